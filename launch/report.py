#!/usr/bin/env python3
"""Draw runs: loss.png and report.html with curves, results and where the time went; each ledger's chain is checked.

python launch/report.py RUN_FOLDER                        into the run's folder
python launch/report.py RUN_FOLDER RUN_FOLDER --out OUT    several runs in one page
"""

from __future__ import annotations

import sys
from pathlib import Path

from encoder.base.command import CommandLine, run_command


def main(argv: list[str] | None = None) -> int:
    """Parses, writes, returns the exit code."""
    parser = CommandLine(description=__doc__)
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="RUN_FOLDER", help="a run file's `out`"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where the page goes; needed for several runs"
    )
    args = parser.parse_args(argv)

    def body() -> None:
        from encoder.base.errors import ConfigError
        from encoder.tools.report.report import verify_ledger, write_report

        if len(args.folders) > 1 and args.out is None:
            raise ConfigError(
                f"{len(args.folders)} runs and no place for their page. Name one: --out FOLDER."
            )
        page = write_report(args.folders, args.out or args.folders[0])
        for folder in args.folders:
            # each line of a ledger holds the hash of the one before
            print(f"ledger of {folder}: {verify_ledger(folder):,} steps, chain unbroken")
        print(f"wrote {page} and {page.with_name('loss.png')}")

    return run_command(body)


if __name__ == "__main__":
    sys.exit(main())
