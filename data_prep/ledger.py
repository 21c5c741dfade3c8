"""A source in the making: OUT/.NAME.part, in which a segment stands when it is whole and durable.

    OUT/.NAME.lock, .NAME.2-of-4.lock          held while a process works on the source, or on that part of it
    OUT/.NAME.part/
        segments/recipe.json                   what the segments are made from
        segments/000007/                       finished: segment.json, train.00000.mds, train.lengths, held_out...;
                                               where asked for train.sentence_counts, train.sentences
        segments/.2-of-4.000008.1f0c/          in the making; thrown away by the next run of that part
        train/, held_out/                      what OUT/NAME will hold; merge moves the shards here, the card last

Every step is a rename of something whole, so a kill between any two leaves a state that the next run goes on from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.segments import Part, Segment
from encoder.base.errors import ShardError, UserError
from encoder.base.files import fsync_path, is_leftover, write_json
from encoder.base.locks import Busy, Kind, NoLocks, take_lock
from encoder.base.log import warn_once
from encoder.base.schema import brief, differences
from encoder.base.untrusted import INDEX_BYTES, plain_name, read_json
from encoder.data.shard_format import CARD, Card, read_card, stored_info

SPLITS = ("train", "held_out")
# of a finished segment, for each split: tokens of each sample; where sentences are asked for, how many each has, and
# the tokens of each
SIDE_FILES = ("lengths", "sentence_counts", "sentences")
COUNT_DTYPE = np.dtype("<u4")  # of sentence_counts
SEGMENT = "segment.json"
RECIPE = "recipe.json"
SHOWN_FILES, SHOWN_CHARS = 50, 300  # of bad files
_SEGMENT_NAME = re.compile("[0-9]{6,12}")


@dataclass(kw_only=True)
class Counts:
    """What came in and where it went; `check` is the conservation law."""

    documents_read: int = 0  # with text
    documents_train: int = 0
    documents_held_out: int = 0
    left_out: dict[str, int] = field(default_factory=dict)  # by reason
    content_tokens: int = 0  # as the tokenizer gave them
    pieces: int = 0  # samples written
    tokens: int = 0  # written, [CLS] and [SEP] counted
    # files cut short or of another kind, and why; the first 50
    bad_files: dict[str, str] = field(default_factory=dict)

    def add_bad_file(self, name: str, why: str) -> None:
        """Remember a file that could not be read as what it is meant to be."""
        if len(self.bad_files) < SHOWN_FILES:
            self.bad_files.setdefault(name, " ".join(why.split())[:SHOWN_CHARS])

    def plain(self) -> dict[str, Any]:
        """For segment.json and the card; without bad files, as it was before they were counted."""
        plain = dataclasses.asdict(self)
        if not self.bad_files:
            del plain["bad_files"]
        return plain

    def check(self) -> None:
        """Everything read was written, and each piece got its [CLS] and [SEP]."""
        assert self.documents_train + self.documents_held_out == self.documents_read, (
            "a document was lost between reading and writing"
        )
        assert self.content_tokens + 2 * self.pieces == self.tokens, (
            "a token was lost between encoding and writing"
        )

    def leave_out(self, reasons: dict[str, int]) -> None:
        """Count documents that were left out."""
        # sorted, so that the card's bytes do not depend on which reason was met first
        self.left_out = dict(sorted((Counter(self.left_out) + Counter(reasons)).items()))

    def add(self, other: Counts) -> None:
        """The counts of both."""
        self.leave_out(other.left_out)
        for name, why in other.bad_files.items():
            self.add_bad_file(name, why)
        for name in (
            "documents_read",
            "documents_train",
            "documents_held_out",
            "content_tokens",
            "pieces",
            "tokens",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True, kw_only=True)
class Record:
    """segment.json: what a finished segment was made from, and what it holds."""

    made_from_sha256: str  # of `identity` of the card to come
    stretches: list[Any]  # [file, first byte, last byte] of each
    counts: Counts
    tokens: dict[str, int]  # by split
    # by split: entries of index.json, with the segment's own file names
    shards: dict[str, list[dict[str, Any]]]

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The shard entries of all splits. Raises KeyError where one is missing."""
        found: list[dict[str, Any]] = []
        for split in SPLITS:
            found += self.shards[split]
        return found


class Ledger:
    """The folder OUT/.NAME.part of one source, opened under its lock by `open_ledger`."""

    def __init__(self, folder: Path) -> None:
        self.out = folder  # where the source will stand
        self.part = folder.with_name(f".{folder.name}.part")
        self.segments = self.part / "segments"

    def begin(self, made_from: dict[str, Any], *, alone: bool, again: bool = False) -> None:
        """Go on with what is there if it was made from the same, else begin with nothing. Raises ShardError if it was made
        from something else, unless `again`: then it is thrown away. Only who is `alone` throws anything away.
        """
        if alone:
            # what a killed run had renamed away, but not yet removed
            _remove(self._trash)
        found = self._made_from()
        changed = changes(found, made_from) if found else ""
        # other parts may be at work on these segments, so only the whole may throw them away
        if changed and not (again and alone):
            raise self._made_otherwise(changed)
        if changed or not found:
            if alone:
                self.discard()
            self.segments.mkdir(parents=True, exist_ok=True)
            write_json(self.segments / RECIPE, made_from)

    def check_made_from(self, made_from: dict[str, Any]) -> None:
        """What is there, if anything, was made from the same. Raises ShardError."""
        found = self._made_from()
        if changed := changes(found, made_from) if found else "":
            raise self._made_otherwise(changed)

    def _made_otherwise(self, changed: str) -> ShardError:
        return ShardError(
            f"{self.part} holds segments made from something else ({changed}). "
            "Prepare the whole with --again to make them anew, or set another out."
        )

    @property
    def assembled(self) -> bool:
        """Whether merge has finished all but the last rename."""
        return (self.part / "train" / CARD).is_file()

    def _made_from(self) -> dict[str, Any] | None:
        # put_in_place removes the segments' recipe before the last rename; the card has the same
        if self.assembled:
            return identity(read_card(self.part / "train"))
        with contextlib.suppress(ShardError):
            return read_json(self.segments / RECIPE, root=dict, error=ShardError)
        return None

    def finished(self) -> set[int]:
        """The numbers of the finished segments."""
        with contextlib.suppress(FileNotFoundError):
            return {
                int(name) for name in os.listdir(self.segments) if _SEGMENT_NAME.fullmatch(name)
            }
        return set()

    def cut_otherwise(self, segments: Sequence[Segment]) -> list[Segment]:
        """The finished ones that were made from other stretches of the files, as another version cuts them."""
        finished = self.finished()
        return [s for s in segments if s.number in finished and not self._is_cut_so(s)]

    def _is_cut_so(self, segment: Segment) -> bool:
        # what cannot be read is reported by `record`
        with contextlib.suppress(ShardError):
            path = self.folder_of(segment) / SEGMENT
            content = read_json(path, root=dict, error=ShardError, most_bytes=INDEX_BYTES)
            return content.get("stretches") == [s.described() for s in segment.stretches]
        return True

    def drop(self, segments: Sequence[Segment], part: Part) -> None:
        """Finished segments are to be made anew. Raises ShardError where a merge has begun to move their shards."""
        if segments and any((self.part / split).exists() for split in SPLITS):
            raise ShardError(
                f"{self.part} was being merged by another version of data-prep, which cut the files"
                " in another way. Remove it, and run prepare again."
            )
        for segment in segments:
            # renamed first: under its number stands a whole one, or none
            beside = self._beside(segment, part)
            with contextlib.suppress(FileNotFoundError):
                os.rename(self.folder_of(segment), beside)
            _remove(beside)

    def record(self, segment: Segment) -> Record:
        """What a finished segment holds. Raises ShardError if it is damaged or was cut from other files."""
        path = self.folder_of(segment) / SEGMENT
        try:
            content = read_json(path, root=dict, error=ShardError, most_bytes=INDEX_BYTES)
            record = Record(**{**content, "counts": Counts(**content["counts"])})
            # names and sizes in it decide what is moved: a name may not lead out of the folder
            for info in map(stored_info, record.entries):
                plain_name(info["basename"], where=path, error=ShardError, folders=False)
                if type(info["bytes"]) is not int:
                    raise TypeError("bytes is no whole number")
        except ShardError as error:
            raise ShardError(f"{error} Remove {path.parent}, and run prepare again.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ShardError(
                f"{path} cannot be read: {error}. Remove {path.parent}, and run prepare again."
            ) from error
        if record.stretches != [s.described() for s in segment.stretches]:
            raise ShardError(
                f"{path.parent} was made from another stretch of the files. Run prepare again,"
                " which makes it anew."
            )
        return record

    def folder_of(self, segment: Segment) -> Path:
        """Where a finished segment stands."""
        return self.segments / f"{segment.number:06}"

    @contextlib.contextmanager
    def making(self, segment: Segment, part: Part) -> Iterator[Path]:
        """An empty folder for a segment; when the block ends well, it is the finished segment."""
        beside = self._beside(segment, part)
        beside.mkdir()
        try:
            yield beside
            # durable from the inside out: the content, the name, the folder of names
            fsync_path(beside)
            # another part of another count may have made it too, with the same bytes
            with contextlib.suppress(FileExistsError):
                _rename_new(beside, self.folder_of(segment))
            fsync_path(self.segments)
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def _beside(self, segment: Segment, part: Part) -> Path:
        # a name of its own: a process orphaned by a kill of its parent may still write to an older one
        return self.segments / f".{part.label}.{segment.number:06}.{secrets.token_hex(4)}"

    def clear(self, part: Part) -> None:
        """Throw away what killed runs of this part (of every part, for the whole) left half-made: folders of segments, and
        the files of a killed write_atomic."""
        for name in os.listdir(self.segments):
            # the whole (1-of-1) clears for all parts
            if name.startswith("." if part.count == 1 else f".{part.label}."):
                _remove(self.segments / name)

    def put_in_place(self) -> None:
        """OUT/.NAME.part, complete but for its segments folder, becomes OUT/NAME; an older one leaves at the last moment."""
        # from here on the card alone says what the source was made from
        _remove(self.segments)
        for split in SPLITS:
            hidden = list((self.part / split).glob(".*"))
            for path in [path for path in hidden if is_leftover(path.name)]:
                _remove(path)
        fsync_path(self.part)

        # a kill between the two renames leaves the new one whole as .part: the next run finds it
        # assembled, and goes on here
        if self.out.exists():
            _remove(self._trash)
            os.rename(self.out, self._trash)
        os.rename(self.part, self.out)
        fsync_path(self.out.parent)
        _remove(self._trash)

    def discard(self) -> None:
        """Nothing is left of the folder; renamed first, so that no kill leaves a half of it under its name."""
        _remove(self._trash)
        if self.part.exists():
            os.rename(self.part, self._trash)
            _remove(self._trash)

    @property
    def _trash(self) -> Path:
        return self.out.with_name(f".{self.out.name}.old")


@contextlib.contextmanager
def open_ledger(folder: Path, part: Part) -> Iterator[Ledger]:
    """The ledger of OUT/NAME, locked: parts beside each other, the whole (and merge) alone. A ledger without a finished
    segment is gone afterwards. Raises UserError when another process works on the same."""
    whole, ledger = part.count == 1, Ledger(folder)
    busy = f"another data-prep is making {folder} at this moment. Wait for it, or set another out."
    with contextlib.ExitStack() as locks:
        # parts beside each other share this lock; the whole and merge hold it alone
        locks.enter_context(
            _locked(folder.with_name(f".{folder.name}.lock"), "alone" if whole else "shared", busy)
        )

        # alone, so no part is at work: their lock files were left by killed ones
        for name in os.listdir(folder.parent) if whole else ():
            # those of a source NAME.x do not match
            if re.fullmatch(rf"\.{re.escape(folder.name)}\.\d+-of-\d+\.lock", name):
                (folder.parent / name).unlink(missing_ok=True)

        # the same part may not be made twice at a time
        if not whole:
            name = f".{folder.name}.{part.label}.lock"
            locks.enter_context(
                _locked(
                    folder.with_name(name),
                    "alone",
                    busy.replace("making", f"making part {part.label} of"),
                )
            )
        try:
            yield ledger
        finally:
            # nothing was finished or assembled: an empty folder does not stay
            if (
                whole
                and ledger.part.exists()
                and not ledger.finished()
                and not any((ledger.part / split).exists() for split in SPLITS)
            ):
                ledger.discard()


def tidy(folder: Path) -> None:
    """Remove what a run that was killed after its last rename left beside a finished source."""
    if any(folder.parent.glob(f".{folder.name}.*")):
        with contextlib.suppress(UserError), open_ledger(folder, Part()) as ledger:
            ledger.discard()


@contextlib.contextmanager
def _locked(path: Path, kind: Kind, busy: str) -> Iterator[None]:
    """A lock that dies with its process, SIGKILL included. The last one that leaves removes the file."""
    without_locks = False
    # open, lock, and look whether the name still leads to what was locked; else begin again
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            take_lock(handle, path, kind)
        except Busy as error:
            os.close(handle)
            raise UserError(busy) from error
        # some network file systems have no locks: work goes on, with a warning
        except NoLocks as error:
            without_locks = True
            warn_once(
                f"{path.parent}: {error.strerror}. See to it that no other data-prep makes the same"
                " source there, or set out to a folder on another disk."
            )
        except BaseException:
            os.close(handle)
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(handle).st_ino:
                break
        os.close(handle)  # it was removed between opening and locking
    try:
        yield
    finally:
        try:
            # the last one removes the file: only it gets the lock alone
            with contextlib.suppress(OSError, Busy):
                if not without_locks:
                    take_lock(handle, path, "alone")  # fails while other parts hold it
                # without locks nobody knows who is the last
                if not (without_locks and kind == "shared"):
                    os.unlink(path)
        finally:
            os.close(handle)


def _rename_new(beside: Path, folder: Path) -> None:
    """Rename to a name that is not taken. Raises FileExistsError."""
    try:
        os.rename(beside, folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder)) from error
        raise


def _remove(path: Path) -> None:
    """A folder with all that is in it, or a file, is gone afterwards."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def identity(card: Card) -> dict[str, Any]:
    """What a source was made from: its tokenizer, settings and files."""
    # counts are a result, and not what it was made from
    return {
        "tokenizer": card.tokenizer_sha256[:12],
        **{k: v for k, v in card.recipe.items() if k != "counts"},
    }


def changes(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What differs between two identities, as words; empty where nothing does."""
    found = [f"{key} was {brief(a)}, is {brief(b)}" for key, a, b in differences(old, new)]
    return "; ".join(found[:2]) + (f" and {len(found) - 2} more" if len(found) > 2 else "")


def side_file(split: str, kind: str) -> str:
    """The name of a segment's side file."""
    return f"{split}.{kind}"


def write_record(folder: Path, record: Record) -> None:
    """Write segment.json: the last file of a segment."""
    write_json(folder / SEGMENT, {**dataclasses.asdict(record), "counts": record.counts.plain()})
