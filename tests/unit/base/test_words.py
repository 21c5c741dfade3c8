"""Amounts, addresses of chance, who we are, files that are whole or absent."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from encoder.base.dist import world_from_env
from encoder.base.errors import ConfigError
from encoder.base.files import write_atomic
from encoder.base.rng import address_seed, generator, splitmix64
from encoder.base.units import parse_tokens, short_count, short_seconds

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("2T", 2 * 10**12),
        ("1.719T", 1_719 * 10**9),
        ("98_304", 98_304),
        ("98,304", 98_304),
        ("4Ki", 4096),
        (0, 0),
        ("1e9", 10**9),
        ("50b", 50 * 10**9),
        ("0.5K", 500),
    ],
)
def test_tokens_are_read_as_people_write_them(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "T", "1.5", "-1", -1, "1X", True, 0.5, "1 2", "nan"])
def test_what_is_no_amount_of_tokens_is_refused(text):
    with pytest.raises(ConfigError):
        parse_tokens(text)


def test_amounts_for_people():
    assert (short_count(1_719e9), short_count(8192), short_seconds(62), short_seconds(3725)) == (
        "1.719T",
        "8.192K",
        "1m02s",
        "1h02m",
    )


def test_an_address_gives_the_same_chance_whatever_was_drawn_before():
    first = generator(17, "mlm", 0, 5, 3).random(4)
    generator(17, "mlm", 0, 5, 2).random(1000)
    assert np.array_equal(first, generator(17, "mlm", 0, 5, 3).random(4))
    others = [
        generator(18, "mlm", 0, 5, 3),
        generator(17, "rows", 0, 5, 3),
        generator(17, "mlm", 0, 53),
        generator(17, "mlm", 5, 0, 3),
    ]
    assert all(not np.array_equal(first, g.random(4)) for g in others)
    assert 0 <= address_seed(17, "init", "a") < 2**63


def test_splitmix64_gives_the_published_numbers():
    # the first outputs of SplitMix64 seeded with 1234567 (test vector of the Java reference)
    state = np.uint64(1234567) + np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert splitmix64(state).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_ranks_come_from_torchrun_deepspeed_or_slurm():
    launched = world_from_env(
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
    )
    assert (launched.rank, launched.size, launched.local_rank, launched.local_size) == (3, 4, 1, 2)
    slurm = world_from_env(
        {
            "SLURM_PROCID": "2",
            "SLURM_NTASKS": "4",
            "SLURM_LOCALID": "0",
            "SLURM_STEP_ID": "0",
            "SLURM_NTASKS_PER_NODE": "2",
        }
    )
    assert (slurm.rank, slurm.size, slurm.first) == (2, 4, False)
    # the batch script itself has SLURM_PROCID too, but is no step
    assert world_from_env({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}).size == 1
    assert world_from_env({}).first


@pytest.mark.parametrize(
    "env, words",
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'; needed: a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1'"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK is ''"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "a"}, "LOCAL_RANK is 'a'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1.0"}, "LOCAL_WORLD_SIZE is '1.0'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2; needed: ranks from 0"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "rank 0 of 0"),
        ({"SLURM_PROCID": "y", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}, "SLURM_PROCID is 'y'"),
    ],
)
def test_ranks_that_no_launcher_gives_are_named(env, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        world_from_env(env)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_atomic(path, "old")
    with pytest.raises(TypeError):
        write_atomic(path, 5)  # type: ignore[arg-type]
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_reader_that_leaves_is_no_mistake_and_a_pipe_that_breaks_elsewhere_is_one(tmp_path):
    program = (
        "import sys\nfrom encoder.base.command import run_command\ndef body():\n    if sys.argv[1]"
        " == 'elsewhere': raise BrokenPipeError(32, 'Broken pipe', 'a worker')\n    for i in"
        " range(20000): print('line', i)\nsys.exit(run_command(body))\n"
    )
    for where, code, said in (("here", 141, ""), ("elsewhere", 2, "error: a worker: Broken pipe")):
        process = subprocess.Popen(
            [sys.executable, "-c", program, where],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        if where == "here":
            process.stdout.readline()
            process.stdout.close()
        error = process.stderr.read()
        assert process.wait() == code and error.startswith(said) and bool(error) == bool(said), (
            error
        )


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["new", "--list"], ["new", "small"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_or_no_reader_for_what_is_printed_is_no_traceback(words, unbuffered):
    """Also where Python holds the lines back until it ends."""
    command = [sys.executable, "-m", "launch.tessera", *words]
    how = {
        "cwd": ROOT,
        "env": {**os.environ, "PYTHONUNBUFFERED": unbuffered},
        "stderr": subprocess.PIPE,
        "text": True,
    }
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, **how)
    assert done.returncode == 2 and done.stderr.startswith("error: No space left on device.")
    assert done.stderr.count("\n") == 1
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, **how)
    os.close(writer)
    assert done.returncode == 141 and done.stderr == ""
