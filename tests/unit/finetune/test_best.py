"""Which evaluation is the best, what a task may say about it, and what is told before anything is read."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from encoder.base.errors import CheckpointError, ConfigError, UserError
from encoder.base.schema import to_yaml
from encoder.base.units import Progress
from encoder.engine.checkpoint import folder
from encoder.finetune import stored
from encoder.finetune.best import BestKeeper, Judge, judge_of, one_of_metrics
from encoder.finetune.checks import check_finished, check_task
from encoder.finetune.config import changed_settings, read_task
from encoder.optim.shares import CosineShares, LinearShares
from tests.helpers.tasks import write_task


def steps_taken(judge: Judge, values: list[float]) -> list[int]:
    keeper = BestKeeper(judge)
    return [
        step
        for step, value in enumerate(values, start=1)
        if keeper.takes({judge.name: value}, Progress(step=step, tokens=9 * step))
    ]


def test_of_equal_evaluations_the_earlier_is_best_and_nan_is_none():
    values = [math.nan, 0.5, 0.8, 0.8, 0.7, 0.9, 0.9]
    assert steps_taken(Judge(of="dev", metric="accuracy"), values) == [2, 3, 6]
    assert steps_taken(Judge(of="dev", metric="loss"), values) == [2]
    assert steps_taken(Judge(of="dev", metric="mean_squared_error"), [2.0, 1.0, 1.0]) == [1, 2]


def test_the_best_comes_back_from_a_checkpoint():
    keeper, again = (BestKeeper(Judge(of="dev", metric="loss")) for _ in range(2))
    keeper.takes({"dev_loss": 0.4}, Progress(step=3, tokens=70, ledger_hash="ab"))
    again.take_up(keeper.to_plain())
    assert again.best == keeper.best and keeper.to_plain()["stands_on_tokens"] == [70]
    assert not again.takes({"dev_loss": 0.4}, Progress(step=4))


def test_a_checkpoint_without_a_best_has_none_again():
    keeper = BestKeeper(Judge(of="dev", metric="loss"))
    keeper.takes({"dev_loss": 0.4}, Progress(step=3))
    keeper.take_up({})
    assert keeper.best is None


def test_a_threshold_judges_nothing():
    metrics = ("no_answer_threshold", "f1")
    assert one_of_metrics(None, metrics, key="evaluate.metric") == "f1"
    assert one_of_metrics(None, metrics[:1], key="evaluate.metric") == "loss"
    with pytest.raises(ConfigError, match="is chosen and measures nothing; needed: f1 or loss"):
        one_of_metrics("no_answer_threshold", metrics, key="evaluate.metric")


@pytest.mark.parametrize("key", ["evaluate", "checkpoints"])
@pytest.mark.parametrize("value", ["1e308", "0", "-1"])
def test_a_share_of_epochs_has_bounds(tmp_path, key, value):
    path = write_task(tmp_path)
    with pytest.raises(ConfigError, match="every_epochs .* must be above 0, at most 1,000,000"):
        read_task(path, [f"{key}.every_epochs={value}"])


def test_an_unfinished_run_names_the_step_that_is_exported(tmp_path, monkeypatch):
    path = write_task(tmp_path)
    run = tmp_path / "run"
    newest = run / "checkpoints" / "newest"
    newest.mkdir(parents=True)
    (newest / "run.yaml").write_text(to_yaml(read_task(path)))
    best = {"step": 3, "tokens": 70, "ledger_hash": "ab", "value": 0.5}
    saved: dict[str, object] = {}
    monkeypatch.setattr(stored, "newest_checkpoint", lambda root: newest)
    monkeypatch.setattr(stored, "read_progress", lambda folder: (Progress(step=9), saved))
    assert stored.unfinished_text(run).endswith("are whole. This exports that step.")
    saved["best"] = best
    assert "step 9, 0 of 2 epochs are whole. This exports step 3, the best" in (
        stored.unfinished_text(run)
    )


def test_what_best_is_judged_by_is_named_or_plain(tmp_path):
    path = write_task(tmp_path)
    best = ["evaluate.keep=best"]
    assert judge_of(read_task(path)) is None
    assert judge_of(read_task(path, best)) == Judge(of="dev", metric="accuracy")
    with pytest.raises(ConfigError, match="metric is acuracy. Did you mean accuracy?"):
        judge_of(read_task(path, [*best, "evaluate.metric=acuracy"]))
    with pytest.raises(ConfigError, match="evaluate.of is def, .* Did you mean dev?"):
        read_task(path, [*best, "evaluate.of=def"])
    with pytest.raises(ConfigError, match="of is missing: data.dev has dev, other. Name one"):
        read_task(path, [*best, "data.dev.other=x.jsonl"])
    with pytest.raises(ConfigError, match="needs a dev set"):
        read_task(path, [*best, "data.dev={}"])
    with pytest.raises(ConfigError, match="metric has no effect with keep: last"):
        read_task(path, ["evaluate.metric=f1"])


def test_how_often_is_free_unless_best_is_kept(tmp_path):
    path = write_task(tmp_path)
    before = {"evaluate": {"every_epochs": 1.0}}  # of an earlier version
    for overrides, keys in (
        (["evaluate.every_epochs=2"], []),
        (["evaluate.keep=best"], ["evaluate.keep"]),
    ):
        task = read_task(path, overrides)
        changed = changed_settings(before, task)
        assert [key for key, _, _ in changed if key.startswith("evaluate.keep")] == keys


def test_checkpoints_that_a_kept_one_stands_on_stay(tmp_path):
    root = tmp_path / "checkpoints"
    for step in (1, 2, 3, 4):
        path = root / folder.folder_name(tokens=step, incarnation=1)
        path.mkdir(parents=True)
        (path / folder.COMMITTED).write_text("")
    stands_on = {4: [2], 3: [1]}
    folder.remove_old(
        root,
        incarnation=1,
        keep_last=1,
        is_whole=lambda _: True,
        stands_on=lambda path: stands_on.get(folder.tokens_of(path), []),
    )
    assert [folder.tokens_of(path) for path in sorted(root.iterdir())] == [2, 4]


@pytest.mark.parametrize("schedule", [LinearShares, CosineShares])
def test_a_long_warm_up_over_few_examples_leaves_one_to_decay(schedule):
    rates = schedule(peak=1.0, warmup_share=0.9)
    assert rates.over(4).at(4, phase_tokens=4) == pytest.approx(0.0)
    assert rates.over(1).at(1, phase_tokens=1) == pytest.approx(0.0)


def test_all_that_can_be_seen_at_once_is_told_at_once(tmp_path):
    path = write_task(tmp_path)
    overrides = [
        "data.train=none.jsonl",
        "data.test.more=none.csv",
        "start_from=nowhere",
        "faults.watchdog_minutes=0.1",
    ]
    with pytest.raises(UserError, match="^4 mistakes: ") as told:
        check_task(read_task(path, overrides))
    assert all(word in str(told.value) for word in ("none.jsonl", "none.csv", "nowhere"))
    check_task(read_task(path))


def test_a_finished_run_refuses_settings_that_are_others_now(tmp_path):
    path = write_task(tmp_path)
    out = Path(read_task(path).out)
    out.mkdir()
    (out / "run.yaml").write_text(to_yaml(read_task(path)))
    check_finished(read_task(path, ["loader.micro_batch_tokens=9"]))
    with pytest.raises(CheckpointError, match=r"seed was 5, now 6 \(also epochs\)"):
        check_finished(read_task(path, ["seed=6", "epochs=9"]))
