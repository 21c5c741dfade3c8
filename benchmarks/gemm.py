"""The card's own ceiling: TFLOP/s of bf16 matrix products, for large square ones and for every shape that a model multiplies.

    python benchmarks/gemm.py --shape base --tokens 98304 [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from step import SHAPES

from encoder.models.modernbert import ModernBertConfig


def main() -> None:
    """One line a shape; each forward product has two of the same FLOP on the way back, of other layouts."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--shape", choices=SHAPES, default="base")
    asked.add_argument("--tokens", type=int, default=98304)
    asked.add_argument("--device", default="cuda")
    asked.add_argument("--json", type=Path)
    args = asked.parse_args()
    config = ModernBertConfig(**SHAPES[args.shape])
    c, f, inner = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_width
    masked = int(0.3 * args.tokens)
    shapes = {"square 8192": (8192, 8192, 8192), "Wqkv": (args.tokens, c, 3 * inner), "Wo": (args.tokens, inner, c),
              "Wi": (args.tokens, c, 2 * f), "mlp Wo": (args.tokens, f, c), "head": (masked, c, c),
              "decoder, a piece": (2048, c, config.vocab_size)}
    found = {}
    for name, (m, k, n) in shapes.items():
        forms = {"forward": ((m, k), (n, k), "nt"), "d input": ((m, n), (n, k), "nn"), "d weight": ((m, n), (m, k), "tn")}
        found[name] = {form: tflops(*form_of, flops=2 * m * k * n, device=args.device) for form, form_of in forms.items()}
        print(f"{name:<18}{m:>8} x {k:>6} x {n:>6}  " + "  ".join(f"{form} {value:7.1f}" for form, value in found[name].items()))
    if args.json:
        args.json.write_text(json.dumps({"asked": {**vars(args), "json": None}, "torch": torch.__version__,
                                         "device": torch.cuda.get_device_name(), "tflops": found}, indent=1) + "\n")


def tflops(left: tuple[int, int], right: tuple[int, int], form: str, *, flops: int, device: str) -> float:
    """Median of 7 rounds of 5 products."""
    a, b = (torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in (left, right))
    a, b = (a.T if form[0] == "t" else a), (b.T if form[1] == "t" else b)
    seconds = []
    for turn in range(9):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(5):
            a @ b
        end.record()
        torch.cuda.synchronize()
        if turn >= 2:
            seconds.append(start.elapsed_time(end) / 5e3)
    return flops / statistics.median(seconds) / 1e12


if __name__ == "__main__":
    main()
