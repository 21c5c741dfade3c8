"""Attention inside packed documents: one contract, several backends with the same numbers, a word that picks one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, get_args

from encoder.base.errors import ConfigError, nearest
from encoder.nn.attend.contract import AttentionRequest, Backend, Plan
from encoder.nn.attend.flash import FLASH
from encoder.nn.attend.flex import Flex
from encoder.nn.attend.sdpa import Sdpa
from encoder.nn.attend.tiles import Tiles
from encoder.nn.attend.varlen import Varlen

__all__ = [
    "BACKENDS",
    "Backend",
    "Choice",
    "Plan",
    "AttentionRequest",
    "Word",
    "attend_by",
    "check_backend_name",
    "choose_backend",
]

Word = Literal["auto", "flash", "flash4", "flash3", "flash2", "varlen", "flex", "tiles", "sdpa"]
# fastest first
BACKENDS: dict[str, Backend] = {b.name: b for b in (*FLASH, Varlen(), Flex(), Tiles(), Sdpa())}

_given: ContextVar[Backend | None] = ContextVar("the backend of attend_by", default=None)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The backend that will run, and a line for the run's header."""

    backend: Backend
    reason: str


def check_backend_name(word: str) -> None:
    """Raises ConfigError for a word that names no backend, whatever the device."""
    if word not in get_args(Word):
        raise ConfigError(f"attention {word!r} is unknown. {nearest(word, list(get_args(Word)))}")


def choose_backend(word: str, request: AttentionRequest) -> Choice:
    """The backend called `word`; the newest flash with "flash", the fastest of all with "auto". Raises ConfigError."""
    check_backend_name(word)
    if given := _given.get():
        return Choice(backend=given, reason=f"{given.name}: given")

    # all are asked, whatever the word: the run's header names those that cannot run
    refusals = {name: why for name, b in BACKENDS.items() if (why := b.why_not(request))}
    able = [name for name in BACKENDS if name not in refusals]

    # a word for several takes the first that can run; they are fastest first
    asked = {"auto": list(BACKENDS), "flash": [b.name for b in FLASH]}.get(word, [word])
    name = next((name for name in asked if name in able), None)
    if name is None:
        raise ConfigError(
            f"{_told({name: refusals[name] for name in asked})}. Use attention:"
            f" {' or '.join(able)}."
        )
    why = {"auto": "the fastest that can run here", "flash": "the newest that can run here"}.get(
        word, "asked for"
    )
    return Choice(
        backend=BACKENDS[name],
        reason="; ".join([f"{name}: {why}", *filter(None, [_told(refusals)])]),
    )


@contextmanager
def attend_by(backend: Backend) -> Iterator[None]:
    """Within it every choice is this backend: for one that only counts, on tensors without data."""
    token = _given.set(backend)
    try:
        yield
    finally:
        _given.reset(token)


def _told(refusals: dict[str, str]) -> str:
    """One clause a reason, for all backends that give it."""
    names: dict[str, list[str]] = {}
    for name, why in refusals.items():
        names.setdefault(why, []).append(name)
    return "; ".join(f"{', '.join(who)} cannot run here: {why}" for why, who in names.items())
