"""ALBERT, ELECTRA and XLNet: one curve on 1, 2 and 3 ranks, at ZeRO stages 0 to 3, with and without recomputation.

truth       fp64 on one rank, nothing computed again, micro-batches of 2 rows
others      fp32 at each stage and fp64 at stage 0; on 2 and 3 ranks micro-batches of 1 row
plain run   XLNet in fp64 and at stage 2, which test_killed_families.py and test_two_terms.py have of the others
--slow      all of them, and a kill in fp64
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest

from encoder.base.dist import World
from encoder.runs.config import read_run
from encoder.runs.folder import EVENTS, LEDGER, read_jsonl
from encoder.train.pretraining import pretrain
from tests.process.ranks import run_ranks
from tests.process.test_killed_families import XLNET, losses_of, train
from tests.process.test_one_curve import distance, weights
from tests.process.test_two_terms import DETECTED, ORDERED, write_texts

MEMORY_OFF = "objective={name: plm, block_tokens: 8}"
FAMILIES = {
    "albert": [*ORDERED, "objective.name=mlm_sop"],
    "electra": DETECTED,
    "xlnet": [*XLNET, MEMORY_OFF],
    "xlnet_memory": XLNET,
}
# of losses and weights to the truth: what rounding leaves
NEARNESS = {"fp32": 1e-5, "fp64": 1e-10}


class Case(NamedTuple):
    """One run."""

    family: str
    ranks: int
    stage: int
    recomputation: str
    precision: str = "fp32"

    @property
    def out(self) -> str:
        """Its folder."""
        return "-".join(map(str, self))


RECOMPUTATION = ("off", "blocks")
MATRIX = [
    Case(family, ranks, stage, again, precision)
    for family, ranks, stage, again, precision in product(
        FAMILIES, (1, 2, 3), (0, 1, 2, 3), RECOMPUTATION, NEARNESS
    )
    # DeepSpeed's flat masters are fp32; stages 1 and 2 of one CPU rank are stage 0
    if (stage == 0 or precision == "fp32") and not (ranks == 1 and stage in (1, 2))
]
LEAN = [Case("xlnet_memory", 2, 0, "off", "fp64"), Case("xlnet_memory", 3, 2, "blocks")]


def truth_of(family: str) -> Case:
    return Case(family, 1, 0, "off", "fp64")


def settings_of(case: Case, *, folder: str) -> list[str]:
    settings = [
        *FAMILIES[case.family],
        f"out={folder}/{case.out}",
        "phases.0.tokens=1K",
        "phases.1.tokens=1K",
        "evaluation.every_tokens=2K",
        "checkpoints.every_tokens=2K",
        f"loader.micro_batch_rows={2 if case.ranks == 1 else 1}",
        f"engine.zero_stage={case.stage}",
        f"engine.activation_checkpointing={case.recomputation}",
        f"engine.precision={case.precision}",
    ]
    return [setting.replace("{folder}", folder) for setting in settings]


def trained(world: World, *, folder: str, cases: list) -> None:
    for case in cases:
        settings = settings_of(Case(*case), folder=folder)
        pretrain(read_run(f"{folder}/run.yaml", settings), world)


def train_all(folder: Path, cases: list[Case]) -> None:
    """Those that are not there yet, a start for each number of ranks."""
    for ranks in (1, 2, 3):
        asked = dict.fromkeys(case for case in cases if case.ranks == ranks)
        missing = [case for case in asked if not (folder / case.out).exists()]
        if missing:
            run_ranks(trained, ranks, timeout_seconds=3000, folder=str(folder), cases=missing)


def check(folder: Path, case: Case) -> float:
    """The case's curve is its truth's; returns how far their weights are from each other."""
    found, truth = folder / case.out, folder / truth_of(case.family).out
    lines = read_jsonl(truth / LEDGER)
    assert len(lines) > 3 and read_jsonl(found / LEDGER) == lines
    near = NEARNESS[case.precision]
    for line, other in zip(losses_of(found), losses_of(truth), strict=True):
        assert line == pytest.approx(other, rel=near)
    off = distance(weights(truth), weights(found))
    assert off < near
    return off


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("family_stages"))


@pytest.fixture(scope="module")
def lean(folder) -> Path:
    train_all(folder, [truth_of("xlnet_memory"), *LEAN])
    return folder


@pytest.mark.matrix
@pytest.mark.parametrize("case", LEAN, ids=lambda case: case.out)
def test_xlnet_has_one_curve_in_fp64_and_at_stage_2(lean, case):
    check(lean, case)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_one_curve_on_all_ranks_and_stages(folder, family):
    """Prints by precision how far the farthest weights are."""
    cases = [case for case in MATRIX if case.family == family]
    train_all(folder, cases)
    for precision in NEARNESS:
        off = {c.out: check(folder, c) for c in cases if c.precision == precision}
        farthest = max(off, key=lambda out: off[out])
        print(f"{family}, {precision}: {len(off)} runs, {farthest} {off[farthest]:.1e}")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_killed_in_fp64_goes_on_with_the_same_numbers(folder, family):
    """On 2 ranks until the kill, on 3 behind it, with other micro-batches."""
    case = Case(family, 2, 0, "off", "fp64")
    train_all(folder, [truth_of(family)])
    out = f"{family}-killed"
    more = [
        *settings_of(case, folder=str(folder)),
        f"out={folder}/{out}",
        "checkpoints.every_tokens=500",
    ]
    values = dict(folder=str(folder), name="", stage=0)
    with pytest.raises(AssertionError, match="rank 0, exit code -9"):
        run_ranks(train, 2, dies=True, rows=1, more=more, **values)
    assert not (folder / out / "done.json").exists()
    again = [*more, "loader.micro_batch_rows=2"]
    run_ranks(train, 3, dies=False, rows=2, more=again, **values)

    whole = folder / truth_of(family).out
    assert read_jsonl(folder / out / LEDGER) == read_jsonl(whole / LEDGER)
    assert distance(weights(whole), weights(folder / out)) < NEARNESS["fp64"]
    starts = [e for e in read_jsonl(folder / out / EVENTS) if e["event"] in ("start", "resume")]
    assert [e["ranks"] for e in starts] == [2, 3] and starts[1]["step"] > 0
