#!/usr/bin/env python3
"""Pretrain a model from a run file, on one rank or many; goes on from the newest checkpoint in the run folder.

    deepspeed --num_accelerators 2 launch/pretrain.py RUN.yaml [key=value ...]
    torchrun --standalone --nproc-per-node 2 launch/pretrain.py RUN.yaml [key=value ...]
    python launch/pretrain.py RUN.yaml [key=value ...]

Exit code: 0 done, or stopped by a signal or its time limit after saving (done.json in the run folder tells which: without it,
start again); 1 a defect, here or on another rank; 2 a mistake in the input, also written to the file TESSERA_MISTAKE_FILE where
a job names one; 3 it hung, RUN/hangs says where; 130 stopped by Ctrl-C before anything was written.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
import traceback

from encoder.base.command import CommandLine, run_command
from encoder.base.log import speak_on
from encoder.base.peers import peers_of_this_rank, watch_peers
from encoder.base.stopping import StopFlag
from encoder.base.world import meeting_address, world_from_env

# launchers end the other ranks as soon as one leaves: those that say nothing leave last
SPEAKER_SECONDS = 3.0


def main(argv: list[str] | None = None) -> int:
    """Parses, trains, returns the exit code."""
    parser = CommandLine(description=__doc__)
    parser.add_argument(
        "run", metavar="RUN.yaml", help="the run file, for example configs/pretrain/tiny_cpu.yaml"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="settings put over the file's, for example engine.zero_stage=2 phases.0.tokens=1M",
    )
    # the deepspeed launcher adds it
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    # before torch starts: its CPU tensors on huge pages, 7 to 12 % more tokens a second
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

    from encoder.base.errors import PassingError, RankError, SilentError, UserError, as_rank_says

    def body() -> int:
        with StopFlag() as stop:
            return train(stop)

    def train(stop: StopFlag) -> int:
        world = world_from_env()
        speak_on(world.first)
        try:
            if world.size > 1:
                # before torch is imported, which takes seconds
                watch_peers(world, meeting_address(world))
            from encoder.runs.config import read_run

            run = read_run(args.run, args.overrides)
            from encoder.train.pretraining import pretrain

            pretrain(run, world, stop=stop)
        except OSError as error:
            tell_job(error)
            raise
        except UserError as error:
            tell_job(error)
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

    def tell_job(error: Exception) -> None:
        # srun ends the other ranks when one leaves, and then has their exit code, not this one's 2
        path = os.environ.get("TESSERA_MISTAKE_FILE")
        if path and not isinstance(error, (PassingError, SilentError)):
            # backslashreplace: a path in it may be no UTF-8
            with (
                contextlib.suppress(OSError),
                open(path, "w", encoding="utf-8", errors="backslashreplace") as file,
            ):
                file.write(" ".join(str(error).split()))

    return run_command(body, stopped="stopped before the first step; nothing was written")


if __name__ == "__main__":
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    from encoder.base.dist import end_process

    end_process(code)
