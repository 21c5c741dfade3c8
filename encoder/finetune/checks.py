"""What can be wrong with a task before its rows and its model are read, and what may not change once it has begun."""

from __future__ import annotations

import os
from collections.abc import Hashable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from encoder.base.agreement import texts_of_all_ranks
from encoder.base.errors import CheckpointError, UserError
from encoder.base.files import sha256_of
from encoder.base.schema import Mistakes, read_mapping, to_plain
from encoder.data.labelled import DataError, check_file
from encoder.engine.checkpoint.folder import committed_folders
from encoder.engine.checkpoint.read import newest_checkpoint, read_progress
from encoder.finetune.best import judge_of
from encoder.finetune.config import FineTuneConfig, changed_settings
from encoder.finetune.metrics import check_packages
from encoder.finetune.prepare import Prepared, prepare_training, read_start, start_of
from encoder.runs.folder import CHECKPOINTS, EVENTS, RUN_FILE, read_jsonl
from encoder.runs.foreign_files import check_folder
from encoder.runs.same import ANEW, check_same_weights, refuse_changes


def check_task(task: FineTuneConfig) -> None:
    """Raises UserError with all that is wrong: settings, the run folder, files and a start that are not there."""
    found: list[str] = [*task.faults.mistakes()]
    for look in (
        task.tracking.check_packages,
        lambda: check_packages(task.task.PACKAGES),
        task.task.metric_names,
        lambda: judge_of(task),
        lambda: check_folder(Path(task.out)),
        *(partial(check_file, path) for path in task.data.files),
        *([task.data.hub.check] if task.data.hub else []),
    ):
        found += _mistakes(look)
    # reading a model takes seconds: done here only where a start is wanted that fails, or all fails anyway
    if found:
        found += _mistakes(lambda: read_start(task))
    if len(found) > 1:
        raise Mistakes(found)
    if found:
        raise UserError(found[0])


def _mistakes(look: Any) -> list[str]:
    try:
        look()
    except UserError as error:
        return [str(error)]
    return []


def check_same_rows(prepared: Prepared) -> None:
    """All ranks have read the same rows; with ranks joined. Raises DataError on all of them."""
    sets = [asked.examples for asked in prepared.sets]
    whole = sha256(" ".join(examples.sha256 for examples in sets).encode()).hexdigest()
    # hashes, then words: a path may be another on each machine
    lines = [
        f"{examples.sha256[:16]} {examples.name}: {len(examples):,} examples"
        f" of {prepared.rows_of.get(examples.name, '')}"
        for examples in sets
    ]
    # the first line stands for all sets, also where the table has no room for some
    text = "\n".join([f"{whole[:16]} other sets", *lines])
    texts = [said.split("\n") for said in texts_of_all_ranks(text)]
    other = next((rank for rank, said in enumerate(texts) if said[0] != texts[0][0]), None)
    if other is None:
        return
    pairs = zip(texts[0], texts[other], strict=False)
    differing = [pair for pair in pairs if pair[0][:16] != pair[1][:16]]
    # behind the first lines, those of the first set that differs
    one, two = differing[min(1, len(differing) - 1)]
    raise DataError(
        f"ranks have read different rows: rank 0 {_words_and_hash(one)}, rank {other}"
        f" {_words_and_hash(two)}. Give all machines the same files, or the same commit as"
        " data.hub.revision."
    )


def _words_and_hash(line: str) -> str:
    digest, _, words = line.partition(" ")
    return f"{words} (SHA-256 {digest})"


def check_same_settings(task: FineTuneConfig, path: Path, *, of: Path) -> None:
    """What decides the curve is as in the run file of a run folder or a checkpoint. Raises UserError.

    task: that goes on, with what its rows and its model say
    path, of: the run file, and what it lies in
    """
    refuse_changes(changed_settings(read_mapping(path), task), of=str(of), out=task.out)


def check_finished(task: FineTuneConfig) -> None:
    """A finished run is of this task: by settings, and by start and training rows as far as they are still there.

    Raises UserError as the start of an unfinished run.
    """
    folder = Path(task.out)
    # settings first: they need no rows
    changed = _changed(read_mapping(folder / RUN_FILE), task)
    refuse_changes(changed, of=str(folder), out=task.out)
    # its weights are not asked, and not read
    for checkpoint in committed_folders(folder / CHECKPOINTS)[-1:]:
        check_same_start(task, checkpoint)
    check_finished_rows(task, known={})


def check_finished_rows(task: FineTuneConfig, *, known: dict[Hashable, str]) -> None:
    """A finished run was trained on the task's rows, where they are still there or others are named. Raises UserError.

    task: as it was read
    known: SHA-256 of rows that were encoded for other runs; takes these
    """
    folder = Path(task.out)
    committed = committed_folders(folder / CHECKPOINTS)
    before = read_mapping(folder / RUN_FILE)
    if not committed or not _rows_are_asked(task, before.get("data") or {}):
        return
    start = read_start(task)
    of = (repr((task.task, task.data)), sha256_of(start.tokenizer_json), repr(start.head))
    rows_of = task.data.train
    if of not in known:
        rows = prepare_training(task, start)
        check_same_settings(rows.task, folder / RUN_FILE, of=folder)
        known[of], rows_of = rows.train.sha256, rows.rows_of["train"]
    check_same_examples(known[of], committed[-1], rows_of=rows_of)


def _rows_are_asked(task: FineTuneConfig, before: dict[str, Any]) -> bool:
    """Whether a finished run's training rows are there, or others are named.

    task: that names them now
    before: the data section that it was trained with
    """
    data = task.data
    if data.hub is not None and data.is_split(data.train):
        # a name on the hub is no path: the same name as before needs no look
        named = (to_plain(data.hub), data.train)
        return data.hub.is_here or named != (before.get("hub"), before.get("train"))
    there = os.path.realpath(str(before.get("train")))
    return Path(data.train).exists() or os.path.realpath(data.train) != there


def check_same_examples(sha256: str, checkpoint: Path, *, rows_of: str) -> None:
    """The training examples are those of the run of a checkpoint. Raises CheckpointError.

    sha256: of the examples now
    checkpoint: of the run
    rows_of: file or split that they were read of
    """
    saved = read_progress(checkpoint)[1]
    trained_on = saved.get("examples_sha256")
    if trained_on == sha256:
        return
    before = (saved.get("rows_of") or {}).get("train", rows_of)
    elsewhere = "" if before == rows_of else f", of {before}"
    raise CheckpointError(
        f"data.train {rows_of} gives examples of SHA-256 {sha256[:16]}, this run was trained on"
        f" {str(trained_on)[:16]}{elsewhere}. Put those rows back, {ANEW}"
    )


def differences_from(task: FineTuneConfig, folder: Path) -> list[tuple[str, Any, Any]]:
    """(key, there, here) of what decides the curve, in a folder where a run of the task has begun; none elsewhere.

    What the task leaves to its rows and its model, such as names of labels, is no difference. Another start_from is one
    where it holds other weights.
    """
    if not (folder / RUN_FILE).is_file():
        return []
    before = read_mapping(folder / RUN_FILE)
    changed = _changed(before, task)
    there = before.get("start_from")
    newest = newest_checkpoint(folder / CHECKPOINTS)
    if there != task.start_from and newest is not None:
        try:
            check_same_start(task, newest)
        except UserError:
            changed.append(("start_from", there, task.start_from))
    return changed


def _changed(before: dict[str, Any], task: FineTuneConfig) -> list[tuple[str, Any, Any]]:
    """As changed_settings, without what the task leaves to its rows and its model."""
    return [
        (key, old, new)
        for key, old, new in changed_settings(before, task)
        if not (new is None and key.startswith(("body", "task.")))
    ]


def check_same_start(task: FineTuneConfig, checkpoint: Path) -> None:
    """start_from holds the weights that the run of a checkpoint began with, or is gone. Raises UserError."""
    sha256 = read_progress(checkpoint)[1].get("init_sha256")
    if sha256:
        check_same_weights(
            Path(task.start_from),
            sha256,
            key="start_from",
            before=read_mapping(checkpoint / RUN_FILE).get("start_from"),
            read=lambda path: start_of(path).model.weights,
        )


def check_first_start(task: FineTuneConfig, sha256: str) -> None:
    """A run that has made steps, and saved none, begins again with the same weights. Raises CheckpointError.

    task: that begins
    sha256: of its start's weights
    """
    events = read_jsonl(Path(task.out) / EVENTS)
    begun = [event.get("init_sha256") for event in events if event.get("event") == "start"]
    if begun and begun[0] and begun[0] != sha256:
        raise CheckpointError(
            f"start_from {task.start_from} holds weights of SHA-256 {sha256[:16]}, this run began"
            f" with {str(begun[0])[:16]}. Name that model, {ANEW}"
        )
