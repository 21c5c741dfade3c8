"""Worker processes: the same steps, errors that come home, deaths that are noticed, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from encoder.base.errors import PassingError, ShardError
from encoder.data.shards import open_source
from encoder.objectives.catalog import build_objective
from encoder.objectives.mlm import MlmConfig
from tests.helpers.loading import loader_with
from tests.helpers.shards import random_documents, write_source

ROOT = Path(__file__).parents[3]


class Failing:
    """A masker with a fault."""

    terms, has_segments, pairs = ("mlm",), False, None

    def mask(self, ids, generator, *, lengths, phase_tokens):
        raise ZeroDivisionError("a fault in the objective")

    def capacity(self, term, tokens):
        return tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_source(
        tmp_path_factory.mktemp("web") / "train", random_documents(100), shard_bytes=1 << 11
    )


def loader_of(folder, *, workers, masker=None):
    source = open_source(folder, name="web")
    return loader_with(
        [source],
        max_tokens_per_document=32,
        row_tokens=64,
        window_documents=16,
        micro_batch_rows=2,
        masker=masker or build_objective(MlmConfig(), vocab_size=64, specials=source.card.specials),
        rows_at=lambda tokens: 3 + tokens // 1000,
        workers=workers,
    )


def pids_of(loader):
    return [w.pid for w in loader._iterator._workers]


def alive(pid):
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def gone_within(pids, seconds):
    end = time.monotonic() + seconds
    while any(alive(p) for p in pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(alive(p) for p in pids)


def test_workers_make_the_steps_that_one_process_makes_and_leave_when_closed(folder):
    with loader_of(folder, workers=0) as loader:
        expected = [loader.next_step() for _ in range(12)]
    with loader_of(folder, workers=2) as loader:
        made = [loader.next_step() for _ in range(12)]
        pids = pids_of(loader)
        assert len(pids) == 2 and all(map(alive, pids)) and os.getpid() not in pids
    assert gone_within(pids, 5)
    assert [(s.row_hash, s.tokens, s.end) for s in made] == [
        (s.row_hash, s.tokens, s.end) for s in expected
    ]
    for one, other in zip(made, expected, strict=True):
        for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
            assert (a.max_seqlen, a.tokens, a.counts) == (b.max_seqlen, b.tokens, b.counts)
            assert [*a.tensors()] == [*b.tensors()]
            assert all(torch.equal(x, b.tensors()[name]) for name, x in a.tensors().items())


def test_a_fault_in_a_worker_comes_home_with_its_traceback(folder):
    with loader_of(folder, workers=1, masker=Failing()) as loader:
        with pytest.raises(
            ZeroDivisionError,
            match=r"(?s)Original Traceback.*assembly\.py.*a fault in the objective",
        ):
            loader.next_step()
        pids = pids_of(loader)
    assert gone_within(pids, 5)


def test_a_users_mistake_comes_home_as_one_line(folder, tmp_path):
    with loader_of(folder, workers=1) as loader:
        (moved := tmp_path / "away").mkdir()
        for path in folder.glob("*.mds"):
            path.rename(moved / path.name)
        try:
            with pytest.raises(
                ShardError, match=r"^\S+\.mds is missing, but index.json lists it\. [^\n]*$"
            ):
                for _ in range(100):  # what was open before stays readable
                    loader.next_step()
        finally:
            for path in moved.glob("*.mds"):
                path.rename(folder / path.name)


def test_a_killed_worker_is_noticed(folder, monkeypatch):
    monkeypatch.setattr(
        torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5
    )  # torch looks every 5 s
    with loader_of(folder, workers=1) as loader:
        loader.next_step()
        os.kill(pids_of(loader)[0], signal.SIGKILL)
        with pytest.raises(
            PassingError, match="a loader worker was killed from outside.*Start again"
        ):
            for _ in range(100):
                loader.next_step()


def test_signals_to_the_whole_process_group_do_not_end_the_workers(folder):
    with loader_of(folder, workers=1) as loader:
        (pid,) = pids_of(loader)
        with open(f"/proc/{pid}/stat") as f:
            server = int(f.read().rsplit(")", 1)[1].split()[1])
        for target in (pid, server):
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                os.kill(target, number)
        for _ in range(30):
            loader.next_step()
        assert signal.SIGTERM not in signal.pthread_sigmask(
            signal.SIG_BLOCK, ()
        )  # the main process still hears
    assert gone_within([pid], 5)


MAIN = """
import os, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.unit.data.test_workers import loader_of, pids_of
if __name__ == "__main__":
    loader = loader_of(Path({folder!r}), workers=1)
    loader.next_step()
    print(*pids_of(loader), flush=True)
    {end}
"""


@pytest.mark.matrix
def test_workers_end_with_a_main_process_that_never_closed_the_loader(folder, tmp_path):
    ends = {3: "raise SystemExit(3)", -9: "os.kill(os.getpid(), 9)"}  # by the exit code
    started = {}
    for code, end in ends.items():  # side by side: each takes seconds to import torch
        script = tmp_path / f"main{code}.py"
        script.write_text(MAIN.format(root=str(ROOT), folder=str(folder), end=end))
        started[code] = subprocess.Popen(
            [sys.executable, str(script)], stdout=subprocess.PIPE, text=True
        )
    for code, process in started.items():
        out, _ = process.communicate(timeout=60)  # ends when nobody holds the pipe any more
        assert process.returncode == code
        assert gone_within([int(p) for p in out.split()], 10)
