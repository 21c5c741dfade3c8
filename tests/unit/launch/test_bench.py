"""launch/bench.py: every question runs, says where and how it measured, and times nothing that is wrong."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    attention,
    checkpoint,
    command,
    gemm,
    loader,
    loss,
    merge,
    optimizer,
    peers,
    step,
)
from encoder.base.errors import UserError
from encoder.engine import graphed
from encoder.models.modernbert import ModernBertForMaskedLM
from launch.bench import main

ROOT = Path(__file__).resolve().parents[3]
ON_CPU = ["--quick", "--device", "cpu", "--threads", "1"]
AGAINST = {"step": ["--against", "hf"]}


@pytest.fixture(autouse=True)
def memory_is_given_back(monkeypatch):
    """Other tests measure memory in this process."""
    monkeypatch.setattr(command.freed_memory, "keep", lambda: True)


# engine: tests/process/test_bench_engine.py, for DeepSpeed starts once a process; time-to-loss: test_time_to_loss.py beside it
@pytest.mark.parametrize(
    "question",
    [
        # the loader's rows are compared with the slow twin's below, too; the loss takes three processes
        pytest.param(q, marks=pytest.mark.slow) if q in ("loader", "loss") else q
        for q in command.QUESTIONS
        if q not in ("engine", "time-to-loss")
    ],
)
def test_every_question_answers_with_numbers_their_spread_and_the_machine(
    question, tmp_path, capsys, monkeypatch
):
    # each line of the loss takes three processes
    monkeypatch.setattr(loss, "SAME_LOSS", {"fp32": 1e-5})
    assert (
        main([question, *ON_CPU, "--json", str(tmp_path / "out.json"), *AGAINST.get(question, [])])
        == 0
    )
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["date"] and found["cpu"] and f"bench.py {question}" in found["command"]
    assert torch.__version__.startswith(found["torch"])
    assert found["tables"] and all(t["rows"] and t["figures"] for t in found["tables"])
    assert question == "loss" or any("spread" in t["head"] for t in found["tables"])
    said = capsys.readouterr().out
    assert all(t["title"] in said for t in found["tables"]) and "checked: " in said
    merge.merge(tmp_path / "table", [tmp_path / "out.json"])
    assert found["tables"][0]["title"] in (tmp_path / "table.md").read_text()


def test_the_step_stands_beside_three_kinds_of_transformers_batches_without_padding_counted(
    tmp_path,
):
    main(["step", *ON_CPU, "--json", str(tmp_path / "out.json"), "--against", "hf"])
    figures = json.loads((tmp_path / "out.json").read_text())["tables"][0]["figures"]
    assert len(figures["sides"]) == 4 and len({s["tokens"] for s in figures["sides"].values()}) == 1
    ours, *others = figures["sides"].values()
    for ratio, other in zip(figures["ratios"].values(), others, strict=True):
        # round by round, whatever the machine did meanwhile
        rounds = sorted(b / a for a, b in zip(ours["seconds"], other["seconds"], strict=True))
        assert len(rounds) == 2
        assert ratio == pytest.approx([rounds[0], sum(rounds) / 2, rounds[1]])


@pytest.fixture
def nothing_may_be_timed(monkeypatch):
    def refuse(*_args, **_named):
        raise AssertionError("it was timed")

    for module in (attention, gemm, optimizer, step):
        monkeypatch.setattr(module, "in_turn", refuse)
    monkeypatch.setattr(checkpoint, "rounds", refuse)
    monkeypatch.setattr(loader, "best_of", refuse)


def _other_seed(monkeypatch):
    plain = step.first_model
    monkeypatch.setattr(
        step,
        "first_model",
        lambda config, *, attention: (
            ModernBertForMaskedLM(config, attention=attention, seed=2)
            if attention == "sdpa"
            else plain(config, attention=attention)
        ),
    )


def _other_gradients(monkeypatch, factor=1.2):
    plain = step.first_model

    def model(config, *, attention):
        made = plain(config, attention=attention)
        if attention == "sdpa":
            made.get_parameter("model.layers.0.mlp.Wo.weight").register_hook(
                lambda grad: factor * grad
            )
        return made

    monkeypatch.setattr(step, "first_model", model)


def _gradients_that_are_no_numbers(monkeypatch):
    _other_gradients(monkeypatch, factor=float("nan"))


def _other_labels(monkeypatch):
    documents = peers.documents_of

    def shifted(batch):
        return [
            type(d)(ids=d.ids, labels=d.labels.where(d.labels < 0, (d.labels + 1) % 1000))
            for d in documents(batch)
        ]

    monkeypatch.setattr(peers, "documents_of", shifted)


def _attention_that_looks_at_nothing(monkeypatch):
    wrong = SimpleNamespace(
        why_not=lambda _: None, plan=lambda *_, **__: lambda q, k, v, local: q + 0 * k + 0 * v
    )
    monkeypatch.setitem(attention.BACKENDS, "wrong", wrong)


def _longer_memory(monkeypatch):
    build = optimizer.build_optimizer
    monkeypatch.setattr(
        optimizer,
        "build_optimizer",
        lambda model, config: build(model, type(config)(betas=(0.95, 0.98))),
    )


def _weights_off_by_a_bit(monkeypatch):
    read = checkpoint.read_weights
    monkeypatch.setattr(
        checkpoint,
        "read_weights",
        lambda path: {name: w * (1 + 2**-23) for name, w in read(path).items()},
    )


def _rows_in_another_order(monkeypatch):
    pack = loader.pack_best_fit
    monkeypatch.setattr(
        loader, "pack_best_fit", lambda lengths, capacity: pack(lengths[::-1], capacity)
    )


@pytest.mark.parametrize(
    "question, break_it, said",
    [
        ("step", _other_seed, "the loss is"),
        ("step", _other_labels, "the loss is"),
        ("step", _other_gradients, "the gradient of model.layers.0.mlp.Wo.weight is"),
        (
            "step",
            _gradients_that_are_no_numbers,
            "the gradient of model.layers.0.mlp.Wo.weight is inf off",
        ),
        ("attention", _attention_that_looks_at_nothing, "wrong is off"),
        ("optimizer", _longer_memory, "off its slow twin"),
        ("checkpoint", _weights_off_by_a_bit, "not those that were saved"),
        ("loader", _rows_in_another_order, "other rows than its slow twin"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_timed(
    question, break_it, said, monkeypatch, nothing_may_be_timed, capsys, tmp_path
):
    break_it(monkeypatch)
    path = tmp_path / "out.json"
    assert main([question, *ON_CPU, "--json", str(path), *AGAINST.get(question, [])]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error and error.endswith("Nothing was timed.") and not path.exists()


def test_a_graph_that_repeats_its_first_micro_batch_is_refused(monkeypatch):
    """It is captured with the first, so that one would not show it."""
    config = step.config_of("tiny", dropout=0.0)
    batches = [
        step.make_batch(vocab_size=config.vocab_size, longest=128, row_tokens=256, rows=1, number=i)
        for i in range(2)
    ]
    truth = step.judged(config, batches, device=torch.device("cpu"), known={})

    def check():
        ours = step.Ours(
            config,
            batches,
            attention="auto",
            compiled="off",
            graphs="micro_step",
            device=torch.device("cpu"),
            autocast=contextlib.nullcontext,
        )
        step.check_same(ours, truth, what="the graph", precision="fp32", bounds=step.SAME_GRADIENT)

    check()
    monkeypatch.setattr(
        graphed._Graph,
        "run",
        lambda graph, _: (setattr(graph, "turn", graph.turn + 1), graph.replay())[1],
    )
    with pytest.raises(UserError, match="the loss is"):
        check()


def test_a_product_that_is_wrong_is_refused():
    a, b = (
        torch.ones(4, 4, dtype=torch.bfloat16),
        torch.full((4, 4), float("nan"), dtype=torch.bfloat16),
    )
    gemm.check_product(a, a, what="fine")
    with pytest.raises(UserError, match="Wo is off by nan"):
        gemm.check_product(a, b, what="Wo")


@pytest.mark.parametrize(
    "words, said",
    [
        (["stp"], "error: stp is no question. Did you mean step?"),
        (["step", "--shap", "tiny"], "error: --shap is unknown. Did you mean --shape?"),
        (["step", "--rows", "2,x"], "argument --rows: 'x'; needed: a whole number of at least 1"),
        (["step", "--shape", "huge"], "argument --shape: invalid choice: 'huge'"),
        (
            ["step", "--kinds", "packt"],
            "argument --kinds: 'packt' is unknown. Did you mean packed?",
        ),
        (["step", "--attention", "tile"], "tile"),
        (["step", "--graphs", "micro_step"], "--graphs micro_step is for --device cuda"),
        (["step", "--row-tokens", "64"], "--row-tokens 64 is below --length"),
        (["--shape", "tiny"], "error: --shape is unknown."),
        (["gemm", "--against", "hf"], "--against hf is for the question step"),
        (["step", "--json", "no/such/folder/x.json"], "there is no folder"),
        (["step", "--json", "."], "--json . is a folder"),
        (["step", "--hf-compile", "on"], "--hf-compile on is for --device cuda"),
        (["prep", "--corpus", "somewhere"], "--corpus and --tokenizer belong together"),
        (["loader", "--shards", "nowhere"], "--shards nowhere holds no web/train"),
    ],
)
def test_a_typo_is_one_line_and_exit_code_2(words, said, capsys):
    try:
        code = main([*words, *(["--device", "cpu"] if words[0] != "--shape" else [])])
    except SystemExit as left:
        code = left.code
    error = capsys.readouterr().err.strip()
    assert code == 2 and said in error and "\n" not in error


@pytest.mark.matrix
def test_a_bare_machine_measures_steps_without_what_only_preparing_and_distributing_need(tmp_path):
    """None of these modules is there: the GPU machine has torch and numpy."""
    absent = [
        "deepspeed",
        "streaming",
        "fastokens",
        "tokenizers",
        "datasets",
        "wandb",
        "matplotlib",
        "rich",
        "psutil",
        "transformers",
        "safetensors",
        "pytest",
    ]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent})); from launch.bench import main;"
        " sys.exit(max(main([question, *sys.argv[1:]]) for question in ('step', 'attention', 'gemm')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *ON_CPU], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("checked: ") >= 3


def test_the_gpu_script_asks_only_what_the_command_knows():
    """Each line of arguments is parsed as the script gives it."""
    import re
    import shlex

    text = (ROOT / "benchmarks/gpu.sh").read_text()
    groups = dict(re.findall(r"(\w+)=\((--[^)]*)\)", text))
    asked = re.findall(r"^bench (\w+) (\d+) (\w+)(.*)$", text, re.M)
    assert len(asked) > 10
    for _name, _seconds, question, rest in asked:
        for group, value in groups.items():
            rest = rest.replace(f'"${{{group}[@]}}"', value)
        module = __import__(f"benchmarks.{question}", fromlist=["options"])
        command._parser(question, module).parse_args(
            ["--device", "cuda", "--rounds", "5", *shlex.split(rest)]
        )
