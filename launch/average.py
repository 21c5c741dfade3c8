#!/usr/bin/env python3
"""Write the mean of checkpoints' weights as a weights folder, as ModernBERT-base is the mean of four of its decay.

    python launch/average.py RUN/checkpoints/A RUN/checkpoints/B [...] --out OUT
    python launch/average.py RUN --out OUT              the weights of the newest checkpoint, as they are

Then export OUT (tessera export), grow it, or train it on (init_from: OUT).
"""

from __future__ import annotations

import sys
from pathlib import Path

from encoder.base.command import CommandLine, run_command


def main(argv: list[str] | None = None) -> int:
    """Parses, averages, returns the exit code."""
    parser = CommandLine(description=__doc__)
    parser.add_argument(
        "checkpoints",
        nargs="+",
        type=Path,
        metavar="CHECKPOINT",
        help=(
            "a folder of RUN/checkpoints, or a run folder for its newest; all of the same model and"
            " tokenizer"
        ),
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="OUT",
        help="the weights folder to write; replaced only if it is an earlier weights folder",
    )
    args = parser.parse_args(argv)

    def body() -> None:
        # imported here, so that --help and mistakes need no torch
        from encoder.tools.weights.average import average_checkpoints

        model = average_checkpoints(args.checkpoints, args.out)
        print(f"wrote {args.out}: {model.origin}")

    return run_command(body)


if __name__ == "__main__":
    sys.exit(main())
