#!/usr/bin/env python3
"""Print what a run file means, without starting anything: parameters, phases, steps, curves, micro-batches, memory.

    python launch/plan.py RUN.yaml [key=value ...] [--ranks N] [--png FILE]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Parses, prints, returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN.yaml", help="the run file, for example configs/pretrain/tiny_cpu.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="settings put over the file's")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes the run would have (default 1)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also draw rate, batch, mask share and length over tokens")
    args = parser.parse_intermixed_args(argv)
    if args.ranks < 1:
        parser.error(f"--ranks {args.ranks}: needed is at least 1")

    from encoder.base.command import run_command

    def body() -> None:
        from encoder.train.config import read_run
        run = read_run(args.run, args.overrides)
        from encoder.train.phases import planned_steps
        from encoder.train.plan import FILL, plan_text
        steps = list(planned_steps(run, fill=FILL))
        print(plan_text(run, ranks=args.ranks, steps=steps))
        if args.png:
            from encoder.train.plan_curves import draw_plan
            draw_plan(run, steps, args.png)
            print(f"wrote {args.png}")

    return run_command(body)


if __name__ == "__main__":
    sys.exit(main())
