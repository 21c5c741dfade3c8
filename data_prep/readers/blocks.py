"""What passes from a reader to the encoder: blocks of raw documents, and the texts parsed from them."""

from __future__ import annotations

import contextlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_prep.config import Source
from encoder.base.errors import UserError, why_unreadable

SKIP = "set on_error: skip"
SET_TEXT = "Set the source's text"
# of a line, row, item or file as it is read, where the settings say nothing else
MOST_DOCUMENT_BYTES = 70_000_000
READ_ERRORS = (OSError, EOFError, zlib.error)
CHECKED_CHARS = 2**20  # of a text at a time


def without_skip(text: str) -> str:
    """A sentence without its advice to set on_error: skip, where that is set already, or is no setting."""
    return text.replace(f", or {SKIP}", "")


class ReadError(UserError):
    """A file that cannot be read to its end; under on_error: skip, the rest of it is left out."""

    # nothing of the file can be read: every stretch of it says the same
    whole_file = False


@dataclass(frozen=True, kw_only=True)
class NotUtf8:
    """Stands for a text of a table that cannot be decoded."""

    byte: int  # the first bad one, from 1


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much of a file is in memory at a time."""

    block_bytes: int
    document_bytes: int = MOST_DOCUMENT_BYTES


@dataclass(frozen=True, kw_only=True)
class TooLarge:
    """Stands for a document that was passed over, since it has more bytes than the settings allow; or for several."""

    number: int = 1  # of its line, row or item, from 1; of the block's `first` on
    bytes: int | None = None  # None: not counted
    documents: int = 1
    what: str = ""  # what is too large, where it is not the document
    times: int = 1  # max_document_bytes, that it may have

    def sentence(self, place: str, most: int) -> str:
        """Found, needed, what to do."""
        size = f"{self.bytes:,} bytes" if self.bytes else f"more than {most:,} bytes"
        found = f"{self.what} of {size}" if self.what else f"{place} has {size}"
        times = "" if self.times == 1 else f"{self.times} x "
        return (
            f"{found}; needed: at most {times}max_document_bytes, {self.times * most:,}. Raise"
            f" max_document_bytes (a process takes about 8 times as much), or {SKIP}."
        )


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some neighbouring documents of one file: raw lines, raw items of a JSON array, or the columns that the source names."""

    source: Source
    file: str
    # number of the first line (row, item), from 1: counted from `counted_from`
    first: int
    lines: bytes | None = None
    items: list[bytes] | None = None
    columns: Mapping[str, list[Any]] | None = None
    numbers: list[int] | None = None  # of the rows, where they do not follow one another
    unit: str = "row"  # what a row of `columns` is called in messages
    # (place, what is wrong) of records beside them
    malformed: list[tuple[str, str]] = field(default_factory=list)
    too_large: TooLarge | None = None  # the block stands for this document alone
    most_bytes: int = MOST_DOCUMENT_BYTES  # that a document may have; for messages
    # bytes of the file that were read for this block, for the progress bar
    file_bytes: int = 0
    # byte of the (decompressed) file; only messages need more, see `numbered`
    counted_from: int = 0

    @property
    def whole_lines(self) -> bytes:
        """The lines of a block that has them."""
        assert self.lines is not None, "a block of items or columns has no lines"
        return self.lines

    @property
    def kind_of_row(self) -> str:
        """What `first` counts."""
        return "line" if self.lines is not None else self.unit


@dataclass(kw_only=True)
class Parsed:
    """The texts of a block, and what was left out of it by reason. `problem` is the first bad document, as a sentence."""

    texts: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    problem: str | None = None
    # places of the texts that are long, by their number
    long: dict[int, str] = field(default_factory=dict)
    problems: int = 0  # documents that should not be there at all

    def leave_out(self, reason: str, problem: str) -> None:
        """Count one bad document and keep the first one's sentence."""
        self.left_out[reason] += 1
        self.problems += 1
        self.problem = self.problem or problem


@contextlib.contextmanager
def opening() -> Iterator[None]:
    """A ReadError inside is of the whole file, whichever stretch of it was asked for.

    But for what the system says, as of a disk that does not answer: another stretch may have been opened well.
    """
    try:
        yield
    except ReadError as error:
        why = error.__cause__
        # what Arrow raises for a file's content is an OSError without a number
        error.whole_file = not (isinstance(why, OSError) and why.errno)
        raise


class UntilBroken:
    """An iterator that ends where reading breaks, so that what was read until there is given out before the error."""

    def __init__(self, given: Iterable[Any]) -> None:
        self._given = iter(given)
        self._error: Exception | None = None

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._given
        # a process without memory says nothing about the file
        except MemoryError:
            raise
        except Exception as error:
            self._error = error

    def raise_error(self) -> None:
        """The error at which it ended, if there was one."""
        if self._error:
            raise self._error


@contextlib.contextmanager
def readable(
    place: Callable[[], str], errors: tuple[type[Exception], ...] = READ_ERRORS
) -> Iterator[None]:
    """What goes wrong with the file inside is a ReadError that begins with `place()`."""
    try:
        yield
    # says already what is wrong
    except UserError:
        raise
    except errors as error:
        if isinstance(error, PermissionError):
            raise ReadError(f"{place()}: {why_unreadable(error)}") from error
        why = (
            getattr(error, "strerror", None)
            or " ".join(str(error).split())[:200].rstrip(".")
            or type(error).__name__
        )
        raise ReadError(f"{place()}: {why}. Fetch the file again, or {SKIP}.") from error


def has_surrogates(text: str) -> bool:
    """Whether a text holds half a surrogate pair: it has no UTF-16, which is found several times as fast as by a pattern."""
    try:
        # by parts, since the bytes of the whole would be in memory beside it
        for at in range(0, len(text), CHECKED_CHARS):
            text[at : at + CHECKED_CHARS].encode("utf-16-le")
    except UnicodeEncodeError:
        return True
    return False
