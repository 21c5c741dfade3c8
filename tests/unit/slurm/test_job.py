"""What a job decides when its step ends, with a `scontrol` that answers what the test says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.done import finish

ROOT = Path(__file__).resolve().parents[3]
SCONTROL = """#!/bin/sh
echo "$@" >> {folder}/calls
case "$*" in
    *"show job 7") echo "JobId=7 JobState=$(cat {folder}/state) Restarts=$(cat {folder}/restarts) ExcNodeList=(null)" ;;
    *"show job 9") echo "JobId=9 JobState=PENDING ExcNodeList=m[1,3]" ;;
    *"show job"*) echo "JobId=6 JobState=COMPLETED ExcNodeList=(null)" ;;
    *"show hostnames"*) printf 'n1\\nn2\\nn3\\n' ;;
    "requeue 7") cat {folder}/refused >&2; test ! -s {folder}/refused ;;
esac
"""


class Job:
    """A job 7 on n1 to n3 whose run folder is `folder`/run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run, self.restart = folder, folder / "run", 0
        (folder / "bin").mkdir()
        script = folder / "bin" / "scontrol"
        script.write_text(SCONTROL.format(folder=folder))
        script.chmod(0o755)
        for name, text in (
            ("state", "RUNNING"),
            ("restarts", "0"),
            ("refused", ""),
            ("run.yaml", "name: x\nout: run  # here\n"),
        ):
            (folder / name).write_text(text)

    def call(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "slurm" / "job.py"), *args],
            cwd=self.folder,
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
                "SLURM_JOB_ID": "7",
                "SLURM_JOB_NODELIST": "n[1-3]",
                "SLURM_JOB_NUM_NODES": "3",
                "SLURM_RESTART_COUNT": str(self.restart),
                **env,
            },
        )

    def begin(self) -> str:
        (self.folder / "restarts").write_text(str(self.restart))
        return self.call("begin", "run.yaml", "--ranks", "3").stdout.strip()

    def end(self, *args: str, **env: str) -> dict:
        done = self.call("end", "run", "--code", "1", "--seconds", "5", *args, **env)
        line = [e for e in self.events() if e["event"] == "end"][-1]
        return {**line, "exit": done.returncode, "said": done.stderr}

    def events(self) -> list[dict]:
        return [
            json.loads(line) for line in (self.run / "slurm" / "7.jsonl").read_text().splitlines()
        ]

    def commit(self, tokens: int) -> None:
        folder = self.run / "checkpoints" / f"tokens{tokens:013d}-i0001"
        folder.mkdir(parents=True)
        (folder / "progress.json").write_text(json.dumps({"progress": {"step": tokens // 10}}))
        (folder / "COMMITTED").write_text("")

    def calls(self) -> str:
        return (self.folder / "calls").read_text()


@pytest.fixture
def job(tmp_path) -> Job:
    return Job(tmp_path)


def test_done_json_is_success_whatever_srun_says(job):
    assert job.begin() == "run"
    assert job.end("--code", "0")["cause"] == "crash"  # exit code 0 proves nothing
    finish(job.run)
    end = job.end("--code", "143", "--signal", "TERM")
    assert (end["cause"], end["decision"], end["exit"]) == ("done", "finish", 0)
    assert job.call("begin", "run.yaml", "--ranks", "3").returncode == 3


def test_a_signal_or_the_runs_own_limit_is_requeued_from_what_is_committed(job):
    job.begin()
    job.commit(500)
    end = job.end("--signal", "USR1", "--code", "0")
    assert (end["cause"], end["decision"], end["step"], end["tokens"], end["exit"]) == (
        "stopped",
        "requeue",
        50,
        500,
        4,
    )
    job.restart = 1
    job.begin()
    (job.run / "events.jsonl").write_text(
        '{"event": "stopped", "step": 60, "limit": "SLURM_JOB_END_TIME"}\n'
    )
    end = job.end("--code", "0")
    assert (end["cause"], end["decision"]) == (
        "stopped",
        "requeue",
    ) and "SLURM_JOB_END_TIME after step 60" in end["why"]
    assert job.events()[2]["restart_after"] == "stopped"


def test_starts_that_commit_nothing_are_not_repeated_for_ever(job):
    for restart in range(3):
        job.restart = restart
        job.begin()
        end = job.end("--signal", "USR1")
    assert (end["decision"], end["exit"]) == (
        "stop",
        1,
    ) and "3 starts in a row committed nothing" in end["why"]


def test_what_slurm_or_the_user_decided_is_left_alone(job):
    job.begin()
    end = job.end("--signal", "TERM")
    assert (end["cause"], end["decision"], end["exit"]) == ("ended", "leave", 143)
    (job.folder / "state").write_text("CANCELLED")
    assert job.end()["decision"] == "leave"
    (job.folder / "state").write_text("RUNNING")
    (job.folder / "restarts").write_text("1")  # the rest of a node that was cut off
    end = job.end("--signal", "USR1")
    assert (end["cause"], end["decision"]) == (
        "taken_over",
        "leave",
    ) and "requeue" not in job.calls()


def test_crashes_are_repeated_only_while_there_is_progress_and_not_more_often_than_allowed(job):
    job.begin()
    assert job.end()["decision"] == "requeue"  # the first one may be chance
    job.restart = 1
    job.begin()
    end = job.end()
    assert (
        end["decision"] == "stop"
        and "nothing was committed since" in end["why"]
        and end["exit"] == 1
    )
    report = (job.run / "slurm" / "7-report.txt").read_text()
    assert "nothing was committed since" in report and "start 1 on n[1-3]" in report
    for restart, tokens in enumerate((100, 200), 2):
        job.restart = restart
        job.begin()
        job.commit(tokens)
        end = job.end()
    assert (end["decision"], end["crashes"]) == (
        "stop",
        4,
    ) and "crash 4 of this job, 3 are allowed" in end["why"]
    assert job.end(TESSERA_MAX_CRASHES="9")["decision"] == "stop"  # nothing since the one before


def test_a_mistake_is_told_with_the_ranks_own_words_and_stops(job):
    job.begin()
    (job.run / "slurm" / "7-r0-mistake.txt").write_text("shards/web: no such folder.")
    end = job.end("--code", "143")
    assert (end["cause"], end["decision"], end["exit"]) == ("mistake", "stop", 2)
    assert "shards/web: no such folder." in end["said"] and end["said"].count("\n") == 1


def names_n2(job):
    """A preflight of three nodes that found one bad; its folder."""
    folder = job.run / "slurm" / "7-r0-preflight"
    folder.mkdir()
    (folder / "bad_nodes").write_text("n2\n")
    for node in ("n1", "n2", "n3"):
        (folder / f"{node}.json").write_text("{}")
    return folder


def test_bad_nodes_are_those_named_and_those_not_heard_from(job):
    job.begin()
    folder = names_n2(job)
    done = job.call("preflight", "run", "--code", "4")
    assert done.returncode == 4 and "update JobId=7 ExcNodeList=n2" in job.calls()
    assert [e["nodes"] for e in job.events() if e["event"] == "excluded"] == [["n2"]]
    (folder / "n3.json").unlink()
    job.call("preflight", "run", "--code", "143")
    assert "update JobId=7 ExcNodeList=n2,n3" in job.calls()
    (folder / "bad_nodes").write_text(
        "n1\nn2\nn3\n"
    )  # all of them: the same would come of any others
    assert job.call("preflight", "run", "--code", "4").returncode == 1
    assert "other nodes would do no better" in job.events()[-1]["why"]
    (folder / "bad_nodes").write_text("n2\n")
    assert job.call("preflight", "run", "--code", "4", TESSERA_MAX_BAD_NODES="1").returncode == 1
    assert "that makes 2 nodes, 1 are allowed" in job.events()[-1]["why"]
    assert (
        job.call("preflight", "run", "--code", "2").returncode == 2
        and "in the job's output" in job.events()[-1]["why"]
    )
    (job.run / "slurm" / "7-r0-mistake.txt").unlink()
    (folder / "n2.json").write_text('{"verdict": {"mistakes": ["shards/web: no such folder"]}}')
    assert job.call("preflight", "run", "--code", "2").returncode == 2
    assert "the preflight: shards/web: no such folder" in job.events()[-1]["why"]
    (job.run / "slurm" / "7-r0-mistake.txt").unlink()
    assert job.call("preflight", "run", "--code", "0").returncode == 0


def test_a_preflight_from_which_nothing_is_heard_is_a_crash_and_no_fault_of_a_node(job):
    job.begin()
    assert job.call("preflight", "run", "--code", "124").returncode == 4
    assert (job.events()[-1]["cause"], job.events()[-2]["bad_nodes"]) == (
        "crash",
        [],
    ) and "ExcNodeList" not in job.calls()


def test_a_preflight_that_runs_out_of_time_is_named_with_what_gives_it_more(job):
    job.begin()
    assert (
        job.call(
            "preflight", "run", "--code", "124", "--seconds", "40", TESSERA_PREFLIGHT_SECONDS="40"
        ).returncode
        == 4
    )
    why = job.events()[-1]["why"]
    assert (
        "the preflight was not done after 40 s, TESSERA_PREFLIGHT_SECONDS gives it 40" in why
        and "step" not in why
    )
    job.restart = 1
    job.begin()
    assert (
        "the preflight ended with exit code 9" in job.call("preflight", "run", "--code", "9").stderr
    )


def test_a_limit_that_is_no_number_is_refused_at_once(job):
    for text in ("many", "²", "9" * 5000):
        done = job.call("begin", "run.yaml", "--ranks", "3", TESSERA_MAX_CRASHES=text)
        assert done.returncode == 2 and f"TESSERA_MAX_CRASHES is {text[:40]}" in done.stderr
        assert done.stderr.count("\n") == 1


def test_outside_of_a_job_the_script_says_so_in_one_line(job):
    for words in (("begin", "run.yaml", "--ranks", "1"), ("end", "run", "--code", "0")):
        done = job.call(*words, SLURM_JOB_ID="")
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "SLURM_JOB_ID is not set; needed: a job of SLURM" in done.stderr


def test_a_job_that_slurm_does_not_requeue_says_so(job):
    job.begin()
    (job.folder / "refused").write_text("Requested operation is presently disabled")
    end = job.end("--signal", "USR1")
    assert (
        end["exit"] == 75
        and "presently disabled" in end["said"]
        and "submit it again" in end["said"]
    )
    assert [e["event"] for e in job.events()] == ["start", "end", "refused"]  # one end of one start
    assert job.events()[-1] == {
        **job.events()[-1],
        "why": "Requested operation is presently disabled",
        "decision": "submit_again",
    }


def test_a_node_that_the_preflight_names_is_left_out_of_the_jobs_that_are_queued_behind(job):
    job.begin()
    (job.folder / "refused").write_text("Requested operation is presently disabled")  # --no-requeue
    queued = [
        {"job": "5", "role": "check"},
        {"job": "6", "role": "training-1"},
        {"job": "7", "role": "training-2"},
        {"job": "9", "role": "training-3"},
    ]
    (job.run / "slurm" / "submitted.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in queued)
    )
    names_n2(job)
    done = job.call("preflight", "run", "--code", "4")
    assert done.returncode == 75 and "job 9 goes on without n2" in done.stderr
    assert [line for line in job.calls().splitlines() if "update" in line] == [
        "update JobId=9 ExcNodeList=m[1,3],n2"
    ]
    assert (job.events()[-1]["event"], job.events()[-1]["nodes"], job.events()[-1]["jobs"]) == (
        "excluded",
        ["n2"],
        ["9"],
    )


@pytest.mark.parametrize(
    "text, overrides, found",
    [
        ("out: runs/a\n", [], "runs/a"),
        ("out: 'runs/a b' # c\n", [], "runs/a b"),
        ("out: a#b\n", [], "a#b"),
        ("out: runs/a\n", ["out=b", "seed=1", "out=c"], "c"),
        ("out: >\n  runs/a\n", ["out=b"], "b"),
        ("out: runs/a\n\n  # a remark\nphases:\n  - x\n", [], "runs/a"),
    ],
)
def test_the_run_folder_is_that_of_the_run_file_or_the_last_override(job, text, overrides, found):
    (job.folder / "run.yaml").write_text(text)
    assert job.call("begin", "run.yaml", *overrides, "--ranks", "1").stdout == f"{found}\n"
    assert (job.folder / found / "slurm" / "7.jsonl").exists()


@pytest.mark.parametrize(
    "text, needle",
    [
        ("out: {a: b}\n", "plain name"),
        ("  out: nested\n", "plain name"),
        (None, "cannot be read"),
        ("out: a'b\n", "plain name"),
        ("out: 'a' 'b'\n", "plain name"),
        ("out: a: b\n", "plain name"),
        ('out: "a\\tb"\n', "plain name"),
        ("out: >\n  runs/a\n", "goes on in the next line: runs/a"),
        ("out:\n\n  runs/a\n", "goes on in the next line: runs/a"),
        ("out: runs/\n  # here\n  a b\nseed: 1\n", "goes on in the next line: a b"),
    ],
)
def test_a_run_file_that_does_not_say_where_is_refused_in_one_line(job, text, needle):
    if text is None:
        (job.folder / "run.yaml").unlink()
    else:
        (job.folder / "run.yaml").write_text(text)
    done = job.call("begin", "run.yaml", "--ranks", "1")
    assert done.returncode == 2 and needle in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("text", ["out: ~/runs/a", "out: $WORK/runs/a", "out: '${WORK}/runs/a'"])
def test_home_and_variables_in_the_run_folder_are_those_that_the_training_takes(job, text):
    """Left as they are, the job would look for done.json in a folder named ~, and repeat a run that is done."""
    (job.folder / "run.yaml").write_text(f"{text}\n")
    there = f"{job.folder}/home"
    done = job.call("begin", "run.yaml", "--ranks", "1", HOME=there, WORK=there)
    assert done.stdout == f"{there}/runs/a\n" and (job.folder / "home/runs/a/slurm").is_dir()
    done = job.call("begin", "run.yaml", "--ranks", "1", HOME=there, WORK="", WORK_OF="x")
    if "WORK" in text:
        assert done.returncode == 2 and "names the variable WORK, which is not set" in done.stderr
    assert sorted(path.name for path in job.folder.iterdir() if path.name[0] in "~$") == []


def test_a_run_folder_of_any_letters_is_handed_back_in_any_locale(job):
    """By its bytes, for the job script to use; where the locale has no letters for a name of the run file, one line."""
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, ROOT / "slurm" / "job.py", "begin", "--ranks", "1", "run.yaml"]
    env = {**os.environ, **plain, "SLURM_JOB_ID": "7"}
    for name in ("läufe-日本".encode(), b"caf\xe9"):
        done = subprocess.run(
            [*command, b"out=" + name], cwd=job.folder, env=env, capture_output=True
        )
        assert done.stdout == name + b"\n" and done.returncode == 0, done.stderr
        assert os.path.isdir(os.fsencode(job.folder) + b"/" + name + b"/slurm")
    (job.folder / "run.yaml").write_text("out: läufe\n", encoding="utf-8")
    done = subprocess.run(command, cwd=job.folder, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "'l\\xe4ufe' has letters that" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_line_goes_under_a_torn_one_and_is_read_again(job):
    job.begin()
    record = job.run / "slurm" / "7.jsonl"
    record.write_bytes(record.read_bytes() + b'{"time": 3, "eve')
    assert job.call("signalled", "run", "USR1").returncode == 0
    lines = record.read_text().splitlines()
    assert (
        lines[1] == '{"time": 3, "eve'
        and json.loads(lines[2])["event"] == "signal"
        and len(lines) == 3
    )
    assert job.call("end", "run", "--code", "1", "--signal", "USR1").returncode == 4


@pytest.mark.parametrize("what, file", [("record", "7.jsonl"), ("mistake", "7-r0-mistake.txt")])
def test_a_file_for_which_there_is_no_room_is_named(job, what, file):
    """Files of at most 1 KiB, as a disk that is full: the first bytes are written, the others refused."""
    job.begin()
    own = job.run / "slurm"
    (own / "7.jsonl").write_text(
        (own / "7.jsonl").read_text() + ("x" * 700 + "\n") * (what == "record")
    )
    (own / "7-r0-preflight").mkdir()
    (own / "7-r0-preflight" / "n1.json").write_text(
        json.dumps({"verdict": {"mistakes": ["m" * 4000]}})
    )
    command = f"ulimit -f 1; exec {sys.executable} {ROOT}/slurm/job.py preflight run --code 2"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=job.folder,
        capture_output=True,
        text=True,
        env={**os.environ, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"},
    )
    assert done.returncode == 2 and done.stderr.startswith(
        f"error: run/slurm/{file}: File too large. Needed: "
    ), done.stderr
    assert done.stderr.count("\n") == 1


def test_a_run_folder_that_cannot_be_made_is_refused_in_one_line(job):
    (job.folder / "file").write_text("")
    done = job.call("begin", "run.yaml", "out=file/run", "--ranks", "1")
    assert (
        done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    )


def test_a_controller_that_is_away_is_waited_for(job):
    script = job.folder / "bin" / "scontrol"
    once = job.folder / "once"
    script.write_text(
        f"#!/bin/sh\ntest -e {once} || {{ touch {once}; echo 'Unable to contact slurm controller'"
        " >&2; exit 1; }\necho JobState=RUNNING Restarts=0\n"
    )
    began = time.monotonic()
    job.begin()
    assert job.end("--signal", "USR1")["decision"] == "requeue" and time.monotonic() - began >= 1.0
