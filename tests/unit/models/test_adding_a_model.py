"""docs/adding_a_model.md: the family and the objective of the page are real, and train on one curve."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from encoder.base.dist import World
from encoder.base.errors import ConfigError, ModelError
from encoder.engine.checkpoint.read import newest_checkpoint, read_weights
from encoder.models.catalog import FAMILIES, SYSTEMS, build_model
from encoder.models.growth import GrowthConfig, axes_of, grow
from encoder.objectives.catalog import OBJECTIVES
from encoder.objectives.contract import ObjectiveFacts
from encoder.runs.config import read_run
from encoder.runs.folder import LEDGER, METRICS, merged_metrics, read_jsonl
from encoder.tools.plan.plan import plan_text
from encoder.train.pretraining import pretrain
from tests.helpers.contracts import check_model, check_objective
from tests.helpers.shards import random_documents, write_source
from tests.process.ranks import run_ranks

PAGE = Path(__file__).resolve().parents[3] / "docs" / "adding_a_model.md"
NAME = "averages_of_the_page"
SPECIALS = SimpleNamespace(mask_id=49, pad_id=48, all_special=(45, 46, 47, 48, 49))


def page() -> types.ModuleType:
    """The page's Python blocks as one module; its names are in the catalogs from then on."""
    if NAME not in sys.modules:
        module = sys.modules[NAME] = types.ModuleType(NAME)
        blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)
        assert len(blocks) >= 4
        exec("\n\n".join(blocks), module.__dict__)  # noqa: S102
    return sys.modules[NAME]


@pytest.fixture
def averages():
    """The page, and catalogs as they were afterwards."""
    yield page()
    del sys.modules[NAME]
    for catalog in (FAMILIES, SYSTEMS, OBJECTIVES):
        catalog.pop("averages", None)
        catalog.pop("lengths", None)


def write_run(folder: Path) -> None:
    (run,) = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)
    write_source(folder / "shards", random_documents(80, seed=1, longest=60), vocab_size=64)
    (folder / "averages.yaml").write_text(
        run.replace("shards/own_text/text/train", str(folder / "shards"))
    )


def train(world: World, *, folder: str, out: str, stage: int) -> None:
    page()
    settings = [
        f"out={folder}/{out}",
        "engine.precision=fp32",
        f"engine.zero_stage={stage}",
        "loader.workers=0",
    ]
    pretrain(read_run(f"{folder}/averages.yaml", settings), world)


def test_the_family_of_the_page_trains_on_one_curve(tmp_path):
    write_run(tmp_path)
    for ranks, stage in ((1, 0), (2, 1), (2, 3)):
        run_ranks(train, ranks, folder=str(tmp_path), out=f"r{ranks}s{stage}", stage=stage)
    first = read_jsonl(tmp_path / "r1s0" / LEDGER)
    weights = read_weights(newest_checkpoint(tmp_path / "r1s0" / "checkpoints"))
    assert len(first) >= 8 and all(line["other_targets"]["long"] for line in first)
    for other in ("r2s1", "r2s3"):
        assert read_jsonl(tmp_path / other / LEDGER) == first
        found = read_weights(newest_checkpoint(tmp_path / other / "checkpoints"))
        assert all(torch.allclose(found[n], w, rtol=1e-4, atol=1e-6) for n, w in weights.items())
    losses = [
        m["loss_long"] for m in merged_metrics(tmp_path / "r1s0" / METRICS) if "loss_long" in m
    ]
    assert losses and losses[0] != losses[-1]


def test_the_plan_of_the_page_and_its_mistakes_are_told(averages, tmp_path):
    write_run(tmp_path)
    text = plan_text(read_run(tmp_path / "averages.yaml"), ranks=2)
    assert "2 layers of 64" in text or "64" in text
    with pytest.raises(ConfigError, match="num_hidden_layers is 0"):
        read_run(tmp_path / "averages.yaml", ["model.num_hidden_layers=0"])
    with pytest.raises(ConfigError, match="nothing that a phase may change"):
        read_run(tmp_path / "averages.yaml", ["phases.0.model.global_rope_theta=10000"])


def test_a_packed_batch_gives_what_its_documents_give_alone_and_the_family_grows(averages):
    small = averages.AveragesConfig(vocab_size=50, hidden_size=8)
    model = check_model(small)

    large = dataclasses.replace(small, hidden_size=16, num_hidden_layers=3)
    grown = grow(model.state_dict(), small, large, GrowthConfig())
    shapes = {name: w.shape for name, w in build_model(large, seed=0).state_dict().items()}
    assert {name: w.shape for name, w in grown.weights.items()} == shapes


def lengths_objective(averages, **settings):
    facts = ObjectiveFacts(vocab_size=50, specials=SPECIALS)
    return averages.LengthsConfig(random_tokens="all", **settings).build(facts)


def test_the_objective_of_the_page_keeps_its_promises(averages):
    model = build_model(averages.AveragesConfig(vocab_size=50, hidden_size=8), seed=1)
    ids = np.arange(120, dtype=np.int64) % 45
    check_objective(lengths_objective(averages), model, ids, [40, 33, 7, 40])


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"capacity": lambda self, term, tokens: 1}, "capacity.*is 1 of 120 tokens"),
        ({"all_targets": lambda self, ids_T: {}}, "all_targets.. has"),
        ({"loss": lambda self, model, batch: {}}, "loss.. has the terms"),
        ({"terms": ("mlm", "long", "more")}, "mask.. has the targets"),
    ],
)
def test_a_promise_that_an_objective_breaks_is_named(averages, broken, said):
    objective = lengths_objective(averages)
    objective.__class__ = type("Broken", (type(objective),), broken)
    globals()["Broken"] = type(objective)
    type(objective).__module__ = __name__
    model = build_model(averages.AveragesConfig(vocab_size=50, hidden_size=8), seed=1)
    with pytest.raises(AssertionError, match=said):
        check_objective(objective, model, np.arange(120, dtype=np.int64) % 45, [40, 33, 7, 40])


def test_weights_that_no_model_of_the_source_has_are_not_lost_in_growing(averages):
    small = averages.AveragesConfig(vocab_size=50, hidden_size=8)
    large = dataclasses.replace(small, hidden_size=16)
    weights = build_model(small, seed=1).state_dict()
    with pytest.raises(ModelError, match="the source has layers.0.decay.weight, which no model"):
        grow({**weights, "layers.0.decay.weight": torch.ones(8)}, small, large, GrowthConfig())
    with pytest.raises(ModelError, match="decay cannot grow: its family's growth"):
        axes_of("layers.0.decay", small.growth())
