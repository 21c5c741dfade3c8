"""How a process is asked to end, and by whom: signals, a launcher that is gone, ranks that do not come."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from encoder.base.dist import Aloud, join, leave
from encoder.base.errors import ConfigError
from encoder.base.stopping import ECHO_SECONDS, STOP_SIGNALS
from encoder.base.world import World, meeting_address, world_from_env

ROOT = Path(__file__).resolve().parents[3]
LISTENS = """
import sys, time
from encoder.base.stopping import StopFlag
with StopFlag() as stop:
    if "begun" in sys.argv:
        stop.begin()
    print("ready", flush=True)
    while not stop.asked:
        time.sleep(0.01)
    print("asked by", stop.cause, flush=True)
    while "stuck" in sys.argv:
        time.sleep(0.01)
"""


def listening(*words: str, before: tuple[str, ...] = ()) -> subprocess.Popen:
    process = subprocess.Popen(
        [*before, sys.executable, "-c", LISTENS, *words],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        encoding="utf-8",
    )
    assert process.stdout.readline() == "ready\n"
    return process


def without_announcement(said: str) -> list[str]:
    """What was said, but for the line that a thread may say before the process has left."""
    return [line for line in said.splitlines() if ": finishes the step" not in line]


@pytest.mark.parametrize(
    "name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU"]
)
def test_every_signal_that_asks_to_end_is_heard_and_saved_for(name):
    process = listening("begun")
    process.send_signal(getattr(signal, name))
    said, errors = process.communicate(timeout=20)
    assert said == f"asked by {name}\n" and without_announcement(errors) == []
    assert process.returncode == 0 and getattr(signal, name) in STOP_SIGNALS


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR2"])
def test_before_the_first_step_a_signal_ends_the_process_with_a_line(name):
    process = listening()
    process.send_signal(getattr(signal, name))
    _, said = process.communicate(timeout=20)
    assert (
        said
        == f"stopped by {name} before the first step of this start; the same command starts again\n"
    )
    assert process.returncode == 128 + getattr(signal, name)


def test_a_second_signal_ends_a_process_at_once_that_is_still_saving():
    process = listening("begun", "stuck")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # a launcher's echo
    time.sleep(ECHO_SECONDS + 0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGINT
    assert said.splitlines()[-1].startswith("asked a second time, by SIGINT: ends at once")


def test_a_notice_and_the_demand_after_it_are_one_wish():
    process = listening("begun", "stuck")
    for number in (signal.SIGUSR1, signal.SIGXCPU, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(ECHO_SECONDS + 0.2)
    still_there = process.poll() is None
    process.kill()
    process.communicate()
    assert still_there


def test_a_hangup_that_nohup_ignores_stays_ignored(tmp_path):
    process = listening("begun", before=("sh", "-c", 'trap "" HUP; exec "$0" "$@"'))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGUSR2)
    assert process.communicate(timeout=20)[0] == "asked by SIGUSR2\n"


def test_a_launcher_that_is_killed_is_noticed_by_what_it_started(tmp_path):
    launcher = tmp_path / "torchrun"
    launcher.write_text(
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', *sys.argv[1:]])\n",
        encoding="utf-8",
    )
    process = subprocess.Popen(
        [sys.executable, launcher, LISTENS, "begun"],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        encoding="utf-8",
    )
    assert process.stdout.readline() == "ready\n"
    process.kill()
    said = process.stdout.read()
    process.wait()
    assert said == f"asked by its launcher: torchrun (process {process.pid}) is gone\n"


@pytest.mark.parametrize(
    "env",
    [
        {"MASTER_ADDR": "x"},
        {"MASTER_PORT": "abc"},
        {"MASTER_ADDR": "x", "MASTER_PORT": "1"},
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x"},
        {"WORLD_SIZE": "1"},
    ],
)
def test_one_rank_needs_no_address_whatever_the_environment_says(env, monkeypatch):
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    world = world_from_env()
    assert world.size == 1 and join(world, device=torch.device("cpu"))
    leave()


@pytest.mark.parametrize("port", ["abc", "0", "65536", "-1", "29500x", "9" * 30, "²", ""])
def test_a_port_that_is_none_is_one_sentence(port):
    with pytest.raises(ConfigError, match="MASTER_PORT"):
        meeting_address(World(rank=0, size=2), {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})


def test_who_waits_for_ranks_says_for_whom_where_and_who_said_so(monkeypatch, capsys):
    monkeypatch.setattr(Aloud, "FIRST_SECONDS", 0.05)
    world = world_from_env({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8"})
    aloud = Aloud("127.0.0.1 port 29500 (MASTER_ADDR)", said_by=world.said_by, size=world.size)
    with pytest.raises(TimeoutError):
        while True:
            aloud.wait(
                "7 of 8 ranks", until=time.monotonic() + 0.3 if not capsys.readouterr().err else 0.0
            )
    aloud.wait("7 of 8 ranks", until=time.monotonic() + 60)
    time.sleep(0.3)
    aloud.wait("7 of 8 ranks", until=time.monotonic() + 60)
    said = capsys.readouterr().err
    for word in (
        "waiting for 7 of 8 ranks since",
        "127.0.0.1 port 29500",
        "SLURM_STEP_NUM_TASKS",
        "RANK=0 WORLD_SIZE=1",
    ):
        assert word in said
