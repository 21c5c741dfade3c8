"""A run file is checked whole before anything starts; its steps follow from tokens alone."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from encoder.base.batch import TermSum
from encoder.base.errors import ConfigError
from encoder.base.schema import to_plain
from encoder.base.units import Progress
from encoder.runs.config import changed_settings, identity_of, read_run
from encoder.runs.phases import enter_next_phase, lr_at, phase_is_done, planned_steps
from encoder.tools.plan.curves import columns_of
from encoder.tools.plan.plan import plan_text
from encoder.train.evaluate import HeldOut, held_out_numbers, unigram_entropy
from tests.reference.planned_steps import walked_steps

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "tests" / "helpers" / "three_phases.yaml"


def test_a_peak_for_a_decay_that_knows_none_is_refused():
    assert (
        read_run(TINY, ["phases.0.max_lr=1e-3", "optimizer={name: muon}"]).phases[0].max_lr == 1e-3
    )
    for name in ("adamw", "lamb"):
        with pytest.raises(ConfigError, match="phase stable: max_lr 0.001 has no effect"):
            read_run(TINY, ["phases.0.max_lr=1e-3", f"optimizer={{name: {name}}}"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "phases.0.batch_tokens=10000",
            "is not a whole number of rows of 512. Nearest: 9,728, 10,240",
        ),
        (
            "data.lanes=3",
            (
                "is not a whole number of rows of 1,536. Nearest: 1,536, 3,072. A step takes a row"
                " of each of 3 data.lanes"
            ),
        ),
        ("data.lanes=0", "lanes 0 must be at least"),
        ("phases.0.mask_share=1.0", "phase stable: mask_share 1.0 must lie between 0 and 1"),
        ("data.sources.0.max_epochs=0", "max_epochs 0.0 must be above 0"),
        ("phases.0.batch_warmup.from_tokens=3000", "is not a whole number of rows"),
        ("phases.1.max_tokens_per_document=4096", "do not fit rows"),
        ("model.max_position_embeddings=256", "max_position_embeddings"),
        ("phases.1.name=stable", "each name may stand once"),
        ("phases.2.lr.warmup_tokens=5", "lr.warmup_tokens is unknown"),
        ("phases=[]", "at least one phase"),
        ("model.num_attention_heads=3", "head"),
        ("engine.zero_stge=2", "Did you mean zero_stage?"),
        ("objective.mask_share=1.5", "mask_share"),
        ("model={preset: modernbert_bas}", "Did you mean modernbert_base?"),
        ("data.sources.0.weight=0", "must be above 0"),
        (
            "optimizer={name: stable_adam}",
            "optimizer.name is 'stable_adam'. Did you mean stable_adamw?",
        ),
        ("optimizer={name: adamw, momentum: 0.9}", "optimizer.momentum is unknown"),
    ],
)
def test_a_run_that_cannot_be_is_refused_in_one_line(override, said):
    with pytest.raises(ConfigError) as caught:
        read_run(TINY, [override])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_preset_fills_in_the_published_sizes():
    run = read_run(TINY, ["model={preset: modernbert_large, vocab_size: 8192}"])
    assert (
        run.model.num_hidden_layers,
        run.model.hidden_size,
        run.model.intermediate_size,
        run.model.vocab_size,
    ) == (
        28,
        1024,
        2624,
        8192,
    )


def test_the_rate_of_a_step_is_the_schedule_at_its_middle_and_ends_at_the_phase():
    decay = read_run(TINY).phases[2]
    half = lr_at(decay, phase_tokens=0, step_tokens=decay.tokens)
    assert half == pytest.approx(decay.lr.at(decay.tokens // 2, phase_tokens=decay.tokens))
    beyond = lr_at(decay, phase_tokens=decay.tokens - 1, step_tokens=10**9)
    assert beyond == pytest.approx(decay.lr.peak * 0.001)


def test_planned_steps_spend_each_phase_and_warm_the_batch_up():
    run = read_run(TINY)
    steps = list(planned_steps(run))
    for index, phase in enumerate(run.phases):
        own = [s for s in steps if s.phase == index]
        assert sum(s.tokens for s in own[:-1]) < phase.tokens <= sum(s.tokens for s in own)
    assert steps[0].rows < steps[-1].rows and [s.step for s in steps] == list(
        range(1, len(steps) + 1)
    )


def test_every_step_has_as_many_rows_of_each_lane():
    run = read_run(
        TINY, ["data.lanes=2"]
    )  # 1,024 to 2,048 tokens a step in rows of 512: one or two rows a lane
    assert {run.rows_at(run.phases[0], seen) for seen in range(0, 400_000, 1000)} == {2, 4}


def test_a_phase_may_ask_another_share_and_let_it_fall_over_its_tokens():
    run = read_run(
        TINY,
        ["objective.mask_share=0.4", "phases.1.mask_share=0.2", "phases.2.mask_share_end=0.15"],
    )
    shares = [run.mask_share_of(phase) for phase in run.phases]
    assert [s.at(0) for s in shares] == [0.4, 0.2, 0.3] and [
        s.at(10**9) for s in shares
    ] == pytest.approx([0.4, 0.2, 0.15])
    assert (
        shares[2].at(run.phases[2].tokens // 2)
        == pytest.approx(0.225)
        == pytest.approx(shares[2].mean)
    )
    assert shares[2].highest == 0.3


def test_a_phase_ends_with_the_step_that_reaches_its_tokens():
    run = read_run(TINY)
    at = Progress(
        step=9,
        tokens=run.phases[0].tokens,
        phase_step=9,
        phase_tokens=run.phases[0].tokens - 1,
        lanes=((2, 3),),
    )
    assert not phase_is_done(run, at) and phase_is_done(
        run, replace(at, phase_tokens=run.phases[0].tokens)
    )
    entered = enter_next_phase(at)
    assert (entered.phase, entered.phase_tokens, entered.lanes, entered.step) == (1, 0, (), 9)


def test_what_changes_the_curve_is_identity_and_what_does_not_is_not():
    run = read_run(TINY)
    same = read_run(
        TINY,
        [
            "engine.zero_stage=2",
            "loader.micro_batch_rows=1",
            "out=elsewhere",
            "tracking.print_every_steps=1",
        ],
    )
    assert identity_of(run) == identity_of(same)
    for override in (
        "seed=18",
        "phases.0.tokens=1M",
        "objective.mask_share=0.2",
        "engine.gradient_clipping=1.0",
        "data.row_tokens=1024",
    ):
        assert identity_of(run) != identity_of(read_run(TINY, [override])), override


def test_settings_that_came_later_had_the_meaning_of_their_defaults():
    run = read_run(TINY)
    old = to_plain(run)
    for section, key in (("optimizer", "bias_correction"), ("objective", "z_loss_weight")):
        del old[section][key]
    assert changed_settings(old, run) == []
    bare = read_run(TINY, ["optimizer.bias_correction=false"])
    assert changed_settings(old, bare) == [("optimizer.bias_correction", None, False)]
    assert changed_settings(to_plain(run), bare) == [("optimizer.bias_correction", True, False)]
    # a setting that has no default was another run's
    del old["phases"][0]["tokens"]
    assert [key for key, _, _ in changed_settings(old, run)] == ["phases.0.tokens"]


def test_held_out_loss_is_a_sum_over_a_count_not_a_mean_of_means():
    sets = [HeldOut(name="a", batches=["a"]), HeldOut(name="b", batches=["b"])]
    losses = held_out_numbers(
        sets,
        lambda batches: {"mlm": TermSum(10.0, 1, 1) if batches == ["a"] else TermSum(10.0, 9, 3)},
    )
    assert losses["held_out_loss"] == pytest.approx(2.0)
    assert losses["held_out_loss_a"] == pytest.approx(10.0) and losses[
        "held_out_loss_b"
    ] == pytest.approx(10 / 9)
    assert losses["held_out_accuracy"] == 0.4 and losses["held_out_accuracy_a"] == 1.0
    assert losses["held_out_accuracy_b"] == pytest.approx(1 / 3)


def test_unigram_entropy_of_even_and_uneven_counts():
    assert unigram_entropy(np.array([5, 5, 5, 5, 99]), [4]) == pytest.approx(np.log(4))
    assert unigram_entropy(np.array([3, 1, 0]), []) == pytest.approx(
        -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    )


def test_a_plan_tells_of_every_phase_without_any_shards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = plan_text(read_run(TINY), ranks=2)
    assert all(
        word in text
        for word in ("stable", "extension", "decay", "not prepared yet", "160,000", "micro-batches")
    )


# a twentieth of the published recipes: the batch warm-ups are whole, the rest has fewer equal steps
WALKED = [
    ("three_phases", 0.9731, []),
    ("mini_four_domains", 0.9731, []),
    (
        "modernbert_base",
        0.998,
        ["phases.0.tokens=86B", "phases.1.tokens=12B", "phases.2.tokens=3B"],
    ),
    (
        "modernbert_large",
        1.0,
        [
            "phases.0.tokens=45B",
            "phases.1.tokens=41B",
            "phases.2.tokens=12B",
            "phases.3.tokens=3B",
        ],
    ),
    ("three_phases", 0.9731, ["data.lanes=2"]),
    ("three_phases", 1.0, ["phases.0.batch_tokens=200704", "data.row_tokens=512"]),
    ("three_phases", 1.0, ["phases.0.lr={schedule: cosine, peak: 1e-3, warmup_tokens: 77K}"]),
    ("three_phases", 1.0, ["phases.0.lr={schedule: bert, peak: 1e-3, warmup_tokens: 77K}"]),
    ("three_phases", 0.9, ["phases.0.lr={schedule: electra, peak: 1e-3, warmup_tokens: 77K}"]),
    ("three_phases", 0.9, ["phases.0.lr={schedule: electra, peak: 1e-3, warmup_tokens: 640K}"]),
    (
        "three_phases",
        0.9,
        ["phases.0.batch_warmup={from_tokens: 512, increase_tokens: 1024, over_tokens: 639_999}"],
    ),
]


@pytest.mark.parametrize(("name", "fill", "settings"), WALKED)
def test_steps_worked_out_are_the_steps_walked_through(name, fill, settings):
    path = TINY if name == TINY.stem else ROOT / "configs" / "pretrain" / f"{name}.yaml"
    run = read_run(path, settings)
    planned, walked = (
        of(run, fills=[fill] * len(run.phases)) for of in (planned_steps, walked_steps)
    )
    count, rates = [0] * len(run.phases), [0.0] * len(run.phases)
    early = [0] * len(run.phases)
    for ours, theirs in zip(planned, walked, strict=True):
        assert ours == theirs
        count[ours.phase] += 1
        rates[ours.phase] = max(rates[ours.phase], ours.lr)
        early[ours.phase] += ours.phase_tokens <= run.phases[ours.phase].tokens // 3
    assert (
        len(planned) == sum(count)
        and planned[-1] == theirs
        and planned[len(planned) // 2].step == len(planned) // 2 + 1
    )
    for index, phase in enumerate(run.phases):
        assert (
            planned.peak_lr(index) == rates[index] and len(planned.indices(index)) == count[index]
        )
        assert len(planned.indices(index, until_tokens=phase.tokens // 3)) == early[index]


@pytest.mark.parametrize(
    "settings",
    [
        ["phases.0.tokens=2T"],  # 1.95e9 steps
        [
            "phases.0.tokens=2T",
            "phases.0.batch_tokens=4_096_000",
            "phases.0.batch_warmup.over_tokens=1.9T",
        ],
    ],
)  # 3,999 stairs
def test_a_plan_of_a_billion_steps_takes_little_time_and_memory(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = read_run(TINY, settings)
    began = time.process_time()
    steps = planned_steps(run)
    text = plan_text(run, ranks=2, steps=steps)
    columns = columns_of(run, steps)
    assert time.process_time() - began < 3.0  # 0.2 and 0.7 s seen, of CPU time on a quiet core
    assert (
        f"{len(steps):,}" in text
        and columns[-1].steps[-1] == steps[len(steps) - 1]
        and len(steps) > 700_000
    )
    tracemalloc.start()
    planned_steps(run)
    assert tracemalloc.get_traced_memory()[1] < 3e6
    tracemalloc.stop()
