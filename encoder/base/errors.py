"""Errors that a person can cause: one line saying what was found, what is needed and what to do."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """A mistake in the input. A command prints its text as one line and exits with code 2."""


class ConfigError(UserError):
    """A run, model or preparation file that cannot be used as it stands."""


class ShardError(UserError):
    """A shard folder that is missing, damaged, or does not fit the run."""


class DamagedShard(ShardError):
    """A shard whose bytes are not those that its folder lists; `source` and number `shard` once they are known."""

    def __init__(self, text: str, *, source: str = "", shard: int = -1) -> None:
        super().__init__(text)
        self.source, self.shard = source, shard

    def __reduce__(self) -> tuple:  # from a worker it travels whole
        return _damaged_shard, (str(self), self.source, self.shard)


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or belongs to another model or run."""


class BusyRun(CheckpointError):
    """A run that another process is training at the moment."""


class LedgerError(UserError):
    """A ledger that does not continue: the data or the settings changed under a run."""


class RankError(UserError):
    """A mistake that only this rank met while training; this rank reports it, whatever its number."""


class SilentError(UserError):
    """Another rank met a mistake and reports it; this one only leaves with it."""


class PassingError(UserError):
    """No mistake in the input: a rank that was lost, a port that is taken. Another start may not meet it again."""


class MachineError(PassingError, LedgerError):
    """The machine computed what it had not computed before."""


class ModelError(UserError):
    """A stored model that is missing, damaged, of another kind, or whose weights do not fit its config."""


class ExportError(UserError):
    """A Hugging Face folder that cannot be written, read, or does not give the same numbers."""


def as_rank_says(error: UserError, *, rank: int) -> UserError:
    """The error as its rank raises it: rank zero's as it is, another's a RankError with its number, which is printed, too."""
    if rank == 0:
        return error
    return RankError(f"rank {rank}: {error}")


RIGHTS = "Needed: rights to read it. Give them (chmod u+r), or name another."


def why_unreadable(error: OSError) -> str:
    """The end of a sentence about a file that cannot be read: the system's reason, and a cure where it is one of rights."""
    reason = f"{error.strerror or error}."
    if isinstance(error, PermissionError):
        reason += f" {RIGHTS}"
    return reason


def nearest(word: str, choices: list[str]) -> str:
    """' Did you mean x?' for a misspelt word, else the choices: the end of an error's sentence. Another number is no
    misspelling: fp16 is not fp64."""
    from difflib import get_close_matches

    close = [
        c
        for c in get_close_matches(word, choices, n=3, cutoff=0.6)
        if c == word or len(c) != len(word) or c.rstrip("0123456789") != word.rstrip("0123456789")
    ]
    if close:
        return f"Did you mean {shortened(close[0], 200)}?"
    return f"Known: {', '.join(shortened(choice, 80) for choice in choices)}."


def shortened(text: str, most: int) -> str:
    """A text of at most so many letters, three points at its end where it was longer."""
    if len(text) <= most:
        return text
    return f"{text[: most - 3]}..."


def first_names(names: Sequence[str], most: int = 3) -> str:
    """a, b, c and 4 more."""
    text = ", ".join(names[:most])
    if len(names) > most:
        text += f" and {len(names) - most} more"
    return text


def _damaged_shard(text: str, source: str, shard: int) -> DamagedShard:
    return DamagedShard(text, source=source, shard=shard)
