"""Whether a run folder belongs to the run that is to go on in it: by settings and by content, never by how a path is spelt.

    settings           run.yaml of the folder or of its newest checkpoint, but for every path in it
    sources            the SHA-256 of their cards, which hold that of the index, which holds those of the shards
    init_from          the SHA-256 of the weights
    branch_from        the link of the parent's ledger
    objective          the SHA-256 of the weights of its stored models, such as a teacher

So shards and models may be moved, and named by another path; what is no longer needed may be gone: of a finished run all of
them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor

from encoder.base.errors import CheckpointError, ShardError, UserError
from encoder.base.files import sha256_of
from encoder.base.hub import parse_hub_name
from encoder.base.schema import brief, read_mapping
from encoder.base.units import parse_tokens
from encoder.data.cache import fetch_side_files
from encoder.data.shard_format import CARD
from encoder.engine.checkpoint.folder import COMMITTED, committed_folders
from encoder.engine.checkpoint.read import read_progress
from encoder.runs.config import RunConfig, SourceConfig, changed_settings
from encoder.runs.facts import HELD_OUT, DataFacts, named_sources, source_name
from encoder.runs.folder import CHECKPOINTS, LEDGER, RUN_FILE, read_jsonl
from encoder.runs.foreign_files import check_folder
from encoder.runs.initial import weights_sha256
from encoder.runs.objective_models import AskedModel, check_same_models, places_of
from encoder.runs.weights import read_model

ANEW = "or start anew with out=ANOTHER_FOLDER."


def has_begun(folder: Path) -> bool:
    """Whether a run folder holds a run: its settings, and a step or a checkpoint."""
    ledger = folder / LEDGER
    begun = ledger.exists() and ledger.stat().st_size > 0 or (folder / CHECKPOINTS).exists()
    return begun and (folder / RUN_FILE).exists()


def check_same_run(run: RunConfig, folder: Path) -> None:
    """A run folder belongs to one run. Raises CheckpointError naming the first setting that changed, ConfigError for a folder
    that holds what no run wrote."""
    check_folder(folder)
    if has_begun(folder):
        check_same_settings(run, folder / RUN_FILE, of=str(folder))


def check_same_settings(run: RunConfig, path: Path, *, of: str) -> None:
    """The run file at `path` decides the same curve. Raises CheckpointError naming the first setting that changed, of `of`."""
    refuse_changes(changed_settings(read_mapping(path), run), of=of, out=run.out)


def refuse_changes(changed: Sequence[tuple[str, Any, Any]], *, of: str, out: str) -> None:
    """Raises CheckpointError where settings that decide the curve are others than a run folder has.

    changed: (dotted key, before, now) of each
    of: what holds the former ones
    out: the run folder
    """
    if not changed:
        return

    key, old, new = changed[0]
    more = ""
    if len(changed) > 1:
        others = ", ".join(other for other, _, _ in changed[1:3])
        rest = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        more = f" (also {others}{rest})"
    found = f"{of} holds another run: {key} was {brief(old)}, now {brief(new)}{more}."
    # only more training was asked for: the way to that is a branch
    if all(_is_extension(*change) for change in changed):
        raise CheckpointError(
            f"{found} The phases of a run that has begun stay as they are. To train on from it: a"
            f" run file with branch_from: {out}, another name, out and seed, and only the"
            " phases that are to come."
        )
    raise CheckpointError(f"{found} Put it back, {ANEW}")


def _is_extension(key: str, old: Any, new: Any) -> bool:
    """Whether a change asks for more: another phase, more tokens of one."""
    if not key.startswith("phases."):
        return False
    longer = (
        key.endswith(".tokens")
        and isinstance(old, (int, str))
        and parse_tokens(old) < parse_tokens(new)
    )
    return (
        # a phase that was not there, more tokens, or a schedule that was worked out from them
        old is None
        and isinstance(new, dict)
        or longer
        or key.endswith(("warmup_tokens", "decay_tokens", "over_tokens"))
    )


def check_same_data(run: RunConfig, facts: DataFacts, folder: Path) -> None:
    """The sources are those of the newest checkpoint in a run folder, where there is one. Raises ShardError."""
    found = committed_folders(folder / CHECKPOINTS)
    if found:
        _check_cards(run, facts.card_sha256, read_progress(found[-1])[1]["card_sha256"])


def check_same_content(
    run: RunConfig,
    facts: DataFacts,
    checkpoint: Path,
    *,
    asked: Mapping[str, AskedModel],
    first: bool,
) -> None:
    """Sources, stored models and parent are those of a checkpoint, as far as they are still there. Called on every rank.

    run: that goes on
    facts: of its sources
    checkpoint: that it goes on from
    asked: the models that its objective asks
    first: of rank zero, which alone reads initial weights

    Raises ShardError, CheckpointError.
    """
    extra = read_progress(checkpoint)[1]
    _check_cards(run, facts.card_sha256, extra["card_sha256"])
    check_same_models(asked, extra.get("objective_sha256") or {}, run=run)
    _check_origin(run, extra, read_mapping(checkpoint / RUN_FILE), first=first)


def check_finished(run: RunConfig, folder: Path, *, first: bool) -> None:
    """A finished run is of these sources, stored models and parent, as far as they are still there. Called on every rank.

    run: as it was read; its settings were compared
    folder: of the finished run
    first: of rank zero, which alone reads weights

    Raises UserError as the start of an unfinished run.
    """
    found = committed_folders(folder / CHECKPOINTS)
    # they may be removed once the run is exported; its settings were compared
    if not found:
        return
    checkpoint = found[-1]
    extra = read_progress(checkpoint)[1]
    before = read_mapping(checkpoint / RUN_FILE)
    saved = extra["card_sha256"]
    here = _cards_at_hand(run, before, saved)
    run = named_sources(run, name_of=_name_at_hand)
    check_same_settings(run, checkpoint / RUN_FILE, of=str(checkpoint))
    _check_cards(run, here, saved)
    digests = extra.get("objective_sha256") or {}
    for name, place in places_of(run).items():
        if first and digests.get(name):
            check_same_weights(
                Path(place),
                digests[name],
                key=f"objective.{name}",
                before=before["objective"].get(name),
                read=lambda path: read_model(path).weights,
            )
    _check_origin(run, extra, before, first=first)


def _cards_at_hand(run: RunConfig, before: dict[str, Any], saved: dict[str, str]) -> dict[str, str]:
    """Source name -> SHA-256 of its card now; of shards that are gone, what it was. Raises ShardError.

    run: whose sources of training are looked at
    before: the run file of its checkpoint
    saved: the SHA-256 that the checkpoint has
    """
    mixtures = [before["data"]["sources"], *(p.get("sources") or [] for p in before["phases"])]
    known = {_place(s["path"]): s.get("name") for mixture in mixtures for s in mixture}
    here: dict[str, str] = {}
    for source in (*run.data.sources, *(s for p in run.phases for s in p.sources or ())):
        if _place(source.path) in known and not _has_card(source):
            name = source.name or known[_place(source.path)]
            # recorded before names were: which source is gone is not known
            if name is None:
                return saved
            digest = saved.get(name, "")
        else:
            # another place is named: what is not there is no answer
            if source.cache:
                fetch_side_files(source.path, Path(source.cache))
            name = source_name(source)
            digest = sha256_of(source.folder / CARD)
        # of two places of one name the changed one counts
        if here.get(name) in (None, saved.get(name)):
            here[name] = digest
    return here


def _place(path: str) -> str:
    """One spelling of a folder's path; a URL stays as it is."""
    return path.rstrip("/") if "://" in path else os.path.realpath(path)


def _has_card(source: SourceConfig) -> bool:
    return (source.folder / CARD).is_file()


def _name_at_hand(source: SourceConfig) -> str | None:
    """As source_name, for shards that may be gone."""
    return source_name(source) if _has_card(source) else source.name


def _check_origin(
    run: RunConfig, extra: dict[str, Any], before: dict[str, Any], *, first: bool
) -> None:
    """init_from and branch_from are what a run began with, as far as they are still there. Raises CheckpointError.

    run: that goes on, or is done
    extra, before: what its checkpoint has beside the progress, and its run file
    first: of rank zero, which alone reads initial weights
    """
    if first and run.init_from and extra.get("init_sha256"):
        check_same_weights(
            Path(run.init_from),
            extra["init_sha256"],
            key="init_from",
            before=before.get("init_from"),
            read=lambda path: read_model(path).weights,
        )
    if run.branch_from and extra.get("parent"):
        _check_parent(Path(run.branch_from), extra["parent"])


def _check_cards(run: RunConfig, here_sha256: dict[str, str], saved_sha256: dict[str, str]) -> None:
    # what is only looked at may change
    saved = {name: digest for name, digest in saved_sha256.items() if HELD_OUT not in name}
    here = {name: digest for name, digest in here_sha256.items() if HELD_OUT not in name}
    # names in their order: the order of the sources decides which documents come
    if [*saved] != [*here]:
        number, old, new = next(
            (i, a, b) for i, (a, b) in enumerate(zip_longest(saved, here)) if a != b
        )
        raise ShardError(
            f"source {number} of this run was {brief(old)}, the run file has {brief(new)} there. "
            f"Put it back (a source's name is its card's unless it has a name:), {ANEW}"
        )
    for name, digest in saved.items():
        if here[name] != digest:
            folder = next((s.folder for s in run.all_sources() if s.name == name), None)
            place = f" in {folder}" if folder else ""
            raise ShardError(
                f"source {name}{place} has a card of SHA-256 {here[name][:16]}, this run was"
                f" trained on {digest[:16]}: it is not the same text. Put those shards back, {ANEW}"
            )


def check_same_weights(
    path: Path,
    sha256: str,
    *,
    key: str,
    before: str | None,
    read: Callable[[Path], dict[str, Tensor]],
) -> None:
    """The model at `path` is the one that the run began with. One that is gone is not needed any more. Raises UserError.

    path: as the run names it now
    sha256: of the weights that it began with
    key: of the setting that names it
    before: the path that it named then
    read: the weights of a path
    """
    # a name on the hub is no path: the same name as before needs no look
    if not path.exists() and (parse_hub_name(path) is None or str(path) == str(Path(before or ""))):
        return
    same_place = before is not None and os.path.realpath(path) == os.path.realpath(before)
    try:
        found = weights_sha256(read(path))
    except UserError:
        if same_place:
            return
        raise
    # a run folder stands for its newest checkpoint, and that run may have gone on
    if found != sha256 and not (same_place and (path / CHECKPOINTS).is_dir()):
        raise CheckpointError(
            f"{key} {path} holds weights of SHA-256 {found[:16]}, this run began with"
            f" {sha256[:16]}. Name that model, {ANEW}"
        )


def _check_parent(path: Path, parent: dict[str, Any]) -> None:
    """The checkpoint or run folder at `path` is of the run that was branched off. One that is gone is not needed any more."""
    link = parent["ledger_hash"]
    if (path / COMMITTED).is_file():
        same = read_progress(path)[0].ledger_hash == link
    elif (path / LEDGER).is_file():
        same = any(line.get("chain") == link for line in read_jsonl(path / LEDGER))
    else:
        return
    if not same:
        raise CheckpointError(
            f"branch_from {path} is not what this run branched off: run {parent['run']}, step "
            f"{parent['step']:,}, ledger {link}. Name that checkpoint, {ANEW}"
        )
