#!/usr/bin/env python3
"""One command over all verbs; each is a file of launch/ or slurm/, and reads its own --help.

tessera VERB [...]        tessera VERB --help
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from typing import NamedTuple

from encoder import __version__
from encoder.base.command import complain, run_command
from encoder.base.errors import nearest
from encoder.base.home import home


class Verb(NamedTuple):
    """What stands behind a verb."""

    module: str  # of launch/, whose main() does it; slurm: a script beside launch/
    text: str  # what it does
    example: str  # without the command's own name


VERBS = {
    "new": Verb(
        "new_file",
        "write a commented run, preparation or task file to start from",
        "new small --data shards/web/train --out run.yaml",
    ),
    "plan": Verb(
        "plan", "what a run will be, without starting it", "plan run.yaml --ranks 8 --gpu h100"
    ),
    "doctor": Verb("doctor", "what would go wrong on this machine", "doctor run.yaml"),
    "pretrain": Verb("pretrain", "train, or go on from the newest checkpoint", "pretrain run.yaml"),
    "finetune": Verb(
        "finetune", "train a model for a task on labelled rows", "finetune sentiment.yaml"
    ),
    "sweep": Verb(
        "sweep", "fine-tune over a grid and seeds, with a table", "sweep rates.yaml --parallel 2"
    ),
    "export": Verb("export_hf", "a Hugging Face folder of a run", "export runs/small hf/small"),
    "import": Verb(
        "import_hf",
        "weights of a Hugging Face folder",
        "import models/ModernBERT-base weights/base",
    ),
    "grow": Verb(
        "grow",
        "a larger model from a smaller one's weights",
        "grow runs/base weights/large --preset modernbert_large",
    ),
    "shrink": Verb(
        "shrink",
        "some layers of a model, for a distillation",
        "shrink runs/base weights/student --layers 0,4,8,12,16,20",
    ),
    "average": Verb(
        "average",
        "the mean of several checkpoints",
        "average runs/base/checkpoints/A runs/base/checkpoints/B --out weights/mean",
    ),
    "fill-mask": Verb(
        "fill_mask",
        "ask an exported model",
        'fill-mask hf/small "The capital of France is [MASK]."',
    ),
    "embed": Verb(
        "embed",
        "train vectors for search, and measure them",
        "embed configs/embed/boolq.yaml --evaluate-only",
    ),
    "serve": Verb(
        "serve", "a page to try exported models", "serve hf/small hf/sentiment --port 7870"
    ),
    "evaluate": Verb(
        "evaluate",
        "models side by side on held-out text, without fine-tuning",
        "evaluate runs/small hf/laptop --texts held_out.jsonl",
    ),
    "report": Verb("report", "curves and results of runs as a page", "report runs/small"),
    "bench": Verb("bench", "how fast it is here, beside others", "bench step --quick"),
    "submit": Verb(
        "slurm",
        "a run as a chain of SLURM jobs",
        "submit run.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00",
    ),
    "status": Verb("slurm", "how a submitted run stands", "status run.yaml"),
    "push": Verb(
        "push_hub", "send an exported folder to the Hugging Face hub", "push hf/small me/small"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb; returns its exit code, 2 for a word that is none."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        return run_command(lambda: print(help_text())) or (0 if words else 2)
    if words[0] in ("-V", "--version"):
        return run_command(lambda: print(f"tessera {__version__}"))
    if words[0] not in VERBS:
        return complain(
            f"{words[0]} is no verb. {nearest(words[0], list(VERBS))} See tessera --help."
        )
    return run_verb(words[0], words[1:])


def run_verb(word: str, words: list[str]) -> int:
    """What the verb's own file does with the words."""
    # in --help and in mistakes the verb stands for its file
    before, sys.argv = (
        sys.argv,
        [
            f"tessera {word}",
            *words,
        ],
    )
    try:
        if VERBS[word].module == "slurm":
            return _submit(["status", *words] if word == "status" else words)
        return importlib.import_module(f"launch.{VERBS[word].module}").main(words)
    finally:
        sys.argv = before


def help_text() -> str:
    """The verbs, and an example of each."""
    lines = [
        "usage: tessera VERB [...]",
        "",
        "Pretrain BERT-style encoders from raw text to a Hugging Face folder.",
        "",
    ]
    lines += [
        f"  {word:<10} {verb.text}\n             $ tessera {verb.example}"
        for word, verb in VERBS.items()
    ]
    return "\n".join(
        [
            *lines,
            "",
            (
                "tessera VERB --help says more. Text becomes shards with data-prep: see data-prep"
                " --help."
            ),
        ]
    )


def _submit(words: list[str]) -> int:
    """slurm/submit.py, one of the scripts beside launch/, which are no package."""
    path = home() / "slurm" / "submit.py"
    spec = importlib.util.spec_from_file_location("tessera_submit", path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    # entered in sys.modules before it runs, as an import does it
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.command(words)


def command() -> None:
    """The console command: as main, and ends the process as launch/pretrain.py does."""
    try:
        code = main()
    except SystemExit as ending:  # argparse: --help 0, a mistake 2
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except Exception:
        traceback.print_exc()
        code = 1
    # end_process is for torch's threads; without torch there are none
    if "torch" not in sys.modules:
        sys.exit(code)
    from encoder.base.dist import end_process

    end_process(code)


if __name__ == "__main__":
    command()
