"""A run that starts from a grown folder has exactly those weights, records them, and goes on without the folder."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from encoder.base.dist import World
from encoder.base.errors import CheckpointError
from encoder.engine.checkpoint.read import newest_checkpoint, read_progress
from encoder.models.modernbert import ModernBertForMaskedLM
from encoder.models.stored import read_stored
from encoder.objectives.mlm import mlm_loss
from encoder.runs.config import read_run
from encoder.runs.facts import check_data
from encoder.runs.folder import read_jsonl
from encoder.runs.initial import read_initial, weights_sha256
from encoder.train.pretraining import Pretraining, pretrain
from encoder.train.start import FINGERPRINT_TOLERANCE, fingerprint, start_run
from launch import grow
from tests.helpers.shards import random_documents, write_source
from tests.process.ranks import run_ranks
from tests.process.test_one_curve import RUN

SMALL = [
    "model.hidden_size=32",
    "model.intermediate_size=24",
    "model.num_hidden_layers=3",
    "model.attention_head_width=16",
]
# 32 -> 64 wide, 3 -> 4 layers, 2 -> 4 heads
LARGE = [
    "model.num_hidden_layers=4",
    "model.attention_head_width=16",
    "model.num_attention_heads=4",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("init_from")
    for name, seed in (("a", 1), ("b", 2), ("held", 3)):
        write_source(root / name, random_documents(60, seed=seed, longest=60), vocab_size=64)
    (root / "run.yaml").write_text(RUN.format(root=root))
    assert run_ranks(small_grown_and_trained_on, 1, folder=str(root)) == [True]
    return root


def small_grown_and_trained_on(world: World, *, folder: str) -> bool:
    """Trains a small model, grows its run folder, and trains the large one on."""
    root = Path(folder)
    pretrain(read_run(root / "run.yaml", [f"out={root}/small", *SMALL]), world)
    assert (
        grow.main(
            [
                f"{root}/small",
                f"{root}/grown",
                "--run",
                f"{root}/run.yaml",
                *(s.removeprefix("model.") for s in LARGE),
            ]
        )
        == 0
    )
    large = [f"out={root}/large", f"init_from={root}/grown", *LARGE]
    assert pretrain(read_run(root / "run.yaml", large), world).done
    # a resume needs no init_from folder any more, and no other one may take its place
    (root / "large" / "done.json").unlink()
    for path in sorted((root / "large" / "checkpoints").iterdir())[1:]:
        shutil.rmtree(path)
    with pytest.raises(
        CheckpointError,
        match=r"init_from .*/small holds weights of SHA-256 \w+, this run began with",
    ):
        pretrain(read_run(root / "run.yaml", [*large, f"init_from={root}/small"]), world)
    (root / "grown").rename(root / "moved")
    return pretrain(read_run(root / "run.yaml", large), world).done


def all_masters(world: World, *, folder: str, cases: list[tuple[int, str]]) -> list[bool]:
    return [
        masters_are_the_stored_values(world, folder=folder, stage=stage, precision=precision)
        for stage, precision in cases
    ]


def masters_are_the_stored_values(world: World, *, folder: str, stage: int, precision: str) -> bool:
    """This rank's share of the masters, to the last bit; and the model's own parameters, by the loss they give."""
    run = read_run(
        f"{folder}/run.yaml",
        [
            f"out={folder}/{precision}{stage}-{world.size}",
            f"init_from={folder}/moved",
            *LARGE,
            f"engine.zero_stage={stage}",
            f"engine.precision={precision}",
        ],
    )
    facts, device = check_data(run), torch.device("cpu")
    initial = read_initial(run, facts, hashed=world.first)
    course = Pretraining(run, facts, world=world, device=device, initial=initial)
    with contextlib.ExitStack() as held:
        engine = start_run(course, world, device, held).engine
    expected = read_stored(Path(folder) / "moved").weights
    found = [
        (p.master, expected[p.name].view(-1)[p.start : p.start + len(p.master)])
        for p in engine.pieces()
    ]
    plain = ModernBertForMaskedLM(run.model).eval()
    plain.load_state_dict(expected)
    batch = course.fingerprint_batch(engine.objective)
    loss = mlm_loss(plain, batch).sum.item() / batch.counts["mlm"]
    assert fingerprint(course, engine, device) == pytest.approx(
        loss, rel=FINGERPRINT_TOLERANCE[precision]
    )
    return bool(found) and all(torch.equal(a, b.to(a.dtype)) for a, b in found)


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [(1, [(0, "fp64"), (1, "bf16")]), (2, [(2, "fp32"), (3, "bf16"), (3, "fp32")])],
)
def test_the_masters_are_the_stored_values_to_the_last_bit(folder, ranks, cases):
    assert (
        run_ranks(all_masters, ranks, folder=str(folder), cases=cases)
        == [[True] * len(cases)] * ranks
    )


def test_start_and_checkpoints_name_the_weights_by_their_sha256(folder):
    grown = weights_sha256(read_stored(folder / "moved").weights)
    start, *_, resume = [
        e
        for e in read_jsonl(folder / "large" / "events.jsonl")
        if e["event"] in ("start", "resume")
    ]
    assert (start["init_sha256"], resume["init_sha256"]) == (grown, grown) and resume[
        "event"
    ] == "resume"
    assert start["init_from"] == f"{folder}/grown"
    assert (
        read_progress(newest_checkpoint(folder / "large" / "checkpoints"))[1]["init_sha256"]
        == grown
    )
    assert "init_sha256" not in json.loads(
        (folder / "small" / "events.jsonl").read_text().splitlines()[0]
    )
