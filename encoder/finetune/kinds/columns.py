"""What the settings of several kinds share: columns that differ, labels that differ, a label's number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from encoder.base.errors import ConfigError, nearest
from encoder.data.labelled import DataError, Rows

MOST_LABELS = 100_000
# of a label that counts as a number; Python reads no more than some thousand
MOST_DIGITS = 600


def check_columns(texts: Sequence[str], label: str) -> None:
    """One text or two, each of a column of its own. Raises ConfigError."""
    if not 1 <= len(texts) <= 2:
        raise ConfigError(f"texts has {len(texts)} columns; needed: one, or two of a pair.")
    columns = [*texts, label]
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"texts and label name the column {twice!r} twice; needed: columns that differ."
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
    if is_whole_number(name) and not named_by_numbers and int(name) < len(numbers):
        return int(name)
    raise DataError(
        f"{rows.place(row)}: {column} is {name[:40]!r}, which is none of task.labels."
        f" {nearest(name, [*numbers])}"
    )


def class_names(rows: Rows, column: str) -> tuple[str, ...] | None:
    """Of a column of classes, as a dataset of the hub has them; None: it has none that tell more than their numbers."""
    names = rows.classes.get(column, ())
    is_told = len({*names}) > 1 and not any(is_whole_number(name) for name in names)
    return names if is_told else None


def known_labels(labels: tuple[str, ...] | None) -> tuple[str, ...]:
    """Those of settings that have met the training rows."""
    assert labels, "labels are known once the training rows were read"
    return labels


def refuse_missing(labels: Sequence[str], counts: np.ndarray, rows: Rows, *, word: str) -> None:
    """Raises DataError where a label never occurs.

    labels, counts: their names, and how often they occur
    rows: of training
    word: what a label is called
    """
    never = [name for name, count in zip(labels, counts, strict=True) if not count]
    if never:
        raise DataError(
            f"{rows.path}: no row has the {word} {never[0]!r} of task.labels. Take it out, or add"
            " rows of it."
        )
