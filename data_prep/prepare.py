"""`data-prep prepare`: the sources of a settings file, one after the other, from text to shard folders.

A source is made in the hidden folder OUT/.NAME.part and renamed to OUT/NAME when it is whole; the name never
stands for a half-made folder. What a killed run left in the hidden folder is thrown away by the next one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import itertools
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.config import PrepareConfig, Source, recipe_of
from data_prep.meter import Meter
from data_prep.pool import Encoded, EncodeJob, EncoderPool
from data_prep.readers import BLOCK_BYTES, Block, InputFile, ReadError, find_files, parse, read_blocks
from data_prep.shards import ShardFolder
from data_prep.tokenization import check_tokenizer_path, choose_encoder
from encoder.base.errors import ConfigError, ShardError, UserError, nearest
from encoder.base.files import fsync_path
from encoder.base.log import say, warn_once
from encoder.base.schema import differences
from encoder.base.units import short_count
from encoder.data.shard_format import CARD, Card, ids_dtype, read_card, special_ids_of, tokenizer_fingerprint

SPLITS = ("train", "held_out")
CHECK_DOCUMENTS, CHECK_CHARS = 200, 500_000      # real text for the check of the encoder, per source


@dataclass(kw_only=True)
class Counts:
    """What came in and where it went; `check` is the conservation law."""

    documents_read: int = 0                       # with text
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    left_out: Counter[str] = field(default_factory=Counter)
    content_tokens: int = 0                       # as the tokenizer gave them
    pieces: int = 0                               # samples written
    tokens: int = 0                               # written, [CLS] and [SEP] counted

    def check(self) -> None:
        """Everything read was written, and each piece got its [CLS] and [SEP]."""
        assert sum(self.documents.values()) == self.documents_read, "a document was lost between reading and writing"
        assert self.content_tokens + 2 * self.pieces == self.tokens, "a token was lost between encoding and writing"

    def plain(self) -> dict[str, Any]:
        """For the card."""
        return {"documents_read": self.documents_read, **{f"documents_{s}": n for s, n in self.documents.items()},
                "left_out": dict(sorted(self.left_out.items())), "content_tokens": self.content_tokens,
                "pieces": self.pieces, "tokens": self.tokens}


def prepare(config: PrepareConfig, *, only: str | None = None, again: bool = False) -> None:
    """Make every source of the settings (or the one named `only`) that is not finished. Raises UserError."""
    sources = [s for s in config.sources if only in (None, s.name)]
    if not sources:
        names = [s.name for s in config.sources]
        raise ConfigError(f"--source {only} is not in the settings. {nearest(only or '', names)}")
    tokenizer_json = check_tokenizer_path(Path(config.tokenizer))
    vocab_size, specials = special_ids_of(tokenizer_json)
    # all mistakes that can be found before the first hour of work are found before it
    plans = [_plan(config, source, tokenizer_json, vocab_size, specials) for source in sources]
    open_plans = [plan for plan in plans if not _stands(plan) or again or not _finished(plan)]
    out = Path(config.out)
    with _disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    if not open_plans:
        return
    pool = _start_pool(config, open_plans)
    try:
        for plan in open_plans:
            _make(plan, config, pool)
    finally:
        pool.close()


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """One source, looked at but not yet made. `card` is the card it will have, without totals and hashes of content."""

    source: Source
    files: list[InputFile]
    bytes: int
    folder: Path
    tokenizer_json: Path
    card: Card


def _plan(config: PrepareConfig, source: Source, tokenizer_json: Path, vocab_size: int, specials: Any) -> _Plan:
    files = find_files(source, Path(config.root))
    settings = {**recipe_of(source), "max_tokens_per_document": config.max_tokens_per_document,
                "held_out_share": config.held_out_share, "shard_bytes": config.shard_bytes,
                "compression": config.compression}
    recipe = {"prepare": 1, "settings": settings, "files": [file.described() for file in files]}
    card = Card(source=source.name, split="train", tokenizer_sha256=tokenizer_fingerprint(tokenizer_json),
                vocab_size=vocab_size, specials=specials, dtype=ids_dtype(vocab_size).name, documents=0, tokens=0,
                max_tokens_per_document=config.max_tokens_per_document, index_sha256="", lengths_sha256="",
                recipe=recipe)
    return _Plan(source=source, files=files, bytes=sum(file.bytes for file in files),
                 folder=Path(config.out) / source.name, tokenizer_json=tokenizer_json, card=card)


def _stands(plan: _Plan) -> bool:
    """Whether OUT/NAME is a finished source. Raises ShardError when it is something else, which no run may remove."""
    if plan.folder.exists() and not (plan.folder / "train" / CARD).is_file():
        raise ShardError(f"{plan.folder} exists and is no finished source. Remove it, or set another out.")
    return plan.folder.exists()


def _finished(plan: _Plan) -> bool:
    """Whether the source was made from the same. Raises ShardError when it was made from something else."""
    card = read_card(plan.folder / "train")
    old = {"tokenizer": card.tokenizer_sha256[:12], **{k: card.recipe.get(k) for k in plan.card.recipe}}
    new = {"tokenizer": plan.card.tokenizer_sha256[:12], **plan.card.recipe}
    changed = [f"{key} was {_brief(a)}, is {_brief(b)}" for key, a, b in differences(old, new)]
    if changed:
        more = f" and {len(changed) - 2} more" if len(changed) > 2 else ""
        raise ShardError(f"{plan.folder} was made from something else ({'; '.join(changed[:2])}{more}). "
                         "Add --again to make it anew, or set another out.")
    held_out = card.recipe["counts"]["documents_held_out"]
    say(f"{plan.source.name}: finished before, {card.documents:,} samples and {short_count(card.tokens)} tokens in "
        f"train, {held_out:,} documents held out ({plan.folder}). Nothing to do.")
    return True


def _start_pool(config: PrepareConfig, plans: list[_Plan]) -> EncoderPool:
    card = plans[0].card
    encoder = choose_encoder(plans[0].tokenizer_json, [text for plan in plans for text in _real_texts(plan)])
    job = EncodeJob(tokenizer_json=str(plans[0].tokenizer_json), encoder=encoder, cls_id=card.specials.cls_id,
                    sep_id=card.specials.sep_id, dtype=card.dtype, held_out_share=config.held_out_share,
                    max_tokens_per_document=config.max_tokens_per_document, stop_on_error=config.on_error == "stop")
    # more processes than blocks would only cost their start
    return EncoderPool(job, min(config.worker_processes, 1 + sum(plan.bytes for plan in plans) // BLOCK_BYTES))


def _make(plan: _Plan, config: PrepareConfig, pool: EncoderPool) -> None:
    with _disk_errors(plan.folder.parent), _hidden_folder(plan.folder) as part:
        counts = _write_source(plan, config, pool, part)
        _put_in_place(part, plan.folder)
    _report(plan, counts)


def _write_source(plan: _Plan, config: PrepareConfig, pool: EncoderPool, part: Path) -> Counts:
    """All documents of a source into part/train and part/held_out."""
    source, skip = plan.source, config.on_error == "skip"
    counts = Counts()
    splits = {}
    try:
        splits = {split: ShardFolder(part / split, dtype=np.dtype(plan.card.dtype), shard_bytes=config.shard_bytes,
                                     compression=None if config.compression == "none" else config.compression)
                  for split in SPLITS}
        with Meter(source.name, plan.bytes) as meter:
            for encoded in pool.encoded(_blocks(plan, skip, counts)):
                if encoded.problem and not skip:
                    raise ConfigError(encoded.problem)
                _write_block(encoded, splits, counts)
                meter.add(file_bytes=encoded.file_bytes, documents=encoded.documents,
                          tokens=0 if encoded.pieces is None else len(encoded.pieces.ids_T))
            say(f"{source.name}: {meter.counts()}")
        _finish_splits(plan, part, splits, counts)
        return counts
    except BaseException:
        for folder in splits.values():
            folder.abandon()
        raise


def _blocks(plan: _Plan, skip: bool, counts: Counts) -> Iterator[Block]:
    for file in plan.files:
        try:
            yield from read_blocks(plan.source, file)
        except ReadError as error:
            if not skip:
                raise
            warn_once(f"left out: {error}")
            counts.left_out["unreadable file or its end"] += 1


def _write_block(encoded: Encoded, splits: dict[str, ShardFolder], counts: Counts) -> None:
    counts.left_out.update(encoded.left_out)
    counts.documents_read += encoded.documents
    pieces = encoded.pieces
    if pieces is None:
        return
    splits["train"].add(pieces.ids_T, pieces.lengths_P, ~pieces.held_out_P)
    splits["held_out"].add(pieces.ids_T, pieces.lengths_P, pieces.held_out_P)
    counts.documents["held_out"] += pieces.held_out_documents
    counts.documents["train"] += encoded.documents - pieces.held_out_documents
    counts.content_tokens += pieces.content_tokens
    counts.pieces += len(pieces.lengths_P)


def _finish_splits(plan: _Plan, part: Path, splits: dict[str, ShardFolder], counts: Counts) -> None:
    if not counts.documents["train"]:
        raise ConfigError(f"source {plan.source.name} has no document for training ({counts.documents_read:,} read, "
                          f"{sum(counts.left_out.values()):,} left out, {counts.documents['held_out']:,} held out). "
                          "Give it more text or a smaller held_out_share.")
    counts.tokens = sum(folder.tokens for folder in splits.values())
    counts.check()
    recipe = {**plan.card.recipe, "counts": counts.plain()}
    tokenizer_json = plan.tokenizer_json.read_bytes()
    if hashlib.sha256(tokenizer_json).hexdigest() != plan.card.tokenizer_sha256:
        raise ConfigError(f"{plan.tokenizer_json} was changed while the source was being made. Run the command again.")
    for split, folder in splits.items():
        if counts.documents[split]:
            folder.finish(dataclasses.replace(plan.card, split=split, recipe=recipe), tokenizer_json)
        else:
            folder.abandon()
            shutil.rmtree(part / split)


def _report(plan: _Plan, counts: Counts) -> None:
    left_out = sum(counts.left_out.values())
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in sorted(counts.left_out.items()))
    say(f"  documents  {counts.documents_read + left_out:>13,} in = {counts.documents['train']:,} train + "
        f"{counts.documents['held_out']:,} held out + {left_out:,} left out{f' ({reasons})' if reasons else ''}")
    say(f"  tokens     {counts.tokens:>13,} written = {counts.content_tokens:,} of text + 2 x {counts.pieces:,} pieces")
    say(f"  folder     {plan.folder}")
    if not counts.documents["held_out"] and plan.card.recipe["settings"]["held_out_share"]:
        warn_once(f"{plan.source.name} has too few documents for held_out_share: none was held out, "
                  f"and there is no {plan.folder / 'held_out'}.")


def _real_texts(plan: _Plan) -> list[str]:
    """Some short documents of the source, for the check of the encoder. Bad lines are reported later, in place."""
    texts: list[str] = []
    with contextlib.suppress(ReadError):
        for block in itertools.islice(read_blocks(plan.source, plan.files[0]), 1):
            texts = [t for t in parse(block).texts if len(t) < 20_000][:CHECK_DOCUMENTS]
    ends = list(itertools.accumulate(map(len, texts)))
    return texts[:sum(end <= CHECK_CHARS for end in ends)]


@contextlib.contextmanager
def _hidden_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside the final one, locked for this process; removed unless it was renamed."""
    part = folder.with_name(f".{folder.name}.part")
    part.mkdir(exist_ok=True)
    handle = os.open(part, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)   # the lock dies with its process, SIGKILL included
        except BlockingIOError as error:
            raise UserError(f"another data-prep is making {folder} at this moment. "
                            "Wait for it, or set another out.") from error
        for leftover in part.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        try:
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)
    finally:
        os.close(handle)


def _put_in_place(part: Path, folder: Path) -> None:
    """Rename, durably; an older folder of that name (--again) leaves at the last moment."""
    fsync_path(part)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(part, folder)
    fsync_path(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """A full disk and a folder that may not be written, said in one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk of {out} is full. Free space or set another out, and run the same command: "
                            "finished sources are kept.") from error
        raise UserError(f"{error.filename or out}: {error.strerror or error}. "
                        "Check the folder out and its rights.") from error


def _brief(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
