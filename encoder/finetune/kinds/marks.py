"""Words of a text between asterisks, where columns say which: in WiC by their characters, in WSC by the number of a word.

sentence1 "The bed of a river."     start1 4           end1 7                 The *bed* of a river.
text      "Mark lied; he ran."      span2_index 2      span2_text "he"        Mark lied; *he* ran.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from encoder.base.errors import ConfigError
from encoder.data.labelled import DataError, Rows, texts_of

MARK = "*"
_WORD = re.compile(r"\S+")
# before and behind words, which blanks alone part
_OPENING = "\"'([{“‘«"
_CLOSING = ".,;:!?\"')]}”’»…-–—"
_APOSTROPHES = ("'", "’")


def check_marks(marks: Mapping[str, Sequence[str]], columns: Sequence[str]) -> None:
    """Each is of a text's column, and names two. Raises ConfigError.

    marks: column -> (column of the first character, of the end), or (of a word's number, of the words)
    columns: of the texts
    """
    for column, places in marks.items():
        if column not in columns:
            raise ConfigError(
                f"marks has {column}, which is no column of texts; needed: {', '.join(columns)}."
            )
        if len(places) != 2:
            raise ConfigError(
                f"marks.{column} names {len(places)} columns; needed: two, of the first character and"
                " of the end, or of a word's number from 0 and of the words."
            )


def marked(rows: Rows, column: str, places: Sequence[str]) -> Iterator[str]:
    """A column's texts, each with its words marked. Raises DataError for a place that is not in the text, or of other words.

    rows: of a data set
    column: of the texts
    places: as check_marks has them
    """
    for row, text in enumerate(texts_of(rows, column)):
        first, last = (rows.columns[name][row] for name in places)
        span = _span(text, first, last)
        if span is None:
            raise DataError(
                f"{rows.place(row)}: {places[0]} {str(first)[:40]!r} and {places[1]}"
                f" {str(last)[:40]!r} are no place in {column}, of {len(text):,} characters;"
                " needed: a first character and an end, or a word's number from 0 and the words."
            )
        begin, end = span
        if _is_of_words(first, last) and not _same(text[begin:end], last):
            raise DataError(
                f"{rows.place(row)}: {places[0]} {first} is {text[begin:end][:40]!r} in {column};"
                f" needed: {last[:40]!r}, as {places[1]} says. Words are counted from 0, and blanks"
                " alone part them."
            )
        yield f"{text[:begin]}{MARK}{text[begin:end]}{MARK}{text[end:]}"


def _span(text: str, first: Any, last: Any) -> tuple[int, int] | None:
    """Characters (begin, end) of a text; None: there is no such place."""
    begin, end = _number(first), _number(last)
    if _is_of_words(first, last):
        return None if begin is None else _words(text, begin, last)
    if begin is None or end is None or not begin < end <= len(text):
        return None
    return begin, end


def _is_of_words(first: Any, last: Any) -> bool:
    """A text of a table with types is words, whatever it says."""
    return isinstance(last, str) and (_number(last) is None or not isinstance(first, str))


def _words(text: str, number: int, needed: str) -> tuple[int, int] | None:
    """Characters of as many words as are needed, from this one on, without what stands around them."""
    count = len(needed.split())
    words = list(_WORD.finditer(text))[number : number + count]
    if not count or len(words) < count:
        return None
    begin, end = words[0].start(), words[-1].end()
    whole = text[begin:end]
    bare = _bare(whole)
    begin += whole.index(bare)
    # of "it's" the word "it"
    part = bare[: len(_bare(needed))]
    if _same(part, needed) and bare[len(part) :].startswith(_APOSTROPHES):
        bare = part
    return begin, begin + len(bare)


def _bare(words: str) -> str:
    """Without what stands around them; as they are where nothing else is there."""
    return words.lstrip(_OPENING).rstrip(_CLOSING) or words


def _same(found: str, needed: str) -> bool:
    """Whether they are the same words but for case, blanks and what stands around them."""
    return _bare(found).casefold().split() == _bare(needed.strip()).casefold().split()


def _number(cell: Any) -> int | None:
    """A whole number of 0 or more; cells of CSV are texts."""
    if isinstance(cell, str) and cell.isascii() and cell.isdecimal() and len(cell) < 10:
        return int(cell)
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return cell if isinstance(cell, int) and not isinstance(cell, bool) and cell >= 0 else None
