#!/usr/bin/env python3
"""Draw a run: loss.png and report.html in its folder, and its ledger's chain checked.

    python launch/report.py RUN_FOLDER
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Parses, writes, returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="a run file's `out`")
    args = parser.parse_args(argv)

    from encoder.base.command import run_command

    def body() -> None:
        from encoder.train.report import verify_ledger, write_report
        page = write_report(args.folder)
        print(f"ledger: {verify_ledger(args.folder):,} steps, chain unbroken")
        print(f"wrote {page} and {page.with_name('loss.png')}")

    return run_command(body)


if __name__ == "__main__":
    sys.exit(main())
