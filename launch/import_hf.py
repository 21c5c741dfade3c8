#!/usr/bin/env python3
"""Take a model from Hugging Face, or from ModernBERT's own training code, as a weights folder.

    python launch/import_hf.py HF_FOLDER OUT                          of ModernBERT, BERT, RoBERTa, DistilBERT, ALBERT, XLNet
                                                                      or ELECTRA
    python launch/import_hf.py answerdotai/ModernBERT-base OUT        from the Hugging Face hub, where there is a network
    python launch/import_hf.py ep0-ba1000-rank0.pt OUT                a checkpoint of Composer's trainer: it says all settings
    python launch/import_hf.py STATE_DICT.pt OUT --global-rope-theta 160000 --tokenizer tokenizer.json

What a .pt does not say is listed as assumed; what it says is never put aside. A Hugging Face folder is proven before OUT
appears: transformers gives the same logits, within 1e-4 in fp32 or 1e-6 in fp64. A run starts from OUT with init_from: OUT.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

from encoder.base.command import CommandLine, count, run_command


def main(argv: list[str] | None = None) -> int:
    """Parses, imports, returns the exit code."""
    parser = CommandLine(description=__doc__)
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help=(
            "a Hugging Face folder, ORG/NAME[@REVISION] on its hub, or a .pt file in FlexBERT's"
            " names"
        ),
    )
    parser.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="the weights folder to write; replaced only if it is an earlier one",
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="tokenizer.json, where SOURCE has none"
    )
    parser.add_argument(
        "--global-rope-theta", type=float, metavar="THETA", help="of a .pt that does not say it"
    )
    parser.add_argument(
        "--local-rope-theta",
        type=float,
        metavar="THETA",
        help="of a .pt that does not say it (default 10000)",
    )
    parser.add_argument(
        "--heads",
        type=count,
        metavar="N",
        help="of a .pt that does not say them (default: hidden size / 64)",
    )
    args = parser.parse_args(argv)

    def body() -> None:
        from encoder.tools.weights.imports import Told, import_model

        words = ("global_rope_theta", "local_rope_theta", "heads")
        given = {word: value for word in words if (value := getattr(args, word)) is not None}
        told = cast(Told, given)
        model, proof = import_model(args.source, args.out, tokenizer=args.tokenizer, told=told)
        config = model.config
        facts = [
            config.shape_text,
            *(f"{name} {value}" for name, value in config.phase_texts.items()),
        ]
        tokenizer = "with its" if model.tokenizer_json else "no"
        print(f"wrote {args.out}: {', '.join(facts)}, {tokenizer} tokenizer; from {model.origin}")
        if proof is not None:
            print(f"transformers gives {proof}")

    return run_command(body)


if __name__ == "__main__":
    sys.exit(main())
