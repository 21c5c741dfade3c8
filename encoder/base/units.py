"""Amounts and where a run stands: tokens written as a person writes them, and Progress."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from encoder.base.errors import ConfigError, shortened

TOKEN_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "b": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
}


def parse_tokens(value: int | float | str) -> int:
    """'2T' -> 2_000_000_000_000; also 500K, 1.719T, 98_304, 4Mi. Raises ConfigError unless a whole number >= 0."""
    if isinstance(value, bool):
        raise ConfigError(f"{value} is no number of tokens. Write for example 500K, 1.5B or 98304.")

    # for messages: cut, since str() of a huge integer is slow, and refused beyond 4,300 digits
    shown = "a number of more than 40 digits"
    if not isinstance(value, int) or abs(value) < 10**40:
        shown = shortened(ascii(value), 60)

    if isinstance(value, int):
        amount = Decimal(value)
    elif len(str(value)) > 60:
        raise ConfigError(f"{shown} is no number of tokens. Write for example 500K, 1.5B or 98304.")
    else:
        # a number, and a unit in either case; Decimal keeps 1.719T exact
        found = re.fullmatch(
            r"\s*([0-9][0-9_,]*\.?[0-9]*(?:[eE][+]?[0-9]+)?)\s*([kmbtKMBTgG]?[iI]?)\s*", str(value)
        )
        if not found or found[2].lower() not in TOKEN_UNITS:
            raise ConfigError(
                f"{shown} is no number of tokens. Write for example 500K, 1.5B or 98304."
            )
        try:
            number = Decimal(found[1].replace("_", "").replace(",", ""))
            amount = number * TOKEN_UNITS[found[2].lower()]
        except ArithmeticError as error:  # an exponent beyond any
            raise ConfigError(
                f"{shown} is no number of tokens. Write for example 500K, 1.5B or 98304."
            ) from error

    if abs(amount) >= 2**63:
        raise ConfigError(f"{shown} is more tokens than 63 bits can count.")
    if amount < 0:
        raise ConfigError(f"{shown} is below 0; needed: a number of tokens.")
    if amount != int(amount):
        raise ConfigError(f"{shown} is not a whole number of tokens.")
    return int(amount)


def short_count(number: float) -> str:
    """1_719_000_000_000 -> '1.719T', for people; not to be parsed again."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:.4g}"


def short_bytes(count: float) -> str:
    """3_221_225_472 -> '3.0 GiB', for people."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1024:.1f} KiB"


def short_seconds(seconds: float) -> str:
    """3725 -> '1h02m', 62 -> '1m02s', 3.21 -> '3.2s'."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(int(round(seconds)), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands, counted over all ranks. Schedules, phases and file names are functions of this."""

    step: int = 0  # updates done in the whole run
    tokens: int = 0  # tokens without padding, whole run
    phase: int = 0  # index of the current phase
    phase_step: int = 0  # updates done in the current phase
    phase_tokens: int = 0  # tokens without padding, current phase
    masked_tokens: int = 0  # positions predicted, whole run
    # next (window, row) of each lane of the phase's data; none at its beginning
    lanes: tuple[tuple[int, int], ...] = ()
    ledger_hash: str = ""  # hash chain over every step's batch


def with_article(name: str) -> str:
    """'a BERT', 'an ALBERT', 'an XLNet': as it is spoken."""
    article = "a"
    if name[:1].lower() in "aeiox":
        article = "an"
    return f"{article} {name}"


def begun(text: str) -> str:
    """With a capital first letter, the others as they are."""
    return text[:1].upper() + text[1:]


def counted(count: int, word: str) -> str:
    """'1 rank', '2 ranks', '0 ranks'."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"
