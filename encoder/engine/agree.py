"""All ranks or none: an act that fails on one rank is an error on every rank, with the same words, and nobody waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from encoder.base.dist import sum_over_ranks
from encoder.base.errors import CheckpointError, UserError

TEXT_BYTES = 1000


def together(act: Callable[[], None] | None, *, doing: str, then: str = "") -> None:
    """Runs an act on the ranks that have one; called on every rank.

    Raises CheckpointError on all of them if a file could not be read or written ("DOING: reason. THEN") or an act found
    a mistake. An error that is none of these is raised where it happened, and the other ranks leave with it.
    """
    text, error = "", None
    try:
        if act:
            act()
    except Exception as caught:
        error, text = caught, _sentence(caught, doing, then)
    for said in texts_of_all_ranks(text):
        if said:
            if error is not None and not isinstance(error, (UserError, OSError, SafetensorError)):
                raise error
            raise CheckpointError(said) from error


def _sentence(error: Exception, doing: str, then: str) -> str:
    if isinstance(error, UserError):
        return str(error)
    reason = (error.strerror if isinstance(error, OSError) else None) or f"{error}" or type(error).__name__
    return " ".join(f"{doing}: {reason.rstrip('.')}. {then}".split())


def texts_of_all_ranks(text: str) -> Iterator[str]:
    """The text of each rank, by rank; one all-reduce of a small table."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    table = torch.zeros(ranks, TEXT_BYTES, dtype=torch.uint8)
    encoded = text.encode("utf-8")[:TEXT_BYTES]
    table[rank, :len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
    for row in sum_over_ranks(table).tolist():
        yield bytes(row).rstrip(b"\0").decode("utf-8", errors="ignore")
