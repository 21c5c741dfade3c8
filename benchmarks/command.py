"""One command over all questions: python launch/bench.py [QUESTION] [--device cpu|cuda] [--against hf] [--json FILE] [...]"""

from __future__ import annotations

import argparse
import importlib
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.options import OneLineParser
from benchmarks.report import Report
from encoder.base.allocator import keep_freed_memory
from encoder.base.errors import ConfigError, nearest

# a question imports what it alone needs: a bare GPU machine has no deepspeed and no streaming
QUESTIONS = {"prep": "text to shards, beside a tokenizer a document and MDSWriter",
             "loader": "feeding: packing, planning, rows a second, a 2T index, memory",
             "step": "training steps, beside transformers",
             "attention": "every backend, beside a dense mask and a padded batch",
             "optimizer": "updates, beside torch's and torch-optimi's",
             "checkpoint": "how long a save holds training up, beside torch.save",
             "gemm": "matrix products of a model, beside the device's own ceiling",
             "loss": "memory of the loss, beside all logits at once"}
ALL = ("step", "attention", "optimizer", "checkpoint", "loader", "prep")


def bench(words: Sequence[str]) -> None:
    """Asks one question, or all one after the other with their defaults. Raises UserError; exits with 2 for a word it does not know."""
    question = "all" if not words or words[0].startswith("-") else words[0]
    rest = words if question == "all" and (not words or words[0] != "all") else words[1:]
    if question not in (*QUESTIONS, "all"):
        raise ConfigError(f"{question} is no question. {nearest(question, [*QUESTIONS, 'all'])}")
    asked = [question] if question != "all" else [*ALL]
    modules = {name: importlib.import_module(f"benchmarks.{name}") for name in asked}
    parser = _parser(question)
    if question != "all":
        modules[question].options(parser)
    args = parser.parse_args([*rest])
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda, but torch sees no CUDA device. Use --device cpu.")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cpu":
        keep_freed_memory()                       # of ours and of the peers: all run in this process
    report = Report(args.json, command=shlex.join(["python", "launch/bench.py", *words]), device=torch.device(args.device))
    for name, module in modules.items():
        own = args
        if question == "all":
            parser = _parser(name)
            module.options(parser)
            own = parser.parse_args([*rest])
        module.ask(own, report)


def _parser(question: str) -> OneLineParser:
    about = "\n".join(f"  {name:<11} {text}" for name, text in QUESTIONS.items())
    parser = OneLineParser(prog=f"bench.py {question}", allow_abbrev=False, description=__doc__, epilog=f"questions:\n{about}",
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--against", choices=("hf",), help="also the peer: transformers, for the step")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers here")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch, on a CPU")
    parser.add_argument("--rounds", type=int, default=8, metavar="N", help="counted rounds (default 8); two come before")
    return parser

