"""Documents into rows: the longest first, each into the fullest row that still takes it.

    lengths 5 4 3 3 1, capacity 8:    row 0 |55555333|    row 1 |44443331|    best fit decreasing (Johnson 1973)

Pieces of one length are placed together: the row that takes the first of them is the fullest that takes the second as
well, until it has no room for another. So the work grows with the number of different lengths, not of pieces.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ROW_BITS = 32


@dataclass(frozen=True)
class Packing:
    """Which pieces each row holds. P pieces, R rows, in the order they were opened."""

    # int64 numbers of pieces, row after row, in a row the longest first
    pieces_P: np.ndarray
    row_starts_R1: np.ndarray  # int64 into pieces_P

    @property
    def rows(self) -> int:
        return len(self.row_starts_R1) - 1


def pack_best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> Packing:
    """Rows whose sums of `lengths` do not exceed `capacity`; every piece in exactly one row.

    Best fit decreasing: longest first (equal lengths in their order), into the open row with the least room left that
    suffices (equal rooms: the row opened first).
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) == 0:
        return Packing(np.empty(0, dtype=np.int64), np.zeros(1, dtype=np.int64))

    # capacity - length ascends where length descends, and is never negative, as the sort needs
    order = _stable_argsort(capacity - lengths, capacity)
    descending = lengths[order]
    shortest, longest = int(descending[-1]), int(descending[0])
    assert 0 < shortest and longest <= capacity, (
        f"{shortest} to {longest} tokens do not fit rows of {capacity}"
    )

    # where each different length begins among the descending ones, and how many pieces have it
    first_of_length = np.flatnonzero(np.diff(descending, prepend=0))
    counts = np.diff(first_of_length, append=len(descending))

    opened = 0
    # room << 32 | row, ascending: one search finds the least room, then the row opened first
    open_rows: list[int] = []

    # a stretch: pieces of one length that follow each other into one row
    stretch_rows: list[int] = []
    stretch_pieces: list[int] = []
    for length, count in zip(descending[first_of_length].tolist(), counts.tolist(), strict=True):
        while count:
            # the key is (length, row 0): the first entry not below it has
            # the least room that suffices
            at = bisect_left(open_rows, length << _ROW_BITS)
            if at < len(open_rows):
                room_and_row = open_rows.pop(at)
                row, room = room_and_row & ((1 << _ROW_BITS) - 1), room_and_row >> _ROW_BITS
            else:
                row, room, opened = opened, capacity, opened + 1

            # the row with the least room stays that until it is too
            # small: it takes all it can at once
            taken = min(count, room // length)
            stretch_rows.append(row)
            stretch_pieces.append(taken)
            count, room = count - taken, room - taken * length

            # a row with less room than the shortest piece takes no other: it is closed
            if room >= shortest:
                insort(open_rows, room << _ROW_BITS | row)

    # pieces in descending order have their rows; a stable sort by row keeps the longest first
    row_of = np.repeat(np.array(stretch_rows), stretch_pieces)
    starts = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=opened))])
    return Packing(order[_stable_argsort(row_of, opened)], starts)


def _stable_argsort(values: np.ndarray, top: int) -> np.ndarray:
    # numpy sorts 16-bit integers by radix, 5 times as fast as wider ones
    if top < 2**16:
        values = values.astype(np.uint16)
    return np.argsort(values, kind="stable")
