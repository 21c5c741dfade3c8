"""Training steps of one model on real document lengths, ours beside transformers' ModernBERT, in one process, in turn.

    python benchmarks/step.py --device cpu --shape small --row-tokens 4096 --against hf
    python benchmarks/step.py --device cuda --shape base --length 1024 --row-tokens 16384 --rows 6 --against hf --json FILE

A step is forward and backward of one micro-batch of packed documents and one update of StableAdamW; transformers' is the
same documents padded as its collator pads them (batches of --hf-batch documents in random order), and torch's AdamW.
Tokens are counted without padding. Both start from the same weights; their losses on the same documents and masks must
agree before anything is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from encoder.base.batch import IGNORE, TokenBatch
from encoder.base.rng import generator
from encoder.data.packing import pack_best_fit
from encoder.data.windows import cut
from encoder.models.catalog import PRESETS
from encoder.models.flops import train_flops
from encoder.models.modernbert import ModernBertConfig, ModernBertForMaskedLM
from encoder.optim.groups import decay_groups
from encoder.optim.stable_adamw import StableAdamW, StableAdamWConfig
from encoder.train.meters import bf16_peak, document_lengths

LENGTHS = Path(__file__).with_name("document_lengths.json")
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=1024, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=2),
    "small": dict(vocab_size=8192, hidden_size=256, intermediate_size=384, num_hidden_layers=8, num_attention_heads=4),
    "17m": dict(vocab_size=50368, hidden_size=256, intermediate_size=384, num_hidden_layers=7, num_attention_heads=4),
    **{name.removeprefix("modernbert_"): {k: v for k, v in shape.items() if k != "system"} for name, shape in PRESETS.items()},
}
MASK_SHARE = 0.3


def main() -> None:
    """Prints a line a competitor, and the ratio."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked.add_argument("--shape", choices=SHAPES, default="small")
    asked.add_argument("--length", type=int, default=1024, help="longest document, in tokens")
    asked.add_argument("--row-tokens", type=int, default=4096)
    asked.add_argument("--rows", type=int, default=1, help="rows of a micro-batch")
    asked.add_argument("--precision", choices=("fp32", "autocast"), default="autocast")
    asked.add_argument("--attention", default="auto")
    asked.add_argument("--compile", action="store_true", help="layers by torch.compile")
    asked.add_argument("--against", choices=("hf",))
    asked.add_argument("--hf-attention", default="sdpa")
    asked.add_argument("--hf-batch", type=int, default=8)
    asked.add_argument("--rounds", type=int, default=8)
    asked.add_argument("--dropout", type=float, default=0.1, help="after attention; transformers has none")
    asked.add_argument("--threads", type=int)
    asked.add_argument("--profile", type=Path, help="write where our step's time goes, the twenty largest")
    asked.add_argument("--json", type=Path)
    args = asked.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    config = ModernBertConfig(**SHAPES[args.shape], global_rope_theta=160000.0, attention_output_dropout=args.dropout,
                              max_position_embeddings=8192)
    batches = [make_batch(config, args, number) for number in range(4)]
    runners = {"ours": Ours(config, batches, args, device)}
    if args.against:
        runners["transformers"] = Theirs(config, batches, args, device)
        check_same_loss(runners["ours"], runners["transformers"], precision=args.precision)
    found = measure(runners, rounds=args.rounds, device=device)
    peak = bf16_peak(device)
    for name, result in found.items():
        flops = statistics.mean(train_flops(config, lengths=document_lengths(b), masked_tokens=b.masked_tokens) / b.tokens
                                for b in batches)
        result["tflops_per_second"] = result["tokens_per_second"] * flops / 1e12
        result["mfu"] = result["tflops_per_second"] * 1e12 / peak if peak else None
        share = f", {result['mfu']:.1%} of the bf16 peak" if peak else ""
        print(f"{name:<13}{result['tokens_per_second']:>12,.0f} tokens/s ({result['spread']:.0%} spread)  "
              f"{result['tflops_per_second']:8.2f} TFLOP/s{share}  {result['peak_memory'] / 2**30:6.2f} GiB  {result['how']}")
    if args.against:
        print(f"ours / transformers: {found['ours']['tokens_per_second'] / found['transformers']['tokens_per_second']:.2f}")
    if args.profile:
        args.profile.write_text(profiled(runners["ours"], device=device))
    if args.json:
        facts = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads(),
                 "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
                 "date": time.strftime("%Y-%m-%d")}
        asked_for = {**vars(args), "json": None, "profile": None}
        args.json.write_text(json.dumps({"asked": asked_for, **facts, "results": found}, indent=1) + "\n")


def make_batch(config: ModernBertConfig, args: argparse.Namespace, number: int) -> TokenBatch:
    """Rows packed from real lengths, random ids, of static shape."""
    draw = generator(0, "bench", number)
    pool = np.array(json.loads(LENGTHS.read_text())["lengths"])
    capacity = args.rows * args.row_tokens
    documents = draw.permutation(pool)
    lengths = cut(0, np.arange(len(documents)), documents, min(args.length, args.row_tokens)).tokens_P
    packing = pack_best_fit(lengths, args.row_tokens)
    rows = draw.permutation(packing.rows)[:args.rows]
    real = [n for row in rows for n in lengths[packing.pieces_P[slice(*packing.row_starts_R1[row:row + 2])]].tolist()]
    tokens = sum(real)
    segments, room = list(real), capacity - tokens
    while room:
        segments.append(min(room, args.length))
        room -= segments[-1]
    ends = np.cumsum([0, *segments])
    ids_T = torch.from_numpy(draw.integers(5, config.vocab_size, capacity))
    masked = round(MASK_SHARE * tokens)
    fixed = round(1.05 * MASK_SHARE * capacity)
    index, target = torch.zeros(fixed, dtype=torch.int64), torch.full((fixed,), IGNORE)
    index[:masked] = torch.from_numpy(np.sort(draw.permutation(tokens)[:masked]))
    target[:masked] = torch.from_numpy(draw.integers(5, config.vocab_size, masked))
    seqlens = torch.full((max(len(ends), capacity // 16) + 1,), capacity, dtype=torch.int32)
    seqlens[:len(ends)] = torch.from_numpy(ends)
    return TokenBatch(
        ids_T=ids_T, positions_T=torch.from_numpy(np.arange(capacity) - np.repeat(ends[:-1], segments)).int(),
        cu_seqlens_S1=seqlens, max_seqlen=args.length, predict_index_M=index, predict_target_M=target,
        dropout_key_T=torch.from_numpy(draw.integers(-2**63, 2**63, capacity)), masked_tokens=masked, tokens=tokens)


class Ours:
    """Packed, predicted positions only."""

    def __init__(self, config: ModernBertConfig, batches: list[TokenBatch], args: argparse.Namespace, device: torch.device) -> None:
        self.model = ModernBertForMaskedLM(config, attention=args.attention, seed=1).to(device)
        if args.compile:
            self.model.compile_blocks_()
        self.optimizer = StableAdamW(decay_groups(self.model, weight_decay=1e-5), StableAdamWConfig(), lr=1e-4, max_lr=1e-3)
        self.batches = [b.to(device) for b in batches]
        self.tokens = [b.tokens for b in batches]
        self.autocast = autocast(args, device)
        with self.autocast():
            self.how = self.model.attention_reason(device).split(":")[0] + (", compiled" if args.compile else "")

    def loss(self, number: int) -> torch.Tensor:
        """Mean over the predicted positions."""
        batch = self.batches[number]
        with self.autocast():
            return self.model(batch).total / batch.masked_tokens

    def step(self, number: int) -> None:
        """One update."""
        self.loss(number).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Theirs:
    """transformers: the same documents, padded batches, logits at every position (sparse_prediction where it has that)."""

    def __init__(self, config: ModernBertConfig, batches: list[TokenBatch], args: argparse.Namespace, device: torch.device) -> None:
        import transformers

        own = transformers.ModernBertConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, reference_compile=False, sparse_prediction=True,
            attn_implementation=args.hf_attention, global_rope_theta=160000.0, local_rope_theta=10000.0)
        self.model = transformers.ModernBertForMaskedLM(own)
        self.model.load_state_dict(ModernBertForMaskedLM(config, seed=1).state_dict(), strict=False)
        self.model.tie_weights()
        self.model.to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=device.type == "cuda")
        self.steps = [[{k: v.to(device) for k, v in part.items()} for part in padded(b, args.hf_batch)] for b in batches]
        self.masked = [b.masked_tokens for b in batches]
        self.tokens = [b.tokens for b in batches]
        self.autocast = autocast(args, device)
        share = sum(b.tokens for b in batches) / sum(p["input_ids"].numel() for s in self.steps for p in s)
        self.how = f"{args.hf_attention}, padded, {share:.0%} of it tokens, transformers {transformers.__version__}"

    def loss(self, number: int) -> torch.Tensor:
        """Mean over the predicted positions, the padded batches one after the other."""
        return torch.stack([self._part(part) for part in self.steps[number]]).sum() / self.masked[number]

    def step(self, number: int) -> None:
        """One update; each padded batch goes back at once, as gradient accumulation does."""
        for part in self.steps[number]:
            (self._part(part) / self.masked[number]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _part(self, part: dict[str, torch.Tensor]) -> torch.Tensor:
        count = (part["labels"] != IGNORE).sum()
        with self.autocast():
            return self.model(**part).loss * count


def padded(batch: TokenBatch, size: int) -> list[dict[str, torch.Tensor]]:
    """The documents of a packed micro-batch, `size` at a time, each padded to its longest."""
    labels_T = torch.full_like(batch.ids_T, IGNORE)
    labels_T[batch.predict_index_M[:batch.masked_tokens]] = batch.predict_target_M[:batch.masked_tokens]
    lengths = document_lengths(batch).tolist()
    documents = list(zip(batch.ids_T[:batch.tokens].split(lengths), labels_T[:batch.tokens].split(lengths), strict=True))
    documents = [documents[i] for i in generator(0, "hf order").permutation(len(documents))]
    parts = []
    for start in range(0, len(documents), size):
        ids, labels = zip(*documents[start:start + size], strict=True)
        if not any((label != IGNORE).any() for label in labels):        # transformers cannot be asked nothing
            continue
        pad = torch.nn.utils.rnn.pad_sequence
        parts.append({"input_ids": pad(list(ids), batch_first=True, padding_value=0),
                      "labels": pad(list(labels), batch_first=True, padding_value=IGNORE),
                      "attention_mask": pad([torch.ones_like(i) for i in ids], batch_first=True)})
    return parts


def autocast(args: argparse.Namespace, device: torch.device) -> Callable[[], contextlib.AbstractContextManager]:
    """What a forward runs in."""
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16) if args.precision == "autocast" else contextlib.nullcontext()


def check_same_loss(ours: Ours, theirs: Theirs, *, precision: str) -> None:
    """The same weights, documents and masks give the same loss, or nothing is timed."""
    ours.model.eval(), theirs.model.eval()
    with torch.no_grad():
        a, b = ours.loss(0).item(), theirs.loss(0).item()
    ours.model.train(), theirs.model.train()
    bound = 1e-5 if precision == "fp32" else 2e-3
    if not abs(a - b) <= bound * b:
        sys.exit(f"the loss is {a:.6f} here and {b:.6f} in transformers; needed: equal within {bound:g}. Nothing was timed.")
    print(f"the same loss from the same weights: {a:.6f} and {b:.6f}")


def measure(runners: dict[str, Ours | Theirs], *, rounds: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Tokens per second, in turn; the first two rounds only warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    memory = dict.fromkeys(runners, 0)
    for turn in range(rounds + 2):
        for name, runner in runners.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            began = time.perf_counter()
            for number in range(len(runner.tokens)):
                runner.step(number)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                memory[name] = torch.cuda.max_memory_allocated(device)
            if turn >= 2:
                seconds[name].append(time.perf_counter() - began)
    return {name: {"tokens_per_second": sum(runner.tokens) / statistics.median(seconds[name]),
                   "spread": (max(seconds[name]) - min(seconds[name])) / statistics.median(seconds[name]),
                   "peak_memory": memory[name], "how": runner.how} for name, runner in runners.items()}


def profiled(runner: Ours, *, device: torch.device) -> str:
    """The twenty operations or kernels that take longest, with their share."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for number in range(len(runner.tokens)):
            runner.step(number)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return profile.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=90)


if __name__ == "__main__":
    main()
