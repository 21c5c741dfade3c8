#!/usr/bin/env python3
"""Write a run's newest checkpoint, one checkpoint, or a weights folder as a Hugging Face folder that gave our logits.

python launch/export_hf.py SOURCE OUT           for transformers and sentence-transformers
python launch/export_hf.py SOURCE OUT --onnx    for onnxruntime, too: OUT/onnx/model.onnx
"""

from __future__ import annotations

import sys
from pathlib import Path

from encoder.base.command import CommandLine, importing, run_command


def main(argv: list[str] | None = None) -> int:
    """Parses, exports, returns the exit code."""
    parser = CommandLine(description=__doc__)
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a run's `out`, one folder of its checkpoints, or a weights folder",
    )
    parser.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="the folder to write; replaced only if it is an earlier export",
    )
    parser.add_argument(
        "--onnx", action="store_true", help="also write OUT/onnx/model.onnx (needs the extra onnx)"
    )
    parser.add_argument(
        "--network",
        metavar="NAME",
        help="of a model of two networks: generator; default: discriminator, which is used",
    )
    args = parser.parse_args(argv)

    def body() -> None:
        with importing():
            from encoder.tools.weights.export import export_run

        proofs = export_run(args.source, args.out, onnx=args.onnx, network=args.network)
        for asked, proof in proofs.items():
            print(f"wrote {args.out}: {asked} gives {proof}")

    return run_command(body)


if __name__ == "__main__":
    sys.exit(main())
