"""What each family costs beside masked tokens with the same body: tokens a second, by the clock and by CPU time, and where it goes.

    python benchmarks/families/cost.py [NAME ...] [--rounds 20] [--json FILE]
    python benchmarks/families/cost.py --draw               the table of docs/families.md, from the file

Runs in the folder that holds shards/ (prep_four.yaml and prep_unigram.yaml make them). All are four layers of 256 with four heads
and no dropout; a step is eight rows of 512 tokens. Each side takes one step a round, in turn.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.families.shares import PARTS, in_part, shares_of
from benchmarks.timing import Timed, cpu_ratio, in_turn, paired_ratio, ratio_text
from encoder.base.command import CommandLine, count, run_command
from encoder.base.dist import World, join, leave
from encoder.base.errors import ConfigError
from encoder.data.loader import DataPosition
from encoder.engine.engine import start_engine
from encoder.engine.precision import precision_on
from encoder.runs.about import versions
from encoder.runs.config import RunConfig, read_run, with_engine
from encoder.runs.defaults import settled
from encoder.runs.facts import check_data, named_sources
from encoder.train import build

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks/results/families/cost.json"
PAGE = ROOT / "docs/families.md"
BEGIN = "<!-- cost: written by benchmarks/families/cost.py -->"
END = "<!-- cost ends -->"
CPU = torch.device("cpu")
BODY = (
    "hidden_size: 256, intermediate_size: 1024, num_hidden_layers: 4, num_attention_heads: 4,"
    " max_position_embeddings: 512"
)
QUIET = "embedding_dropout: 0.0, attention_output_dropout: 0.0, mlp_output_dropout: 0.0"
QUIET_XLNET = f"{QUIET}, mlp_inner_dropout: 0.0, last_dropout: 0.0"
MASKS = "mask_share: 0.15, mask_count: round, random_tokens: vocabulary"
RUN = """
name: cost
out: none
data: {{sources: [{{path: {shards}}}], row_tokens: 512}}
model: {{system: {system}, {body}, {model}}}
objective: {{{objective}}}
optimizer: {{name: adamw, weight_decay: 0.01}}
phases: {{tokens: 400K, max_tokens_per_document: {document}, batch_tokens: 4096, lr: 1.0e-4}}
engine: {{gradient_clipping: 1.0}}
loader: {{workers: 0, micro_batch_rows: 8}}
evaluation: null
device: cpu
"""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One family, and what it is held against."""

    system: str
    objective: str
    model: str = QUIET
    beside: str | None = "bert_mlm"  # None: masked tokens itself
    shards: str = "shards/wordpiece4/web/train"
    document_tokens: int = 128
    says: str = ""  # in the table


SIDES = {
    "bert_mlm": Side(
        system="bert", objective=f"name: mlm, {MASKS}", beside=None, says="BERT, masks alone"
    ),
    "bert": Side(
        system="bert", objective=f"name: mlm_nsp, {MASKS}", says="BERT, masks and next sentence"
    ),
    "albert": Side(
        system="albert",
        objective=f"name: mlm_sop, {MASKS}, whole_words: true, spans: ngram",
        says="ALBERT, n-grams and order",
    ),
    "electra": Side(
        system="electra",
        objective="name: rtd",
        model=f"{QUIET}, embedding_size: 128, generator_fraction: 0.25",
        says="ELECTRA, a generator of 1/4",
    ),
    "xlnet": Side(
        system="xlnet",
        objective="name: plm, block_tokens: 64",
        model=QUIET_XLNET,
        shards="shards/unigram/web/train",
        says="XLNet",
    ),
    "xlnet_memory": Side(
        system="xlnet",
        objective="name: plm, block_tokens: 64, segment_tokens: 128, memory_tokens: 96",
        model=QUIET_XLNET,
        shards="shards/unigram/web/train",
        document_tokens=512,
        says="XLNet, documents of 512, memory of 96",
    ),
    "modernbert_mlm": Side(
        system="modernbert",
        objective=f"name: mlm, {MASKS}",
        model="attention_output_dropout: 0.0",
        beside=None,
        says="ModernBERT, masks alone",
    ),
    "modernbert_rtd": Side(
        system="modernbert_rtd",
        objective="name: rtd",
        model="attention_output_dropout: 0.0, generator_layers: 2",
        beside="modernbert_mlm",
        says="ModernBERT by replaced tokens, a generator of 2 layers",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The measurement and its file, then the table."""
    asked = CommandLine(description=__doc__)
    asked.add_argument("names", nargs="*", help=f"all by default: {', '.join(SIDES)}")
    asked.add_argument("--rounds", type=count, default=20, help="counted ones (default 20)")
    asked.add_argument("--json", type=Path, default=RESULT, metavar="FILE")
    asked.add_argument("--draw", action="store_true", help="only write the table of the page")
    args = asked.parse_args(argv)

    def body() -> None:
        if not args.draw:
            found = compare(_with_references(args.names or [*SIDES]), rounds=args.rounds)
            args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        found = json.loads(args.json.read_text(encoding="utf-8"))
        print(table_text(found))
        if args.json == RESULT:
            write_table(PAGE, found)

    return run_command(body)


def _with_references(names: Sequence[str]) -> list[str]:
    """The sides asked for, and what they are held against."""
    for name in names:
        if name not in SIDES:
            raise ConfigError(f"{name} is no family here; needed: one of {', '.join(SIDES)}.")
    found = {name for name in names} | {SIDES[name].beside for name in names}
    return [name for name in SIDES if name in found]


def compare(names: Sequence[str], *, rounds: int) -> dict[str, Any]:
    """What was seen.

    names: of SIDES
    rounds: that are counted
    """
    joined = join(World(), device=CPU)
    sides = {name: Trained(SIDES[name]) for name in names}
    timed = in_turn({name: side.step for name, side in sides.items()}, rounds=rounds, device=CPU)
    per_token = {name: _per_token(timed[name], sides[name].tokens) for name in names}
    found = {}
    for name, side in sides.items():
        side.tokens.clear()
        found[name] = {
            **_figures(per_token[name]),
            "parameters": side.model.parameter_count(),
            "precision": side.run.engine.precision,
            "shares": shares_of(side.model, side.step),
        }
        beside = SIDES[name].beside
        if beside in per_token:
            found[name] |= _ratios(per_token[name], per_token[beside])
    if joined:
        leave(peer_failed=False)
    return {
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "sides": found,
        "versions": versions(),
    }


class Trained:
    """A run's loader and engine, a step at a time."""

    def __init__(self, side: Side) -> None:
        run = settled(_run_of(side))
        facts = check_data(run)
        run = named_sources(run)
        self.run = with_engine(run, precision=precision_on(run.engine.precision, CPU))
        phase, world = self.run.phases[0], World()
        self.model = build.make_model(self.run)
        self.engine = start_engine(
            self.model,
            objective=build.make_objective(self.run, facts, phase),
            config=self.run.engine,
            optimizer=self.run.optimizer,
            world=world,
            device=CPU,
        )
        self.loader = build.make_loader(self.run, facts, world, CPU, phase, DataPosition())
        self.tokens: list[int] = []  # of each step

    def step(self) -> None:
        """Data, forward, backward and update."""
        with in_part("data"):
            data = self.loader.next_step()
        self.tokens.append(data.tokens)
        lr = 1e-4
        self.engine.step(data.micro_batches, counts=data.counts, lr=lr, max_lr=lr)


def _run_of(side: Side) -> RunConfig:
    text = RUN.format(
        shards=side.shards,
        system=side.system,
        body=BODY,
        model=side.model,
        objective=side.objective,
        document=side.document_tokens,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.yaml")
        path.write_text(text, encoding="utf-8")
        return read_run(path)


def _per_token(timed: Timed, tokens: Sequence[int]) -> Timed:
    """Seconds of a token in each counted round: rows are not equally full."""
    counted = tokens[-len(timed.seconds) :]
    return Timed(
        seconds=tuple(s / n for s, n in zip(timed.seconds, counted, strict=True)),
        cpu_seconds=tuple(s / n for s, n in zip(timed.cpu_seconds, counted, strict=True)),
    )


def _figures(per_token: Timed) -> dict[str, Any]:
    cpu = Timed(seconds=per_token.cpu_seconds)
    return {
        "tokens_per_second": 1 / per_token.median,
        "spread": per_token.spread,
        "tokens_per_cpu_second": 1 / cpu.median,
        "cpu_spread": cpu.spread,
    }


def _ratios(one: Timed, beside: Timed) -> dict[str, Any]:
    """How many times as fast as its reference; round by round."""
    return {
        "ratio": paired_ratio(one, beside),
        "cpu_ratio": cpu_ratio(one, beside),
    }


def table_text(found: Mapping[str, Any]) -> str:
    """Two tables in Markdown: what each costs, and where it goes."""
    sides = found["sides"]
    lines = [
        "| | parameters | tokens a CPU second | beside masks alone, by CPU time | by the clock |",
        "|---|---|---|---|---|",
    ]
    for name, figures in sides.items():
        by_cpu, by_clock = "1", "1"
        if "ratio" in figures:
            by_cpu = f"{figures['cpu_ratio']:.2f}"
            by_clock = ratio_text(figures["ratio"])
        lines.append(
            f"| {SIDES[name].says} | {figures['parameters']:,} |"
            f" {figures['tokens_per_cpu_second']:,.0f} | {by_cpu} | {by_clock} |"
        )
    parts = [part for part in PARTS if any(part in s["shares"] for s in sides.values())]
    lines += ["", f"| share of CPU time | {' | '.join(parts)} |", f"|---|{'---|' * len(parts)}"]
    for name, figures in sides.items():
        shares = [figures["shares"].get(part, 0.0) for part in parts]
        cells = " | ".join(f"{share:.0%}" for share in shares)
        lines.append(f"| {SIDES[name].says} | {cells} |")
    return "\n".join(lines)


def write_table(page: Path, found: Mapping[str, Any]) -> None:
    """Between the page's two marks."""
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{page} has no line {BEGIN}, or none {END} behind it. Put both there.")
    page.write_text(f"{before}{BEGIN}\n\n{table_text(found)}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
