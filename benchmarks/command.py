"""One command over all questions.

python launch/bench.py [QUESTION] [--device cpu|cuda] [--against hf] [--json FILE] [--quick] [...]
"""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from encoder.base.allocator import freed_memory
from encoder.base.command import CommandLine, count
from encoder.base.errors import ConfigError, nearest
from encoder.base.files import refuse_foreign

# a question imports what it alone needs: a bare GPU machine has no deepspeed, no streaming and no fastokens
QUESTIONS = {
    "prep": "text to shards, beside a tokenizer a document and MDSWriter",
    "loader": "feeding: packing, planning, rows a second, a 2T index, memory",
    "step": "training steps, beside transformers",
    "attention": "every backend, beside a dense mask and a padded batch",
    "optimizer": "updates, beside torch's and torch-optimi's",
    "engine": "what DeepSpeed costs at each ZeRO stage, beside the same step without it",
    "checkpoint": "how long a save holds training up, beside torch.save",
    "gemm": "matrix products of a model, beside the device's own ceiling",
    "loss": "memory of the loss, beside all logits at once",
    "time-to-loss": "seconds to a held-out loss, beside transformers' Trainer",
}
ALL = ("step", "attention", "optimizer", "checkpoint", "loader", "prep")


def bench(words: Sequence[str]) -> None:
    """Asks one question, or all of them with their defaults. Raises UserError; exits with 2 for a word it does not know."""
    named = bool(words) and not words[0].startswith("-")
    question, rest = (words[0], words[1:]) if named else ("all", words)
    if question not in (*QUESTIONS, "all"):
        raise ConfigError(f"{question} is no question. {nearest(question, [*QUESTIONS, 'all'])}")
    if question == "all":
        # words of one question alone are refused before anything runs
        _parser("all", None).parse_args([*rest])
    modules = {
        name: importlib.import_module(f"benchmarks.{name.replace('-', '_')}")
        for name in (ALL if question == "all" else [question])
    }
    # here: torch takes seconds, and --help is read without it
    import torch

    from benchmarks.report import Report

    # all command lines are read before the first question is asked
    asked = {
        name: _parser(name, module, quick="--quick" in rest).parse_args([*rest])
        for name, module in modules.items()
    }
    for one in asked.values():
        one.device = one.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args = next(iter(asked.values()))
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda, but torch sees no CUDA device. Use --device cpu.")
    if args.against and question not in ("step", "all"):
        raise ConfigError(
            f"--against {args.against} is for the question step; {question} always has its peers"
            " beside it. Leave it out."
        )
    if args.json and args.json.is_dir():
        raise ConfigError(f"--json {args.json} is a folder; needed: a file in it.")
    if args.json and not args.json.absolute().parent.is_dir():
        raise ConfigError(
            f"--json {args.json}: there is no folder {args.json.absolute().parent}. Make it, or"
            " name another."
        )
    if args.json:
        refuse_foreign(args.json, ours=lambda head: b'"command": "python launch/bench.py' in head)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cpu":
        freed_memory.keep()  # of ours and of the peers: all run in this process
    report = Report(
        args.json,
        command=shlex.join(["python", "launch/bench.py", *words]),
        device=torch.device(args.device),
    )
    for name, module in modules.items():
        module.ask(asked[name], report)


def _parser(question: str, module: ModuleType | None, *, quick: bool = False) -> CommandLine:
    about = "\n".join(
        f"  {name:<13} {text}" for name, text in (*QUESTIONS.items(), ("all", ", ".join(ALL)))
    )
    parser = CommandLine(
        prog=f"bench.py {question}", description=__doc__, epilog=f"questions:\n{about}"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where torch sees a CUDA device"
    )
    parser.add_argument(
        "--against", choices=("hf",), help="also the peer: transformers, for the step"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write all numbers here, over those of a bench before",
    )
    parser.add_argument("--threads", type=count, metavar="N", help="of torch, on a CPU")
    parser.add_argument(
        "--rounds",
        type=count,
        default=8,
        metavar="N",
        help="counted rounds (default 8); two come before",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny shapes and few rounds: whether it runs, not how fast it is",
    )
    if module is not None:
        module.options(parser)
        # a word that is given still goes before those of --quick
        if quick:
            parser.set_defaults(rounds=2, **module.QUICK)
    return parser
