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

import os
import traceback

from encoder.base.command import CommandLine, importing, run_command
from encoder.base.ranks import run_on_ranks
from encoder.base.stopping import StopFlag
from encoder.base.world import World


def main(argv: list[str] | None = None) -> int:
    """Parses, trains, returns the exit code."""
    parser = CommandLine(description=__doc__)
    parser.add_argument(
        "run", metavar="RUN.yaml", help="the run file, for example configs/pretrain/tiny_cpu.yaml"
    )
    parser.takes_overrides(example="engine.zero_stage=2 phases.0.tokens=1M")
    args = parser.parse_args(argv)
    # before torch starts: its CPU tensors on huge pages, 7 to 12 % more tokens a second
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

    def train(world: World, stop: StopFlag) -> None:
        with importing():
            from encoder.runs.config import read_run

        run = read_run(args.run, args.overrides)
        with importing():
            from encoder.train.pretraining import pretrain

        pretrain(run, world, stop=stop)

    return run_command(
        lambda: run_on_ranks(train), stopped="stopped before the first step; nothing was written"
    )


if __name__ == "__main__":
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    from encoder.base.dist import end_process

    end_process(code)
