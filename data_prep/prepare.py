"""`data-prep prepare` and `merge`: the sources of a settings file, one after the other, from text to shard folders.

A source is cut into segments (segments.py), each made by one process (worker.py) and kept in the ledger of the source
(ledger.py) when it is whole; when all are there they become OUT/NAME (merge.py), a name that never stands for a half.
The work can be spread over a job array: `--part I/N` makes the segments of one part, `merge` puts them together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.config import PrepareConfig, Source, recipe_of, word_of
from data_prep.ledger import SHOWN_FILES, Counts, Ledger, changes, identity, open_ledger, tidy
from data_prep.merge import assemble
from data_prep.meter import Meter
from data_prep.readers import check_kind, find_files, pinned
from data_prep.readers.blocks import MOST_DOCUMENT_BYTES
from data_prep.segments import Part, Segment, segments_of
from data_prep.sentences import splitter_name
from data_prep.tokenization import EncoderName, check_tokenizer_path, choose_encoder
from data_prep.worker import Done, EncodeJob, SegmentJob, SegmentPool
from encoder.base.errors import ConfigError, ShardError, UserError, nearest
from encoder.base.files import is_hidden
from encoder.base.log import say, warn_once
from encoder.base.tokenizer_json import special_ids_of
from encoder.base.units import short_count
from encoder.data.shard_format import (
    CARD,
    Card,
    ids_dtype,
    read_card,
    tokenizer_fingerprint,
    width_of,
)


def prepare(
    config: PrepareConfig, *, only: str | None = None, part: Part | None = None, again: bool = False
) -> None:
    """Make every source of the settings (or the one named `only`) that is not finished, or only the segments of a part.

    Raises UserError."""
    if part and again:
        raise ConfigError(
            "--again with --part would throw away what other parts made. Remove the finished folder"
            " and its hidden one beside it, or set another out."
        )
    plans = _plans(config, only)
    # `_finished` is asked last: it says its line, or raises for a source made from something else
    open_plans = [plan for plan in plans if not _stands(plan) or again or not _finished(plan)]
    if not open_plans:
        return

    # one pool for all sources, so that each process loads the tokenizer once
    pool = _start_pool(config, open_plans, part or Part())
    try:
        encoder = choose_encoder(
            open_plans[0].tokenizer_json, lambda: _real_texts(open_plans, pool)
        )
        for plan in open_plans:
            with _disk_errors(Path(config.out)), open_ledger(plan.folder, part or Part()) as ledger:
                try:
                    _make_segments(
                        plan,
                        ledger,
                        part or Part(),
                        pool,
                        encoder,
                        processes=config.worker_processes,
                        again=again,
                    )
                except BaseException:
                    pool.close()  # before anything of theirs is cleaned up
                    # a disk that is full hides no error
                    with contextlib.suppress(OSError):
                        ledger.clear(part or Part())
                    raise
                # a part makes segments alone; `merge` puts them together
                if not part:
                    _assemble(plan, ledger)
    finally:
        pool.close()


def merge(config: PrepareConfig, *, only: str | None = None) -> None:
    """Put the parts of every source together. Raises UserError, naming what is missing."""
    for plan in _plans(config, only):
        if not (_stands(plan) and _finished(plan)):
            with _disk_errors(Path(config.out)), open_ledger(plan.folder, Part()) as ledger:
                ledger.begin(identity(plan.card), alone=True)
                _assemble(plan, ledger)


def all_made(config: PrepareConfig) -> bool:
    """Whether every source is finished and merged; says which are. Raises UserError."""
    # a list, not a generator: every source is looked at, and says its line
    return all([_stands(plan) and _finished(plan) for plan in _plans(config, None)])


def missing_parts(config: PrepareConfig, *, count: int) -> list[int]:
    """Which of `count` parts have a segment, of any source, that is not finished. Raises UserError."""
    missing: set[int] = set()
    for plan in _plans(config, None):
        ledger = Ledger(plan.folder)
        # a source that is finished, or assembled but for its last rename, needs no part any more
        if not _stands(plan) and not ledger.assembled:
            ledger.check_made_from(identity(plan.card))
            # those that are cut in another way are made anew
            others = {s.number for s in ledger.cut_otherwise(plan.segments)}
            finished = ledger.finished() - others
            for index in range(1, count + 1):
                segments = Part(index=index, count=count).of(plan.segments)
                if any(s.number not in finished for s in segments):
                    missing.add(index)
    return sorted(missing)


def _plans(config: PrepareConfig, only: str | None) -> list[_Plan]:
    """All mistakes that can be found before the first hour of work are found here."""
    sources = [s for s in config.sources if only in (None, s.name)]
    if not sources:
        names = [s.name for s in config.sources]
        raise ConfigError(f"--source {only} is not in the settings. {nearest(only or '', names)}")
    tokenizer_json = check_tokenizer_path(Path(config.tokenizer))
    vocab_size, specials = special_ids_of(tokenizer_json)
    plans = [_plan(config, source, tokenizer_json, vocab_size, specials) for source in sources]
    # made here, so that a place that cannot be written to is found before any work
    with _disk_errors(Path(config.out)):
        Path(config.out).mkdir(parents=True, exist_ok=True)
    return plans


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """One source, looked at but not yet made. `card` is the card it will have, without totals and hashes of content."""

    source: Source
    segments: list[Segment]
    folder: Path
    tokenizer_json: Path
    card: Card
    max_document_bytes: int

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(segment.bytes for segment in self.segments)

    @property
    def made_from_sha256(self) -> str:
        """Names the tokenizer, the settings and the files that every segment must be made from."""
        return hashlib.sha256(
            json.dumps(identity(self.card), sort_keys=True).encode("utf-8")
        ).hexdigest()


def _plan(
    config: PrepareConfig, source: Source, tokenizer_json: Path, vocab_size: int, specials: Any
) -> _Plan:
    files = find_files(source, Path(config.root))
    # a source of the hub is held to the commit that its files were found at
    source, described = pinned(source, files), [file.described() for file in files]
    files = [
        dataclasses.replace(file, fingerprint=of.get("fingerprint"))
        for file, of in zip(files, described, strict=True)
    ]

    # settings that decide the content of shards; part of what `identity` compares
    settings = {
        **recipe_of(source),
        "max_tokens_per_document": config.max_tokens_per_document,
        "held_out_share": config.held_out_share,
        "shard_bytes": config.shard_bytes,
        "compression": config.compression,
    }
    # under on_error: stop no document is ever left out for its size, and the default says nothing
    if config.on_error == "skip" and config.max_document_bytes != MOST_DOCUMENT_BYTES:
        settings["max_document_bytes"] = config.max_document_bytes
    splitter = splitter_name(config.sentence_language) if config.sentences else ""
    if splitter:
        # the key is there only where it says something: other cards stay the same bytes
        settings["sentences"] = splitter

    # under on_error: skip a file of another kind is counted as bad when it is read
    if config.on_error == "stop":
        for file in files:
            check_kind(source, file)
    recipe = {"prepare": 2, "settings": settings, "files": described}
    card = Card(
        source=source.name,
        split="train",
        tokenizer_sha256=tokenizer_fingerprint(tokenizer_json),
        vocab_size=vocab_size,
        specials=specials,
        dtype=width_of(ids_dtype(vocab_size)),
        documents=0,
        tokens=0,
        max_tokens_per_document=config.max_tokens_per_document,
        index_sha256="",
        lengths_sha256="",
        sentence_splitter=splitter,
        recipe=recipe,
    )
    return _Plan(
        source=source,
        segments=segments_of(source, files, shard_bytes=config.shard_bytes),
        folder=Path(config.out) / source.name,
        tokenizer_json=tokenizer_json,
        card=card,
        max_document_bytes=config.max_document_bytes,
    )


def _stands(plan: _Plan) -> bool:
    """Whether OUT/NAME is a finished source. Raises ShardError when it is something else, which no run may remove."""
    if plan.folder.exists() and not (plan.folder / "train" / CARD).is_file():
        raise ShardError(
            f"{plan.folder} exists and is no finished source. Remove it, or set another out."
        )
    return plan.folder.exists()


def _finished(plan: _Plan) -> bool:
    """Whether the source was made from the same. Raises ShardError when it was made from something else."""
    card = read_card(plan.folder / "train")
    if changed := changes(identity(card), identity(plan.card)):
        raise ShardError(
            f"{plan.folder} was made from something else ({changed}). "
            "Add --again to make it anew, or set another out."
        )
    counts = card.recipe["counts"]
    held_out, left_out = counts["documents_held_out"], sum(counts["left_out"].values())
    bad = f", {len(counts['bad_files'])} bad files" if counts.get("bad_files") else ""
    say(
        f"{plan.source.name}: finished before, {card.documents:,} samples and"
        f" {short_count(card.tokens)} tokens in train, {held_out:,} documents held out,"
        f" {left_out:,} left out{bad} ({plan.folder}). Nothing to do."
    )
    # a run that was killed behind its last rename left its lock or its old folder beside the source
    tidy(plan.folder)
    return True


def _start_pool(config: PrepareConfig, plans: list[_Plan], part: Part) -> SegmentPool:
    card = plans[0].card
    job = EncodeJob(
        tokenizer_json=str(plans[0].tokenizer_json),
        specials=card.specials,
        dtype=card.dtype,
        held_out_share=config.held_out_share,
        max_tokens_per_document=config.max_tokens_per_document,
        shard_bytes=config.shard_bytes,
        compression=None if config.compression == "none" else config.compression,
        stop_on_error=config.on_error == "stop",
        max_document_bytes=config.max_document_bytes,
        sentence_language=config.sentence_language if config.sentences else None,
    )
    # more processes than segments would only cost their start
    return SegmentPool(
        job,
        max(1, min(config.worker_processes, max(len(part.of(plan.segments)) for plan in plans))),
    )


def _make_segments(
    plan: _Plan,
    ledger: Ledger,
    part: Part,
    pool: SegmentPool,
    encoder: EncoderName,
    *,
    processes: int,
    again: bool,
) -> None:
    """The segments of a part that are not finished.

    plan: of the source
    ledger: of its segments
    part: of them, that this command makes
    pool: makes them
    encoder: that proved right
    processes: as many as may work at a time
    again: whether what was finished is made anew
    """
    name, label = plan.source.name, "" if part.count == 1 else f" part {part.label}"
    ledger.begin(identity(plan.card), alone=part.count == 1, again=again)
    # all but the last rename is done: no segment is left to make
    if ledger.assembled:
        return
    ledger.clear(part)
    segments = part.of(plan.segments)
    if others := ledger.cut_otherwise(segments):
        ledger.drop(others, part)
        say(
            f"{name}{label}: {len(others):,} of {len(segments):,} segments were cut from the files"
            " in another way, by another version of data-prep, and are made anew."
        )
    finished = ledger.finished()
    left = [s for s in segments if s.number not in finished]
    if len(left) < len(segments):
        say(
            f"{name}{label}: {len(segments) - len(left):,} of {len(segments):,} segments were"
            " finished before."
        )
    if not segments:
        say(
            f"{name}{label}: none of the source's {len(plan.segments):,} segments begins in this"
            " part. Nothing to do."
        )
    if not left:
        return
    with Meter(f"{name}{label}", sum(s.bytes for s in left)) as meter:

        def tell(done: Done) -> None:
            meter.add(file_bytes=done.file_bytes, documents=done.documents, tokens=done.tokens)

        pool.make(
            [
                SegmentJob(
                    source=plan.source,
                    encoder=encoder,
                    segment=s,
                    part=part,
                    folder=str(plan.folder),
                    made_from_sha256=plan.made_from_sha256,
                    read_ahead=len(left) < processes,
                )
                for s in left
            ],
            tell,
        )
    say(f"{name}{label}: {meter.counts()}")


def _assemble(plan: _Plan, ledger: Ledger) -> None:
    # the copy beside the shards must be the file that their ids were encoded with
    tokenizer_json = plan.tokenizer_json.read_bytes()
    if hashlib.sha256(tokenizer_json).hexdigest() != plan.card.tokenizer_sha256:
        raise ConfigError(
            f"{plan.tokenizer_json} was changed while the source was being made. Run the command"
            " again."
        )
    counts = assemble(
        ledger,
        plan.segments,
        plan.card,
        made_from_sha256=plan.made_from_sha256,
        tokenizer_json=tokenizer_json,
    )
    _report(plan, counts)


def _report(plan: _Plan, counts: Counts) -> None:
    # the conservation law, for people: what came in is in train, held out or left out
    left_out = sum(counts.left_out.values())
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in sorted(counts.left_out.items()))
    why = f" ({reasons})" if reasons else ""
    say(
        f"  documents  {counts.documents_read + left_out:>13,} in = {counts.documents_train:,}"
        f" train + {counts.documents_held_out:,} held out + {left_out:,} left out{why}"
    )
    say(
        f"  tokens     {counts.tokens:>13,} written = {counts.content_tokens:,} of text + 2 x"
        f" {counts.pieces:,} pieces"
    )

    # at most SHOWN_FILES are remembered, so a full list says `or more`
    if counts.bad_files:
        more = " or more" if len(counts.bad_files) == SHOWN_FILES else ""
        files = set(itertools.chain.from_iterable(map(_names_of_files, plan.segments)))
        say(
            f"  bad files  {len(counts.bad_files):>13,}{more} of {len(files):,}: "
            + "; ".join(
                f"{name} ({why.rstrip('.')})"
                for name, why in itertools.islice(counts.bad_files.items(), 3)
            )
        )
    say(f"  folder     {plan.folder}")
    if counts.bad_files:
        warn_once(
            f"{plan.source.name}: {len(counts.bad_files)} of its files could not be read as"
            f" {word_of(plan.source)}, first {next(iter(counts.bad_files))}. Not all that they"
            " hold is in the shards; mend them and prepare with --again."
        )

    # all documents fell on the side of training, as happens with a few dozen
    if not counts.documents_held_out and plan.card.recipe["settings"]["held_out_share"]:
        warn_once(
            f"{plan.source.name} has too few documents for held_out_share: none was held out, "
            f"and there is no {plan.folder / 'held_out'}."
        )


def _real_texts(plans: list[_Plan], pool: SegmentPool) -> list[str]:
    """Some short documents of every source, for the check of the encoder. Raises UserError for a column that is not there."""
    texts: list[str] = []
    for plan in plans:
        texts += pool.sample(plan.source, plan.segments[0].stretches[0].file)
    return texts


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """A full disk and a folder that may not be written, said in one line."""
    try:
        yield
    except OSError as error:
        # EDQUOT is a user's or a group's quota, used up
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk of {out} is full. Free space or set another out, and run the same"
                " command: what is finished is kept."
            ) from error
        raise UserError(
            f"{_place_of(error, out)}: {error.strerror or error}. Needed: a folder that may be"
            " written to. Change its rights, or set another out."
        ) from error


def _place_of(error: OSError, out: Path) -> Path:
    """Where it happened; `out` for what is hidden in it, whose name means nothing to a person."""
    if not error.filename:
        return out
    place = Path(os.fsdecode(error.filename))
    if place.is_relative_to(out) and is_hidden(place, below=out):
        return out
    return place


def _names_of_files(segment: Segment) -> set[str]:
    return {stretch.file.name for stretch in segment.stretches}
