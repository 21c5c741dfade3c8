"""How byte-level BPE writes bytes as characters (Radford et al. 2019)."""

from __future__ import annotations


def byte_of_character() -> dict[str, int]:
    """The byte that each character stands for: printable ones for themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {**{chr(b): b for b in printable}, **{chr(0x100 + i): b for i, b in enumerate(others)}}
