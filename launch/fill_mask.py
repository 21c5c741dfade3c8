#!/usr/bin/env python3
"""Ask an exported model: the five likeliest tokens for each [MASK], with plain transformers.

    python launch/fill_mask.py HF_FOLDER "The capital of France is [MASK]." [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Parses, asks, prints, returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="HF_FOLDER")
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="sentences with [MASK] in them")
    parser.add_argument("--top", type=int, default=5, help="answers for each [MASK]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the answers there")
    args = parser.parse_args(argv)
    if not (args.folder / "config.json").is_file():
        print(
            f"error: {args.folder} holds no config.json; needed: a folder written by launch/export_hf.py",
            file=sys.stderr,
        )
        return 2
    without = next((t for t in args.texts if "[MASK]" not in t), None)
    if without is not None:
        print(f"error: {without!r} has no [MASK]; write one where the model shall answer", file=sys.stderr)
        return 2
    found = answers(args.folder, args.texts, top=args.top)
    for item in found:
        print(item["text"])
        for at in item["masks"]:
            print("    " + "   ".join(f"{token!r} {share:.0%}" for token, share in at))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def answers(folder: Path, texts: list[str], *, top: int) -> list[dict]:
    """For each text, for each [MASK] in it, the `top` likeliest tokens with their probabilities."""
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    found = []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            logits_TV = model(**inputs).logits[0]
        places = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero().flatten().tolist()
        masks = []
        for place in places:
            best = torch.softmax(logits_TV[place].float(), -1).topk(top)
            masks.append([(tokenizer.decode([i]), p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)])
        found.append({"text": text, "masks": masks})
    return found


if __name__ == "__main__":
    sys.exit(main())
