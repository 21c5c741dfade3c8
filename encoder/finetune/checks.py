"""What can be wrong with a task before its rows and its model are read, and what may not change once it has begun."""

from __future__ import annotations

from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from encoder.base.agreement import texts_of_all_ranks
from encoder.base.errors import CheckpointError, UserError
from encoder.base.log import warn_once
from encoder.base.schema import Mistakes, brief, read_mapping
from encoder.data.labelled import DataError, check_file
from encoder.engine.checkpoint.read import newest_checkpoint, read_progress
from encoder.finetune.best import judge_of
from encoder.finetune.config import FineTuneConfig, changed_settings
from encoder.finetune.metrics import check_packages
from encoder.finetune.prepare import Prepared, read_start, start_of
from encoder.runs.folder import CHECKPOINTS, EVENTS, RUN_FILE, read_jsonl
from encoder.runs.foreign_files import check_folder
from encoder.runs.same import ANEW, check_same_weights


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


def say_differences(task: FineTuneConfig) -> None:
    """About a finished run whose settings are others than the task's: they have no effect any more."""
    changed = differences_from(task, Path(task.out))
    if not changed:
        return
    shown = [f"{key} was {brief(old)}, now {brief(new)}" for key, old, new in changed[:5]]
    more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
    warn_once(
        f"{task.out} was trained with other settings: {', '.join(shown)}{more}. What is there stays."
        f" To train with these: out=ANOTHER_FOLDER"
    )


def differences_from(task: FineTuneConfig, folder: Path) -> list[tuple[str, Any, Any]]:
    """(key, there, here) of what decides the curve, in a folder where a run of the task has begun; none elsewhere.

    What the task leaves to its rows and its model, such as names of labels, is no difference. Another start_from is one
    where it holds other weights.
    """
    if not (folder / RUN_FILE).is_file():
        return []
    before = read_mapping(folder / RUN_FILE)
    changed = [
        (key, old, new)
        for key, old, new in changed_settings(before, task)
        if not (new is None and key.startswith(("body", "task.")))
    ]
    there = before.get("start_from")
    newest = newest_checkpoint(folder / CHECKPOINTS)
    if there != task.start_from and newest is not None:
        try:
            check_same_start(task, newest)
        except UserError:
            changed.append(("start_from", there, task.start_from))
    return changed


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
