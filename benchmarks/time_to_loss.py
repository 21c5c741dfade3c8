"""Seconds to a held-out loss: a run file here, beside transformers' Trainer on the same text, tokenizer and shape.

    tessera bench time-to-loss                                     the demo's recipe; make demo prepares its shards
    tessera bench time-to-loss RUN.yaml --ours "" --ours "ranks=2" --ours "optimizer.name=muon phases.0.lr.peak=3e-3"
    tessera bench time-to-loss RUN.yaml --peer-lr 1e-3,2e-3 --seeds 1,2,3 --json FILE

A side is trained alone, one after another, in processes of its own; what is finished is kept in --work and not done again.
The Trainer has documents of the run's own mixture and its own initialization. Unless it is told otherwise, it has as many tokens
in all, batches as large as the run's last phase, and the run's masking rate. Snapshots of all sides are judged by
the same code, in fp32, on the run's held-out documents with the same masks. Seconds are those of training, and of vectors that
are counted before it (init_embeddings): start, evaluation and saving are left out on both sides.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from benchmarks.judge import CPU, Judge, Point, seconds_to
from benchmarks.options import several, several_of, share
from benchmarks.report import Report
from benchmarks.timing import ratio_text
from benchmarks.trainer import POINTS, Peer, grouped, write_peer
from encoder.base.command import count
from encoder.base.errors import ConfigError, UserError
from encoder.base.files import write_json
from encoder.base.rng import generator
from encoder.base.schema import to_plain
from encoder.base.units import parse_tokens, short_count
from encoder.base.world import alone
from encoder.engine.checkpoint.folder import committed_folders, tokens_of
from encoder.engine.precision import precision_on
from encoder.models.hf.catalog import bridge_of
from encoder.models.hf.tokenizer import write_tokenizer
from encoder.objectives.mlm import MlmConfig
from encoder.runs.about import first_vectors_of, starts_of
from encoder.runs.config import RunConfig, read_run
from encoder.runs.facts import DataFacts, check_data
from encoder.runs.folder import CHECKPOINTS, read_metrics
from encoder.train.build import open_mixture

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
DEMO = "configs/pretrain/tiny_cpu.yaml"
WORK = Path("runs/time_to_loss")
FOUND = "found.json"  # of a side: what it was asked, and what it found
# the judge's loss of a last checkpoint beside the one that its run found: the run computes in its own precision
SAME_LOSS = {"fp32": 1e-4, "fp64": 1e-4, "autocast": 5e-3, "bf16": 2e-2}
# of an objective, that the Trainer's collator has no other words for
MASKING = (
    "whole_words",
    "spans",
    "mask_count",
    "mask_special_tokens",
    "random_share",
    "keep_share",
)
# side -> seed -> points
Found: TypeAlias = Mapping[str, Mapping[int, Sequence[Point]]]
QUICK = dict(seeds=[1], points=2, peer_lr=[1e-3])


def options(parser: argparse.ArgumentParser) -> None:
    """Of this question."""
    parser.add_argument("run_file", nargs="?", default=DEMO, help=f"default: {DEMO}")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of every side of ours")
    parser.add_argument(
        "--ours",
        action="append",
        metavar="WORDS",
        help='ranks=N and settings of one side, such as "ranks=2 optimizer.name=muon"; repeatable',
    )
    parser.add_argument(
        "--peer-lr",
        type=several(float),
        default=[1e-3, 2e-3],
        help="the Trainer's peak rates (default 1e-3,2e-3)",
    )
    parser.add_argument(
        "--peer-block",
        type=several(count),
        help="tokens of a block (default: the longest document)",
    )
    parser.add_argument(
        "--peer-tokens",
        type=several(parse_tokens),
        help="its length, such as 1.5M (default: the run's)",
    )
    parser.add_argument(
        "--peer-batch",
        type=several(parse_tokens),
        help="tokens of its steps (default: those of the run's last phase)",
    )
    parser.add_argument(
        "--peer-mask",
        type=several(share),
        help="share of the tokens that it predicts (default: the run's in its first phase)",
    )
    parser.add_argument(
        "--peer-sparse",
        type=several_of("on", "off"),
        default=["on"],
        help="whether its ModernBERT decodes masked tokens alone",
    )
    parser.add_argument(
        "--peer-precision",
        type=several_of("fp32", "autocast"),
        help="default: autocast where the CPU has units for bf16, else fp32",
    )
    parser.add_argument("--seeds", type=several(int), default=[1], help="default 1")
    parser.add_argument("--points", type=count, default=10, help="of a curve (default 10)")
    parser.add_argument("--work", type=Path, default=WORK, help=f"what is kept (default {WORK})")
    parser.add_argument("--curve", type=Path, metavar="PNG", help="also draw the curves")


def ask(args: argparse.Namespace, report: Report) -> None:
    """Trains all sides of all seeds, judges them, and reports. Raises UserError."""
    if args.device != "cpu":
        raise ConfigError("time-to-loss compares CPU runs. Use --device cpu.")
    bench = Bench(args)
    sides = [*bench.our_sides(args.ours or [""]), *bench.peer_sides(args)]
    for seed, side in itertools.product(args.seeds, sides):
        bench.learn(side, seed)
    peers = [side.name for side in sides if side.peer]
    tell(report, bench.found, peers=peers, checks=bench.checks)
    if args.curve:
        draw(args.curve, bench.found)


@dataclass(frozen=True, kw_only=True)
class Side:
    """One way to train."""

    name: str
    words: tuple[str, ...] = ()  # settings of the run file
    ranks: int = 1
    peer: Mapping[str, Any] | None = None  # of the Trainer; None: a side of ours

    def folder(self, work: Path, asked: Mapping[str, Any]) -> Path:
        """A folder of its own for everything that decides what it finds."""
        plain = re.sub(r"[^A-Za-z0-9.]+", "_", self.name).strip("_")
        digest = sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        return work / f"{plain[:60]}-seed{asked['seed']}-{digest[:12]}"


class Bench:
    """The sides of one run file, and what they found: side -> seed -> points."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._path = args.run_file
        self._settings = [*args.settings]
        self.run = read_run(self._path, self._settings)
        self._facts: DataFacts = check_data(self.run)
        check_masking(self.run)
        self._judge = Judge(self.run, self._facts)
        self._points = args.points
        self._work = args.work
        self._threads = torch.get_num_threads()
        self.tokens = sum(phase.tokens for phase in self.run.phases)
        self.found: dict[str, dict[int, list[Point]]] = {}
        self.checks: list[str] = []

    def our_sides(self, asked: Sequence[str]) -> list[Side]:
        """A side each; `ranks=` is taken out of the words. Raises ConfigError, also for words that the run file has not."""
        sides = []
        for text in asked:
            words = shlex.split(text)
            settings = [word for word in words if not word.startswith("ranks=")]
            ranks = 1
            for word in set(words) - set(settings):
                number = word.removeprefix("ranks=")
                if not number.isdecimal() or number == "0":
                    raise ConfigError(
                        f"--ours {text!r}: {word}; needed: a number, such as ranks=2."
                    )
                ranks = int(number)
            # refused before anything is trained
            read_run(self._path, [*self._settings, *settings])
            sides.append(Side(name=f"ours {text}".strip(), words=tuple(settings), ranks=ranks))
        return sides

    def peer_sides(self, args: argparse.Namespace) -> list[Side]:
        """Every rate with every block, length, batch and share of masks, sparse or not."""
        precision = args.peer_precision
        if precision is None:
            precision = [precision_on("auto", CPU)]
        blocks = args.peer_block or [self.run.phases[-1].max_tokens_per_document]
        lengths = args.peer_tokens or [self.tokens]
        masks = args.peer_mask or [self.run.mask_share_of(self.run.phases[0]).highest]
        batches = args.peer_batch or [self.run.phases[-1].batch_tokens]
        sides = []
        for lr, block, tokens, batch, mask, sparse, computed in itertools.product(
            args.peer_lr, blocks, lengths, batches, masks, args.peer_sparse, precision
        ):
            peer = {
                "lr": lr,
                "block": block,
                "tokens": tokens,
                "batch_tokens": batch,
                "mask_share": mask,
                "sparse": sparse == "on",
                "precision": computed,
            }
            dense = "" if sparse == "on" else ", all logits"
            name = (
                f"Trainer {computed}, {short_count(tokens)} tokens by {batch:,}, masks {mask:g},"
                f" rate {lr:g}, blocks of {block}{dense}"
            )
            sides.append(Side(name=name, peer=peer))
        return sides

    def learn(self, side: Side, seed: int) -> None:
        """Trains it, unless that is done, and has it judged."""
        run = read_run(self._path, [*self._settings, *side.words])
        asked = {
            # all of it: how a step is computed decides the seconds
            "run": {
                key: value for key, value in to_plain(run).items() if key not in ("name", "out")
            },
            "shards": self._facts.card_sha256,
            "ranks": side.ranks,
            "threads": self._threads,
            "peer": dict(side.peer) if side.peer else None,
            "seed": seed,
            "points": self._points,
        }
        folder = side.folder(self._work, asked)
        path = folder / FOUND
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
        else:
            shutil.rmtree(folder, ignore_errors=True)
            print(f"training: {side.name}, seed {seed}", flush=True)
            train = self._train_peer if side.peer else self._train_ours
            kept = {"asked": asked, "found": train(side, seed, folder)}
            write_json(path, kept)
        found = kept["found"]
        self.found.setdefault(side.name, {})[seed] = [Point(**point) for point in found["points"]]
        if check := found.get("check"):
            self.checks.append(f"checked: {side.name}, seed {seed}: {check}")

    def _train_ours(self, side: Side, seed: int, folder: Path) -> dict[str, Any]:
        run = folder / "run"
        settings = [
            *self._settings,
            *side.words,
            f"out={run}",
            f"seed={seed}",
            f"checkpoints.every_tokens={max(1, self.tokens // self._points)}",
            f"checkpoints.keep_last={self._points + len(self.run.phases) + 1}",
            f"evaluation.every_tokens={self.tokens}",
        ]
        program = [str(LAUNCH / "pretrain.py"), self._path, *settings]
        launcher = []
        if side.ranks > 1:
            launcher = [
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={side.ranks}",
            ]
        _run([sys.executable, *launcher, *program], folder, threads=self._threads // side.ranks)

        # a checkpoint stands where its step's line says the tokens and the seconds
        lines = {line["tokens"]: line for line in read_metrics(run) if "spent" in line}
        # what was done to the weights before the first step is learning, too
        before = first_vectors_of(starts_of(run)).get("seconds", 0.0)
        points = []
        # the newest comes last
        for checkpoint in sorted(committed_folders(run / CHECKPOINTS), key=tokens_of):
            tokens = tokens_of(checkpoint)
            spent = lines[tokens]["spent"]
            points.append(
                {
                    "tokens": tokens,
                    "seconds": before + spent["training"] + spent["waiting"],
                    "loss": self._judge.loss_of(checkpoint),
                }
            )
        check = self._same_loss(read_run(self._path, settings), run, last=checkpoint)
        shutil.rmtree(run / CHECKPOINTS)
        return {"points": points, "check": check}

    def _same_loss(self, run: RunConfig, folder: Path, *, last: Path) -> str:
        """What the run said of its last checkpoint, and what a judge with the masks of its own seed says."""
        lines = [line for line in read_metrics(folder) if "held_out_loss" in line]
        said = lines[-1]["held_out_loss"]
        judged = Judge(run, self._facts).loss_of(last)
        precision = precision_on(run.engine.precision, CPU)
        if not abs(judged - said) <= SAME_LOSS[precision]:
            raise UserError(
                f"the judge found a held-out loss of {judged:.5f}, the run itself {said:.5f}; needed:"
                f" the same within {SAME_LOSS[precision]:g}. Nothing is reported."
            )
        return f"the run's own last held-out loss {said:.4f}, the judge's {judged:.4f}"

    def _train_peer(self, side: Side, seed: int, folder: Path) -> dict[str, Any]:
        peer = self._peer(side, seed, folder)
        path = write_peer(peer, folder)
        _run([sys.executable, "-m", "benchmarks.trainer", str(path)], folder, threads=self._threads)
        points = []
        for point in json.loads((folder / POINTS).read_text(encoding="utf-8")):
            snapshot = folder / point.pop("folder")
            points.append({**point, "loss": self._judge.loss_of(snapshot)})
            shutil.rmtree(snapshot)
        return {"points": points}

    def _peer(self, side: Side, seed: int, folder: Path) -> Peer:
        asked = side.peer
        assert asked is not None
        run = self.run
        specials = self._facts.specials
        bridge = bridge_of(run.model, specials)
        if bridge is None:
            raise ConfigError(
                "this model has no class in transformers, so its Trainer trains none."
            )
        settings = bridge.to_settings(run.model, specials)
        # its ModernBERT alone has these words
        if settings["model_type"] == "modernbert":
            settings |= {"sparse_prediction": asked["sparse"], "reference_compile": False}

        tokenizer = folder / "tokenizer"
        tokenizer.mkdir(parents=True)
        write_tokenizer(
            tokenizer,
            self._facts.tokenizer_json,
            specials,
            vocab_size=run.model.vocab_size,
            max_tokens=run.model.max_position_embeddings,
        )
        documents = drawn_documents(run, seed=seed, tokens=asked["tokens"])
        blocks = grouped(documents, tokens=asked["block"])
        np.save(folder / "blocks.npy", blocks)
        rows = max(1, round(asked["batch_tokens"] / asked["block"]))
        steps = math.ceil(asked["tokens"] / (rows * asked["block"]))
        return Peer(
            tokenizer=str(tokenizer),
            settings=settings,
            blocks=str(folder / "blocks.npy"),
            rows=rows,
            steps=steps,
            every_steps=max(1, steps // self._points),
            lr=asked["lr"],
            mask_share=asked["mask_share"],
            autocast=asked["precision"] == "autocast",
            threads=self._threads,
            seed=seed,
        )


def check_masking(run: RunConfig) -> None:
    """The Trainer's collator can mask as the run does. Raises ConfigError."""
    objective = run.objective
    usual = MlmConfig(mask_share=run.mask_share_of(run.phases[0]).highest)
    strange = [name for name in MASKING if getattr(objective, name, None) != getattr(usual, name)]
    if strange:
        raise ConfigError(
            f"objective {', '.join(strange)}: the Trainer's collator masks single tokens, 80 % of them"
            " as [MASK], 10 % by another, 10 % not at all. Needed: objective {name: mlm} with no"
            " more than mask_share."
        )


def drawn_documents(run: RunConfig, *, seed: int, tokens: int) -> list[np.ndarray]:
    """Whole documents of the run's first mixture, by its weights, so many tokens of them, mixed.

    A source with less text than its share gives all of it, once.
    """
    mixture = run.sources_of(run.phases[0])
    whole = sum(source.weight for source in mixture)
    draw = generator(seed, "grouped")
    documents: list[np.ndarray] = []
    for settings, source in zip(mixture, open_mixture(mixture), strict=True):
        left = tokens * settings.weight / whole
        for number in draw.permutation(source.documents):
            if left <= 0:
                break
            documents.append(source.read(int(number)))
            left -= len(documents[-1])
    return [documents[i] for i in draw.permutation(len(documents))]


def _run(command: Sequence[str], folder: Path, *, threads: int) -> None:
    """A process that says what it says into a log. Raises UserError with its last line where it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    settings = {
        "OMP_NUM_THREADS": str(max(1, threads)),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(LAUNCH.parent), os.environ.get("PYTHONPATH", "")]),
    }
    with alone(), log.open("w", encoding="utf-8") as out:
        done = subprocess.run(
            [*command], stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **settings}
        )
    if done.returncode:
        lines = log.read_text(encoding="utf-8").strip().splitlines()
        said = lines[-1] if lines else "nothing was said"
        raise UserError(f"{log}: exit code {done.returncode}: {said}")


def tell(report: Report, found: Found, *, peers: Sequence[str], checks: Sequence[str]) -> None:
    """The table.

    report: that gets it
    found: side -> seed -> points
    peers: the names of those sides that are no ours
    checks: what was compared before
    """
    best = min(peers, key=lambda name: _mean_last(found[name]))
    rows = []
    figures = {}
    for name, seeds in found.items():
        times, ratios = against(found[best], seeds)
        last = [points[-1] for points in seeds.values()]
        losses = [point.loss for point in last]
        rows.append(
            (
                name,
                f"{statistics.mean(losses):.3f}",
                f"{max(losses) - min(losses):.3f}",
                f"{statistics.mean(point.seconds for point in last):.0f}",
                _mean_text(times),
                _ratio_text(ratios),
            )
        )
        figures[name] = {
            "points": {seed: [asdict(point) for point in points] for seed, points in seeds.items()},
            "seconds_to_best_peer": times,
            "times_as_fast": ratios,
        }
    first = next(iter(found.values()))
    report.add(
        f"Time to loss, {next(iter(first.values()))[-1].tokens:,} tokens, {len(first)} seeds",
        head=["side", "last loss", "spread", "seconds", "to best peer's loss", "times as fast"],
        rows=rows,
        notes=[*checks, f"best peer: {best}"],
        figures=figures,
    )


def against(
    peer: Mapping[int, Sequence[Point]], ours: Mapping[int, Sequence[Point]]
) -> tuple[list[float | None], list[float | None]]:
    """Of each seed: seconds to the peer's last loss, and the peer's seconds over them; None where it was not reached."""
    times = [seconds_to(points, peer[seed][-1].loss) for seed, points in ours.items()]
    ratios = []
    for seed, seconds in zip(ours, times, strict=True):
        ratios.append(None if seconds is None else peer[seed][-1].seconds / seconds)
    return times, ratios


def draw(path: Path, found: Found) -> None:
    """The curves of all sides and seeds, a colour a side."""
    # here: matplotlib takes seconds
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, seeds) in enumerate(found.items()):
        for points in seeds.values():
            axes.plot(
                [point.seconds for point in points],
                [point.loss for point in points],
                color=f"C{number}",
                marker=".",
                label=name if points is next(iter(seeds.values())) else None,
            )
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("held-out loss, nats a masked token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _mean_last(seeds: Mapping[int, Sequence[Point]]) -> float:
    """Infinite where a seed diverged."""
    losses = [points[-1].loss for points in seeds.values()]
    if not all(math.isfinite(loss) for loss in losses):
        return math.inf
    return statistics.mean(losses)


def _mean_text(times: Sequence[float | None]) -> str:
    reached = [seconds for seconds in times if seconds is not None]
    if len(reached) < len(times):
        return "not reached"
    return f"{statistics.mean(reached):.0f} s"


def _ratio_text(ratios: Sequence[float | None]) -> str:
    reached = sorted(ratio for ratio in ratios if ratio is not None)
    if len(reached) < len(ratios):
        return "-"
    return ratio_text((reached[0], statistics.median(reached), reached[-1]))
