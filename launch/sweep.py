#!/usr/bin/env python3
"""Fine-tune many times: a grid of settings times seeds, one process for many points, and a table of the results.

    python launch/sweep.py SWEEP.yaml                      trains what is not done, then prints the table
    python launch/sweep.py SWEEP.yaml --parallel 4         in four processes; with GPUs one GPU each
    python launch/sweep.py SWEEP.yaml --part 3/16          every 16th point, for a job array on one file system
    python launch/sweep.py SWEEP.yaml --dry-run            points, steps, tokens and minutes; trains nothing
    python launch/sweep.py SWEEP.yaml --table              the table of what is there; trains nothing
    python launch/sweep.py mnli.yaml rte.yaml              several; one that comes after another waits for its points

With two sweeps --compare dev says whether their chosen settings differ by more than chance, row by row.

The same command goes on after a stop. Exit code: 0 all points are done; 2 mistakes in the input, of a point or of the file; 1 a
defect, or a process that was ended; 130 stopped by Ctrl-C after saving.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from encoder.base.command import CommandLine, count, run_command
from encoder.base.errors import ConfigError
from encoder.base.units import counted
from encoder.base.untrusted import number_in_name
from encoder.base.world import world_from_env

if TYPE_CHECKING:
    from encoder.finetune.sweeps.board import Part
    from encoder.finetune.sweeps.points import Sweep


def main(argv: list[str] | None = None) -> int:
    """Parses, trains or tells, returns the exit code."""
    parser = CommandLine(description=__doc__)
    parser.add_argument(
        "words",
        nargs="+",
        metavar="SWEEP.yaml [key=value]",
        help="sweep files, and settings put over each, for example seeds=[1,2,3]",
    )
    parser.add_argument(
        "--parallel", type=count, default=1, metavar="N", help="processes at a time (default 1)"
    )
    parser.add_argument(
        "--part", type=_part, metavar="K/N", help="points K, K + N, ... alone, for job arrays"
    )
    parser.add_argument(
        "--compare", metavar="SET", help="the chosen settings of two sweeps, example by example"
    )
    told = parser.add_mutually_exclusive_group()
    told.add_argument("--dry-run", action="store_true", help="what it would train, and how long")
    told.add_argument("--table", action="store_true", help="what is there; trains nothing")
    args = parser.parse_args(argv)

    def body() -> int:
        if world_from_env().size > 1:
            raise ConfigError(
                "a sweep starts its own processes; needed: the command alone, without torchrun,"
                " deepspeed or several tasks of srun. Use --parallel."
            )
        from encoder.finetune.sweeps.points import read_sweeps

        paths = [Path(word) for word in args.words if "=" not in word]
        if not paths:
            parser.error("no sweep file")
        sweeps = read_sweeps(paths, [word for word in args.words if "=" in word])
        if args.compare and len(sweeps) != 2:
            raise ConfigError(f"--compare needs two sweeps; there are {len(sweeps)}.")
        if args.dry_run:
            return _tell_plan(sweeps, args.parallel)
        if args.table:
            return _tell_tables(sweeps, args.compare)
        return _train(sweeps, args.parallel, args.part, args.compare)

    return run_command(body, stopped="stopped before a point began; nothing was written")


def _part(text: str) -> Part:
    index, _, total = text.partition("/")
    number, parts = number_in_name(index), number_in_name(total)
    if not number or not parts or number > parts:
        raise argparse.ArgumentTypeError(f"{text[:40]!r}; needed: K/N, from 1/N to N/N")
    from encoder.finetune.sweeps.board import Part

    return Part(index=number - 1, count=parts)


def _train(sweeps: Sequence[Sweep], parallel: int, part: Part | None, of: str | None) -> int:
    from encoder.finetune.sweeps.run import run_sweeps

    ended = run_sweeps(sweeps, parallel=parallel, part=part)
    if ended.signal:
        print(f"stopped: {counted(ended.done, 'point')} done; the same command goes on")
        return ended.code
    _tell_tables(sweeps, of)
    if ended.elsewhere:
        print(
            f"{counted(ended.elsewhere, 'point')} of other parts to be trained; once they are, the same"
            " command chooses, and trains fresh seeds"
        )
    if ended.failed:
        print(f"{ended.failed} of {ended.done + ended.failed} points failed", file=sys.stderr)
    return ended.code


def _tell_tables(sweeps: Sequence[Sweep], of: str | None) -> int:
    """Prints each table, and writes it where the sweep has a folder; `of`: where the first two are compared, too."""
    from encoder.finetune.sweeps.table import table_of, write_table

    for sweep in sweeps:
        table = table_of(sweep)
        print(f"\n{sweep.name}: {sweep.out}\n{table.as_text()}")
        if sweep.out.is_dir():
            write_table(table)
    if of is not None:
        from encoder.finetune.sweeps.paired import compare

        ours, theirs = (table_of(sweep) for sweep in sweeps)
        print(
            f"\n{ours.sweep.name} against {theirs.sweep.name}, {of}: {compare(ours, theirs, of=of).text}"
        )
    return 0


def _tell_plan(sweeps: Sequence[Sweep], parallel: int) -> int:
    from encoder.finetune.sweeps.forecast import forecast_text

    print(forecast_text(sweeps, parallel=parallel))
    return 0


if __name__ == "__main__":
    sys.exit(main())
