"""A fine-tuning through the real loop: one curve on any ranks, micro-batches and stages, also after SIGKILL."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import pytest
import torch

from encoder.base.dist import World
from encoder.base.errors import ConfigError
from encoder.data.labelled import DataError
from encoder.engine.checkpoint.read import newest_checkpoint, read_weights
from encoder.finetune.config import read_task
from encoder.finetune.course import finetune
from encoder.finetune.stored import read_trained
from encoder.finetune.sweeps.board import Board
from encoder.finetune.sweeps.points import read_sweeps
from encoder.models.stored import read_safetensors
from encoder.runs.folder import EVENTS, LEDGER, METRICS, merged_metrics, read_jsonl
from encoder.tools.report.report import verify_ledger, write_report
from encoder.tools.weights.export import export_run
from launch import finetune as launch_finetune
from tests.helpers.tasks import write_rows, write_start, write_task
from tests.process.ranks import run_ranks, start_ranks, wait_for

# (name, ranks, settings)
CASES = [
    ("one", 1, []),
    ("two", 2, []),
    ("three", 3, ["loader.micro_batch_tokens=30"]),
    ("zero3", 2, ["engine.zero_stage=3", "engine.precision=fp32"]),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("finetune")
    write_task(root)
    for name, ranks, settings in CASES:
        done = run_ranks(train, ranks, root=str(root), out=name, settings=settings)
        assert done == [True] * ranks
    return root


def train(world: World, *, root: str, out: str, settings: list[str]) -> bool:
    task = read_task(f"{root}/task.yaml", [f"out={root}/{out}", *settings])
    return finetune(task, world).done


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return read_weights(newest_checkpoint(run / "checkpoints"))


@pytest.mark.parametrize(
    ("name", "tolerance"), [(c[0], 1e-5 if "zero" in c[0] else 1e-10) for c in CASES[1:]]
)
def test_the_curve_is_one_on_any_ranks_and_micro_batches(root, name, tolerance):
    assert read_jsonl(root / name / LEDGER) == read_jsonl(root / "one" / LEDGER)
    one, other = (merged_metrics(root / run / METRICS) for run in ("one", name))
    assert len(one) == 12 and one[-1]["lr"] < one[3]["lr"]
    for a, b in zip(one, other, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)
        assert a.get("dev_loss", 0.0) == pytest.approx(b.get("dev_loss", 0.0), rel=tolerance)
    assert sum("dev_loss" in line for line in one) == 4
    whole = weights_of(root / "one")
    for key, w in weights_of(root / name).items():
        assert (
            torch.linalg.vector_norm(w - whole[key])
            <= tolerance * torch.linalg.vector_norm(w) + tolerance
        ), key


@pytest.mark.parametrize("name", ["three", "zero3"])
def test_predictions_stand_in_the_order_of_the_rows(root, name):
    for data in ("dev", "more"):
        one, other = (
            [json.loads(line) for line in (root / run / "predictions" / f"{data}.jsonl").open()]
            for run in ("one", name)
        )
        assert [line["row"] for line in other] == list(range(11 if data == "dev" else 5))
        rows = [json.loads(line) for line in (root / f"{data}.jsonl").open()]
        assert [line["target"] for line in other] == [row["label"] for row in rows]
        for a, b in zip(one, other, strict=True):
            assert a["logits"] == pytest.approx(b["logits"], abs=1e-4)


def test_a_report_sets_fine_tunings_side_by_side(root):
    page = write_report([root / "one", root / "two"], root / "page").read_text()
    numbers = json.loads((root / "one" / "result.json").read_text())["metrics"]
    for data, measured in numbers.items():
        assert f"<td>{data} accuracy</td><td>{measured['accuracy']:.2%}</td>" in page
        assert f"<td>{data} loss</td><td>{measured['loss']:.4f}</td>" in page
    assert "2 epochs in steps of 8 examples" in page and "42 examples of" in page
    assert "<td>ranks</td><td>1, on" in page and "Phases" not in page
    assert (root / "page" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_first_step_moves_each_layer_by_its_rate(root):
    """Adam's first step is the rate wherever a gradient is not small: d^(L - l), embeddings d^L, head 1, for d = 0.5, L = 2."""
    settings = [
        "epochs=1",
        "batch_examples=64",
        "lr={peak: 1e-3, schedule: constant}",
        "optimizer={name: adamw, weight_decay: 0.0, eps: 1e-12}",
        "engine.gradient_clipping=0",
    ]
    assert run_ranks(train, 1, root=str(root), out="step", settings=settings) == [True]
    before = read_safetensors(root / "start" / "model.safetensors")
    after = weights_of(root / "step")
    moved = {
        name: float((after[name] - before[name]).abs().max()) for name in after if name in before
    }
    for name, change in moved.items():
        rate = 1e-3
        if name.startswith("model.layers."):
            rate *= 0.5 ** (1 - int(name.split(".")[2]))
        if name.startswith("model.embeddings."):
            rate *= 0.5**2
        assert change == pytest.approx(rate, rel=1e-3), name
    assert len(moved) > 10


@pytest.mark.parametrize(("ranks", "stage", "precision"), [(1, 0, "fp64"), (2, 2, "fp32")])
def test_clipped_gradients_are_decayed_by_layer_whole_and_cut(root, ranks, stage, precision):
    """With a huge eps Adam's first step is the gradient's: those of two runs differ by d^(L - l), and by nothing else."""
    moved = {}
    before = read_safetensors(root / "start" / "model.safetensors")
    for decay in (1.0, 0.5):
        settings = [
            "epochs=1",
            "batch_examples=64",
            "layer_decay=1.0",
            f"gradient_layer_decay={decay}",
            "lr={peak: 1e11, schedule: constant}",
            "optimizer={name: adamw, weight_decay: 0.0, eps: 1e6}",
            f"engine={{zero_stage: {stage}, precision: {precision}, gradient_clipping: 0.001}}",
            "data.dev={}",
            "data.test={}",
        ]
        out = f"gradients{stage}-{decay}"
        done = run_ranks(train, ranks, root=str(root), out=out, settings=settings)
        assert done == [True] * ranks
        after = weights_of(root / out)
        moved[decay] = {name: after[name] - before[name] for name in after if name in before}
    assert len(moved[1.0]) > 10
    for name, change in moved[1.0].items():
        factor = 1.0
        if name.startswith("model.layers."):
            factor = 0.5 ** (1 - int(name.split(".")[2]))
        largest = float(change.abs().max())
        assert largest > 0
        torch.testing.assert_close(
            moved[0.5][name], factor * change, rtol=1e-3, atol=1e-3 * largest
        )


def test_another_fine_tuning_may_be_the_start_and_its_head_is_kept(root):
    still = ["epochs=1", "lr.peak=1e-30", f"start_from={root}/one"]
    assert run_ranks(train, 1, root=str(root), out="after", settings=still) == [True]
    whole = weights_of(root / "one")
    for key, w in weights_of(root / "after").items():
        # a stored model is fp32
        torch.testing.assert_close(w, whole[key], rtol=1e-6, atol=1e-7)

    # numbers are another head: its classifier is drawn anew
    write_rows(root / "numbers.jsonl", [{"text": "abc", "label": n} for n in range(9)])
    data = f"data={{train: {root}/numbers.jsonl, max_tokens: 24}}"
    task = "task={kind: regress, texts: [text], label: label}"
    assert run_ranks(train, 2, root=str(root), out="drawn", settings=[*still, data, task]) == [
        True,
        True,
    ]
    drawn = weights_of(root / "drawn")
    assert drawn["classifier.weight"].shape == (1, 16)
    dense = "head.dense.weight"
    torch.testing.assert_close(drawn[dense], whole[dense], rtol=1e-6, atol=1e-7)


def test_killed_and_started_again_on_other_ranks_nothing_shows_it(root):
    for size, after in ((2, 4), (3, 7)):
        ranks = start_ranks(train, size, root=str(root), out="killed", settings=[])
        # a checkpoint is due after every quarter of an epoch, 11 examples
        while len(read_jsonl(root / "killed" / LEDGER)) < after and ranks[0][0].poll() is None:
            time.sleep(0.02)
        for process, _ in ranks:
            process.kill()
        with pytest.raises(AssertionError):
            wait_for(ranks, timeout_seconds=60)
    assert run_ranks(train, 1, root=str(root), out="killed", settings=[]) == [True]
    killed = root / "killed"
    starts = [e["event"] for e in read_jsonl(killed / EVENTS) if e["event"] in ("start", "resume")]
    assert len(starts) == 3 and "resume" in starts
    assert read_jsonl(killed / LEDGER) == read_jsonl(root / "one" / LEDGER) and verify_ledger(
        killed
    )
    results = [json.loads((root / run / "result.json").read_text()) for run in ("one", "killed")]
    assert results[1]["metrics"]["more"] == pytest.approx(results[0]["metrics"]["more"], rel=1e-9)
    whole = weights_of(root / "one")
    for key, w in weights_of(killed).items():
        torch.testing.assert_close(w, whole[key], rtol=1e-9, atol=1e-10)


def test_another_data_set_cannot_go_on_in_the_folder_of_a_run(root):
    text = (root / "train.jsonl").read_text().splitlines()
    (root / "other.jsonl").write_text("\n".join(text[1:]) + "\n")
    shutil.copytree(root / "two", root / "begun")
    (root / "begun" / "done.json").unlink()
    with pytest.raises(AssertionError, match="gives examples of SHA-256"):
        run_ranks(
            train, 1, root=str(root), out="begun", settings=[f"data.train={root}/other.jsonl"]
        )
    with pytest.raises(AssertionError, match="seed was 5, now 6"):
        run_ranks(train, 1, root=str(root), out="begun", settings=["seed=6"])


def test_a_finished_run_refuses_other_rows_and_settings_and_not_that_its_rows_are_gone(
    root, tmp_path, capsys
):
    shutil.copytree(root / "start", tmp_path / "start")
    shutil.copy(root / "train.jsonl", tmp_path)
    shutil.copytree(root / "one", tmp_path / "one")
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    (tmp_path / "other.jsonl").write_text("\n".join(lines[1:]) + "\n")
    (tmp_path / "moved.jsonl").write_text((tmp_path / "train.jsonl").read_text())

    def said(*settings: str) -> str:
        task = [f"out={tmp_path}/one", f"start_from={tmp_path}/start", *settings]
        code = launch_finetune.main([str(root / "task.yaml"), *task])
        told = capsys.readouterr()
        assert (code == 0) == ("is done already" in told.out), told
        assert code in (0, 2)
        return told.err

    assert said() == ""
    assert said(f"data.train={tmp_path}/moved.jsonl", "loader.micro_batch_tokens=40") == ""
    assert "gives examples of SHA-256" in said(f"data.train={tmp_path}/other.jsonl")
    assert "none.jsonl does not exist" in said(f"data.train={tmp_path}/none.jsonl")
    assert "epochs was 2, now 3" in said("epochs=3")
    write_start(tmp_path / "bert", family="bert")
    assert "holds weights of SHA-256" in said(f"start_from={tmp_path}/bert")
    # dev and test sets may go, and so may the rows themselves
    gone = [f"data.dev.dev={tmp_path}/gone.jsonl", f"data.test.more={tmp_path}/gone.jsonl"]
    assert said(*gone) == ""
    run_yaml = tmp_path / "one" / "run.yaml"
    run_yaml.write_text(run_yaml.read_text().replace(f"{root}/train.jsonl", f"{tmp_path}/gone.csv"))
    assert said(f"data.train={tmp_path}/gone.csv", f"start_from={tmp_path}/none") == ""


def test_a_finished_point_of_a_sweep_is_done_only_with_the_rows_that_it_was_trained_on(
    root, tmp_path
):
    task = (root / "task.yaml").read_text()
    (tmp_path / "task.yaml").write_text(task)
    sweep = {"base": f"{tmp_path}/task.yaml", "out": f"{tmp_path}/points", "seeds": [5]}
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    (point,) = read_sweeps([tmp_path / "sweep.yaml"])[0].points()
    shutil.copytree(root / "one", point.folder)
    (point.folder.parent / "sweep.yaml").write_text("")
    assert Board(read_sweeps([tmp_path / "sweep.yaml"])).take() is None

    lines = (root / "train.jsonl").read_text().splitlines()
    (tmp_path / "other.jsonl").write_text("\n".join(lines[1:]) + "\n")
    (tmp_path / "task.yaml").write_text(
        task.replace(f"{root}/train.jsonl", f"{tmp_path}/other.jsonl")
    )
    with pytest.raises(ConfigError, match="seed=5: data.train .*gives examples of SHA-256"):
        read_sweeps([tmp_path / "sweep.yaml"])


def test_a_finished_run_becomes_a_folder_whose_pipeline_says_the_labels(root, tmp_path):
    import transformers

    # a card has the run's results where the weights are those of its end
    assert {*read_trained(root / "one").results} == {"dev", "more"}
    assert json.loads((root / "one" / "done.json").read_text())["results"].keys() == {"dev", "more"}
    shutil.copytree(root / "one", tmp_path / "earlier")
    (tmp_path / "earlier" / "done.json").unlink()
    assert read_trained(tmp_path / "earlier").results == {}

    proofs = export_run(root / "one", tmp_path / "hf")
    assert proofs["transformers"].max_abs_difference < 1e-4
    answer = transformers.pipeline("text-classification", model=str(tmp_path / "hf"), device="cpu")
    rows = [json.loads(line) for line in (root / "dev.jsonl").open()]
    said = [json.loads(line) for line in (root / "one" / "predictions" / "dev.jsonl").open()]
    for row, ours in zip(rows, said, strict=True):
        (theirs,) = answer([row["text"]], truncation=True, max_length=24)
        assert theirs["label"] == ours["label"]
        assert theirs["score"] == pytest.approx(ours["probability"], abs=1e-4)


def train_on_other_rows(world: World, *, root: str) -> str:
    """What ends a rank whose dev set is another."""
    dev = ["dev", "more"][world.rank]
    task = read_task(f"{root}/task.yaml", [f"out={root}/other", f"data.dev.dev={root}/{dev}.jsonl"])
    with pytest.raises(DataError) as told:
        finetune(task, world)
    return str(told.value)


def test_ranks_that_read_other_rows_end_together(root):
    one, other = run_ranks(train_on_other_rows, 2, root=str(root))
    assert one == other
    # nothing but the words
    assert [path.name for path in (root / "other").iterdir()] == ["errors"]
    assert re.search(
        r"rank 0 dev: 11 examples of \S+/dev.jsonl \(SHA-256 \w{16}\), rank 1 dev: 5 ", one
    )
