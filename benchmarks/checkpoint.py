"""How long a save holds training up: ours, which copies and writes in the background, beside torch.save and safetensors.

    python launch/bench.py checkpoint [--shape small] [--folder FOLDER]

What is saved is a model's weights and its optimizer's two moments in fp32, by one rank. Before anything is timed a checkpoint is
written, and its weights read back must be those that were there. The stall is what training waits; committed is when the
checkpoint counts, synced and hashed, while training steps of the same model go on: their slowdown stands beside it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from benchmarks.report import Report
from benchmarks.step import Ours, forward_context
from benchmarks.workload import SHAPES, config_of, make_batch
from encoder.base.dist import World
from encoder.base.errors import ConfigError, UserError
from encoder.base.units import Progress
from encoder.engine.checkpoint.read import claim_incarnation, read_weights
from encoder.engine.checkpoint.save import Saved, Saver
from encoder.engine.engine import Engine, StateShard

QUICK = dict(shape="tiny")


def options(parser: argparse.ArgumentParser) -> None:
    """Of this question."""
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="FOLDER",
        help="where to write, for a while (the system's for such files)",
    )


def ask(args: argparse.Namespace, report: Report) -> None:
    """Three lines."""
    if args.folder and not args.folder.is_dir():
        raise ConfigError(f"--folder {args.folder} is no folder. Make it, or name another.")
    device, config = torch.device(args.device), config_of(args.shape, dropout=0.0)
    batches = [
        make_batch(vocab_size=config.vocab_size, longest=256, row_tokens=512, rows=1, number=0)
    ]
    side = Ours(
        config,
        batches,
        attention="auto",
        compiled="off",
        device=device,
        autocast=forward_context("autocast", device),
    )
    side.step(0)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        saves = _Saves(side, Path(scratch))
        saves.check()
        found = {
            "ours, in the background": list(rounds(saves.ours, args.rounds)),
            "safetensors, blocking": list(rounds(saves.safetensors, args.rounds)),
            "torch.save, blocking": list(rounds(saves.torch_save, args.rounds)),
            # steps while nothing is saved, for comparison
        }
        alone = statistics.median(_step_seconds(side, device) for _ in range(args.rounds))
    size = saves.bytes

    # ratios above 1 say that training waits longer than for ours
    stalls = {name: [r["stall_seconds"] for r in taken] for name, taken in found.items()}
    ratios = {
        name: statistics.median(stalls[name]) / statistics.median(stalls["ours, in the background"])
        for name in found
    }
    rows = []
    for name, taken in found.items():
        stall = statistics.median(stalls[name])
        steps = [r["step_seconds"] for r in taken if r.get("step_seconds")]
        rows.append(
            [
                name,
                f"{1e3 * stall:.1f}",
                f"{(max(stalls[name]) - min(stalls[name])) / stall:.0%}",
                f"{statistics.median(r['done_seconds'] for r in taken):.2f}",
                f"{statistics.median(steps) / alone:.2f}" if steps else "-",
                f"{ratios[name]:.1f}",
            ]
        )
    report.add(
        f"Saves: {args.shape}, {size / 1e6:,.1f} MB, one rank",
        head=[
            "",
            "stall ms",
            "spread",
            "done s",
            "steps meanwhile, times as long",
            "times our stall",
        ],
        rows=rows,
        notes=[
            "checked: the weights read back from a checkpoint are those that were there",
            f"a step alone takes {1e3 * alone:.1f} ms",
        ],
        figures={"bytes": size, "rounds": found, "step_alone_seconds": alone, "ratios": ratios},
    )


def rounds(save: Callable[[int], dict[str, Any]], number: int) -> Iterator[dict[str, Any]]:
    """Some saves; the first, whose memory is new, is not counted."""
    for i in range(number + 1):
        taken = save(i)
        if i:
            yield taken


class _Saves:
    """Three ways to write the same state."""

    def __init__(self, side: Ours, folder: Path) -> None:
        self._side, self._folder = side, folder
        model, state = side.model, side.optimizer.state
        self._names = {name: p for name, p in model.named_parameters()}
        self._state = state
        self.bytes = sum(t.nbytes for piece in self._pieces() for t in piece.tensors.values())
        engine = SimpleNamespace(  # what Saver asks of one, without DeepSpeed
            world=World(),
            owned_pieces=self._pieces,
            optimizer_steps=1,
            shapes={n: tuple(p.shape) for n, p in self._names.items()},
            config=SimpleNamespace(zero_stage=0, precision="autocast"),
        )
        self._saver = Saver(
            folder / "checkpoints",
            engine=cast(Engine, engine),
            incarnation=claim_incarnation(folder, World()),
            keep_last=1,
        )
        self._tokens = 0
        self._device = next(model.parameters()).device

    def ours(self, _number: int) -> dict[str, Any]:
        """Stall, time to the commit, and a step's length meanwhile."""

        # the device is idle, so that no earlier work counts as stall
        self._settle()
        self._tokens += 1
        began = time.perf_counter()
        self._saver.start(Progress(step=self._tokens, tokens=self._tokens), run_yaml="", extra={})
        stall, steps = time.perf_counter() - began, []
        # training goes on while it writes; a turn of the saver holds it up, so it counts as stall
        while self._saver.busy:
            if self._saver.ready:
                turned = time.perf_counter()
                self._saver.advance()
                stall += time.perf_counter() - turned
            else:
                steps.append(_step_seconds(self._side, self._device))
        return {
            "stall_seconds": stall,
            "done_seconds": time.perf_counter() - began,
            "step_seconds": statistics.median(steps) if steps else None,
        }

    def safetensors(self, _number: int) -> dict[str, Any]:
        """One file, as it is usually written: no sync, no hash."""
        from safetensors.torch import save_file

        return self._blocking(
            lambda tensors: save_file(tensors, self._folder / "plain.safetensors")
        )

    def torch_save(self, _number: int) -> dict[str, Any]:
        """One file, no sync, no hash."""
        return self._blocking(lambda tensors: torch.save(tensors, self._folder / "plain.pt"))

    def check(self) -> None:
        """Raises UserError where a checkpoint gives back other weights."""
        self._tokens += 1
        there = {name: p.detach().cpu().clone() for name, p in self._names.items()}
        self._saver.start(Progress(step=self._tokens, tokens=self._tokens), run_yaml="", extra={})
        saved: Saved | None = self._saver.wait()
        assert saved is not None, "a save was started"
        read = read_weights(saved.path)
        wrong = [name for name, tensor in there.items() if not torch.equal(read[name], tensor)]
        if wrong:
            raise UserError(
                f"{len(wrong)} tensors of a checkpoint, {wrong[0]} first, are not those that were"
                " saved. Nothing was timed."
            )

    def _blocking(self, write: Callable[[dict[str, torch.Tensor]], object]) -> dict[str, Any]:
        self._settle()
        began = time.perf_counter()
        write(
            # on the host, as a writer of files needs them
            {
                f"{piece.name}/{kind}": t.cpu()
                for piece in self._pieces()
                for kind, t in piece.tensors.items()
            }
        )
        took = time.perf_counter() - began
        return {"stall_seconds": took, "done_seconds": took}

    def _pieces(self) -> list[StateShard]:
        return [
            StateShard(
                name=name,
                start=0,
                tensors={
                    "master": p.detach().view(-1),
                    **{kind: self._state[p][kind].view(-1) for kind in ("exp_avg", "exp_avg_sq")},
                },
            )
            for name, p in self._names.items()
        ]

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _step_seconds(side: Ours, device: torch.device) -> float:
    began = time.perf_counter()
    side.step(0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
