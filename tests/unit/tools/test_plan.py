"""The work of a phase, from the documents that there are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from encoder.base.batch import packed_documents
from encoder.base.errors import ConfigError
from encoder.data.shards import read_samples_per_shard
from encoder.models.catalog import build_model
from encoder.models.modernbert import ModernBertForMaskedLM
from encoder.nn.attend import AttentionRequest, choose_backend
from encoder.optim.schedule import Constant
from encoder.runs.config import SourceConfig, read_run
from encoder.runs.epochs import count_repeats, many_epochs_text, repeats_text
from encoder.tools.plan import activations
from encoder.tools.plan.activations import count_kept
from encoder.tools.plan.memory import count_needs, estimate_memory
from encoder.tools.plan.plan import plan_text
from encoder.tools.plan.work import phase_work
from tests.helpers.shards import write_source

TINY = Path("tests/helpers/three_phases.yaml")


def test_work_follows_the_stored_lengths_cut_as_the_phase_cuts_them(tmp_path):
    """100 tokens with at most 52: bodies of 49 and 49, so 51 + 51 tokens; the other document stays whole."""
    folder = write_source(
        tmp_path / "a" / "train", [np.ones(100, dtype=np.int64), np.ones(20, dtype=np.int64)]
    )
    here = SourceConfig(path=str(folder), weight=3.0)
    missing = SourceConfig(path=str(tmp_path / "missing"), weight=1.0)
    run = read_run(TINY)
    phase = replace(run.phases[0], max_tokens_per_document=52, sources=(here,))
    known = phase_work(run, phase)
    per_token = (
        run.model.train_flops(lengths=[51, 51, 20], targets={"mlm": run.objective.mask_share * 122})
        / 122
    )
    assert known.unknown == () and known.flops == pytest.approx(per_token * phase.tokens)
    longest = (
        run.model.train_flops(lengths=[52], targets={"mlm": run.objective.mask_share * 52}) / 52
    )
    mixed = phase_work(run, replace(phase, sources=(here, missing)))
    assert mixed.unknown == (missing.path,)
    assert mixed.flops == pytest.approx((3 * per_token + longest) / 4 * phase.tokens)


def test_a_plan_counts_epochs_warns_of_many_and_refuses_more_than_a_source_allows(tmp_path):
    """500 tokens, half of a phase of 2,000: two epochs; five in the next, whose only source it is."""
    for name in ("a", "b"):
        write_source(tmp_path / name, [np.ones(50, dtype=np.int64)] * 10)
    run = read_run(TINY)
    one, other = (SourceConfig(path=str(tmp_path / n), name=n, max_epochs=5) for n in ("a", "b"))
    run = replace(
        run,
        phases=(
            replace(run.phases[1], name="stable", tokens=2000, sources=(one, other)),
            replace(run.phases[1], tokens=2500, sources=(one,)),
        ),
    )
    repeats = count_repeats(run)
    assert repeats_text(repeats) == "stable: a 2, b 2; extension: a 5"
    assert many_epochs_text(repeats).startswith("the run goes through a 7 times; above 4")
    assert many_epochs_text(repeats[:2]) is None
    assert (
        "epochs      stable: a 2" in (text := plan_text(run, ranks=1))
        and "warning: the run goes through a 7" in text
    )
    with pytest.raises(
        ConfigError, match="phase stable goes 2.00 times through source a, its max_epochs is 1.9"
    ):
        count_repeats(
            replace(
                run, phases=(replace(run.phases[0], sources=(replace(one, max_epochs=1.9), other)),)
            )
        )


def test_epochs_with_lanes_are_those_of_the_lane_of_fewest_documents(tmp_path):
    """Shards, so lanes, of 20 and 19 documents of 50 tokens: 1,950 tokens are an epoch of all, and 39 / 38 of the second."""
    write_source(tmp_path / "a", [np.ones(50, dtype=np.int64)] * 39, shard_bytes=2500)
    assert read_samples_per_shard(tmp_path / "a").tolist() == [20, 19]
    source = SourceConfig(path=str(tmp_path / "a"), name="a", max_epochs=1.03)
    run = read_run(TINY, ["data.lanes=2"])
    phase = replace(run.phases[0], tokens=1950, sources=(source,), lr=Constant(peak=1e-3))
    assert count_repeats(replace(run, phases=(phase,)))[0].epochs == pytest.approx(39 / 38)
    with pytest.raises(
        ConfigError, match="phase stable goes 1.03 times through source a, its max_epochs is 1.02"
    ):
        count_repeats(
            replace(run, phases=(replace(phase, sources=(replace(source, max_epochs=1.02),)),))
        )


@pytest.mark.parametrize(
    "name, said",
    [
        (
            "stable_adamw",
            (
                "StableAdamW betas 0.9, 0.98, eps 1e-06, decay 1e-05 a step at the peak rate (fully"
                " decoupled)"
            ),
        ),
        ("adamw", "AdamW betas 0.9, 0.98, eps 1e-06, decay 1e-05 times the rate a step"),
        ("lamb", "LAMB betas 0.9, 0.98, eps 1e-06, decay 1e-05 of the weights in the direction"),
        (
            "muon",
            (
                "Muon momentum 0.95, adam scale, 1 times the rate, for the layers' matrices;"
                " StableAdamW betas 0.9, 0.98"
            ),
        ),
    ],
)
def test_a_plan_says_which_optimizer_moves_the_weights(name, said):
    asked = f"{{name: {name}, betas: [0.9, 0.98], eps: 1.0e-6, weight_decay: 1.0e-5}}"
    run = read_run(TINY, [f"optimizer={asked}"])
    assert f"optimizer   {said}" in plan_text(run, ranks=1)


def test_a_plan_says_how_many_ranks_have_nothing_to_do():
    run = read_run(TINY)
    assert "idle" not in plan_text(run, ranks=2) and " a rank (996 idle)" in plan_text(
        run, ranks=1000
    )


def test_a_phase_too_short_for_its_schedule_is_told_when_the_file_is_read():
    with pytest.raises(
        ConfigError,
        match="warmup_tokens 60,000 and decay_tokens 0 are more than the phase's 20,000 tokens",
    ):
        read_run(TINY, ["phases.0.tokens=20K"])


def test_a_plan_says_whose_lengths_it_guessed(tmp_path, monkeypatch):
    run = read_run(TINY)
    monkeypatch.chdir(tmp_path)
    assert f"documents of {run.data.sources[0].path}" in plan_text(run, ranks=1)


@pytest.mark.parametrize(
    "precision, stage, weights, gradients, optimizer",
    [
        ("fp32", 0, 4, 4, 8),
        ("fp32", 1, 4, 4, 6),
        ("fp32", 2, 4, 2, 6),
        ("fp32", 3, 2, 2, 6),
        ("bf16", 2, 2, 2, 6),
        ("bf16", 3, 1, 2, 6),
    ],
)
def test_each_zero_stage_splits_one_thing_more_over_two_ranks(
    precision, stage, weights, gradients, optimizer
):
    """Bytes of 1 M parameters; at stage 3 also the largest matrix, whole."""
    run = read_run(TINY, [f"engine.zero_stage={stage}", f"engine.precision={precision}"])
    memory = estimate_memory(
        run, parameters=10**6, largest=10**5, optimizer_elements=2 * 10**6, ranks=2
    )
    largest = 10**5 if stage == 3 else 0
    width = 2 if precision == "bf16" else 4
    assert memory.weights == weights * 10**6 + width * largest
    assert (memory.gradients, memory.optimizer) == (gradients * 10**6, optimizer * 10**6)


@pytest.mark.parametrize("stage, offloaded", [(1, 8), (2, 8), (3, 10)])
def test_an_offloaded_optimizer_takes_the_machines_memory_instead(stage, offloaded):
    """Bytes of 1 M parameters on one of two ranks: masters, two averages and the gradients, at stage 3 twice."""
    run = read_run(
        TINY,
        [f"engine.zero_stage={stage}", "engine.precision=fp32", "engine.offload_optimizer=cpu"],
    )
    memory = estimate_memory(
        run, parameters=10**6, largest=10**5, optimizer_elements=2 * 10**6, ranks=2
    )
    assert (memory.optimizer, memory.offloaded) == (0, offloaded * 10**6)
    assert "in the machine" in plan_text(run, ranks=2)


def test_a_copy_that_probes_fine_tune_is_counted_as_a_run_of_its_shape_by_adamw():
    """On one of two ranks at ZeRO-1: weights, gradients, and half of masters and two moments; 4 + 4 + 6 bytes each.

    Two texts of 8 tokens are 8 on each rank. The run's masters are whole before the first step, beside weights and moments.
    """
    probe = (
        "{name: p, kind: finetune, train: a.jsonl, test: b.jsonl, max_tokens: 8, batch_examples: 2}"
    )
    settings = ["engine.zero_stage=1", "engine.precision=fp32", "device=cpu"]
    run = read_run(TINY, [*settings, f"evaluation.probes=[{probe}]"])
    numbers = dict(parameters=10**6, largest=10**5, optimizer_elements=10**6, ranks=2)
    memory = estimate_memory(run, **numbers)
    parameters = run.model.parameter_counts().total
    probe = memory.probe
    assert (probe.weights, probe.gradients) == (4 * parameters, 4 * parameters)
    assert probe.optimizer == 6 * parameters and probe.start == (4 + 4 + 6) * parameters
    kept = count_kept(run.model, precision="fp32", device="cpu")
    layers = run.model.num_hidden_layers * kept.layer_per_token
    assert probe.activations == 8 * (layers + kept.outside_per_token)
    plain = estimate_memory(read_run(TINY, settings), **numbers)
    assert memory.in_step == plain.total == plain.in_step
    # the run's own activations are gone meanwhile
    assert memory.total == plain.held + max(plain.activations, probe.total)
    text = plan_text(run, ranks=2)
    assert "\nin a probe     about " in text and "\nin a probe " not in plan_text(
        read_run(TINY), ranks=2
    )


def test_on_a_gpu_a_probe_starts_in_the_machines_memory():
    """The run's masters and a copy, 4 bytes each, but at stage 3, where the copy is cut from the first moment on."""
    probe = "{name: p, kind: finetune, train: a.jsonl, test: b.jsonl}"
    for stage, copies in ((1, 2), (3, 1)):
        run = read_run(
            TINY,
            [f"evaluation.probes=[{probe}]", "device=cuda", f"engine.zero_stage={stage}"],
        )
        numbers = dict(parameters=10**6, largest=10**5, optimizer_elements=10**6, ranks=2)
        found = estimate_memory(run, **numbers).probe
        assert found.start == 4 * copies * run.model.parameter_counts().total
        assert found.total == found.training and found.bucket == 2**28


def test_layers_computed_again_keep_their_inputs_and_one_of_them_whole():
    words = ("off", "blocks")
    off, blocks = (
        read_run(TINY, ["engine.precision=fp32", f"engine.activation_checkpointing={word}"])
        for word in words
    )
    kept = [
        estimate_memory(run, parameters=1, largest=1, optimizer_elements=1, ranks=1).activations
        for run in (off, blocks)
    ]
    tokens = off.loader.micro_batch_rows * off.data.row_tokens
    layer = tokens * count_kept(off.model, precision="fp32", device="cpu").layer_per_token
    inputs = 4 * tokens * off.model.num_hidden_layers * off.model.hidden_size
    assert kept[0] - kept[1] == (off.model.num_hidden_layers - 1) * layer - inputs


@pytest.mark.parametrize(
    "device, precision, dropout, width_bytes, inner_bytes",
    [
        ("cpu", "fp32", 0.1, 9 * 4, 4 * 4),
        ("cpu", "fp64", 0.1, 9 * 8, 4 * 8),
        ("cuda", "fp32", 0.1, 9 * 4, 4 * 4),
        ("cuda", "fp32", 0.0, 8 * 4, 4 * 4),
        ("cuda", "autocast", 0.1, 12 * 2, 4 * 2),
        ("cuda", "bf16", 0.1, 10 * 2, 4 * 2),
    ],
)
def test_a_layer_keeps_what_can_be_counted_by_hand(
    device, precision, dropout, width_bytes, inner_bytes
):
    """Stream twice, two norms, q, k, v, attention, dropout; under autocast stream and dropout are fp32, in bf16 dropout alone."""
    m = replace(read_run(TINY).model, attention_output_dropout=dropout)
    kept = count_kept(m, precision=precision, device=device)
    # of two norms mean and deviation, fp32 or fp64; of attention a logsumexp for each head
    statistics = 4 * (8 if precision == "fp64" else 4) + 4 * m.num_attention_heads
    assert (
        kept.layer_per_token
        == width_bytes * m.hidden_size + inner_bytes * m.intermediate_size + statistics
    )
    matrices = m.parameter_counts().matrices // m.num_hidden_layers
    assert kept.layer_fixed == (2 * matrices if precision == "autocast" else 0)


def test_at_stage_3_linear_layers_keep_both_norms_in_fp32_under_autocast():
    m = read_run(TINY).model
    plain, zero_3 = (
        count_kept(m, precision="autocast", device="cuda", zero_3=word) for word in (False, True)
    )
    assert (
        zero_3.layer_per_token - plain.layer_per_token == 2 * 2 * m.hidden_size
        and zero_3.layer_fixed == 0
    )


def test_counting_leaves_torch_as_it_was():
    linear = F.linear
    count_kept(
        read_run(TINY, ["model.hidden_size=32"]).model, precision="bf16", device="cpu", zero_3=True
    )
    assert F.linear is linear and torch.get_default_dtype() == torch.float32
    assert not torch.is_autocast_enabled("cpu") and "cpu" in str(torch.zeros(1).device)
    here = AttentionRequest(
        device=torch.device("cpu"), dtype=torch.float32, head_width=8, training=True
    )
    assert choose_backend("sdpa", here).backend.name == "sdpa"


def test_a_model_whose_shapes_depend_on_values_says_its_width(monkeypatch):
    class NeedsData(ModernBertForMaskedLM):
        def hidden_states(self, batch):
            return super().hidden_states(batch)[: len(torch.bincount(batch.ids_T))]

    monkeypatch.setattr(
        activations, "build_model", lambda config, *, seed: NeedsData(config, seed=seed)
    )
    m = read_run(TINY, ["model.hidden_size=64"]).model
    for precision, width in (("bf16", 2), ("fp32", 4), ("fp64", 8)):
        kept = count_kept(m, precision=precision, device="cpu")
        assert (kept.layer_per_token, kept.outside_per_token) == (width * m.activation_width, 0)


@pytest.mark.parametrize("precision", ["fp32", "autocast"])
@pytest.mark.parametrize(
    ("lengths", "most"),
    [((300, 500, 224), 1.12), ((60, 64, 61, 63), 1.12), ((700, 400, 500), 1.5), ((700, 650), 1.5)],
    ids=str,
)
def test_on_a_cpu_the_count_is_near_what_a_forward_keeps(precision, lengths, most):
    """Tiles of documents and windows are padded, which is not counted; each document counts as the one that keeps most."""
    config = replace(read_run(TINY).model, num_hidden_layers=4)
    model = build_model(config, seed=0)
    batch = packed_documents([torch.zeros(length, dtype=torch.int64) for length in lengths])
    storages = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storages[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            hidden = model.hidden_states(batch)
    for parameter in model.parameters():
        storages.pop(parameter.untyped_storage()._cdata, None)
    found = sum(storage.nbytes() for storage in storages.values())
    kept = count_kept(config, precision=precision, device="cpu", longest_tokens=max(lengths))
    counted = (
        len(hidden) * (kept.outside_per_token + 4 * kept.layer_per_token) + 4 * kept.layer_fixed
    )
    assert 0.88 * found < counted < most * found


SMALL = [
    "model.hidden_size=256",
    "model.intermediate_size=384",
    "model.num_hidden_layers=7",
    "model.num_attention_heads=4",
]
STAGE_3 = ["engine.zero_stage=3"]


@pytest.mark.parametrize(
    "shape, rows, settings, found_gb",
    [
        ("base", 1, SMALL, 2.14),
        ("base", 4, SMALL, 5.36),
        ("base", 2, [], 22.72),
        ("base", 4, [], 41.72),
        ("base", 2, ["engine.fp8=layers"], 18.68),
        ("base", 2, ["engine.precision=bf16"], 20.89),
        ("base", 2, ["engine.activation_checkpointing=blocks"], 7.67),
        ("large", 1, [], 27.94),
        ("large", 2, [], 46.53),
        ("large", 2, ["engine.activation_checkpointing=blocks"], 14.66),
        ("base", 1, [*SMALL, *STAGE_3], 2.35),
        ("base", 1, STAGE_3, 15.16),
        ("base", 2, STAGE_3, 26.40),
        ("base", 1, [*SMALL, *STAGE_3, "engine.precision=bf16"], 2.03),
        ("base", 1, [*STAGE_3, "engine.precision=bf16"], 12.50),
    ],
)
def test_memory_is_within_eight_percent_of_what_torchs_allocator_counted(
    shape, rows, settings, found_gb
):
    """The most bytes of tensors in steps of two micro-batches under DeepSpeed on one CUDA device that had memory alone
    (docs/log.md); torch 2.11, layers compiled below stage 3."""
    run = read_run(
        Path(f"configs/pretrain/modernbert_{shape}.yaml"),
        [f"loader.micro_batch_rows={rows}", "device=cuda", *settings],
    )
    needs = count_needs(run, ranks=1)
    assert needs.memory.total / 1e9 == pytest.approx(found_gb, rel=0.08)


@pytest.mark.parametrize(
    "setting, word", [("model.norm=rmsnorm", "norm rmsnorm"), ("model.mlp=gelu", "mlp gelu")]
)
def test_a_plan_says_before_training_what_cannot_become_a_hugging_face_folder(setting, word):
    said = plan_text(read_run(TINY, [setting]), ranks=1)
    assert f"export      not to Hugging Face, whose ModernBERT has no word for {word}" in said
    assert "export" not in plan_text(read_run(TINY), ranks=1)
