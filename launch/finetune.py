#!/usr/bin/env python3
"""Fine-tune a model on labelled rows by a task file, on one rank or many; goes on from the newest checkpoint.

    deepspeed --num_accelerators 2 launch/finetune.py TASK.yaml [key=value ...]
    torchrun --standalone --nproc-per-node 2 launch/finetune.py TASK.yaml [key=value ...]
    python launch/finetune.py TASK.yaml [key=value ...]
    python launch/finetune.py TASK.yaml --dry-run

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
        "task",
        metavar="TASK.yaml",
        help="the task file, for example configs/finetune/sentiment.yaml",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="read task, model and rows, say what would be trained, and write nothing",
    )
    parser.takes_overrides(example="seed=3 epochs=5 lr.peak=3e-5")
    args = parser.parse_intermixed_args(argv)
    # before torch starts: its CPU tensors on huge pages, 7 to 12 % more tokens a second
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

    def train(world: World, stop: StopFlag) -> None:
        with importing():
            from encoder.finetune.config import read_task

        task = read_task(args.task, args.overrides)
        with importing():
            from encoder.finetune.course import finetune

        finetune(task, world, stop=stop)

    def plan() -> None:
        from encoder.finetune.config import read_task
        from encoder.finetune.plan import plan_lines

        for line in plan_lines(read_task(args.task, args.overrides)):
            print(line)

    if args.dry_run:
        return run_command(plan)
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
