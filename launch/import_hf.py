#!/usr/bin/env python3
"""Take a model from Hugging Face, or from ModernBERT's own training code, as a weights folder.

    python launch/import_hf.py HF_FOLDER OUT
    python launch/import_hf.py ep0-ba1000-rank0.pt OUT                a checkpoint of Composer's trainer: it says all settings
    python launch/import_hf.py STATE_DICT.pt OUT --global-rope-theta 160000 --tokenizer tokenizer.json

What a .pt does not say is listed as assumed; what it says is never put aside. A Hugging Face folder is proven before OUT
appears: transformers gives the same logits, within 1e-4 in fp32 or 1e-6 in fp64. A run starts from OUT with init_from: OUT.
"""

from __future__ import annotations

import sys
from pathlib import Path

from encoder.base.command import CommandLine, count, run_command


def main(argv: list[str] | None = None) -> int:
    """Parses, imports, returns the exit code."""
    parser = CommandLine(description=__doc__)
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a folder with config.json and weights, or a .pt file in FlexBERT's names",
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
        import dataclasses
        import tempfile

        from encoder.base.errors import ModelError
        from encoder.models.composer_import import read_composer
        from encoder.models.hf_import import prove_import, read_hf
        from encoder.models.hf_tokenizer import check_tokenizer
        from encoder.models.stored import write_stored

        def imported(scratch: Path) -> None:
            told = {
                k: v
                for k in ("global_rope_theta", "local_rope_theta", "heads")
                if (v := getattr(args, k)) is not None
            }
            if args.source.is_dir():
                if told:
                    raise ModelError(
                        f"--{next(iter(told)).replace('_', '-')} has no effect on a folder, whose "
                        "config.json says it. "
                        "Leave it out."
                    )
                model = read_hf(args.source)
            else:
                model = read_composer(args.source, **told, tokenizer_to=scratch / "tokenizer.json")
            if args.tokenizer is not None:
                if model.tokenizer_json is not None:
                    raise ModelError(
                        f"--tokenizer is not needed: {args.source} has its own tokenizer.json. "
                        "Leave it out."
                    )
                model = dataclasses.replace(model, tokenizer_json=args.tokenizer)
            if model.tokenizer_json is not None:
                check_tokenizer(model.tokenizer_json, vocab_size=model.config.vocab_size)
            proof = prove_import(model, args.source) if args.source.is_dir() else None
            write_stored(model, args.out)
            c = model.config
            print(
                f"wrote {args.out}: {c.num_hidden_layers} layers of {c.hidden_size}, "
                f"{c.num_attention_heads} heads, vocabulary "
                f"{c.vocab_size:,}, RoPE theta {c.global_rope_theta:,.0f} global "
                f"{c.local_rope_theta:,.0f} local, "
                f"{'with its' if model.tokenizer_json else 'no'} tokenizer; from {model.origin}"
            )
            if proof is not None:
                print(f"transformers gives {proof}")

        if not args.source.exists():
            raise ModelError(
                f"{args.source} does not exist; needed: a Hugging Face folder or a .pt file."
            )
        with tempfile.TemporaryDirectory() as scratch:
            imported(Path(scratch))

    return run_command(body)


if __name__ == "__main__":
    sys.exit(main())
