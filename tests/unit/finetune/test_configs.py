"""The shipped task files are read, and their decays are those of the published table."""

from __future__ import annotations

from pathlib import Path

import pytest

from encoder.base.errors import ConfigError
from encoder.base.schema import from_mapping, to_plain
from encoder.finetune.config import FineTuneConfig, changed_settings, read_task

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "finetune"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_a_shipped_file_says_the_same_when_it_is_written_again(path):
    task = read_task(path)
    assert from_mapping(FineTuneConfig, to_plain(task)) == task and task.out == f"runs/{task.name}"


def test_a_decay_at_the_peak_is_composers():
    task = read_task(CONFIGS / "rte.yaml")
    # a step at the peak takes lr * weight_decay of a weight
    assert task.lr.peak * task.weight_decay == pytest.approx(1e-5)
    stable = read_task(CONFIGS / "rte.yaml", ["optimizer={name: stable_adamw}"])
    assert stable.weight_decay == 1e-5
    with pytest.raises(ConfigError, match="both say the decay"):
        read_task(CONFIGS / "rte.yaml", ["optimizer.weight_decay=0.01"])


def test_the_rate_rises_and_falls_over_the_examples():
    schedule = read_task(CONFIGS / "sentiment.yaml").lr.over(1000)
    rates = [schedule.at(n, phase_tokens=1000) for n in (0, 50, 100, 550, 1000)]
    assert rates == pytest.approx([0, 2.5e-5, 5e-5, 2.5e-5, 0])


def test_a_rate_alone_is_the_peak_of_the_linear_schedule(tmp_path):
    text = (CONFIGS / "sentiment.yaml").read_text()
    (tmp_path / "short.yaml").write_text(text.partition("lr: ")[0] + "lr: 5e-5")
    whole = read_task(CONFIGS / "sentiment.yaml")
    assert read_task(tmp_path / "short.yaml") == whole
    assert read_task(tmp_path / "short.yaml", ["lr.peak=1e-5"]).lr.peak == 1e-5
    assert read_task(tmp_path / "short.yaml", ["lr=1e-5"]).lr.peak == 1e-5
    # over a schedule of the file's, too: the rest of it stays
    cosine = ["lr={schedule: cosine, peak: 3e-5, warmup_share: 0.06}", "lr=1e-5"]
    (tmp_path / "long.yaml").write_text(text.partition("lr: ")[0] + f"lr: {cosine[0][3:]}")
    swept = read_task(tmp_path / "long.yaml", cosine[1:]).lr
    assert (type(swept).__name__, swept.peak, swept.warmup_share) == ("CosineShares", 1e-5, 0.06)


def test_what_decides_the_curve_may_not_change_and_places_may():
    task = read_task(CONFIGS / "sentiment.yaml")
    moved = read_task(
        CONFIGS / "sentiment.yaml", ["out=there", "data.train=x.csv", "loader.micro_batch_tokens=9"]
    )
    assert changed_settings(to_plain(task), moved) == []
    other = read_task(CONFIGS / "sentiment.yaml", ["lr.peak=1e-5", "data.max_tokens=64"])
    keys = [key for key, _, _ in changed_settings(to_plain(task), other)]
    assert sorted(keys) == ["data.max_tokens", "lr.peak"]
