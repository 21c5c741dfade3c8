"""A training command on this rank: who speaks of a mistake, what the job's file is told, who leaves last."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable

from encoder.base.errors import PassingError, RankError, SilentError, UserError, as_rank_says
from encoder.base.log import speak_on
from encoder.base.peers import peers_of_this_rank, watch_peers
from encoder.base.stopping import StopFlag
from encoder.base.world import World, meeting_address, world_from_env

# launchers end the other ranks as soon as one leaves: those that say nothing leave last
SPEAKER_SECONDS = 3.0


def run_on_ranks(train: Callable[[World, StopFlag], object]) -> int:
    """Runs `train` under a flag that hears signals to stop; returns the exit code.

    Raises UserError for a mistake that this rank is to speak of.
    """
    with StopFlag() as stop:
        world = world_from_env()
        speak_on(world.first)
        try:
            if world.size > 1:
                # before torch is imported, which takes seconds
                watch_peers(world, meeting_address(world))
            train(world, stop)
        except OSError as error:
            _tell_job(error)
            raise
        except UserError as error:
            _tell_job(error)
            # the others must not wait for this rank
            if peers := peers_of_this_rank():
                peers.fail(2)
            if isinstance(error, SilentError):
                time.sleep(SPEAKER_SECONDS)
                return 2
            if not (world.first or isinstance(error, RankError)):
                # a launcher whose rank zero met it too has ended this one by now
                time.sleep(SPEAKER_SECONDS)
                raise as_rank_says(error, rank=world.rank) from error
            raise
        # a run that is done already is left before the ranks have met: the others must not take that for a death
        if peers := peers_of_this_rank():
            peers.close()
        return 0


def _tell_job(error: Exception) -> None:
    # srun ends the other ranks when one leaves, and then has their exit code, not this one's 2
    path = os.environ.get("TESSERA_MISTAKE_FILE")
    if path and not isinstance(error, (PassingError, SilentError)):
        # backslashreplace: a path in it may be no UTF-8
        with (
            contextlib.suppress(OSError),
            open(path, "w", encoding="utf-8", errors="backslashreplace") as file,
        ):
            file.write(" ".join(str(error).split()))
