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
    from encoder.base.files import native_path

    if not (folder / "config.json").is_file():
        raise ExportError(
            f"{folder} holds no config.json; needed: a folder written by tessera export."
        )
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    try:
        with native_path(folder) as name:
            of_disk = {"local_files_only": True, "trust_remote_code": False}
            tokenizer = AutoTokenizer.from_pretrained(name, **of_disk)
            model = AutoModelForMaskedLM.from_pretrained(
                name, attn_implementation="sdpa", **of_disk
            ).eval()
    except Exception as error:
        # transformers, tokenizers and safetensors each raise their own kinds
        why = " ".join(str(error).split())[:200]
        raise ExportError(
            f"{folder} cannot be read as a model ({why}). Export again with tessera export."
        ) from error
    if not 1 <= top <= model.config.vocab_size:
        raise ExportError(f"--top {top}: needed is 1 to {model.config.vocab_size:,}.")
    # RoBERTa's table has two rows more than its longest text
    longest = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    # [MASK] in any model's text, or the tokenizer's own name: <mask> in RoBERTa and XLNet
    masked = [text.replace("[MASK]", tokenizer.mask_token) for text in texts]
    for text, asked in zip(texts, masked, strict=True):
        if tokenizer.mask_token not in asked:
            raise ExportError(f"{text!r} has no [MASK]; write one where the model shall answer.")
    found = []
    for text, asked in zip(texts, masked, strict=True):
        inputs = tokenizer(asked, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        if length > longest:
            raise ExportError(
                f"a text of {length:,} tokens is longer than the model's {longest:,}. Shorten it."
            )
        with torch.no_grad():
            logits_TV = model(**inputs).logits[0]

        # where the text had [MASK]; logits are [tokens, vocabulary]
        places = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero().flatten().tolist()
        masks = []
        for place in places:
            best = torch.softmax(logits_TV[place].float(), -1).topk(top)
            pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            masks.append([(tokenizer.decode([token]), share) for share, token in pairs])
        found.append({"text": text, "masks": masks})
    return found


if __name__ == "__main__":
    sys.exit(main())
