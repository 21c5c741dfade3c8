"""Probes during a run: one number on any ranks and stages, that which `tessera evaluate` or `finetune` has of the checkpoint."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from encoder.base.dist import World
from encoder.base.errors import UserError
from encoder.base.rng import generator
from encoder.base.stopping import StopFlag
from encoder.engine.checkpoint.read import newest_checkpoint, read_progress, read_weights
from encoder.finetune.config import read_task
from encoder.finetune.course import finetune
from encoder.optim.shares import rate_of_step
from encoder.runs.config import read_run
from encoder.runs.folder import EVENTS, LEDGER, METRICS, merged_metrics, read_jsonl
from encoder.tools import notebook
from encoder.tools.evaluation.features import layer_features, text_documents
from encoder.tools.plan.memory import count_needs
from encoder.tools.report.report import write_report
from encoder.train import probes, tuned_probe
from encoder.train.pretraining import pretrain
from encoder.train.probe_scores import linear_probe, majority, probe_layers, read_labelled
from encoder.train.probes import ProbeTexts
from encoder.train.tuned_probe import tuned_logits
from encoder.train.watchdog import Watchdog
from tests.helpers.shards import random_documents, write_source
from tests.helpers.tasks import drawn_examples
from tests.process.ranks import run_ranks, start_ranks, wait_for

RUN = """
name: probed
out: none
seed: 3
model: {{system: modernbert, vocab_size: 64, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 2,
        num_attention_heads: 1, max_position_embeddings: 32}}
data: {{sources: [{{path: {root}/a, name: a}}], row_tokens: 32, window_documents: 30}}
objective: {{name: mlm}}
phases: [{{name: one, tokens: 600, max_tokens_per_document: 32, batch_tokens: 128, lr: {{schedule: constant, peak: 1e-3}}}}]
checkpoints: {{every_tokens: 1K}}
evaluation:
  sources: [{{path: {root}/held, name: held}}]
  every_tokens: 400
  rows: 2
  probes: [{{name: first, train: {root}/train.jsonl, test: {root}/test.jsonl, max_tokens: 12}},
           {{name: tuned, kind: finetune, train: {root}/train.jsonl, test: {root}/test.jsonl, max_tokens: 12,
            epochs: 2, batch_examples: 16, lr: 3e-3, seed: 5}}]
engine: {{precision: fp32, zero_stage: {stage}}}
loader: {{workers: 0}}
"""


def rows(count: int, *, seed: int) -> list[dict[str, str]]:
    """Texts of words; half of them have the word t0 among them, and its label."""
    draw = generator(seed, "probed rows")
    found = []
    for number in range(count):
        words = [f"t{word}" for word in draw.integers(1, 50, int(draw.integers(3, 16)))]
        if number % 2:
            words[int(draw.integers(0, 3))] = "t0"
        found.append({"text": " ".join(words), "label": "with" if number % 2 else "without"})
    return found


TASK = """
name: as_tuned
start_from: {root}/one
task: {{kind: classify, texts: [text], label: label}}
data: {{train: {root}/train.jsonl, test: {{test: {root}/test.jsonl}}, max_tokens: 12}}
lr: 3e-3
epochs: 2
batch_examples: 16
seed: 5
engine: {{precision: fp32, zero_stage: 1}}
"""


def train(world: World, *, folder: str, out: str, stage: int) -> bool:
    settings = [f"out={folder}/{out}", f"engine.zero_stage={stage}"]
    return pretrain(read_run(f"{folder}/run.yaml", settings), world).done


@dataclass(frozen=True)
class Asked:
    """A fine-tuning of a run: its logits, and the random states before and after."""

    logits: list
    before: tuple
    after: tuple


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Shards, rows and the run file."""
    root = tmp_path_factory.mktemp("probed")
    write_source(root / "a", random_documents(90, seed=1, longest=30), vocab_size=64)
    write_source(
        root / "held", random_documents(9, seed=2, longest=30), vocab_size=64, split="held_out"
    )
    for name, count, seed in (("train", 61, 4), ("test", 35, 5)):
        lines = [json.dumps(row) for row in rows(count, seed=seed)]
        (root / f"{name}.jsonl").write_text("\n".join(lines))
    (root / "run.yaml").write_text(RUN.format(root=root, stage=1))
    return root


@pytest.fixture(scope="module")
def probed(place) -> tuple[Path, list[Asked]]:
    """The runs `one`, here, and `two`, on two ranks at stage 3; and what the fine-tunings of the first gave."""
    asked = []

    def noted(*parts, **named):
        before = random_states()
        logits = tuned_logits(*parts, **named)
        asked.append(Asked(logits.tolist(), before, random_states()))
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "tuned_logits", noted)
        assert train(World(), folder=str(place), out="one", stage=1)
    assert run_ranks(train, 2, folder=str(place), out="two", stage=3) == [True, True]
    return place, asked


@pytest.fixture
def root(probed) -> Path:
    return probed[0]


def random_states() -> tuple:
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return read_weights(newest_checkpoint(run / "checkpoints"))


@pytest.mark.parametrize("probe", ["probe_first", "probe_tuned"])
def test_a_probe_is_the_same_on_two_ranks_at_stage_3(root, probe):
    one, two = (
        [m for m in read_jsonl(root / out / METRICS) if "held_out_loss" in m]
        for out in ("one", "two")
    )
    assert [m[probe] for m in one] == [m[probe] for m in two]
    assert [m["step"] for m in one if probe in m] == [m["step"] for m in one]
    assert len(one) >= 3 and all(0 <= m[probe] <= 1 for m in one)


def test_probes_leave_the_run_as_it_was(root, monkeypatch):
    one = [m for m in read_jsonl(root / "one" / METRICS) if "held_out_loss" in m]
    text = (root / "run.yaml").read_text()
    begin, end = text.index("  probes:"), text.index("engine:")
    (root / "without.yaml").write_text(text[:begin] + text[end:])
    beats = []
    monkeypatch.setattr(Watchdog, "still_going", lambda self: beats.append(self._doing))
    pretrain(read_run(f"{root}/without.yaml", [f"out={root}/without"]), World())
    # a long evaluation is no hang: each of its forwards is noticed
    assert {beat for beat in beats if "evaluating" in beat} and len(beats) >= len(one)
    assert read_jsonl(root / "without" / LEDGER) == read_jsonl(root / "one" / LEDGER)
    losses = [
        [m["loss"] for m in read_jsonl(root / out / METRICS) if "loss" in m]
        for out in ("one", "without")
    ]
    assert losses[0] == losses[1]
    plain = weights_of(root / "without")
    for name, weight in weights_of(root / "one").items():
        assert torch.equal(weight, plain[name]), name


def test_a_short_fine_tuning_is_that_of_the_checkpoint_and_moves_no_random_state(probed):
    """From the last checkpoint of the run `tessera finetune` gives the logits of its last probe, bit by bit."""
    root, asked = probed
    assert len(asked) >= 3 and all(one.before == one.after for one in asked)
    run = read_run(root / "one" / "run.yaml")
    micro_batch = run.loader.micro_batch_rows * run.data.row_tokens
    settings = [f"out={root}/as_tuned", f"loader.micro_batch_tokens={micro_batch}"]
    (root / "task.yaml").write_text(TASK.format(root=root))
    assert finetune(read_task(root / "task.yaml", settings), World()).done
    lines = read_jsonl(root / "as_tuned" / "predictions" / "test.jsonl")
    assert [line["logits"] for line in lines] == asked[-1].logits
    right = [line["label"] == line["target"] for line in lines]
    found = [m for m in read_jsonl(root / "one" / METRICS) if "probe_tuned" in m]
    assert found[-1]["probe_tuned"] == sum(right) / len(right)
    # it has learned something: the head alone knows nothing
    assert sum(right) / len(right) > 0.6


def train_killed_in_a_probe(world: World, *, folder: str) -> bool:
    """SIGKILL in the middle of the second fine-tuning."""
    asked = []

    def killed(*parts: Any, **named: Any) -> None:
        asked.append(1)
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return copy_trained(*parts, **named)

    copy_trained = tuned_probe._train
    tuned_probe._train = killed
    settings = [f"out={folder}/killed", "checkpoints.every_tokens=100"]
    return pretrain(read_run(f"{folder}/run.yaml", settings), world).done


@pytest.mark.matrix
def test_killed_in_a_probe_a_run_goes_on_and_asks_again(root):
    killed = start_ranks(train_killed_in_a_probe, 1, folder=str(root))
    with contextlib.suppress(AssertionError):
        wait_for(killed, timeout_seconds=100)
    assert killed[0][0].poll() == -signal.SIGKILL
    assert run_ranks(train, 1, folder=str(root), out="killed", stage=1) == [True]
    assert "resume" in [line["event"] for line in read_jsonl(root / "killed" / EVENTS)]
    assert read_jsonl(root / "killed" / LEDGER) == read_jsonl(root / "one" / LEDGER)
    numbers = [
        [
            (m["step"], m["probe_tuned"])
            for m in merged_metrics(root / run / METRICS)
            if "probe_tuned" in m
        ]
        for run in ("one", "killed")
    ]
    assert numbers[0] == numbers[1]
    whole = weights_of(root / "one")
    for name, weight in weights_of(root / "killed").items():
        assert torch.equal(weight, whole[name]), name


def test_asked_to_stop_in_a_probe_a_run_leaves_it_saves_and_goes_on(root, monkeypatch, capsys):
    """In the tenth step of its fine-tunings; it goes on with other rows of the first probe, which is told."""
    stop = StopFlag()
    rates = []

    def noted_rate(*parts, **named):
        rates.append(rate_of_step(*parts, **named))
        if len(rates) == 10:
            stop.cause = "SIGTERM"
        return rates[-1]

    monkeypatch.setattr(tuned_probe, "rate_of_step", noted_rate)
    out = f"out={root}/stopped"
    stopped = pretrain(read_run(root / "run.yaml", [out]), World(), stop=stop)
    assert not stopped.done and len(rates) == 10
    at = read_jsonl(root / "stopped" / LEDGER)[-1]["step"]
    saved = newest_checkpoint(root / "stopped" / "checkpoints")
    assert read_progress(saved)[0].step == at
    lines = read_jsonl(root / "stopped" / METRICS)
    (number,) = (m for m in lines if "probe_tuned" in m and m["step"])
    assert (number["step"], number["probe_tuned"]) == (at, None) and number["probe_first"] > 0
    assert "probe tuned: left after 32 of 122 texts" in capsys.readouterr().out

    (root / "other.jsonl").write_text((root / "train.jsonl").read_text().replace("t1", "t2"))
    settings = [out, f"evaluation.probes.0.train={root}/other.jsonl"]
    assert pretrain(read_run(root / "run.yaml", settings), World()).done
    told = capsys.readouterr().err
    assert told.count("the texts of probe first are others than at the start before") == 1
    assert "probe tuned" not in told
    assert read_jsonl(root / "stopped" / LEDGER) == read_jsonl(root / "one" / LEDGER)


def test_the_last_number_is_that_of_an_evaluation_of_the_checkpoint(root):
    bert = notebook.load(root / "one")
    states, labels = [], []
    for name in ("train", "test"):
        read = [json.loads(line) for line in (root / f"{name}.jsonl").read_text().splitlines()]
        documents = text_documents(bert, [row["text"] for row in read], longest=12)
        states.append(layer_features(bert, documents))
        labels.append([row["label"] for row in read])
    scores = probe_layers(states[0], labels[0], states[1], labels[1], seed=3)
    found = [m for m in read_jsonl(root / "one" / METRICS) if "probe_first" in m]
    assert found[-1]["probe_first"] == scores.linear[-1].test
    page = write_report([root / "one"], root / "report").read_text()
    assert f"{scores.linear[-1].test:.2%}" in page


def test_a_broken_model_has_no_number_and_an_error_of_rank_zero_is_everybodys(monkeypatch):
    examples = SimpleNamespace(__len__=lambda self: 6)
    probe = ProbeTexts(
        name="p", examples=examples, train_labels=["a", "b"] * 2, test_labels=["a", "b"]
    )
    broken = torch.full((6, 4), math.nan)
    monkeypatch.setattr(probes, "_embedded", lambda *_args, **_named: broken)
    run, engine = SimpleNamespace(seed=1), SimpleNamespace(device=torch.device("cpu"))
    found = probes.probe_numbers([probe], engine, world=World(), run=run)
    assert math.isnan(found["probe_p"])
    monkeypatch.setattr(probes, "tuned_logits", lambda *_parts, **_named: broken)
    examples = drawn_examples(6)
    tuned = replace(probe, examples=examples, tuning=SimpleNamespace())
    found = probes.probe_numbers([tuned], engine, world=World(), run=run)
    assert math.isnan(found["probe_p"])

    entered = []
    monkeypatch.setattr(probes, "all_ranks_agree", lambda world: noted(entered))
    monkeypatch.setattr(probes, "_accuracy", lambda *_args, **_named: entered.append("fit") or 0.5)
    assert probes.probe_numbers([probe], engine, world=World(), run=run) == {"probe_p": 0.5}
    assert entered == ["in", "fit", "out"]


@contextlib.contextmanager
def noted(entered: list[str]):
    entered.append("in")
    yield
    entered.append("out")


def test_a_regression_finds_what_is_there_and_the_commonest_label_is_no_find():
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(300, 8, generator=draw)
    labels = ["b" if value > 0.3 else "a" for value in x[:, 2].tolist()]
    assert linear_probe(x[:200], labels[:200], x[200:], labels[200:], seed=1) > 0.9
    shuffled = [*labels[7:200], *labels[:7]]
    assert linear_probe(x[:200], shuffled, x[200:], labels[200:], seed=1) < 0.75
    share = labels[200:].count("a") / 100
    assert majority(labels[:200], labels[200:]) == pytest.approx(share)


def most_bytes_of_tensors(body: Callable[[], Any]) -> tuple[Any, int]:
    """What a call gives, and the most bytes of tensors that it had made and not let go, as torch's profiler counts them."""
    with torch.profiler.profile(profile_memory=True) as profiled:
        given = body()
    events = profiled.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda change: change[0])
    return given, max(accumulate(nbytes for _, nbytes in changes))


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["engine.precision=autocast"],
        ["engine.activation_checkpointing=blocks", "model.num_hidden_layers=6"],
    ],
)
def test_a_plan_counts_what_a_short_fine_tuning_takes(place, tmp_path, monkeypatch, settings):
    """All that it makes lies below what the plan says, and above seven tenths of it: its texts are not all of full length, and of
    two layers the last one, behind its attention, sees [CLS] alone."""
    most = []

    def measured(*parts, **named):
        logits, nbytes = most_bytes_of_tensors(lambda: tuned_logits(*parts, **named))
        most.append(nbytes)
        return logits

    monkeypatch.setattr(probes, "tuned_logits", measured)
    wide = [
        "model.hidden_size=128",
        "model.intermediate_size=192",
        "data.row_tokens=512",
        "phases.0.batch_tokens=512",
        "evaluation.probes.1.batch_examples=61",
        "device=cpu",
        f"out={tmp_path}/wide",
        *settings,
    ]
    run = read_run(place / "run.yaml", wide)
    assert pretrain(run, World()).done
    counted = count_needs(run, ranks=1).memory
    assert counted.probe and counted.probe.training == counted.probe.total
    assert 0.7 * counted.probe.total < max(most) < counted.probe.total
    assert counted.total == counted.held + max(counted.activations, counted.probe.total)


def test_of_a_file_that_is_sorted_by_labels_all_labels_are_drawn(tmp_path):
    rows = [{"text": f"t{number}", "label": "ab"[number >= 500]} for number in range(1000)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    some = read_labelled(tmp_path / "rows.jsonl", text="text", label="label", most=100)
    assert len(some.texts) == 100 and 30 < some.labels.count("a") < 70
    numbers = [int(text[1:]) for text in some.texts]
    assert numbers == sorted(numbers)
    whole = read_labelled(tmp_path / "rows.jsonl", text="text", label="label")
    assert len(whole.texts) == 1000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"probes.0.train": "nowhere.jsonl"}, ["evaluation.probes.0 (first)", "nowhere.jsonl"]),
        ({"probes.0.label": "labels"}, ["train.jsonl line 1", "Did you mean label"]),
        ({"probes.0.name": "a b"}, ["probe_NAME"]),
        ({"probes.0.test": "one.jsonl"}, ["'other'", "none of the training texts'"]),
        ({"probes.0.lable": "x"}, ["lable", "Did you mean label"]),
        ({"probes.1.kind": "tune"}, ["evaluation.probes.1.kind is 'tune'", "finetune"]),
        ({"probes.1.lr": "0"}, ["probes.1", "peak 0 must be above 0"]),
        ({"probes.0.epochs": "2"}, ["probes.0.epochs is unknown"]),
        ({"probes.1.test": "one.jsonl"}, ["evaluation.probes.1 (tuned)", "'other'"]),
    ],
)
def test_a_probe_that_cannot_be_asked_is_told_before_the_run(place, changes, words):
    (place / "one.jsonl").write_text('{"text": "t1", "label": "other"}\n')
    settings = [f"evaluation.{key}={value}" for key, value in changes.items()]
    settings = [word.replace("=one.jsonl", f"={place}/one.jsonl") for word in settings]
    with pytest.raises(UserError) as refused:
        pretrain(read_run(f"{place}/run.yaml", [f"out={place}/bad", *settings]), World())
    assert all(word in str(refused.value) for word in words), refused.value
    assert not (place / "bad").exists()
