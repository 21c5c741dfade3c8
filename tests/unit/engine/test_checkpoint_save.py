"""Saving in the background, on one rank without an engine: what is copied, what a full disk and damage do, what is kept."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from encoder.base import log
from encoder.base.dist import World
from encoder.base.errors import CheckpointError
from encoder.base.units import Progress
from encoder.engine.checkpoint import save as checkpoint_save
from encoder.engine.checkpoint.read import claim_incarnation, newest_checkpoint, read_weights
from encoder.engine.checkpoint.save import Saved, Saver
from encoder.engine.engine import StateShard


class Run:
    """A run folder, and a model of one parameter in the place of an engine."""

    def __init__(self, folder: Path, *, keep_last: int = 9) -> None:
        self.root, self.weight = folder / "checkpoints", torch.arange(6.0)
        pieces = [
            StateShard(
                name="w", start=0, tensors={"master": self.weight, "exp_avg": torch.zeros(6)}
            )
        ]
        engine = SimpleNamespace(
            world=World(),
            owned_pieces=lambda: pieces,
            optimizer_steps=7,
            shapes={"w": (2, 3)},
            config=SimpleNamespace(zero_stage=0, precision="fp32"),
        )
        self.saver = Saver(
            self.root,
            engine=engine,
            incarnation=claim_incarnation(folder, World()),
            keep_last=keep_last,
        )

    def start(self, tokens: int, **named) -> Saved | None:
        return self.saver.start(
            Progress(step=tokens, tokens=tokens), run_yaml="a: 1\n", extra={"note": tokens}, **named
        )

    def save(self, tokens: int, **named) -> Path:
        return (self.start(tokens, **named) or self.saver.wait()).path

    def names(self) -> list[int]:
        return sorted(int(p.name[6:19]) if p.name[0] == "t" else -1 for p in self.root.iterdir())


@pytest.fixture
def slow_disk(monkeypatch) -> threading.Event:
    """Writing the tensors waits for the event."""
    go, plain = threading.Event(), checkpoint_save.write_tensors
    monkeypatch.setattr(
        checkpoint_save, "write_tensors", lambda *values: go.wait(10) and plain(*values)
    )
    return go


def test_training_goes_on_while_the_disk_is_slow_and_the_checkpoint_has_the_weights_of_its_step(
    tmp_path, slow_disk
):
    run = Run(tmp_path)
    run.start(1)
    run.weight.add_(100.0)
    assert run.saver.busy and run.saver.ready == 0 and newest_checkpoint(run.root) is None
    slow_disk.set()
    saved = run.saver.wait()
    assert (
        saved.path == newest_checkpoint(run.root)
        and saved.bytes == (saved.path / "rank00000.safetensors").stat().st_size
    )
    assert (
        torch.equal(read_weights(saved.path)["w"], torch.arange(6.0).view(2, 3))
        and not run.saver.busy
    )


def test_from_part_to_part_only_when_the_ranks_meet(tmp_path, slow_disk):
    run = Run(tmp_path)
    run.start(1)
    slow_disk.set()
    run.saver._save.thread.join()
    assert run.saver.ready == 1 and newest_checkpoint(run.root) is None, (
        "all files are there, nothing is committed"
    )
    assert run.saver.advance() is None
    run.saver._save.thread.join()
    assert run.saver.ready == 1 and run.saver.advance().path == newest_checkpoint(run.root)
    assert run.saver.ready == 0


def test_a_process_that_ends_meanwhile_leaves_the_checkpoint_before(tmp_path, slow_disk):
    run = Run(tmp_path)
    slow_disk.set()
    before = run.save(1)
    run.start(2)
    run.saver.close()
    assert newest_checkpoint(run.root) == before and run.names() == [-1, 1]
    assert Run(tmp_path).save(3).is_dir() and run.names() == [
        1,
        3,
    ], "what was left is removed by the next"


def test_a_full_disk_at_any_file_operation_is_one_line_and_the_checkpoint_before_stays(tmp_path):
    """The tensors, the fsync and replace of each file, the rename: each in turn has no room."""
    run = Run(tmp_path)
    before, operation, failed = run.save(1), 0, True
    while failed:
        operation += 1
        with no_room_at(operation):
            try:
                run.save(2)
                failed = False
            except CheckpointError as error:
                assert "No space left on device" in str(error) and "\n" not in str(error)
        if run.names() == [1, 2]:
            break  # the mark was there already, its folder could not be synced
        assert newest_checkpoint(run.root) == before and run.names() == [1]
    assert operation > 15, "a save has more operations"
    assert run.save(2) == newest_checkpoint(run.root), "once there is room"


@contextlib.contextmanager
def no_room_at(operation: int) -> Iterator[None]:
    count = 0

    def full(plain):
        def act(*values, **named):
            nonlocal count
            count += 1
            if count == operation:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "f")
            return plain(*values, **named)

        return act

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_save, "write_tensors", full(checkpoint_save.write_tensors))
        for name in ("fsync", "replace", "rename"):
            patch.setattr(os, name, full(getattr(os, name)))
        yield


def damages(folder: Path, *, flips: int) -> list[tuple[str, str, bytes | None]]:
    """(name, file, what it holds then; None: it is gone)."""
    found, chance = [], random.Random(5)
    files = sorted(p for p in folder.iterdir() if p.stat().st_size)
    for path in files:
        content = path.read_bytes()
        found += [
            (f"cut to {n}", path.name, content[:n])
            for n in {0, len(content) // 2, len(content) - 1}
        ]
        found.append(("gone", path.name, None))
    for i in range(flips):
        path = files[i % len(files)]
        content = bytearray(path.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        found.append((f"flip {i}", path.name, bytes(content)))
    return found


@pytest.mark.parametrize("flips", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_no_damage_of_any_file_is_ever_loaded(tmp_path, capsys, flips):
    run = Run(tmp_path)
    before, last = run.save(1), run.save(2)
    seen = set()
    for how, name, content in damages(last, flips=flips):
        whole = (last / name).read_bytes()
        if content is None:
            (last / name).unlink()
        else:
            (last / name).write_bytes(content)
        log._state.said.clear()
        assert newest_checkpoint(run.root) == before, (how, name)
        said = capsys.readouterr().err
        assert name in said or (name, how) == ("COMMITTED", "gone"), (
            how,
            name,
            said,
        )  # a folder without it does not exist
        (last / name).write_bytes(whole)
        seen.add(name)
    assert newest_checkpoint(run.root) == last
    assert seen == {
        "rank00000.safetensors",
        "state.json",
        "progress.json",
        "run.yaml",
        "environment.json",
        "MANIFEST.json",
        "COMMITTED",
    }


def test_a_damaged_folder_does_not_count_for_those_that_are_kept(tmp_path):
    run = Run(tmp_path, keep_last=2)
    for tokens in (1, 2, 3):
        run.save(tokens)
    assert run.names() == [2, 3]
    resumed = Run(tmp_path, keep_last=2)
    path = next(run.root.glob("*3-i0001")) / "rank00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    resumed.save(4)
    assert run.names() == [2, 3, 4], "two whole ones, and the damaged one between them"
    resumed.save(5)
    assert run.names() == [4, 5]


def test_a_milestone_is_never_written_again_nor_removed(tmp_path):
    run = Run(tmp_path, keep_last=1)
    first = run.save(1, milestone="stable")
    stamp = (first / "rank00000.safetensors").stat().st_mtime_ns
    run.weight.add_(1.0)
    again = run.saver.start(Progress(step=1, tokens=1), run_yaml="", extra={}, milestone="stable")
    assert (
        again.path == first
        and again.bytes == 0
        and (first / "rank00000.safetensors").stat().st_mtime_ns == stamp
    )
    for tokens in (2, 3):
        run.save(tokens)
    assert run.names() == [1, 3]
