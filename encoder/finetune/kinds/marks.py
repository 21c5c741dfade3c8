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
# behind a word, as the number of words counts it
_BEHIND = ".,;:!?\"')"


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
    """A column's texts, each with its words marked. Raises DataError for a place that is not in the text.

    rows: of a data set
    column: of the texts
    places: as check_marks has them
    """
    for row, text in enumerate(texts_of(rows, column)):
        cells = [rows.columns[name][row] for name in places]
        span = _span(text, *cells)
        if span is None:
            raise DataError(
                f"{rows.place(row)}: {places[0]} {str(cells[0])[:40]!r} and {places[1]}"
                f" {str(cells[1])[:40]!r} are no place in {column}, of {len(text):,} characters;"
                " needed: a first character and an end, or a word's number from 0 and the words."
            )
        begin, end = span
        yield f"{text[:begin]}{MARK}{text[begin:end]}{MARK}{text[end:]}"


def _span(text: str, first: Any, last: Any) -> tuple[int, int] | None:
    """Characters (begin, end) of a text; None: there is no such place."""
    begin, end = _number(first), _number(last)
    # a text of a table with types is words, whatever it says
    if isinstance(last, str) and (end is None or not isinstance(first, str)):
        return None if begin is None else _words(text, begin, len(last.split()))
    if begin is None or end is None or not begin < end <= len(text):
        return None
    return begin, end


def _words(text: str, number: int, count: int) -> tuple[int, int] | None:
    """Characters of `count` words from this one on, without what stands behind the last."""
    words = list(_WORD.finditer(text))[number : number + count]
    if not count or len(words) < count:
        return None
    begin, end = words[0].start(), words[-1].end()
    bare = text[begin:end].rstrip(_BEHIND)
    return begin, begin + len(bare) if bare else end


def _number(cell: Any) -> int | None:
    """A whole number of 0 or more; cells of CSV are texts."""
    if isinstance(cell, str) and cell.isascii() and cell.isdecimal() and len(cell) < 10:
        return int(cell)
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return cell if isinstance(cell, int) and not isinstance(cell, bool) and cell >= 0 else None
