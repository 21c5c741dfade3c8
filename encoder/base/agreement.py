"""All ranks or none: a mistake that one rank meets ends all of them together, and nobody waits in a collective.

all_ranks_agree(world)      a block in which a rank may meet a mistake of its own: all ranks leave at its end
DeferredErrors(world)       the same for several blocks, whose first mistake is kept until agree()
run_on_all_ranks(act, ...)  an act of some ranks, such as a save: all ranks leave at its end, with the same words

They agree by one mechanism: an all-reduce of one number names the lowest rank that met a mistake. What follows differs:

- a start or a step ends with the mistake. Its rank raises it as it is, so that its class still says which exit code it
  has, and the others have nothing to say;
- a save or a load may be survived: training goes on, or an older checkpoint is read. So every rank needs the words, and
  all catch the same CheckpointError.

Which rank reports it is said by the class of what is raised, and launch/pretrain.py alone looks at it:

UserError on rank zero      printed
RankError                   printed with the rank's number: only this rank met it
SilentError                 not printed: another rank reports it
PassingError                printed; another start may not meet it again, so a job is queued anew
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from safetensors import SafetensorError

from encoder.base.command import as_user_error
from encoder.base.dist import World, max_over_ranks, rank_and_size, sum_over_ranks
from encoder.base.errors import CheckpointError, SilentError, UserError, as_rank_says

TEXT_BYTES = 1000


@contextlib.contextmanager
def all_ranks_agree(world: World) -> Iterator[None]:
    """A block in which a rank may meet a mistake of its own: all ranks leave together, at its end."""
    error: UserError | None = None
    try:
        yield
    except (UserError, OSError) as problem:
        error = as_user_error(problem)
    _leave_together(error, world)


def _leave_together(error: UserError | None, world: World) -> None:
    """The lowest rank with an error raises it, the others raise SilentError."""
    first = _first_with_error(error is not None)
    if first is None:
        return
    if error is not None and first == world.rank:
        raise as_rank_says(error, rank=world.rank) from error
    raise SilentError(f"rank {first} met an error")


def _first_with_error(has_error: bool) -> int | None:
    """The lowest rank that has an error, None where no rank has; called on every rank."""
    rank, ranks = rank_and_size()
    # ranks - rank, or 0 without an error: the maximum is that of the lowest rank
    highest = int(max_over_ranks(torch.tensor([(ranks - rank) * has_error]))[0])
    if highest == 0:
        return None
    return ranks - highest


def run_on_all_ranks(act: Callable[[], object] | None, *, doing: str, then: str = "") -> None:
    """Runs an act on the ranks that have one; called on every rank.

    Raises CheckpointError on all of them if a file could not be read or written ("DOING: reason. THEN") or an act found
    a mistake. An error that is none of these is raised where it happened, and the other ranks leave with it.
    """
    error: Exception | None = None
    text = ""
    try:
        if act:
            act()
    except Exception as caught:
        error = caught
        text = _sentence(caught, doing, then)

    # every rank comes here, also after an error of its own: nobody is left in the collective
    first = _first_with_error(error is not None)
    if first is None:
        return
    words = list(texts_of_all_ranks(text))[first]
    # an error of our own code keeps its traceback
    if error is not None and not isinstance(error, (UserError, OSError, SafetensorError)):
        raise error
    raise CheckpointError(words) from error


def _sentence(error: Exception, doing: str, then: str) -> str:
    if isinstance(error, UserError):
        return str(error)
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(f"{doing}: {reason.rstrip('.')}. {then}".split())


def texts_of_all_ranks(text: str) -> Iterator[str]:
    """The text of each rank, by rank; one all-reduce of a small table."""
    rank, ranks = rank_and_size()

    table = torch.zeros(ranks, TEXT_BYTES, dtype=torch.uint8)
    encoded = text.encode("utf-8")[:TEXT_BYTES]
    table[rank, : len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)

    # each rank filled its own row of zeros: the sum is the table of all
    for row in sum_over_ranks(table).tolist():
        yield bytes(row).rstrip(b"\0").decode("utf-8", errors="ignore")


class DeferredErrors:
    """Mistakes that one rank alone can meet, kept until all ranks meet: nobody leaves others waiting in a collective.

    with errors.deferred():        # on rank zero alone
        ledger.write(...)
    errors.agree()                 # on every rank
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.first: UserError | None = None  # of this rank

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Keeps a mistake of this block."""
        try:
            yield
        except (UserError, OSError) as error:
            self.first = self.first or as_user_error(error)

    def agree(self) -> None:
        """Called on every rank: raises on all of them where one has met a mistake."""
        _leave_together(self.first, self._world)
