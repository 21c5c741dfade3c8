"""The shipped recipes of ModernBERT are the published ones, and their data is the mixture that we prepare."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from encoder.runs.config import RunConfig, read_run
from encoder.runs.phases import planned_steps
from encoder.tools.plan.curves import columns_of, draw_plan
from encoder.tools.plan.forecast import gpu
from encoder.tools.plan.plan import plan_text
from launch.new_file import RUNS

ROOT = Path(__file__).resolve().parents[3]


def recipe(name: str) -> RunConfig:
    return read_run(ROOT / "configs" / "pretrain" / f"modernbert_{name}.yaml")


def stairs(run: RunConfig) -> list[tuple[int, int, int]]:
    """(sequences of 1,024 in a step, full steps, tokens) of each batch size of the first phase's warm-up."""
    steps = planned_steps(run)
    sizes: dict[int, list[int]] = {}
    for s in (steps[i] for i in steps.indices(0, until_tokens=60 * 10**9)):
        sizes.setdefault(s.rows, []).append(s.tokens)
    return [
        (rows * run.data.row_tokens // 1024, len(tokens), sum(tokens))
        for rows, tokens in list(sizes.items())[:-1]
    ]


def test_base_takes_the_published_steps_in_each_phase():
    """5 stairs of 4,239 steps and (1,719B - 50B) / 4,718,592 = 353,706; 250B and 50B over the same, the last step begun.

    Of full rows: plan, which reckons with 99.8 %, counts 375,653, 53,089 and 10,618.
    """
    steps = planned_steps(recipe("base"))
    assert [len(steps.indices(i)) for i in range(3)] == [
        5 * 4239 + 353_706,
        52_982,
        10_597,
    ]


@pytest.mark.parametrize(
    ("name", "first", "last", "steps_each", "tokens"),
    [
        ("base", 768, 3840, 4239, [3.33e9, 6.67e9, 10.0e9, 13.3e9, 16.7e9]),
        ("large", 448, 4480, 396, [0.182e9 * i for i in range(1, 11)]),
    ],
)
def test_the_batch_climbs_the_published_stairs_with_equally_many_steps_on_each(
    name, first, last, steps_each, tokens
):
    found = stairs(recipe(name))
    assert [size for size, _, _ in found] == list(range(first, last + 1, first))
    assert all(abs(count - steps_each) <= 1 for _, count, _ in found)
    assert [n for _, _, n in found] == pytest.approx(tokens, rel=5e-3)


def test_every_phase_has_the_published_length_batch_rate_decay_and_theta():
    published = {
        "base": [
            ("1719", 1024, 4608, 8e-4, 1e-5, 1e4),
            ("250", 8192, 576, 3e-4, 1e-5, 16e4),
            ("50", 8192, 576, 3e-4, 1e-5, 16e4),
        ],
        "large": [
            ("900", 1024, 4928, 5e-4, 1e-5, 1e4),
            ("819", 1024, 4928, 5e-5, 1e-6, 1e4),
            ("250", 8192, 616, 5e-5, 1e-6, 16e4),
            ("50", 8192, 624, 5e-5, 1e-6, 16e4),
        ],
    }
    for name, phases in published.items():
        run = recipe(name)
        found = [
            (
                str(p.tokens // 10**9),
                p.max_tokens_per_document,
                p.batch_tokens / p.max_tokens_per_document,
                p.lr.peak,
                run.weight_decay_of(p),
                p.model["global_rope_theta"],
            )
            for p in run.phases
        ]
        assert found == phases
        assert all(p.model["local_rope_theta"] == 1e4 for p in run.phases)
        assert all(run.mask_share_of(p).highest == 0.3 and p.max_lr is None for p in run.phases)


@pytest.mark.parametrize("name", ["base", "large"])
def test_sources_and_weights_are_those_of_the_mixtures_that_we_prepare(name):
    prepared = yaml.safe_load((ROOT / "configs" / "prep" / "mixture_2t.yaml").read_text())
    mixtures = {
        word: {source: float(str(amount).rstrip("B")) for source, amount in m["sources"].items()}
        for word, m in prepared["mixtures"].items()
    }
    run = recipe(name)
    for phase in run.phases:
        word = (
            "pretrain_1024"
            if phase.sources is None
            else f"{'extend' if phase.name == 'extension' else 'decay'}_8192"
        )
        sources = run.sources_of(phase)
        assert {s.name: s.weight for s in sources} == mixtures[word]
        assert all(s.path == f"{prepared['out']}/{s.name}/train" for s in sources)
    assert {s.path for s in run.evaluation.sources} == {
        f"{prepared['out']}/{s.name}/held_out" for s in run.data.sources
    }


def test_a_plan_is_drawn_a_column_a_phase_and_one_for_short_warm_ups(tmp_path):
    run = read_run(ROOT / "configs" / "pretrain" / "modernbert_base.yaml", ["phases.0.tokens=600B"])
    steps = planned_steps(run)
    columns = columns_of(run, steps)
    assert [(c.title, c.end_tokens) for c in columns] == [
        ("stable, its warm-ups", 60 * 10**9),
        ("stable", 600 * 10**9),
        ("extension", 250 * 10**9),
        ("decay", 50 * 10**9),
    ]
    assert max(s.phase_tokens for s in columns[0].steps) <= 60e9 and {
        s.phase for s in columns[3].steps
    } == {2}
    draw_plan(run, steps, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("small", 16_913_600),
        ("laptop", 16_913_600),
        ("one_gpu", 68_457_664),
        ("domain", 32_081_344),
        ("continue", 149_655_232),
    ],
)
def test_a_recipe_for_one_machine_is_short_fits_a_gpu_and_says_hours(name, parameters):
    """Without shards at hand: ModernBERT's vocabulary. Ettin's models of these shapes have 16.8, 31.9 and 68.2 M weights."""
    path = ROOT / "configs" / "pretrain" / f"{name}.yaml"
    settings = [
        line for line in path.read_text().splitlines() if line and not line.lstrip().startswith("#")
    ]
    run = read_run(path)
    said = plan_text(run, ranks=1, machine=gpu("a100"))
    assert (
        f"{parameters:,} parameters" in said
        and "fits 74.5 GiB" in said
        and "does NOT fit" not in said
        and "time  " in said
    )
    assert run.out == f"runs/{name}" and len(settings) <= (11 if len(run.phases) == 1 else 30)


def test_every_journey_of_the_documents_ends_in_a_folder_that_transformers_reads():
    text = (ROOT / "docs" / "recipes.md").read_text()
    journeys = [
        block for block in re.findall(r"```bash\n(.*?)```", text, re.S) if "tessera new" in block
    ]
    assert len(journeys) == 5 and all("tessera export" in j or "--export" in j for j in journeys)
    for word in re.findall(r"^tessera new (?!prep)([\w-]+)", text, re.M):
        assert word in RUNS
