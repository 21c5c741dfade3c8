"""Data preparation as a job array: a part killed, a part's node lost; the shards are the bytes of a serial run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.bed import ROOT, Bed, wait_until
from tests.helpers.prep import bytes_of, settings, texts, write_jsonl

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

PREP = ROOT / "slurm" / "prep_array.sbatch"


def submit(bed: Bed, config: Path, *sbatch: str, env: dict[str, str] | None = None) -> str:
    return bed.sbatch(
        *sbatch,
        f"--output={config.parent}/%x-%A_%a.log",
        PREP,
        config,
        env={"TESSERA_PYTHON": sys.executable, **(env or {})},
        cwd=config.parent,
    )


def states(bed: Bed, array: str) -> dict[str, tuple[str, str, str]]:
    """By task of an array: state, node, how often it was started again."""
    lines = bed.slurm("scontrol", "--oneliner", "show", "job", array).splitlines()
    jobs = [
        dict(word.partition("=")[::2] for word in line.split() if "=" in word) for line in lines
    ]
    return {job["ArrayTaskId"]: (job["JobState"], job["NodeList"], job["Restarts"]) for job in jobs}


def processes_of(part: str) -> list[int]:
    """The process that makes this part, and its workers, on whichever node: they are all processes of this machine."""
    found = subprocess.run(
        ["pgrep", "-f", f"data_prep prepare .*--part {part}"], capture_output=True, text=True
    )
    return [
        int(pid)
        for pid in found.stdout.split()
        if Path(f"/proc/{pid}/comm").read_text().startswith("python")
    ]


def log_of(config: Path, array: str, task: int) -> str:
    return (config.parent / f"prep-{array}_{task}.log").read_text()


def test_a_killed_part_a_lost_node_and_a_failed_part_made_again_leave_the_bytes_of_a_serial_run(
    bed: Bed, tmp_path
):
    write_jsonl(tmp_path / "a.jsonl", texts(150_000, longest=200))
    config = settings(tmp_path, shard_bytes=2**16)
    segments = tmp_path / "shards" / ".a.part" / "segments"
    array = submit(bed, config, "--array=1-3", "--cpus-per-task=4")
    merge = submit(bed, config, f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes")
    wait_until(
        lambda: (segments / "000000").exists() and len(list(segments.glob("0*"))) >= 4,
        seconds=90,
        what="the first segments",
    )

    victim = wait_until(lambda: processes_of("1/3"), seconds=10, what="a process of part 1")[0]
    subprocess.run(["kill", "-KILL", str(victim)], check=True)  # memory ended, say
    lost = states(bed, array)["2"][1]
    bed.host("crash", lost)
    subprocess.run(
        [sys.executable, "-m", "data_prep", "prepare", str(config), f"out={tmp_path / 'serial'}"],
        check=True,
        cwd=ROOT,
        capture_output=True,
    )
    wait_until(
        lambda: all(s == "COMPLETED" for s, *_ in states(bed, array).values()),
        seconds=200,
        what="the end of the array",
        every=1.0,
    )
    bed.host("boot", lost)
    assert "ended with exit code 137; try 2 of 3" in log_of(config, array, 1)
    assert states(bed, array)["2"][2] == "1" and states(bed, array)["2"][1] != lost
    assert "segments were finished before" in log_of(config, array, 1)
    assert bed.wait_for_end(merge, seconds=60) == "COMPLETED"
    assert bytes_of(tmp_path / "shards") == bytes_of(tmp_path / "serial")
    assert len(list((tmp_path / "shards" / "a" / "train").glob("*.mds"))) > 20


def test_only_the_part_that_failed_is_made_again_and_nothing_is_merged_before(bed: Bed, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts(20_000, longest=100))
    config = settings(tmp_path, shard_bytes=2**16)
    (tmp_path / "bad_env.sh").write_text(
        '[ "${SLURM_ARRAY_TASK_ID:-}" != 2 ] || TESSERA_PYTHON=/bin/false\n'
    )
    array = submit(bed, config, "--array=1-3", env={"TESSERA_ENV": str(tmp_path / "bad_env.sh")})
    merge = submit(bed, config, f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes")
    assert bed.wait_for_end(merge, seconds=90) == "CANCELLED"
    assert {task: s for task, (s, *_) in states(bed, array).items()} == {
        "1": "COMPLETED",
        "2": "FAILED",
        "3": "COMPLETED",
    }
    missing = subprocess.run(
        [sys.executable, "-m", "data_prep", "missing", str(config), "--parts", "3"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
    ).stdout
    assert missing == "2\n"
    again = submit(bed, config, f"--array={missing.strip()}", env={"TESSERA_PARTS": "3"})
    merge = submit(bed, config, f"--dependency=afterok:{again}", "--kill-on-invalid-dep=yes")
    assert bed.wait_for_end(merge, seconds=90) == "COMPLETED", log_of(config, again, 2)
    subprocess.run(
        [sys.executable, "-m", "data_prep", "prepare", str(config), f"out={tmp_path / 'serial'}"],
        check=True,
        cwd=ROOT,
        capture_output=True,
    )
    assert bytes_of(tmp_path / "shards") == bytes_of(tmp_path / "serial")


def test_an_array_that_is_not_whole_must_say_of_how_many_parts(bed: Bed, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts(10))
    config = settings(tmp_path)
    array = submit(bed, config, "--array=2-3")
    assert wait_until(
        lambda: {s for s, *_ in states(bed, array).values()} == {"FAILED"},
        seconds=30,
        what="both tasks to end",
    )
    assert "TESSERA_PARTS=N" in log_of(config, array, 2) and not (tmp_path / "shards").exists()
