#!/usr/bin/env python3
"""Write a run's newest checkpoint, or one checkpoint, as a Hugging Face folder that gave transformers' logits.

python launch/export_hf.py RUN_FOLDER_OR_CHECKPOINT OUT
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Parses, exports, returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="RUN_FOLDER_OR_CHECKPOINT",
                        help="a run's `out`, or one folder of its checkpoints")
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="the folder to write; replaced only if it is an earlier export"
    )
    args = parser.parse_args(argv)

    from encoder.base.command import run_command

    def body() -> None:
        from encoder.train.export import export_run
        proof = export_run(args.source, args.out)
        print(f"wrote {args.out}: transformers gives the same logits within {proof.max_abs_difference:.1e} "
              f"at lengths {', '.join(map(str, proof.lengths))}")

    return run_command(body)


if __name__ == "__main__":
    sys.exit(main())
