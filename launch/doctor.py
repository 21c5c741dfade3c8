#!/usr/bin/env python3
"""Look at every node before a run holds it: versions, run file, shards, run folder, room, devices, memory, links.

    python launch/doctor.py RUN.yaml [key=value ...]                       on a laptop, one rank
    srun python launch/doctor.py RUN.yaml [key=value ...] --report FOLDER      in a job, one task for each rank of the run

Exit code: 0 fine; 2 a mistake in the input, which no other node would mend; 4 bad nodes, named on the console and in
FOLDER/bad_nodes, 5 where all nodes are bad; 1 a defect of this program. FOLDER/NODE.json has what each node found.
"""

from __future__ import annotations

import argparse
import os
import traceback
from pathlib import Path

from encoder.base.command import CommandLine, run_command


def main(argv: list[str] | None = None) -> int:
    """Parses, examines, returns the exit code."""
    parser = CommandLine(description=__doc__)
    parser.add_argument("run", metavar="RUN.yaml", help="the run file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings put over the file's"
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FOLDER",
        help="where NODE.json and bad_nodes go, on a shared disk",
    )
    parser.add_argument(
        "--wait-seconds",
        type=float,
        default=45.0,
        metavar="S",
        help="longest wait for another rank (45)",
    )
    # the deepspeed launcher adds it
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args(argv)
    if not 0 < args.wait_seconds <= 86_400:
        parser.error(
            f"--wait-seconds {args.wait_seconds:g}: needed is above 0 and at most 86,400, a day"
        )
    # torch would print a stack of its own for every wait that comes to nothing; what is silent is named by us
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")

    def body() -> int:
        from encoder.base.dist import world_from_env
        from encoder.base.log import speak_on

        world = world_from_env()
        speak_on(world.first)
        from encoder.tools.doctor.doctor import Doctor

        doctor = Doctor(
            world=world, env=dict(os.environ), report=args.report, wait_seconds=args.wait_seconds
        )
        return doctor.examine(args.run, args.overrides)

    return run_command(body)


if __name__ == "__main__":
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    from encoder.base.dist import end_process

    end_process(code)  # a thread may still stand in a collective that nobody joined
