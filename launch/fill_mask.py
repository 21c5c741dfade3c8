#!/usr/bin/env python3
"""Ask an exported model: the five likeliest tokens for each [MASK], with plain transformers.

python launch/fill_mask.py HF_FOLDER "The capital of France is [MASK]." [--json FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from encoder.base.command import CommandLine, count, run_command
from encoder.base.files import refuse_foreign, write_json


def main(argv: list[str] | None = None) -> int:
    """Parses, asks, prints, returns the exit code."""
    parser = CommandLine(description=__doc__)
    parser.add_argument(
        "folder", type=Path, metavar="HF_FOLDER", help="a folder written by tessera export"
    )
    parser.add_argument(
        "texts",
        nargs="+",
        metavar="TEXT",
        help="sentences with [MASK] in them, or with the model's own name for it, such as <mask>",
    )
    parser.add_argument(
        "--top", type=count, default=5, metavar="N", help="answers for each [MASK] (default 5)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the answers there")
    args = parser.parse_args(argv)

    def body() -> None:
        if args.json:
            refuse_foreign(
                args.json, ours=lambda head: head.startswith(b"[\n") and b'"masks"' in head
            )
        found = answers(args.folder, args.texts, top=args.top)
        for item in found:
            print(item["text"])
            for at in item["masks"]:
                print("    " + "   ".join(f"{token!r} {share:.1%}" for token, share in at))
        if args.json:
            write_json(args.json, found)

    return run_command(body)


def answers(folder: Path, texts: list[str], *, top: int) -> list[dict[str, Any]]:
    """For each text, for each [MASK] in it, the `top` likeliest tokens with their probabilities. Raises ExportError."""
    from encoder.base.errors import ExportError
    from encoder.tools.page.folders import open_folder

    opened = open_folder(folder, kind="fill_mask")
    # here: it imports torch, and a folder of another kind is refused without it
    from encoder.tools.page.fill_mask import check_masks, fill_mask

    if not 1 <= top <= opened.model.config.vocab_size:
        raise ExportError(f"--top {top}: needed is 1 to {opened.model.config.vocab_size:,}.")
    for text in texts:
        check_masks(opened, text)
    found = [fill_mask(opened, text, top=top, cut=False) for text in texts]
    return [{"text": one.text, "masks": one.masks} for one in found]


if __name__ == "__main__":
    sys.exit(main())
