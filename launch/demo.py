#!/usr/bin/env python3
"""The whole job on one machine: text -> tokenizer -> shards -> training, killed and resumed -> export -> answers -> a probe.

    python launch/demo.py [--out demo] [--shrink 50]

Every command is shown as you would type it, then run. What is done already is left out, so that a second run goes on.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path

from encoder.base.command import CommandLine, run_command
from encoder.base.done import is_done
from encoder.base.units import short_seconds
from launch.demo_probe import write_probe
from launch.shown_commands import ShownCommands, done_already, say
from launch.smaller_demo import ROOT, RUN_FILE, preparation_settings, run_settings, short

CORPUS_MB = 20
VOCABULARY = 8192
KILL_AT = 0.45  # of the tokens
# the demo is the same everywhere: no GPU even where there is one, and nothing fetched
SETTINGS = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
QUESTIONS = [
    "The function returns a new [MASK] with the given keys and values.",
    "If the file does not [MASK], an exception is raised.",
    "This method is not [MASK] and will be removed in a future version.",
    "for i in [MASK](len(values)):\n    print(values[i])",
    "def __init__([MASK], name):\n    self.name = name",
]


def main(argv: list[str] | None = None) -> int:
    """Parses, tells the story, returns the exit code: 2 where one of its commands fails."""
    parser = CommandLine(description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo"),
        help="folder for everything the demo makes (default: demo)",
    )
    parser.add_argument(
        "--shrink",
        type=float,
        default=1.0,
        help="divide the corpus and the training by this (tests use 50)",
    )
    args = parser.parse_args(argv)
    if not 1 <= args.shrink <= 1000:
        parser.error(f"--shrink {args.shrink:g}: needed is 1 to 1,000")
    out = Path(os.path.realpath(args.out))

    def body() -> None:
        out.mkdir(parents=True, exist_ok=True)
        tell(out, shrink=args.shrink)

    return run_command(body, stopped="\nstopped; make demo goes on from here")


def tell(out: Path, *, shrink: float) -> None:
    """From text to answers.

    out: folder for everything that is made.
    shrink: the corpus and the training are divided by it.
    """
    begun = time.monotonic()
    shell = ShownCommands(folder=ROOT, settings=SETTINGS)
    here = shlex.quote(str(short(out)))
    say(
        "From text to a language model, on the CPU alone. In this folder each command can be typed"
        " as it stands, after:"
    )
    activate = Path(sys.prefix) / "bin" / "activate"
    if activate.exists():
        say(f"$ . {short(activate)}")
    say(f"$ export {' '.join(f'{name}={value}' for name, value in SETTINGS.items())}")

    shell.chapter(
        "Text", "Every Python environment has some: code, and the prose of its documentation."
    )
    size_mb = max(1.0, CORPUS_MB / shrink)
    shell.run(
        f"data-prep environment-corpus --out {here}/corpus --size-mb {size_mb:g}",
        made=out / "corpus" / "manifest.json",
    )

    shell.chapter(
        "Tokenizer",
        f"Byte-level BPE: {VOCABULARY:,} pieces of words, chosen so that this text has few of"
        " them.",
    )
    files = f"{here}/corpus/code.jsonl {here}/corpus/prose.jsonl"
    shell.run(
        f"data-prep tokenizer train --files {files} --vocab-size {VOCABULARY} --out"
        f" {here}/tokenizer.json",
        made=out / "tokenizer.json",
    )

    shell.chapter(
        "Shards",
        "Every document becomes token ids, once for all lengths of training. 2 % are held out.",
    )
    shell.run(
        f"data-prep prepare configs/prep/demo.yaml {shlex.join(preparation_settings(out))}",
        made=out / "shards" / "prose" / "train" / "card.json",
    )

    shell.chapter(
        "Training, killed and resumed",
        "A ModernBERT of 4 million weights, one rank on all cores. In the middle every process gets"
        " SIGKILL, as in a power cut. The same command then goes on from the last checkpoint. The"
        " steps since then are done again, and each must read the batches whose hashes stand in"
        f" the ledger of the run. What it prints goes to {short(out)}/training.log.",
    )
    proof = train_killed_and_resumed(shell, out, shrink=shrink)
    for what, found in proof:
        say(f"{what:<35} {found}")

    shell.chapter(
        "Export",
        "A Hugging Face folder. It gets its name only after transformers gave the same logits.",
    )
    shell.run(f"tessera export {here}/run {here}/hf", made=out / "hf" / "config.json")

    shell.chapter(
        "Answers",
        "Plain transformers reads that folder: the five likeliest tokens for each [MASK].",
    )
    shell.run(f"tessera fill-mask {here}/hf {shlex.join(QUESTIONS)} --json {here}/answers.json")

    shell.chapter(
        "Probe",
        "What the frozen model tells about text it was never asked of: from which package is a"
        " passage of 24 words? A linear probe learns it from the mean of the states. Beside it"
        " stands the same model with drawn weights.",
    )
    if not (out / "probe" / "train.jsonl").exists():
        write_probe(out / "corpus" / "prose.jsonl", out / "probe", shrink=shrink)
    shell.run(
        f"tessera evaluate {here}/hf --untrained --train {here}/probe/train.jsonl --test"
        f" {here}/probe/test.jsonl --out {here}/evaluation",
        made=out / "evaluation" / "evaluation.json",
    )

    shell.chapter(
        "Report",
        "Curves, where the time went, the kill and the answers in one page. Unigram entropy would"
        " be the loss of a model that knows only how often each token occurs, uniform that of one"
        " that guesses blindly.",
    )
    # here: matplotlib takes seconds
    from launch.demo_page import result_text, write_demo_page

    page = write_demo_page(out / "run", out / "answers.json", proof)
    say(result_text(out / "run", vocabulary=VOCABULARY))
    say(f"{short(page)}   (open it in a browser)")
    say(
        f"\nDone in {short_seconds(time.monotonic() - begun)}. The model is {short(out)}/hf. For"
        " text of your own: docs/recipes.md"
    )


def train_killed_and_resumed(
    shell: ShownCommands, out: Path, *, shrink: float
) -> list[tuple[str, str]]:
    """Trains; returns what the ledger proves, as rows of (what, how much)."""
    # here: torch takes seconds
    from encoder.runs.config import read_run
    from encoder.runs.same import check_same_run
    from encoder.tools.report.compare import compare_ledgers, keep_ledger
    from launch.killed_training import Training, train

    run = out / "run"
    settings = run_settings(out, shrink=shrink)
    training = Training(
        command=f"tessera pretrain {short(RUN_FILE)} {shlex.join(settings)}",
        run=run,
        log=out / "training.log",
        tokens=sum(phase.tokens for phase in read_run(RUN_FILE, settings).phases),
    )
    # kept at the kill; where it is there, the rest alone is to be trained
    ledger_at_kill = out / "killed.json"
    if is_done(run)[0]:
        # one of another --shrink is another run
        check_same_run(read_run(RUN_FILE, settings), run)
        shell.show(training.command)
        done_already(run / "done.json")
    else:
        if not ledger_at_kill.exists():
            step = train(training, shell, kill_at=KILL_AT)
            keep_ledger(run, ledger_at_kill)
            say(f"SIGKILL to every process after step {step}.\n\nThe same command again:")
        train(training, shell)
    return compare_ledgers(run, ledger_at_kill) if ledger_at_kill.exists() else []


if __name__ == "__main__":
    sys.exit(main())
