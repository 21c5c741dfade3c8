"""Attention inside packed documents: one contract, several backends with the same numbers, a word that picks one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from encoder.base.errors import ConfigError, nearest
from encoder.nn.attend.contract import Backend, Plan, Situation
from encoder.nn.attend.sdpa import Sdpa
from encoder.nn.attend.tiles import Tiles

__all__ = ["BACKENDS", "Backend", "Choice", "Plan", "Situation", "Word", "check_word", "choose_backend"]

Word = Literal["auto", "tiles", "sdpa"]
BACKENDS: dict[str, Backend] = {b.name: b for b in (Tiles(), Sdpa())}     # fastest first


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The backend that will run, and a line for the run's header."""

    backend: Backend
    reason: str


def check_word(word: str) -> None:
    """Raises ConfigError for a word that names no backend, whatever the device."""
    if word not in get_args(Word):
        raise ConfigError(f"attention {word!r} is unknown. {nearest(word, list(get_args(Word)))}")


def choose_backend(word: str, situation: Situation) -> Choice:
    """The backend called `word`, or with "auto" the fastest that can run in the situation. Raises ConfigError."""
    check_word(word)
    refusals = {name: why for name, b in BACKENDS.items() if (why := b.why_not(situation))}
    able = [name for name in BACKENDS if name not in refusals]
    if word in refusals:
        raise ConfigError(f"{word} cannot run here: {refusals[word]}. Use attention: {' or '.join(['auto', *able])}.")
    name = able[0] if word == "auto" else word
    why = "the fastest that can run here" if word == "auto" else "asked for"
    others = "".join(f"; {other} cannot run here: {refusal}" for other, refusal in refusals.items())
    return Choice(backend=BACKENDS[name], reason=f"{name}: {why}{others}")
