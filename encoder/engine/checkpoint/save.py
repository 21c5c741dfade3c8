"""Saving while training goes on: the run waits for a copy in memory; threads write it, and rank zero commits.

    start      all ranks meet; rank zero makes the hidden folder; each rank copies its slices to memory     the stall
    write      a thread of each rank: its file, synced and hashed
    commit     when the files of all ranks are durable: a thread of rank zero writes the rest, the name and the mark

From part to part the ranks go together, where they meet anyway: each step's all-reduce carries `ready`, and no thread of
a save ever takes part in a collective. At most one save is under way. A kill at any moment leaves the checkpoint before it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from encoder.base.agreement import run_on_all_ranks
from encoder.base.dist import sum_over_ranks
from encoder.base.errors import CheckpointError
from encoder.base.files import fsync_path, sha256_of, write_atomic, write_json
from encoder.base.units import Progress
from encoder.engine.checkpoint.folder import (
    COMMITTED,
    FORMAT,
    MANIFEST,
    MILESTONE,
    check_not_stale,
    damage,
    folder_name,
    remove_old,
)
from encoder.engine.checkpoint.read import read_progress
from encoder.engine.checkpoint.tensors import copy_pieces, rank_file, write_tensors
from encoder.engine.engine import Engine

_PACKAGES = (
    "torch",
    "deepspeed",
    "safetensors",
    "numpy",
    "tokenizers",
    "transformers",
    "mosaicml-streaming",
    "tessera-encoders",
)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A committed checkpoint, and what it took."""

    path: Path
    progress: Progress
    milestone: str | None
    bytes: int  # all ranks; 0 where this position was committed already
    seconds: float  # from the start to the mark


class Saver:
    """The saves of a run under `root` (RUN/checkpoints), one at a time; start, advance and wait are called on every rank.

    They raise CheckpointError on all ranks if a file cannot be written (what was half-written is removed,
    older checkpoints stay) or if a newer start of the run took over.
    """

    def __init__(
        self,
        root: Path,
        *,
        engine: Engine,
        incarnation: int,
        keep_last: int,
        is_good: Callable[[Path], bool] = lambda _: True,
    ) -> None:
        """`is_good`: whether the run could go back to a checkpoint; the last such one is always kept."""
        self._root, self._engine, self._incarnation, self._keep_last = (
            root,
            engine,
            incarnation,
            keep_last,
        )
        self._is_good = is_good
        self._save: _Save | None = None
        # rank zero: folders that this start wrote, or has hashed
        self._known_whole: dict[Path, bool] = {}

    @property
    def busy(self) -> bool:
        """Whether a save is under way; the same on all ranks."""
        return self._save is not None

    @property
    def ready(self) -> int:
        """This rank's word for a sum over ranks: from the number of ranks on, all call `advance`. A failure counts for all."""
        if self._save is None or self._save.thread.is_alive():
            return 0
        if self._save.error is None:
            return 1
        return self._engine.world.size

    def start(
        self,
        progress: Progress,
        *,
        run_yaml: str,
        extra: dict[str, Any],
        milestone: str | None = None,
    ) -> Saved | None:
        """Begins a save, after the one before it; what it is made of is copied when this returns.

        `extra` holds plain JSON values that load_checkpoint gives back. A position that is committed already gets nothing but
        the milestone, and comes back as saved.
        """
        assert self._save is None, "the save before it is still under way: wait() first"
        first = self._engine.world.first
        save = _Save(
            self._root, self._engine, progress, run_yaml, self._incarnation, extra, milestone
        )
        with self._cleaned_up_after(save):
            run_on_all_ranks(save.begin if first else None, doing=save.doing, then=save.then)
            # rank zero alone has looked; the sum tells the others
            kept_already = int(sum_over_ranks(save.kept_already))
            if not kept_already:
                run_on_all_ranks(save.copy, doing=save.doing, then=save.then)
        if kept_already:
            return save.result()

        # from here on training may change weights and state: the copies are the thread's
        self._save = save
        save.go(save.write_rank)
        return None

    def advance(self) -> Saved | None:
        """From one part to the next, once this rank's is over; what was saved when that was the last."""
        save = self._save
        assert save, "no save is under way"
        save.thread.join()
        with self._cleaned_up_after(save):
            run_on_all_ranks(save.raise_error, doing=save.doing, then=save.then)
            if not save.written:
                save.written = True
                # each rank filled its own row: with the sum rank zero can write the manifest
                sum_over_ranks(save.digests)
                # the others run an empty part, so that `ready` has the same meaning on every rank
                save.go(self._commit if self._engine.world.first else _nothing)
                return None
        self._save = None
        return save.result()

    def wait(self) -> Saved | None:
        """What is under way is committed when this returns; None if nothing was."""
        saved = None
        while self._save is not None:
            saved = self.advance()
        return saved

    def close(self) -> None:
        """No thread writes any more; what was not committed is not."""
        if self._save is not None:
            self._save.thread.join()

    def _commit(self) -> None:
        """On rank zero's thread: the rest of the files, then retention."""
        assert self._save
        self._save.commit()

        # hashed while it was written: retention need not read it again
        self._known_whole[self._save.final] = True
        try:
            remove_old(
                self._root,
                incarnation=self._incarnation,
                keep_last=self._keep_last,
                is_whole=self._is_whole,
                is_good=self._is_good,
                stands_on=_stands_on,
            )
        except OSError as error:
            raise CheckpointError(
                f"cannot remove old checkpoints in {self._root}: {error.strerror or error}. "
                f"{self._save.final.name} is committed."
            ) from error

    def _is_whole(self, folder: Path) -> bool:
        if folder not in self._known_whole:
            self._known_whole[folder] = damage(folder) is None
        return self._known_whole[folder]

    @contextlib.contextmanager
    def _cleaned_up_after(self, save: _Save) -> Any:
        try:
            yield
        except BaseException:
            self._save = None
            if self._engine.world.first:
                save.clean_up()
            raise


class _Save:
    """One save: what each rank, and rank zero alone, does."""

    def __init__(
        self,
        root: Path,
        engine: Engine,
        progress: Progress,
        run_yaml: str,
        incarnation: int,
        extra: dict[str, Any],
        milestone: str | None,
    ) -> None:
        name = folder_name(tokens=progress.tokens, incarnation=incarnation)
        self.root, self.part, self.final = root, root / f".{name}.part", root / name
        self.engine, self.progress, self.run_yaml, self.incarnation = (
            engine,
            progress,
            run_yaml,
            incarnation,
        )
        self.extra, self.milestone = extra, milestone
        self.doing = f"cannot write checkpoint {self.final}"
        self.then = "The one before it stays valid; start again once there is room."
        self.kept_already = torch.zeros(1, dtype=torch.int64)
        # a row a rank: bytes of its file, then the 32 bytes of its SHA-256
        self.digests = torch.zeros(engine.world.size, 33, dtype=torch.int64)
        self.began = time.monotonic()
        self.written = False  # the files of all ranks
        self.error: BaseException | None = None
        self.thread = threading.Thread()

    def begin(self) -> None:
        """Rank zero: an empty hidden folder; or, where this position is committed already, only its milestone."""
        check_not_stale(self.root, self.incarnation)
        self.clean_up()
        if self.final.is_dir():
            assert read_progress(self.final)[0] == self.progress, (
                f"{self.final} was saved at another position"
            )
            self.kept_already.fill_(1)
            if self.milestone:
                write_atomic(self.final / MILESTONE, self.milestone)
        else:
            self.part.mkdir(parents=True)

    def copy(self) -> None:
        """Every rank: all that the next step would change."""
        engine = self.engine
        self.tensors = copy_pieces(engine.owned_pieces())
        self.state = {
            "format": FORMAT,
            "optimizer_steps": engine.optimizer_steps,
            "ranks": engine.world.size,
            "zero_stage": engine.config.zero_stage,
            "precision": engine.config.precision,
            "shapes": engine.shapes,
        }

    def go(self, act: Callable[[], None]) -> None:
        """Runs a part on a thread of its own."""

        def run() -> None:
            try:
                act()
            except BaseException as error:  # kept until the ranks meet
                self.error = error

        self.thread = threading.Thread(target=run, name=f"saving {self.final.name}", daemon=True)
        self.thread.start()

    def raise_error(self) -> None:
        """What went wrong on this rank's thread."""
        if self.error is not None:
            raise self.error

    def write_rank(self) -> None:
        """Every rank: the state it answers for."""
        rank = self.engine.world.rank
        path = self.part / rank_file(rank)
        write_tensors(path, self.tensors)
        # the copies' memory, while the hash is computed
        self.tensors = {}
        self.digests[rank] = torch.tensor([path.stat().st_size, *bytes.fromhex(sha256_of(path))])

    def commit(self) -> None:
        """Rank zero: everything else, then the name, then the mark."""
        part = self.part
        write_json(part / "state.json", self.state)
        write_json(
            part / "progress.json",
            {"progress": dataclasses.asdict(self.progress), "extra": self.extra},
        )
        write_atomic(part / "run.yaml", self.run_yaml)
        write_json(part / "environment.json", _environment())

        # the ranks have hashed their own files, rank zero hashes the rest
        files = {
            p.name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)}
            for p in sorted(part.iterdir())
            if p.suffix != ".safetensors"
        }
        for rank, (size, *digest) in enumerate(self.digests.tolist()):
            files[rank_file(rank)] = {"bytes": size, "sha256": bytes(digest).hex()}
        write_json(part / MANIFEST, files)
        if self.milestone:
            write_atomic(part / MILESTONE, self.milestone)

        # the last look for a newer start. Then name and mark, each durable before the next: a kill
        # in between leaves an uncommitted folder
        check_not_stale(self.root, self.incarnation)
        os.rename(part, self.final)
        fsync_path(self.root)
        write_atomic(self.final / COMMITTED, sha256_of(self.final / MANIFEST))

    def clean_up(self) -> None:
        """Removes what this save, or one before it at this position, left without committing."""
        shutil.rmtree(self.part, ignore_errors=True)
        if not (self.final / COMMITTED).exists():
            shutil.rmtree(self.final, ignore_errors=True)

    def result(self) -> Saved:
        """For who asked for it; the same on all ranks but for the times."""
        return Saved(
            path=self.final,
            progress=self.progress,
            milestone=self.milestone,
            bytes=int(self.digests[:, 0].sum()),
            seconds=time.monotonic() - self.began,
        )


def _environment() -> dict[str, str | None]:
    """Versions only: a checkpoint is given to others."""
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
    }
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _nothing() -> None:
    pass


def _stands_on(folder: Path) -> list[int]:
    """Tokens of other checkpoints that a checkpoint's run still needs; a damaged one needs none."""
    try:
        return read_progress(folder)[1].get("stands_on_tokens", [])
    except CheckpointError:
        return []
