"""keep: best ends a fine-tuning with the weights of its best evaluation, also after SIGKILL, and another start is refused."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from encoder.base.dist import World
from encoder.engine.checkpoint.folder import committed_folders
from encoder.engine.checkpoint.read import read_progress, read_weights
from encoder.finetune.config import read_task
from encoder.finetune.course import finetune
from encoder.finetune.stored import read_trained, unfinished_text
from encoder.runs.folder import EVENTS, LEDGER, METRICS, merged_metrics, read_jsonl
from encoder.tools.weights.export import export_run
from tests.helpers.tasks import write_start, write_task
from tests.process.ranks import run_ranks, start_ranks, wait_for

# rates at which the last evaluation is not the best one
OFTEN = ["epochs=4", "checkpoints={}", "evaluate={every_epochs: 0.2, keep: best}"]
ACCURACY = [*OFTEN, "lr.peak=0.03"]
LOSS = [*OFTEN, "lr.peak=0.07", "evaluate.metric=loss", "evaluate.of=dev"]


def train(world: World, *, root: str, out: str, settings: list[str]) -> bool:
    task = read_task(f"{root}/task.yaml", [f"out={root}/{out}", *settings])
    return finetune(task, world).done


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("best")
    write_task(root)
    assert run_ranks(train, 1, root=str(root), out="best", settings=ACCURACY) == [True]
    return root


def best_step(run: Path) -> tuple[int, float]:
    """By hand: the first of the highest."""
    lines = [line for line in merged_metrics(run / METRICS) if "dev_accuracy" in line]
    highest = max(line["dev_accuracy"] for line in lines)
    step = next(line["step"] for line in lines if line["dev_accuracy"] == highest)
    assert lines[0]["step"] < step < lines[-1]["step"], "a case in which the last is not the best"
    return step, highest


def test_result_export_and_card_have_the_weights_of_the_best_evaluation(root, tmp_path):
    step, accuracy = best_step(root / "best")
    result = json.loads((root / "best" / "result.json").read_text())
    assert (result["weights_step"], result["metrics"]["dev"]["accuracy"]) == (step, accuracy)
    (there,) = (
        folder
        for folder in committed_folders(root / "best" / "checkpoints")
        if read_progress(folder)[0].step == step
    )
    trained = read_trained(root / "best")
    for name, w in read_weights(there).items():
        assert torch.equal(trained.weights[name], w.float()), name
    export_run(root / "best", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert f"best dev accuracy {accuracy:.4f}, of step {step}" in card
    assert f"| dev | accuracy | {accuracy:.4f} |" in card


def test_killed_and_started_again_the_lowest_loss_is_the_same(root):
    assert run_ranks(train, 1, root=str(root), out="loss", settings=LOSS) == [True]
    lines = merged_metrics(root / "loss" / METRICS)
    losses = [(line["dev_loss"], line["step"]) for line in lines if "dev_loss" in line]
    whole = json.loads((root / "loss" / "result.json").read_text())
    step = whole["weights_step"]
    assert step == min(losses)[1] < losses[-1][1] - 4

    ranks = start_ranks(train, 2, root=str(root), out="killed", settings=LOSS)
    while len(read_jsonl(root / "killed" / LEDGER)) < step + 3 and ranks[0][0].poll() is None:
        time.sleep(0.01)
    for process, _ in ranks:
        process.kill()
    with pytest.raises(AssertionError):
        wait_for(ranks, timeout_seconds=60)
    assert run_ranks(train, 1, root=str(root), out="killed", settings=LOSS) == [True]
    events = [e["event"] for e in read_jsonl(root / "killed" / EVENTS)]
    again = json.loads((root / "killed" / "result.json").read_text())
    assert "resume" in events and whole["weights_ledger_hash"] == again["weights_ledger_hash"]
    assert whole["metrics"] == {
        name: pytest.approx(numbers, rel=1e-9) for name, numbers in again["metrics"].items()
    }


def test_another_model_to_start_from_is_refused_before_and_after_the_first_save(root):
    write_start(root / "other", family="modernbert")
    weights = root / "other" / "model.safetensors"
    from encoder.models.stored import read_safetensors, write_safetensors

    changed = {name: w + 0.01 for name, w in read_safetensors(weights).items()}
    weights.unlink()
    write_safetensors(changed, weights)
    never = ["checkpoints={every_epochs: 99}", f"start_from={root}/start"]
    ranks = start_ranks(train, 1, root=str(root), out="begun", settings=never)
    while not len(read_jsonl(root / "begun" / LEDGER)) and ranks[0][0].poll() is None:
        time.sleep(0.01)
    ranks[0][0].kill()
    with pytest.raises(AssertionError):
        wait_for(ranks, timeout_seconds=60)
    assert not committed_folders(root / "begun" / "checkpoints")
    other = [never[0], f"start_from={root}/other"]
    with pytest.raises(AssertionError, match="start_from .* holds weights of SHA-256"):
        run_ranks(train, 1, root=str(root), out="begun", settings=other)
    assert run_ranks(train, 1, root=str(root), out="begun", settings=never) == [True]

    assert unfinished_text(root / "begun") is None
    (root / "begun" / "done.json").unlink()
    assert "begun is not trained to its end: step 12, 2 of 2 epochs" in unfinished_text(
        root / "begun"
    )
    with pytest.raises(AssertionError, match="start_from .* holds weights of SHA-256"):
        run_ranks(train, 1, root=str(root), out="begun", settings=other)
