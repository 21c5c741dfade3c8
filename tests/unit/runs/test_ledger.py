"""The ledger continues, or says why not."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from encoder.base.errors import LedgerError, ShardError
from encoder.base.units import Progress
from encoder.runs.config import TrackingConfig
from encoder.runs.folder import LEDGER, METRICS, merged_metrics, read_jsonl
from encoder.runs.ledger import Ledger, chain
from encoder.tools.report.report import verify_ledger
from encoder.train.meters import Clock
from encoder.train.quarantine import Quarantine
from encoder.train.tracker import Tracker


def after(progress: Progress, batch_hash: int) -> Progress:
    tokens = progress.tokens + 100
    return replace(
        progress,
        step=progress.step + 1,
        tokens=tokens,
        ledger_hash=chain(
            progress.ledger_hash,
            step=progress.step + 1,
            tokens=tokens,
            masked_tokens=30,
            batch_hash=batch_hash,
        ),
    )


def write_steps(folder, start: Progress, hashes: list[int]) -> tuple[Progress, int]:
    ledger = Ledger(folder, resumed_at=start)
    for batch_hash in hashes:
        start = after(start, batch_hash)
        ledger.write(start, phase="a", rows=1, tokens=100, masked_tokens=30, batch_hash=batch_hash)
    ledger.close()
    return start, ledger.repeated_steps


def test_steps_done_again_after_a_resume_add_no_lines_and_are_counted(tmp_path):
    at_two, _ = write_steps(tmp_path, Progress(), [5, -6])
    write_steps(tmp_path, at_two, [7, 8])
    end, repeated = write_steps(tmp_path, at_two, [7, 8, 9])
    assert repeated == 2 and [line["step"] for line in read_jsonl(tmp_path / LEDGER)] == [
        1,
        2,
        3,
        4,
        5,
    ]
    assert (
        verify_ledger(tmp_path) == 5
        and read_jsonl(tmp_path / LEDGER)[-1]["chain"] == end.ledger_hash
    )


def test_other_data_after_a_resume_is_refused(tmp_path):
    at_one, _ = write_steps(tmp_path, Progress(), [5])
    write_steps(tmp_path, at_one, [7])
    with pytest.raises(
        LedgerError, match="step 2 has batch 0000000000000008.*recorded 0000000000000007"
    ):
        write_steps(tmp_path, at_one, [8])


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    at_one, _ = write_steps(tmp_path, Progress(), [5])
    with pytest.raises(LedgerError, match="mixes two runs"):
        Ledger(tmp_path, resumed_at=replace(at_one, ledger_hash="0" * 16))


def test_a_ledger_that_was_lost_goes_on_from_the_checkpoint_and_says_so(tmp_path, capsys):
    at_two, _ = write_steps(tmp_path, Progress(), [5, 6])
    lines = (tmp_path / LEDGER).read_text().splitlines(keepends=True)
    (tmp_path / LEDGER).write_text(lines[0])
    write_steps(tmp_path, at_two, [7])
    assert "did not reach step 2" in capsys.readouterr().err and verify_ledger(tmp_path) == 3
    assert (tmp_path / "ledger.before-step-2.jsonl").read_text() == lines[0]


def test_a_start_that_still_lives_cannot_write_into_the_ledger_of_the_next(tmp_path):
    stale = Ledger(tmp_path, resumed_at=Progress())
    write_steps(tmp_path, Progress(), [5, 6])
    stale.write(after(Progress(), 9), phase="a", rows=1, tokens=100, masked_tokens=30, batch_hash=9)
    stale.close()
    assert verify_ledger(tmp_path) == 2


def test_a_ledger_cut_after_the_run_was_done_is_found_out(tmp_path):
    end, _ = write_steps(tmp_path, Progress(), [5, 6, 7])
    (tmp_path / "done.json").write_text(json.dumps({"step": 3, "ledger_hash": end.ledger_hash}))
    assert verify_ledger(tmp_path) == 3
    lines = (tmp_path / LEDGER).read_text().splitlines(keepends=True)
    (tmp_path / LEDGER).write_text("".join(lines[:2]))
    with pytest.raises(LedgerError, match="ends at step 2"):
        verify_ledger(tmp_path)


def test_a_line_torn_by_a_kill_is_dropped(tmp_path):
    at_one, _ = write_steps(tmp_path, Progress(), [5])
    with open(tmp_path / LEDGER, "a") as f:
        f.write('{"step": 2, "pha')
    assert len(read_jsonl(tmp_path / LEDGER)) == 1
    write_steps(tmp_path, at_one, [7])
    assert verify_ledger(tmp_path) == 2


def test_an_edited_ledger_is_found_out(tmp_path):
    write_steps(tmp_path, Progress(), [5, 6, 7])
    lines = (tmp_path / LEDGER).read_text().splitlines()
    second = json.loads(lines[1])
    lines[1] = json.dumps({**second, "masked_tokens": second["masked_tokens"] + 1})
    (tmp_path / LEDGER).write_text("\n".join(lines) + "\n")
    with pytest.raises(LedgerError, match="line 2: the chain breaks"):
        verify_ledger(tmp_path)


def test_metrics_of_a_step_done_twice_count_once(tmp_path):
    (tmp_path / METRICS).write_text(
        '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 2, "loss": 2.5}\n'
        '{"step": 2, "held_out_loss": 9.0}\n'
    )
    assert merged_metrics(tmp_path / METRICS)[1] == {"step": 2, "loss": 2.5, "held_out_loss": 9.0}


@pytest.mark.parametrize(
    "key, value",
    [
        ("batch", None),
        ("batch", "zz"),
        ("batch", 5),
        ("masked_tokens", None),
        ("tokens_seen", None),
        ("tokens_seen", 101),
        ("tokens", 99),
        ("chain", None),
        ("chain", 7),
        ("step", "1"),
    ],
)
def test_an_edited_line_of_the_ledger_is_named(tmp_path, key, value):
    write_steps(tmp_path, Progress(), [5, 6, 7])
    lines = read_jsonl(tmp_path / LEDGER)
    lines[1] = {k: v for k, v in {**lines[1], key: value}.items() if v is not None}
    (tmp_path / LEDGER).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(LedgerError, match="line 2: the chain breaks at step"):
        verify_ledger(tmp_path)


def test_a_line_of_the_metrics_without_a_step_and_a_damaged_quarantine_are_named(tmp_path):
    (tmp_path / METRICS).write_text('{"loss": 3}\n')
    with pytest.raises(LedgerError, match="line 1 has no step"):
        merged_metrics(tmp_path / METRICS)
    (tmp_path / "quarantine.json").write_text("{")
    with pytest.raises(ShardError, match="quarantine.json cannot be read"):
        Quarantine(tmp_path, [])


def test_wandb_that_does_not_answer_is_written_offline_and_one_that_fails_ends_no_run(
    tmp_path, monkeypatch, capsys
):
    import wandb

    told, logged = [], []

    class Run:
        def log(self, numbers, step):
            logged.append(step)
            if step == 2:
                raise wandb.errors.CommError("gone")

        def finish(self):
            raise AssertionError("it was given up")

    def init(**values):
        told.append(values)
        if values["mode"] == "online":
            raise wandb.errors.CommError("no such host")
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    tracker = Tracker(
        tmp_path,
        TrackingConfig(wandb_project="p"),
        clock=Clock(began=0.0),
        start=1,
        run_name="a/b: ü #1",
        settings={},
    )
    for step in (1, 2, 3):
        tracker.metrics(step, loss=1.0)
    tracker.close()
    assert [values["mode"] for values in told] == ["online", "offline"] and not set(
        told[0]["id"]
    ) & set("/:;,#?' ")
    assert logged == [1, 2] and len(read_jsonl(tmp_path / METRICS)) == 3
    assert "wandb does not answer" in capsys.readouterr().err
