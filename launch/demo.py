#!/usr/bin/env python3
"""The whole job on one machine: text -> tokenizer -> shards -> training, killed and resumed -> export -> answers.

    python launch/demo.py [--out demo] [--shrink 10]

Every part runs the same command a person would type, and is left out when it is done already.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from encoder.base.command import CommandLine
from encoder.base.done import is_done

ROOT = Path(__file__).resolve().parents[1]
RUN_FILE = ROOT / "configs" / "pretrain" / "tiny_cpu.yaml"
SENTENCES = [
    "The function returns a new [MASK] with the given keys and values.",
    "If the file does not [MASK], an exception is raised.",
    "This method is not [MASK] and will be removed in a future version.",
    "for i in [MASK](len(values)):\n    print(values[i])",
    "def __init__([MASK], name):\n    self.name = name",
]


def main(argv: list[str] | None = None) -> int:
    """Runs the parts in order; returns the exit code of the first that fails."""
    parser = CommandLine(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), help="folder for everything the demo makes (default: demo)"
    )
    parser.add_argument(
        "--shrink", type=float, default=1.0, help="divide the corpus and the training by this (tests use 10)"
    )
    args = parser.parse_args(argv)
    demo = Demo(out=args.out.resolve(), shrink=args.shrink)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        demo.tell()
    except subprocess.CalledProcessError as error:
        print(
            f"error: this command ended with exit code {error.returncode}: {' '.join(map(str, error.cmd))}",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("\nstopped; make demo goes on from here", file=sys.stderr)
        return 130
    return 0


class Demo:
    """The parts of the demo and the folder they share."""

    def __init__(self, *, out: Path, shrink: float) -> None:
        self.out, self.shrink = out, shrink
        self.run = out / "run"
        self.start = time.monotonic()
        self.bin = Path(sys.executable).parent
        # no GPU even where there is one: the demo is the same everywhere
        self.env = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "PATH": f"{self.bin}:{os.environ.get('PATH', '')}",
        }
        # a test's or a shell's one thread is not meant for the demo's ranks, which share out the cores themselves
        self.env.pop("OMP_NUM_THREADS", None)

    def tell(self) -> None:
        """The time line."""
        size_mb = max(1.0, 20 / self.shrink)
        corpus, tokenizer = self.out / "corpus", self.out / "tokenizer.json"
        self.part("corpus: this Python environment as text", corpus / "manifest.json", [
            self.bin / "data-prep", "environment-corpus", "--out", corpus, "--size-mb", f"{size_mb:g}"])
        self.part("tokenizer: byte-level BPE, 8,192 entries", tokenizer, [
            self.bin / "data-prep", "tokenizer", "train", "--files", corpus / "code.jsonl", corpus / "prose.jsonl",
            "--vocab-size", "8192", "--out", tokenizer])
        self.part("shards: documents to token ids", self.out / "shards" / "prose" / "train" / "card.json", [
            self.bin / "data-prep", "prepare", ROOT / "configs" / "prep" / "demo.yaml", f"root={corpus}",
            f"tokenizer={tokenizer}", f"out={self.out / 'shards'}"])
        self.training()
        self.part("export: a Hugging Face folder, checked against transformers", self.out / "hf" / "config.json", [
            sys.executable, ROOT / "launch" / "export_hf.py", self.run, self.out / "hf"])
        self.part(
            "fill-mask: what the model answers",
            None,
            [
                sys.executable,
                ROOT / "launch" / "fill_mask.py",
                self.out / "hf",
                *SENTENCES,
                "--json",
                self.out / "answers.json",
            ],
        )
        self.report()

    def part(self, title: str, made: Path | None, command: list[object]) -> None:
        """One command of the time line, left out when `made` is there. Raises CalledProcessError."""
        self.line(title)
        if made is not None and made.exists():
            print(f"        done already ({made.name} is there)", flush=True)
            return
        command = [str(word) for word in command]
        print("        $ " + " ".join(_short(word) for word in command), flush=True)
        subprocess.run(command, env=self.env, cwd=ROOT, check=True)

    def line(self, title: str) -> None:
        """A mark on the time line."""
        print(f"\n[{time.monotonic() - self.start:5.0f} s] {title}", flush=True)

    def training(self) -> None:
        """First start, SIGKILL in the middle, resume; then the ledger of both held together."""
        from encoder.base.dist import free_port
        command = [str(self.bin / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port()),
                   str(ROOT / "launch" / "pretrain.py"), str(RUN_FILE), *self.overrides()]
        killed_at = self.out / "killed.json"
        if not is_done(self.run)[0]:
            if not killed_at.exists():
                self.line("training: first start (it will be killed in the middle)")
                steps = self.train(command, kill_at=0.45)
                killed_at.write_text(json.dumps({"steps": steps, "ledger": _ledger(self.run)}), encoding="utf-8")
                print(f"        SIGKILL to every process after step {steps}", flush=True)
            self.line("training: the same command again")
            self.train(command, kill_at=None)
        else:
            self.line("training")
            print("        done already (done.json is there)", flush=True)
        self.proof = self.compare(json.loads(killed_at.read_text(encoding="utf-8"))) if killed_at.exists() else []
        for row in self.proof:
            print(f"        {row[0]:<34} {row[1]}", flush=True)

    def overrides(self) -> list[str]:
        """Where this demo's files are, and the run divided by `shrink`."""
        words = [f"out={self.run}"]
        for i, name in enumerate(("code", "prose")):
            words += [f"data.sources.{i}.path={self.out}/shards/{name}/train",
                      f"evaluation.sources.{i}.path={self.out}/shards/{name}/held_out"]
        if self.shrink != 1.0:
            from encoder.base.units import parse_tokens
            for key, value in _token_settings():
                words.append(f"{key}={math.ceil(parse_tokens(value) / self.shrink)}")
        return words

    def train(self, command: list[str], *, kill_at: float | None) -> int:
        """Runs the training with a progress bar; kills it at this share of its tokens. Returns the last step in the ledger."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        from encoder.runs.config import read_run
        total = sum(p.tokens for p in read_run(RUN_FILE, self.overrides()).phases)
        print("        $ " + " ".join(_short(w) for w in command[:7]), flush=True)
        console = Console()
        columns = (
            TextColumn("        {task.fields[phase]:<10}"),
            BarColumn(30),
            TextColumn(
                "{task.percentage:>3.0f} %  loss "
                "{task.fields[loss]}  held-out {task.fields[held_out]}  {task.fields[speed]} tok/s"
            ),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with open(self.out / "training.log", "ab") as log, Progress(
                *columns, console=console, refresh_per_second=4, disable=not console.is_terminal) as bar:
            task = bar.add_task("training", total=total, phase="starting", loss="-", held_out="-", speed="-")
            process = subprocess.Popen(command, env=self.env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            try:
                self._watch(
                    process, total, kill_at, lambda **now: bar.update(task, **now), plain=not console.is_terminal
                )
            except BaseException:
                _kill_tree(process.pid)
                raise
        lines = _ledger(self.run)
        return lines[-1]["step"] if lines else 0

    def _watch(
        self, process: subprocess.Popen, total: int, kill_at: float | None, show: Callable[..., None], *, plain: bool
    ) -> None:
        from encoder.runs.folder import METRICS, merged_metrics
        said = -1
        while process.poll() is None:
            time.sleep(0.3)
            if not (self.run / METRICS).exists():
                continue
            metrics = merged_metrics(self.run / METRICS)
            trained = [m for m in metrics if m.get("loss") is not None]
            if not trained:
                continue
            held_out = [m["held_out_loss"] for m in metrics if "held_out_loss" in m]
            now = dict(
                phase=trained[-1]["phase"],
                loss=f"{trained[-1]['loss']:.2f}",
                held_out=f"{held_out[-1]:.2f}" if held_out else "-",
                speed=f"{trained[-1]['tokens_per_second']:,.0f}",
            )
            tokens = _ledger(self.run)[-1]["tokens_seen"]
            show(completed=tokens, **now)
            if plain and int(10 * tokens / total) > said:
                said = int(10 * tokens / total)
                print(
                    f"        {now['phase']:<10} {tokens / total:4.0%}  loss {now['loss']}  held-out {now['held_out']}  "
                    f"{now['speed']} tok/s",
                    flush=True,
                )
            saved = sorted((self.run / "checkpoints").glob("*/COMMITTED"))
            if kill_at is not None and tokens >= kill_at * total and saved and self._beyond_checkpoint():
                _kill_tree(process.pid)
                process.wait()
                return
        if process.returncode != 0:
            tail = (self.out / "training.log").read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
            print("\n".join(tail), file=sys.stderr)
            raise subprocess.CalledProcessError(process.returncode, [str(a) for a in process.args])

    def _beyond_checkpoint(self) -> bool:
        """At least three steps were done since the newest save, so that a resume has something to do again."""
        from encoder.runs.folder import EVENTS, read_jsonl
        saves = [e["step"] for e in read_jsonl(self.run / EVENTS) if e["event"] == "checkpoint"]
        return bool(saves) and _ledger(self.run)[-1]["step"] >= saves[-1] + 3

    def compare(self, killed: dict) -> list[tuple[str, str]]:
        """The ledger as the kill left it against the ledger of the whole run."""
        from encoder.runs.folder import EVENTS, read_jsonl
        from encoder.tools.report.report import verify_ledger
        whole, before = _ledger(self.run), killed["ledger"]
        resumed = next((e["step"] for e in read_jsonl(self.run / EVENTS) if e["event"] == "resume"), 0)
        if whole[: len(before)] != before:
            raise SystemExit("error: the ledger of the resumed run does not continue the first one's")
        return [
            ("killed with SIGKILL after step", f"{killed['steps']:,}"),
            ("resumed from the checkpoint of step", f"{resumed:,}"),
            ("steps done twice, hashes equal", f"{killed['steps'] - resumed:,} of {killed['steps'] - resumed:,}"),
            (
                "ledger",
                f"{verify_ledger(self.run):,} steps in one unbroken chain, the first {len(before):,} from before the kill",
            ),
        ]

    def report(self) -> None:
        """loss.png and report.html, with the answers and the kill in them."""
        from encoder.tools.report.report import Section, write_report
        self.line("report")
        answers = json.loads((self.out / "answers.json").read_text(encoding="utf-8"))
        rows = [
            (a["text"], *(f"{token.strip() or token!r} {share:.0%}" for token, share in a["masks"][0])) for a in answers
        ]
        page = write_report([self.run], self.run, sections=[
            Section(title="Killed and resumed", head=("", ""), rows=self.proof),
            Section(title="Fill-mask, from the exported folder", head=("text", "1", "2", "3", "4", "5"), rows=rows)])
        done = json.loads((self.run / "done.json").read_text(encoding="utf-8"))
        print(f"        held-out masked loss {done['held_out_loss']:.3f} nats   (unigram entropy of the same text "
              f"{done['unigram_entropy']:.3f}, uniform {math.log(8192):.2f})")
        for path in (page, page.with_name("loss.png"), self.out / "hf", self.out / "training.log"):
            print(f"        {_short(str(path))}")
        self.line("done")


def _token_settings() -> list[tuple[str, object]]:
    """(dotted key, value) of every amount of tokens in the run file that shrinks with the run (a step does not)."""
    from encoder.base.schema import read_mapping
    mapping = read_mapping(RUN_FILE)
    found: list[tuple[str, object]] = [("checkpoints.every_tokens", mapping["checkpoints"]["every_tokens"]),
                                       ("evaluation.every_tokens", mapping["evaluation"]["every_tokens"])]
    for i, phase in enumerate(mapping["phases"]):
        found.append((f"phases.{i}.tokens", phase["tokens"]))
        if "warmup_tokens" in phase["lr"]:
            found.append((f"phases.{i}.lr.warmup_tokens", phase["lr"]["warmup_tokens"]))
        if "batch_warmup" in phase:
            found.append((f"phases.{i}.batch_warmup.over_tokens", phase["batch_warmup"]["over_tokens"]))
    return found


def _ledger(run: Path) -> list[dict]:
    from encoder.runs.folder import LEDGER, read_jsonl
    return read_jsonl(run / LEDGER)


def _kill_tree(pid: int) -> None:
    """SIGKILL to a process and all below it, parents first so that no launcher can tidy up."""
    import psutil
    try:
        parent = psutil.Process(pid)
        family = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


def _short(word: str) -> str:
    """A path as seen from the project's folder, long text cut."""
    word = word.replace(f"{ROOT}/", "").replace(f"{Path.cwd()}/", "").replace("\n", "\\n")
    word = Path(word).name if word.startswith(sys.prefix) else word
    return f"'{word}'" if " " in word else word


if __name__ == "__main__":
    sys.exit(main())
