#!/usr/bin/env python3
"""Make a smaller model of some layers of a trained one: the student of a distillation, as DistilBERT was made of BERT.

    python launch/shrink.py SOURCE OUT --layers 0,2,4,7,9,11 --system distilbert     of BERT's 12
    python launch/shrink.py SOURCE OUT --layers 0,4,8,12,16,20                       of ModernBERT-base's 22

Then train OUT with `init_from: OUT` and `objective: {name: distill, teacher: SOURCE}` in a run file (docs/distillation.md).
"""

from __future__ import annotations

import sys

from encoder.base.command import CommandLine, run_command


def main(argv: list[str] | None = None) -> int:
    """Parses, shrinks, prints, returns the exit code."""
    parser = CommandLine(description=__doc__)
    parser.takes_model_and_out()
    parser.add_argument(
        "--layers",
        required=True,
        metavar="I,I,...",
        help="the source's layers that the new model has, counted from 0, ascending",
    )
    parser.add_argument(
        "--system",
        metavar="NAME",
        help="family of the new model (default: the source's); distilbert for a BERT: no segments",
    )
    args = parser.parse_args(argv)
    words = args.layers.split(",")
    if not all(word.strip().isascii() and word.strip().isdecimal() for word in words):
        parser.error(f"--layers {args.layers}: needed are numbers such as 0,2,4")

    def body() -> None:
        # imported here, so that --help and mistakes need no torch
        from encoder.tools.weights.shrink import shrink_model, student_text

        student = shrink_model(
            args.source, args.out, layers=[int(word) for word in words], system=args.system
        )
        print(student_text(student))
        print(
            f"wrote {args.out}; to train it, a run file without model, with init_from: {args.out}"
            f" and objective: {{name: distill, teacher: {args.source}}}"
        )

    return run_command(body)


if __name__ == "__main__":
    sys.exit(main())
