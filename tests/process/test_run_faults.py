"""What goes wrong while a run is under way: all ranks leave together, and a resume takes only what belongs to it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from encoder.base.dist import World
from encoder.base.errors import CheckpointError, ShardError, UserError
from encoder.data.loader import Loader
from encoder.runs.config import read_run
from encoder.runs.folder import LEDGER, read_jsonl
from encoder.runs.weights import read_model
from encoder.tools.weights.export import export_run
from encoder.train.pretraining import pretrain
from tests.helpers.shards import random_documents, write_source
from tests.process.ranks import run_ranks
from tests.process.test_one_curve import RUN


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("faults")
    for name, seed in (("a", 1), ("b", 2), ("held", 3)):
        write_source(root / name, random_documents(60, seed=seed, longest=60), vocab_size=64)
    (root / "run.yaml").write_text(RUN.format(root=root))
    assert run_ranks(all_cases, 1, folder=str(root)) == [True]
    return root


def settings(folder: str, out: str, *overrides: str) -> list[str]:
    return [f"out={folder}/{out}", *overrides]


def all_cases(world: World, *, folder: str) -> bool:
    """On one rank: a whole run, and starts after it under other settings. Asserts in the rank itself."""
    file = f"{folder}/run.yaml"
    assert pretrain(read_run(file, settings(folder, "whole")), world).done
    cut = Path(folder) / "cut"
    shutil.copytree(Path(folder) / "whole", cut)
    (cut / "done.json").unlink()
    (cut / "run.yaml").unlink()  # as when only the checkpoints were copied
    shutil.rmtree(cut / "incarnations")
    for path in sorted((cut / "checkpoints").iterdir())[1:]:
        shutil.rmtree(path)
    with pytest.raises(CheckpointError, match="phases.1.lr.peak was 0.005, now 0.5"):
        pretrain(read_run(file, settings(folder, "cut", "phases.1.lr.peak=0.5")), world)
    # another precision and another attention may go on: the fixed batch's loss differs by rounding only
    assert pretrain(
        read_run(file, settings(folder, "cut", "engine.precision=autocast", "attention=sdpa")),
        world,
    ).done
    newest = max((cut / "checkpoints").iterdir(), key=lambda p: p.stat().st_mtime)
    assert newest.name.endswith("-i0002"), (
        "the checkpoint's own number counts where the claims were lost"
    )
    return True


def one_rank_meets_a_mistake(world: World, *, folder: str) -> list[str]:
    plain, calls = Loader.next_step, [0]

    def next_step(self):
        calls[0] += 1
        if calls[0] == 4 and world.rank == 1:
            raise ShardError("shard 7 is damaged.")
        return plain(self)

    Loader.next_step = next_step
    try:
        pretrain(read_run(f"{folder}/run.yaml", settings(folder, "torn")), world)
    except UserError as error:
        return [type(error).__name__, str(error)]
    return []


def test_a_mistake_that_one_rank_meets_ends_all_and_is_said_once(folder):
    first, second = run_ranks(one_rank_meets_a_mistake, 2, folder=str(folder))
    assert second == ["RankError", "rank 1: shard 7 is damaged."]
    assert first[0] == "SilentError" and len(read_jsonl(folder / "torn" / LEDGER)) == 3


def test_a_run_goes_on_only_under_its_own_settings_and_its_ledger_is_the_same(folder):
    assert read_jsonl(folder / "cut" / LEDGER) == read_jsonl(folder / "whole" / LEDGER)


def test_a_damaged_checkpoint_is_not_exported(folder, tmp_path):
    checkpoint = max((folder / "whole" / "checkpoints").iterdir())
    damaged = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    path = damaged / "rank00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 255
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="rank00000.safetensors is damaged"):
        export_run(damaged, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_checkpoint_away_from_its_run_is_read_with_the_tokenizer_that_was_put_into_it(
    folder, tmp_path
):
    checkpoint = max((folder / "whole" / "checkpoints").iterdir())
    moved = shutil.copytree(checkpoint, tmp_path / "elsewhere" / "moved")
    assert read_model(moved).tokenizer_json is None
    shutil.copy(folder / "whole" / "tokenizer.json", moved)
    assert read_model(moved).tokenizer_json == moved / "tokenizer.json"
    assert read_model(checkpoint).tokenizer_json == folder / "whole" / "tokenizer.json"


def test_a_second_start_is_refused_while_the_first_trains(folder):
    from encoder.train.start import lock_folder

    (folder / "locked").mkdir()
    with lock_folder(folder / "locked"):
        with pytest.raises(CheckpointError, match="another start of this run is training"):
            lock_folder(folder / "locked")
    lock_folder(folder / "locked").close()


def test_only_a_later_start_of_the_same_job_passes_by_one_that_still_lives(folder):
    from encoder.train.start import lock_folder

    (folder / "job").mkdir()
    with lock_folder(folder / "job", {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}):
        lock_folder(folder / "job", {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}).close()
        for env in (
            {},
            {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "2"},
            {"SLURM_JOB_ID": "7"},
            {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"},
        ):
            with pytest.raises(CheckpointError, match="another start of this run is training"):
                lock_folder(folder / "job", env)
