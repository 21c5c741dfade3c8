"""Bad steps in real runs, not finite or spikes: skipped together, gone back from, repeated by a resume, a stop at last."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from encoder.base.dist import World
from encoder.base.errors import UserError
from encoder.data.loader import Loader
from encoder.engine.checkpoint.read import newest_checkpoint, read_weights
from encoder.engine.engine import Engine
from encoder.runs.config import read_run
from encoder.runs.folder import EVENTS, LEDGER, METRICS, merged_metrics, read_jsonl
from encoder.tools.report.report import verify_ledger
from encoder.train.pretraining import pretrain
from tests.helpers.shards import random_documents, write_source
from tests.process.ranks import run_ranks

RUN = """
name: bad
out: none
seed: 3
model: {{system: modernbert, vocab_size: 64, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1,
        num_attention_heads: 1, max_position_embeddings: 64}}
data: {{sources: [{{path: {root}/a, name: a}}], row_tokens: 64, window_documents: 30}}
objective: {{name: mlm}}
optimizer: {{}}
phases: [{{name: one, tokens: 5K, max_tokens_per_document: 48, batch_tokens: 256, lr: {{schedule: constant, peak: 1e-3}}}}]
checkpoints: {{every_tokens: 1K, keep_last: 99}}
engine: {{precision: fp32}}
loader: {{micro_batch_rows: 4, workers: 0}}
tracking: {{print_every_steps: 100}}
"""


@contextlib.contextmanager
def bad_at(bad: list[int], spiked: list[int], world: World) -> Iterator[list[int]]:
    """Rank 1 (or the only one) has a gradient of NaN in the n-th steps that this start computes, all have ten times the loss
    in the spiked ones; gives the steps computed."""
    plain, computed = Engine.step, []

    def step(self: Engine, *values, **named):
        computed.append(1)
        if len(computed) in spiked:
            result = plain(self, *values, **named)
            return dataclasses.replace(result, loss=10 * result.loss)
        if world.rank != world.size - 1 or len(computed) not in bad:
            return plain(self, *values, **named)
        hook = self.module.decoder.bias.register_hook(lambda g: g * float("nan"))
        try:
            return plain(self, *values, **named)
        finally:
            hook.remove()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "step", step)
        yield computed


def start(
    world: World,
    folder: str,
    out: str,
    *settings: str,
    bad: Sequence[int] = (),
    spiked: Sequence[int] = (),
    stop_at: int = 0,
    term_at: int = 0,
) -> str:
    """A start of a run; returns its error or nothing. `stop_at`: it fails before this step, as a kill would end it;
    `term_at`: SIGTERM comes before this step, which is not trained any more."""
    plain, calls = Loader.next_step, [0]

    def next_step(self):
        calls[0] += 1
        if calls[0] == stop_at:
            raise UserError("stopped here")
        if calls[0] == term_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self)

    with bad_at([*bad], [*spiked], world), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "next_step", next_step)
        try:
            pretrain(
                read_run(
                    f"{folder}/run.yaml",
                    [f"out={folder}/{out}", f"engine.zero_stage={min(world.size, 2)}", *settings],
                ),
                world,
            )
        except UserError as error:
            return str(error)
    return ""


def on_two_ranks(world: World, *, folder: str) -> list[str]:
    return [
        start(world, folder, "skipped", bad=[3]),
        start(world, folder, "back", bad=[8, 9, 10]),
        start(world, folder, "spiked", SPIKE, spiked=[9, 12, 13, 14]),
        start(world, folder, "stopped", bad=[8, 9, 10, 11, 12, 13]),
    ]


SPIKE = "faults.spike={deviations: 10, over_steps: 5}"


def on_one_rank(world: World, *, folder: str) -> list[str]:
    """A run that is killed after it had gone back, goes on without its cause, and one that is not killed."""
    root = Path(folder)
    first = start(world, folder, "killed", bad=[8, 9, 10], stop_at=14)
    for path in sorted((root / "killed" / "checkpoints").glob("tokens*"))[
        1:
    ]:  # from far before the bad steps
        shutil.rmtree(path)
    return [
        first,
        start(world, folder, "killed", bad=[]),
        start(world, folder, "alone", bad=[8, 9, 10]),
        start(world, folder, "limited", "faults.max_hours=1e-6", bad=[3]),
        start(world, folder, "limited", bad=[2]),
        start(world, folder, "spiked_killed", SPIKE, spiked=[9, 12, 13, 14], stop_at=16),
        start(world, folder, "spiked_killed", SPIKE),
        *preempted_in_a_row(world, folder),
        *other_cadence(world, folder),
        start(world, folder, "diverged", "phases.0.lr.peak=1e25", "checkpoints.every_tokens=100"),
        start(world, folder, "diverged_at_the_end", "phases.0.lr.peak=1e25", "phases.0.tokens=10"),
    ]


def preempted_in_a_row(world: World, folder: str) -> list[str]:
    """Bad steps 8, 9 and 10, and a stop after each of the first two."""
    told = ["preempted", "checkpoints.keep_last=1"]
    return [
        start(world, folder, *told, bad=[8], term_at=9),
        start(world, folder, *told, bad=[1], term_at=2),
        start(world, folder, *told, bad=[1]),
    ]


def other_cadence(world: World, folder: str) -> list[str]:
    """Killed after it had gone back; the checkpoints are lost but for the first, and made at other steps from then on."""
    first = start(world, folder, "cadence", bad=[8, 9, 10], stop_at=14)
    for path in sorted((Path(folder) / "cadence" / "checkpoints").glob("tokens*"))[1:]:
        shutil.rmtree(path)
    return [first, start(world, folder, "cadence", "checkpoints.every_tokens=20K")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("bad")
    write_source(root / "a", random_documents(90, seed=1, longest=60), vocab_size=64)
    (root / "run.yaml").write_text(RUN.format(root=root))
    one, two = run_ranks(on_two_ranks, 2, folder=str(root))
    assert one == two and one[:3] == ["", "", ""], "all ranks see the same"
    (root / "stopped" / "error").write_text(one[3])
    (alone,) = run_ranks(on_one_rank, 1, folder=str(root))
    assert alone[:-2] == [
        "stopped here",
        "",
        "",
        "",
        "",
        "stopped here",
        "",
        "",
        "",
        "",
        "stopped here",
        "",
    ]
    for name, error in zip(("diverged", "diverged_at_the_end"), alone[-2:]):
        (root / name / "error").write_text(error)
    return root


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_weights(newest_checkpoint(run / "checkpoints"))


def events(run: Path, what: str) -> list[dict]:
    return [e for e in read_jsonl(run / EVENTS) if e["event"] == what]


def test_one_rank_with_nan_makes_all_skip_the_step_and_the_run_goes_on(folder):
    lines = read_jsonl(folder / "skipped" / LEDGER)
    assert [line["step"] for line in lines if line.get("fault")] == [3] and verify_ledger(
        folder / "skipped"
    ) == len(lines)
    (event,) = events(folder / "skipped", "bad_step")
    assert (event["step"], event["fault"], event["in_a_row"]) == (3, "not_finite", 1)
    assert all(t.isfinite().all() for t in weights(folder / "skipped").values())


def test_three_in_a_row_go_back_to_the_checkpoint_before_and_leave_out_the_rest_of_the_window(
    folder,
):
    lines = read_jsonl(folder / "back" / LEDGER)
    (back,) = [line for line in lines if line.get("back")]
    saved = [e["step"] for e in events(folder / "back", "checkpoint")]
    assert back["step"] == 10 and back["weights_of_step"] == max(s for s in saved if s < 8)
    before, after = (
        next(line for line in lines if line["step"] == s and not line.get("back")) for s in (10, 11)
    )
    assert back["next"] == [[before["next"][0][0] + 1, 0]] and before["next"][0][1] > 0
    assert (
        after["next"][0][0] == back["next"][0][0]
        and after["tokens_seen"] == before["tokens_seen"] + after["tokens"]
    )
    assert (
        not any(8 <= s <= 10 for s in saved) and verify_ledger(folder / "back") == lines[-1]["step"]
    )


def test_a_resume_repeats_what_the_ledger_holds_though_nothing_fails_any_more(folder):
    """The checkpoint is from before the bad steps; the cause is gone; the weights are those of the run that was not killed."""
    assert (
        read_jsonl(folder / "killed" / LEDGER)
        == read_jsonl(folder / "alone" / LEDGER)
        == read_jsonl(folder / "back" / LEDGER)
    )
    for name, whole in weights(folder / "alone").items():
        assert torch.equal(weights(folder / "killed")[name], whole)


def test_a_spike_is_applied_and_three_in_a_row_go_back(folder):
    lines = read_jsonl(folder / "spiked" / LEDGER)
    assert [
        (e["step"], e["fault"], e["in_a_row"]) for e in events(folder / "spiked", "bad_step")
    ] == [(9, "spike", 1), (12, "spike", 1), (13, "spike", 2), (14, "spike", 3)]
    (back,) = [line for line in lines if line.get("back")]
    saved = [e["step"] for e in events(folder / "spiked", "checkpoint")]
    assert (back["step"], back["weights_of_step"]) == (14, max(s for s in saved if s < 12))
    assert [line["step"] for line in lines if line.get("fault")] == [9, 12, 13, 14]
    assert verify_ledger(folder / "spiked") == lines[-1]["step"]


def test_a_resume_repeats_the_spikes_of_the_ledger_though_the_loss_has_none_any_more(folder):
    """Killed after it had gone back: the checkpoint from before the spikes is the one to go on from."""
    assert read_jsonl(folder / "spiked_killed" / LEDGER) == read_jsonl(folder / "spiked" / LEDGER)
    for name, whole in weights(folder / "spiked").items():
        torch.testing.assert_close(
            weights(folder / "spiked_killed")[name], whole, rtol=1e-4, atol=1e-6
        )  # one rank, two


def test_stops_among_bad_steps_never_cost_the_checkpoint_to_go_back_to(folder):
    """keep_last is 1, and each stop saves: 7 is kept beside 8 and 9, which are after bad steps."""
    (back,) = [line for line in read_jsonl(folder / "preempted" / LEDGER) if line.get("back")]
    saved = [e["step"] for e in events(folder / "preempted", "checkpoint")]
    assert {8, 9} <= set(saved) and (back["step"], back["weights_of_step"]) == (
        10,
        max(s for s in saved if s < 8),
    )


def test_a_checkpoint_that_the_ledger_goes_back_to_is_made_again_whatever_the_cadence(folder):
    assert read_jsonl(folder / "cadence" / LEDGER) == read_jsonl(folder / "back" / LEDGER)
    for name, whole in weights(folder / "alone").items():
        assert torch.equal(weights(folder / "cadence")[name], whole)


def test_weights_that_give_no_finite_loss_are_never_saved_and_the_run_says_what_to_lower(folder):
    said = (folder / "diverged" / "error").read_text()
    assert "Start anew with a lower rate: out=ANOTHER_FOLDER phases.0.lr.peak=5e+24" in said
    assert not list((folder / "diverged" / "checkpoints").glob("tokens*"))


def test_a_loss_that_is_not_finite_at_the_last_phases_end_names_that_phases_rate(folder):
    """The next phase is entered before the end of one is saved; after the last there is none."""
    said = (folder / "diverged_at_the_end" / "error").read_text()
    assert "they are not saved" in said and said.endswith("phases.0.lr.peak=5e+24.")


def test_a_step_that_is_done_again_without_computing_it_keeps_its_first_loss(folder):
    first, again = (m["loss"] for m in read_jsonl(folder / "killed" / METRICS) if m["step"] == 9)
    merged = {m["step"]: m["loss"] for m in merged_metrics(folder / "killed" / METRICS)}
    assert again is None and merged[9] == first > 1


def test_a_run_stops_before_its_time_limit_with_a_checkpoint_and_goes_on_from_it(folder):
    (stopped,), (resumed,) = (
        events(folder / "limited", "stopped"),
        events(folder / "limited", "resume"),
    )
    assert stopped["limit"] == "faults.max_hours" and stopped["step"] == resumed["step"] == 1
    assert read_jsonl(folder / "limited" / LEDGER) == read_jsonl(folder / "skipped" / LEDGER)


def test_the_second_time_without_a_checkpoint_in_between_the_run_stops_and_says_why(folder):
    said = (folder / "stopped" / "error").read_text()
    assert "3 bad steps in a row, and the run went back once since its last checkpoint" in said
    assert "done" not in [e["event"] for e in read_jsonl(folder / "stopped" / EVENTS)]
