#!/usr/bin/env python3
"""Print what a run file means, without starting anything: parameters, phases, steps, curves, micro-batches, memory;
with --gpu or --measure also tokens a second, hours, and what a rank sends in a step.

    python launch/plan.py RUN.yaml [key=value ...] [--ranks N] [--gpu h100 [--interconnect GB/s] | --measure] [--png FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path

from encoder.base.command import CommandLine, count, importing, run_command


def main(argv: list[str] | None = None) -> int:
    """Parses, prints, returns the exit code."""
    parser = CommandLine(description=__doc__)
    parser.add_argument(
        "run", metavar="RUN.yaml", help="the run file, for example configs/pretrain/tiny_cpu.yaml"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings put over the file's"
    )
    parser.add_argument(
        "--ranks",
        type=count,
        default=1,
        metavar="N",
        help="processes the run would have (default 1)",
    )
    parser.add_argument(
        "--png",
        type=Path,
        metavar="FILE",
        help="also draw rate, batch, mask share and length over tokens",
    )
    parser.add_argument(
        "--gpu",
        metavar="WORD",
        help="also how fast it will be on this GPU: a100, h100, h200, b200 or l40s",
    )
    parser.add_argument(
        "--interconnect", type=float, metavar="GB/s", help="of a rank to the others, each way"
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="also how fast it will be here, from a few steps of the run itself",
    )
    args = parser.parse_intermixed_args(argv)
    if args.gpu and args.measure:
        parser.error(
            "--gpu and --measure: one says how fast it is there, the other here; needed: one of"
            " them"
        )
    if args.interconnect is not None and not (args.interconnect > 0 and (args.gpu or args.measure)):
        parser.error(
            f"--interconnect {args.interconnect:g}: needed is a rate above 0, and --gpu or"
            " --measure"
        )

    def body() -> None:
        with importing():
            from encoder.runs.config import read_run

        run = read_run(args.run, args.overrides)
        from encoder.runs.foreign_files import check_folder

        check_folder(Path(run.out))
        if args.png:
            from encoder.base.files import refuse_foreign
            from encoder.tools.plan.curves import MADE_BY

            refuse_foreign(args.png, ours=lambda head: MADE_BY.encode() in head)
        from encoder.runs.filling import row_fills
        from encoder.runs.phases import planned_steps
        from encoder.tools.plan.plan import plan_text

        # packed rows are never quite full, so a phase takes a few steps more
        steps = planned_steps(run, fills=row_fills(run))
        machine = probed = None
        if args.gpu:
            from encoder.tools.plan.forecast import gpu

            machine = gpu(args.gpu, precision=run.engine.precision)
        if args.measure:
            from encoder.tools.plan.probe import probe

            probed = probe(args.run, args.overrides)
        print(
            plan_text(
                run,
                ranks=args.ranks,
                steps=steps,
                machine=machine,
                probe=probed,
                interconnect=args.interconnect and 1e9 * args.interconnect,
            )
        )
        if args.png:
            from encoder.tools.plan.curves import draw_plan

            draw_plan(run, steps, args.png)
            print(f"wrote {args.png}")

    return run_command(body)


if __name__ == "__main__":
    sys.exit(main())
