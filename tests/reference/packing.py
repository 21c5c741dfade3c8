"""Packing told slowly: best fit decreasing by looking at every row, and the fewest rows by trying everything."""

from __future__ import annotations

from collections.abc import Sequence


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Longest piece first into the row with the least room that suffices, the first of equals; O(n * rows)."""
    rows: list[list[int]] = []
    rooms: list[int] = []
    for piece in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [(room, row) for row, room in enumerate(rooms) if room >= lengths[piece]]
        if fitting:
            _, row = min(fitting)
        else:
            row = len(rows)
            rows.append([])
            rooms.append(capacity)
        rows[row].append(piece)
        rooms[row] -= lengths[piece]
    return rows


def fewest_rows(lengths: Sequence[int], capacity: int) -> int:
    """The least number of rows that hold all pieces; tries every assignment, for up to 9 pieces."""
    best = len(lengths)

    def place(piece: int, rooms: list[int]) -> None:
        nonlocal best
        if len(rooms) >= best:
            return
        if piece == len(lengths):
            best = len(rooms)
            return
        for row in range(len(rooms)):
            if rooms[row] >= lengths[piece]:
                place(piece + 1, [*rooms[:row], rooms[row] - lengths[piece], *rooms[row + 1 :]])
        place(piece + 1, [*rooms, capacity - lengths[piece]])

    place(0, [])
    return best
