"""What an objective must be (encoder.base.objective), and what it may know of a tokenizer."""

from __future__ import annotations

from typing import Protocol

from encoder.base.objective import MaskedRow, Masker, Objective, RowTargets

__all__ = ["MaskedRow", "Masker", "Objective", "RowTargets", "Specials"]


class Specials(Protocol):
    """The special ids of a tokenizer (a card's SpecialIds is one)."""

    mask_id: int
    pad_id: int
    all_special: tuple[int, ...]
