"""The shipped task files are read, and their decays are those of the published table."""

from __future__ import annotations

from pathlib import Path

import pytest

from encoder.base.errors import ConfigError
from encoder.base.schema import from_mapping, to_plain
from encoder.finetune.config import FineTuneConfig, changed_settings, read_task
from launch import new_file

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "finetune"


@pytest.mark.parametrize("path", [*new_file.tasks().values()], ids=lambda p: p.stem)
def test_a_shipped_file_says_the_same_when_it_is_written_again(path):
    task = read_task(path)
    assert from_mapping(FineTuneConfig, to_plain(task)) == task and task.out == f"runs/{task.name}"


# rate, decay as a share at the peak, epochs (Warner et al. 2024, appendix)
BASE = {
    "cola": (8e-5, 1e-6, 5),
    "sst2": (8e-5, 1e-5, 2),
    "mrpc": (5e-5, 5e-6, 10),
    "stsb": (8e-5, 5e-6, 10),
    "qqp": (5e-5, 5e-6, 10),
    "mnli": (5e-5, 5e-6, 1),
    "qnli": (8e-5, 5e-6, 2),
    "rte": (5e-5, 1e-5, 3),
}
LARGE = {
    "cola": (3e-5, 8e-6, 5),
    "sst2": (1e-5, 1e-6, 3),
    "mrpc": (8e-5, 5e-6, 2),
    "stsb": (8e-5, 1e-5, 10),
    "qqp": (5e-5, 8e-6, 2),
    "mnli": (3e-5, 1e-5, 1),
    "qnli": (3e-5, 5e-6, 2),
    "rte": (5e-5, 8e-6, 3),
}


def like(tmp_path: Path, name: str, model: str | None = None) -> FineTuneConfig:
    """What `tessera new finetune` writes, as it is read."""
    words = ["finetune", name]
    text = new_file.template(words)
    if model:
        text = new_file.with_published(text, words, model=model)
    (tmp_path / "task.yaml").write_text(text)
    return read_task(tmp_path / "task.yaml")


@pytest.mark.parametrize("name", BASE)
def test_modernbert_has_the_points_of_its_paper(tmp_path, name):
    for model, points in ((None, BASE), ("modernbert_large", LARGE)):
        task = like(tmp_path, name, model)
        assert (task.lr.peak, task.decay_at_peak, task.epochs) == points[name]
        assert (task.batch_examples, task.data.max_tokens, task.lr.warmup_share) == (64, 256, 0.1)
        assert task.weight_decay == pytest.approx(points[name][1] / points[name][0])
        assert task.optimizer.betas == (0.9, 0.98) and task.optimizer.eps == 1e-6
        assert task.dropout.attention_output == 0.1 and task.engine.gradient_clipping == 0.0
        assert task.start_from.endswith("large" if model else "base")


def test_every_published_point_is_a_task_file_of_its_task(tmp_path):
    known = new_file.published()
    for model, about in known.items():
        for name in about["tasks"]:
            own, other = like(tmp_path, name), like(tmp_path, name, model)
            assert (other.name, other.task) == (own.name, own.task)
            assert other.lr.peak > 0
    assert len(known) >= 8


def test_published_points_of_other_models_are_those_of_their_code(tmp_path):
    race = like(tmp_path, "race", "roberta_large")
    assert type(race.lr).__name__ == "ConstantShares" and race.lr.warmup_share == 0.0
    assert (race.lr.peak, race.epochs, race.batch_examples, race.weight_decay) == (
        1e-5,
        5,
        16,
        0.01,
    )
    squad = like(tmp_path, "squad1", "xlnet_large")
    assert (squad.gradient_layer_decay, squad.layer_decay) == (0.75, 1.0)
    assert (squad.batch_examples, squad.data.max_tokens) == (48, 512)
    electra = like(tmp_path, "rte", "electra_large")
    assert (electra.layer_decay, electra.epochs, electra.lr.peak) == (0.9, 10, 5e-5)
    assert not electra.optimizer.bias_correction and electra.decay_at_peak is None
    with pytest.raises(ConfigError, match="nothing was published for race. Known: squad1"):
        like(tmp_path, "race", "xlnet_large")
    with pytest.raises(ConfigError, match="nothing is known of it. Did you mean roberta_large"):
        like(tmp_path, "rte", "roberta_larg")


def test_a_decay_at_the_peak_is_composers():
    task = read_task(CONFIGS / "glue" / "rte.yaml")
    # a step at the peak takes lr * weight_decay of a weight
    assert task.lr.peak * task.weight_decay == pytest.approx(1e-5)
    stable = read_task(CONFIGS / "glue" / "rte.yaml", ["optimizer={name: stable_adamw}"])
    assert stable.weight_decay == 1e-5
    with pytest.raises(ConfigError, match="both say the decay"):
        read_task(CONFIGS / "glue" / "rte.yaml", ["optimizer.weight_decay=0.01"])


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
