"""Documents into rows: the longest first, each into the fullest row that still takes it.

    lengths 5 4 3 3 1, capacity 8:    row 0 |55555333|    row 1 |44443331|    best fit decreasing (Johnson 1973)
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

_ROW_BITS = 32


def pack_best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Rows of indices into `lengths` whose sums do not exceed `capacity`; every index in exactly one row.

    Best fit decreasing: longest first (equal lengths in their order), into the open row with the least room left that
    suffices (equal rooms: the row opened first). O(n log n), about 1 us a piece.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) == 0:
        return []
    order = np.argsort(-lengths, kind="stable")
    shortest, longest = int(lengths[order[-1]]), int(lengths[order[0]])
    assert 0 < shortest and longest <= capacity, f"{shortest} to {longest} tokens do not fit rows of {capacity}"
    rows: list[list[int]] = []
    open_rows: list[int] = []    # room << 32 | row, ascending: one search finds the least room, then the first row
    for piece, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        at = bisect_left(open_rows, length << _ROW_BITS)
        if at < len(open_rows):
            room_and_row = open_rows.pop(at)
            row = room_and_row & ((1 << _ROW_BITS) - 1)
            room = (room_and_row >> _ROW_BITS) - length
            rows[row].append(piece)
        else:
            row, room = len(rows), capacity - length
            rows.append([piece])
        if room >= shortest:
            insort(open_rows, room << _ROW_BITS | row)
    return rows
