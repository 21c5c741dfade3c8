"""launch/bench.py engine: what DeepSpeed costs, told only where its steps are the plain side's."""

from __future__ import annotations

import json

from benchmarks import engine
from encoder.base.dist import World
from launch.bench import main
from tests.process.ranks import run_ranks

WORDS = ["engine", "--quick", "--device", "cpu", "--threads", "1"]


def asked(world: World, *, path: str) -> list[int]:
    """Exit codes: as it is, and with another rate on the plain side."""
    codes = [main([*WORDS, "--json", path])]
    rule = engine.StableAdamW
    engine.StableAdamW = lambda groups, config, **_: rule(
        groups, config, lr=2 * engine.LR, max_lr=engine.MAX_LR
    )
    return [*codes, main([*WORDS, "--json", path + ".wrong"])]


def test_every_stage_stands_beside_the_same_step_without_deepspeed_and_another_rate_is_refused(
    tmp_path,
):
    assert run_ranks(asked, 1, path=str(tmp_path / "out.json")) == [[0, 2]]
    found = json.loads((tmp_path / "out.json").read_text())
    (table,) = found["tables"]
    assert [row[0] for row in table["rows"]] == [
        "without DeepSpeed",
        *(f"ZeRO stage {stage}" for stage in range(4)),
    ]
    assert all(
        f"checked: after two steps the weights of stage {stage} are" in note
        for stage, note in enumerate(table["notes"])
    )
    assert all(len(side["cpu_seconds"]) == 2 for side in table["figures"].values())
    assert not (tmp_path / "out.json.wrong").exists()
