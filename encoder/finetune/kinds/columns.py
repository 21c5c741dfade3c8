"""What the settings of several kinds share: texts of columns, what must differ or have room, a label's number.

sentence1                  the column of this name
"{word}: {sentence1}"      columns in a text"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from encoder.base.errors import ConfigError, nearest
from encoder.data.labelled import DataError, Rows, texts_of
from encoder.finetune.kinds.marks import marked

MOST_LABELS = 100_000
MOST_SPECIAL_TOKENS = 4  # of a pair: <s> first </s></s> second </s>
_PART = re.compile(r"\{([^{}]+)\}")
# of a label that counts as a number; Python reads no more than some thousand
MOST_DIGITS = 600


def columns_of(texts: Sequence[str]) -> tuple[str, ...]:
    """The columns of texts, each once: a text is a column's name, or has names in braces."""
    names = [name for text in texts for name in _PART.findall(text) or [text]]
    return tuple(dict.fromkeys(names))


def written(
    rows: Rows, text: str, marks: Mapping[str, Sequence[str]] | None = None
) -> Iterator[str]:
    """A column's texts, or those of several columns in one text. Raises DataError for a cell that is none, or empty.

    rows: of a data set
    text: a column's name, or names in braces
    marks: columns whose words are marked, and where (encoder/finetune/kinds/marks.py)
    """
    marks = marks or {}

    def cells_of(name: str) -> Iterator[str]:
        return marked(rows, name, marks[name]) if name in marks else texts_of(rows, name)

    names = _PART.findall(text)
    if not names:
        yield from cells_of(text)
        return
    cells = {name: list(cells_of(name)) for name in names}
    # what stands between names, and names, by turns
    parts = _PART.split(text)
    for row in range(len(rows)):
        yield "".join(cells[part][row] if k % 2 else part for k, part in enumerate(parts))


def groups_of(rows: Rows, names: Sequence[str]) -> np.ndarray | None:
    """The number of each row's group, int64 [N]: rows are in one where they are equal in all of these; None: without names.

    names: columns; idx.question is what the objects of column idx have under question

    Raises DataError for a cell without such a part.
    """
    if not names:
        return None
    numbers: dict[str, int] = {}
    found = []
    for row in range(len(rows)):
        cells = [_part_of(rows, row, name) for name in names]
        found.append(numbers.setdefault(json.dumps(cells, default=str), len(numbers)))
    return np.array(found, dtype=np.int64)


def _part_of(rows: Rows, row: int, name: str) -> Any:
    column, dot, part = name.partition(".")
    cell = rows.columns[column][row]
    if not dot:
        return cell
    if not isinstance(cell, dict) or part not in cell:
        raise DataError(
            f"{rows.place(row)}: {column} is {str(cell)[:40]!r}; needed: an object with {part}, as"
            f" task.groups has {name}."
        )
    return cell[part]


def check_columns(texts: Sequence[str], label: str) -> None:
    """One text or two, each of a column of its own, and without the label. Raises ConfigError."""
    if not 1 <= len(texts) <= 2:
        raise ConfigError(f"texts has {len(texts)} columns; needed: one, or two of a pair.")
    columns = [*texts, label]
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if label in columns_of(texts):
        twice = label
    if twice is not None:
        raise ConfigError(
            f"texts and label name the column {twice!r} twice; needed: columns that differ."
        )


def check_differ(columns: Sequence[str]) -> None:
    """Columns of which each has one use. Raises ConfigError."""
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"two columns are called {twice!r}; needed: columns that differ.")


def check_room(max_tokens: int, **kept: int) -> None:
    """Room for a token of the text beside what is kept of other parts. Raises ConfigError.

    max_tokens: of a document
    kept: tokens, by the setting of the task that says how many
    """
    least = sum(kept.values()) + MOST_SPECIAL_TOKENS + 1
    if max_tokens >= least:
        return
    told = ", ".join(f"task.{setting} {tokens:,}" for setting, tokens in kept.items())
    which = "that" if len(kept) == 1 else "one of them"
    raise ConfigError(
        f"data.max_tokens is {max_tokens:,}; needed: at least {least:,}, for {told} and a text."
        f" Lower {which}."
    )


def check_labels(labels: Sequence[str] | None, *, least: int) -> None:
    """Names that differ. Raises ConfigError."""
    if labels is None:
        return
    if len(labels) < least:
        raise ConfigError(f"labels has {len(labels)} names; needed: at least {least}.")
    twice = next((name for name in labels if list(labels).count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"labels has {twice!r} twice; each may stand once.")


def is_whole_number(name: str) -> bool:
    """Whether a label is a number that can be read: decimal digits, not too many."""
    return name.isdecimal() and len(name) <= MOST_DIGITS


def number_of(name: str, numbers: dict[str, int], rows: Rows, row: int, column: str) -> int:
    """The number of a label. Raises DataError.

    name: as the row has it
    numbers: of all labels
    rows, row, column: where it stands
    """
    if name in numbers:
        return numbers[name]
    # the number of a class, as GLUE's tables have it; where names are numbers themselves, a number is a name
    named_by_numbers = any(other.isdecimal() for other in numbers)
    if is_whole_number(name) and not named_by_numbers:
        own = rows.classes.get(column, ())
        # the dataset's numbers are in its own order, and the task may have another, or fewer
        if not numbers.keys() <= {*own}:
            own = tuple(numbers)
        name = own[int(name)] if int(name) < len(own) else name
        if name in numbers:
            return numbers[name]
    raise DataError(
        f"{rows.place(row)}: {column} is {name[:40]!r}, which is none of task.labels."
        f" {nearest(name, [*numbers])}"
    )


def sorted_labels(found: Iterable[str], *, first: str = "") -> tuple[str, ...]:
    """Labels that occur, sorted, `first` before all others; where all are numbers, by their size."""
    names = [*found]
    whole = all(is_whole_number(name) for name in names)
    order = sorted(names, key=lambda name: (name != first, int(name) if whole else 0, name))
    return tuple(order)


def class_names(rows: Rows, column: str) -> tuple[str, ...] | None:
    """Of a column of classes, as a dataset of the hub has them; None: it has none that tell more than their numbers."""
    names = rows.classes.get(column, ())
    is_told = len({*names}) > 1 and not any(is_whole_number(name) for name in names)
    return names if is_told else None


def known_labels(labels: tuple[str, ...] | None) -> tuple[str, ...]:
    """Those of settings that have met the training rows."""
    assert labels, "labels are known once the training rows were read"
    return labels


def refuse_missing(
    labels: Sequence[str], counts: np.ndarray, rows: Rows, column: str, *, word: str
) -> None:
    """Raises DataError where a label never occurs.

    labels, counts: their names, and how often they occur
    rows, column: of training
    word: what a label is called
    """
    never = [name for name, count in zip(labels, counts, strict=True) if not count]
    if not never:
        return
    found = f"{rows.path}: no row has the {word} {never[0]!r}"
    if {*labels} == {*rows.classes.get(column, ())}:
        occur = [name for name in labels if name not in never]
        raise DataError(
            f"{found}, which the dataset names. Set task.labels to those that occur,"
            f" {json.dumps(occur, ensure_ascii=False)}, or add rows of it."
        )
    raise DataError(f"{found} of task.labels. Take it out, or add rows of it.")
