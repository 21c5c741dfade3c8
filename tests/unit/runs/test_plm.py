"""Run files of XLNet: what it needs of text, model and lengths is said in a line, before anything starts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch.profiler import ProfilerActivity, profile

from encoder.base.errors import ConfigError
from encoder.models.catalog import build_model
from encoder.runs.checks import hints_of
from encoder.runs.config import read_run
from encoder.tools.plan.memory import count_needs
from encoder.tools.plan.plan import plan_text
from launch import plan
from tests.helpers.shards import random_documents, write_source
from tests.helpers.xlnet import batch_of, objective_of

MODEL = (
    "{system: xlnet, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2,"
    " num_attention_heads: 2, max_position_embeddings: 64}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("plm")
    documents = random_documents(60, seed=1, longest=60)
    write_source(root / "first", documents)
    write_source(root / "last", [np.roll(ids, -1) for ids in documents], frame="end")
    return root


def run_file(
    folder: Path, *, data: str = "last", model: str = MODEL, objective: str = "plm"
) -> Path:
    path = folder / "run.yaml"
    path.write_text(
        f"name: a\nout: {folder}/runs/a\ndata: [{{path: {folder}/{data}}}]\nmodel: {model}\n"
        f"objective: {objective}\nevaluation: null\n"
        "phases: {tokens: 4K, batch_tokens: 512, lr: 1.0e-3, max_tokens_per_document: 64}\n"
    )
    return path


SMALL = "{name: plm, block_tokens: 8, segment_tokens: 16, memory_tokens: 8}"
BAD = {
    "both ends": (dict(data="first"), "has [CLS] before each text"),
    "another model": (
        dict(model="{preset: bert_tiny}"),
        "this objective needs a model with query_stream, which this one has not. Use another"
        " model.system, such as xlnet",
    ),
    "another objective": (
        dict(model=MODEL.replace("xlnet,", "xlnet, query_stream: true,"), objective="mlm"),
        "model.query_stream is true, and this objective has no loss for it",
    ),
    "long memory": (
        dict(objective="{name: plm, memory_tokens: 64}"),
        "objective.memory_tokens 64 is not below the longest document, 64 tokens",
    ),
    "nothing to remember": (
        dict(objective="{name: plm, memory_tokens: 32}"),
        "documents of at most 64 tokens are one segment of 512",
    ),
    "pairs": (dict(objective="mlm_nsp"), "this objective needs a model with"),
    "a word of mlm": (
        dict(objective="{name: plm, random_share: 0.1}"),
        "objective.random_share is unknown",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_said_in_a_line_and_ends_with_2(folder, capsys, case):
    changes, said = BAD[case]
    assert plan.main([str(run_file(folder, **changes))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and not (folder / "runs").exists()


def test_an_xlnet_without_a_query_stream_is_trained_by_masked_tokens(folder):
    run = read_run(run_file(folder, data="first", objective="mlm"))
    assert not run.model.query_stream


def test_a_plan_counts_both_streams_and_the_memory(folder):
    run = read_run(run_file(folder, objective=SMALL))
    assert run.model.query_stream and run.model.vocab_size == 64
    text = plan_text(run, ranks=1, machine=None)
    assert f"{run.model.parameter_counts().total:,} parameters" in text and "memory a rank" in text
    lengths = [64]
    targets = {"plm": 10.0}
    found = run.objective.train_flops(run.model, {}, lengths=lengths, targets=targets)
    # four segments of 16, three of which see 8 more and have made their keys and values once more
    pairs, remembered = 4 * 16 * 16 + 3 * 16 * 8, 3 * 8
    width, inner = 32, 48
    layer = 64 * (8 * width * width + 4 * width * inner) + 10 * 4 * width * (width + inner)
    layer += remembered * 4 * width * width + 6 * width * pairs * (1 + 10 / 64)
    assert found == pytest.approx(3 * (2 * layer + 2 * width * 64 * 10))


@pytest.mark.parametrize("memory", [0, 32])
def test_a_plan_is_near_the_most_bytes_of_tensors_of_a_long_document(folder, memory):
    """As torch's profiler counts them in a forward and backward pass, its gradients left out.

    Read whole, its scores are the square of its length: 8 times those of segments of 96 with a memory.
    """
    text = run_file(folder).read_text()
    path = folder / "long.yaml"
    path.write_text(text.replace("64}", "1024}").replace("512", "1024"))
    run = read_run(
        path,
        [
            f"objective.memory_tokens={memory}",
            "objective.block_tokens=96",
            "objective.segment_tokens=96",
            "loader.micro_batch_rows=1",
            "engine.precision=fp32",
            "device=cpu",
        ],
    )
    model = build_model(run.model, seed=0)
    objective = objective_of(block_tokens=96, segment_tokens=96, memory_tokens=memory)
    batch = batch_of(objective, [1024])
    planned = count_needs(run, ranks=1).memory
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as kept:
        objective.loss(model, batch)["plm"].total.backward()
    found = most_bytes(kept) - planned.gradients
    assert planned.activations == pytest.approx(found, rel=0.08)


def most_bytes(kept: profile) -> int:
    """Of all tensors made under the profiler, at any time."""
    events = [e for e in kept.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(changes).max())


def test_a_segment_without_a_memory_draws_a_hint(folder):
    run = read_run(run_file(folder, objective="{name: plm, segment_tokens: 256}"))
    assert any("objective.segment_tokens has no effect" in line for line in hints_of(run, ranks=1))


def test_a_model_needs_whole_heads(folder):
    with pytest.raises(ConfigError, match="hidden_size 33 over 2 heads"):
        read_run(run_file(folder, model=MODEL.replace("hidden_size: 32", "hidden_size: 33")))
