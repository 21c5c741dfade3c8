"""A shard that is found damaged under way is left out from one step on, by all ranks, and by every start after it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from encoder.base.dist import World
from encoder.base.errors import ShardError
from encoder.runs.config import read_run
from encoder.runs.folder import CHECKPOINTS, DONE, EVENTS, LEDGER, read_jsonl
from encoder.train.pretraining import pretrain
from tests.helpers.shards import random_documents, write_source
from tests.process.ranks import run_ranks
from tests.process.test_one_curve import RUN

BAD = "shard.00001.mds"
# met in the seventh step
SAMPLE = 9


def damage(shard: Path, sample: int) -> None:
    """One document that is no array any more, found when it is read; the others of its shard are read as before."""
    content = bytearray(shard.read_bytes())
    begin = int(np.frombuffer(content, "<u4", 1, 4 + 4 * sample)[0])
    content[begin + 4] = 255
    shard.write_bytes(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("quarantine")
    for name, seed in (("a", 1), ("b", 2), ("held", 3)):
        write_source(
            root / name,
            random_documents(100, seed=seed, longest=60),
            vocab_size=64,
            shard_bytes=1 << 11,
        )
    shutil.copy(root / "b" / BAD, root / "whole.mds")
    damage(root / "b" / BAD, SAMPLE)
    (root / "run.yaml").write_text(RUN.format(root=root))
    assert run_ranks(on_one_rank, 1, folder=str(root)) == [True]
    assert run_ranks(on_two_ranks, 2, folder=str(root)) == [True, True]
    return root


def run_of(folder: str, out: str, *more: str):
    return read_run(
        f"{folder}/run.yaml",
        [
            f"out={folder}/{out}",
            "phases.0.tokens=4K",
            "loader.on_bad_shard=quarantine",
            "evaluation.every_tokens=4K",
            *more,
        ],
    )


def on_one_rank(world: World, *, folder: str) -> bool:
    """A whole run, and one that goes on from before the loss, after the shard was mended. Asserts in the rank itself."""
    assert pretrain(run_of(folder, "one"), world).done
    root = Path(folder)
    shutil.copytree(root / "one", root / "again")
    (root / "again" / DONE).unlink()
    shutil.rmtree(root / "again" / "incarnations")
    (lost,) = json.loads((root / "one" / "quarantine.json").read_text())
    steps = {}
    for path in sorted((root / "again" / CHECKPOINTS).iterdir()):
        steps[path] = json.loads((path / "progress.json").read_text())
    before = [p for p, s in steps.items() if s["progress"]["step"] < lost["from_step"]]
    assert [s["extra"]["quarantine"] for s in steps.values()] == [[]] * len(before) + [[lost]] * (
        len(steps) - len(before)
    )
    for path in steps:
        if path not in before[:1]:
            shutil.rmtree(path)
    shutil.copy(root / "b" / BAD, root / "damaged.mds")
    shutil.copy(root / "whole.mds", root / "b" / BAD)
    assert pretrain(run_of(folder, "again", "loader.on_bad_shard=stop"), world).done
    shutil.copy(root / "damaged.mds", root / "b" / BAD)
    first = root / "b" / "shard.00000.mds"
    shutil.copy(first, root / "first.mds")
    damage(first, 0)
    with pytest.raises(
        ShardError,
        match=r"2 damaged shards with \d+\.\d% of the tokens of source b; at most 5% are left out",
    ):
        pretrain(run_of(folder, "much"), world)
    shutil.copy(root / "first.mds", first)
    return True


def on_two_ranks(world: World, *, folder: str) -> bool:
    return pretrain(
        run_of(
            folder,
            "two",
            "loader.workers=1",
            "loader.micro_batch_rows=2",
            f"data.sources.0.cache={folder}/cache",
            "data.sources.0.cache_bytes=5000",
            "loader.prefetch_windows=2",
        ),
        world,
    ).done


def test_all_ranks_leave_a_damaged_shard_out_from_the_same_step_on(folder):
    one, two = (
        json.loads((folder / out / "quarantine.json").read_text()) for out in ("one", "two")
    )
    (lost,) = one
    assert (
        one == two
        and (lost["source"], lost["shard"], lost["file"]) == ("b", 1, BAD)
        and lost["from_step"] > 2
    )
    assert f"{BAD} sample {SAMPLE} is damaged" in lost["reason"]
    assert read_jsonl(folder / "one" / LEDGER) == read_jsonl(folder / "two" / LEDGER)
    assert list((folder / "cache/shards").glob("*.mds")), (
        "which read one of its sources through a cache"
    )


def test_the_loss_is_an_event_with_its_documents_and_tokens(folder):
    (event,) = [e for e in read_jsonl(folder / "two" / EVENTS) if e["event"] == "quarantine"]
    lengths, index = (
        np.fromfile(folder / "b/lengths.bin", "<u2"),
        json.loads((folder / "b/index.json").read_text()),
    )
    first, count = (index["shards"][n]["samples"] for n in (0, 1))
    assert (event["documents"], event["tokens"]) == (
        count,
        int(lengths[first : first + count].sum()),
    )


def test_a_run_that_goes_on_from_before_the_loss_leaves_it_out_from_the_same_step_on(folder):
    assert read_jsonl(folder / "again" / LEDGER) == read_jsonl(folder / "one" / LEDGER)
