"""What a run does about bad steps: it skips them, and after several in a row goes back to a good checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from encoder.base.dist import sum_over_ranks
from encoder.base.errors import CheckpointError, UserError
from encoder.engine.checkpoint.read import newest_checkpoint, read_progress
from encoder.engine.engine import StepResult
from encoder.runs.folder import CHECKPOINTS, LEDGER
from encoder.runs.ledger import chain_back
from encoder.train.faults import NOT_FINITE, OK, SPIKE, StepMonitor
from encoder.train.recorder import Recorder
from encoder.train.session import Session
from encoder.train.start import load_verified


class Recovery:
    """Classifies steps, and takes the run back. What stands in the ledger of steps that are done again is repeated."""

    def __init__(self, session: Session, recorder: Recorder, *, bad_steps: dict[str, Any]) -> None:
        """session, recorder: of this start
        bad_steps: of the checkpoint that it goes on from
        """
        self._session = session
        self._recorder = recorder
        recorded = _from_first_rank(
            recorder.ledger.recorded() if recorder.ledger else [], session.device
        )
        # the step whose weights were taken after a step, of steps that will be done again
        self._taken_after = {step: weights for step, _, weights in recorded if weights >= 0}
        self.monitor = StepMonitor(
            session.run.faults,
            recorded={step: fault for step, fault, _ in recorded},
            saved=bad_steps,
        )

    def wants_save(self, step: int) -> bool:
        """Whether the ledger goes back to this step later: its weights will be needed again."""
        return step in self._taken_after.values()

    def go_back(self, result: StepResult, *, wait_for_save: Callable[[], None]) -> None:
        """The weights of the last good checkpoint, and the data from behind the bad steps on.

        The clock of tokens goes on: what was trained between is in the ledger, and so is this.
        Raises UserError, the same on all ranks, the second time in a row.

        result: of the last bad step
        wait_for_save: commits what is being written
        """
        session = self._session
        p, step = session.progress, session.progress.step
        session.watchdog.heartbeat(f"going back after step {step}")
        wait_for_save()
        found = self._checkpoint_to_go_back_to(result)

        course = session.course
        weights, _ = load_verified(found, course, session.engine, session.device)
        # load_verified has set those of the checkpoint's phase, which may be an earlier one
        session.engine.module.set_phase_(course.last_phase(p).model)
        lanes = course.past_bad_steps(p)
        link = chain_back(p.ledger_hash, step=step, weights_of_step=weights.step, lanes=lanes)
        session.progress = dataclasses.replace(p, lanes=lanes, ledger_hash=link)
        self.monitor.gone_back()
        self._recorder.went_back(weights, found.name)

    def _checkpoint_to_go_back_to(self, result: StepResult) -> Path:
        session, step = self._session, self._session.progress.step
        # `taken`: the step whose weights the first start took here; is_good finds no other then
        again, taken = self.monitor.went_back, self._taken_after.get(step)
        found = (
            None if again else newest_checkpoint(session.folder / CHECKPOINTS, fits=self.is_good)
        )
        if found is not None:
            return found
        ledger = session.folder / LEDGER
        if taken is not None:
            raise UserError(
                f"{ledger} goes back from step {step} to the weights of step {taken}, whose"
                f" checkpoint is gone or damaged. Put it back, or remove those after step {taken},"
                " so that it is made again."
            )
        why = "there is no good checkpoint to go back to"
        if again:
            why = "the run went back once since its last checkpoint"
        raise UserError(
            f"{self.monitor.in_a_row} bad steps in a row, and {why}: the loss of step {step} is"
            f" {result.loss:.4g}, its gradient norm {result.grad_norm:.4g}."
            f" {session.course.lower_rate_text(session.progress)}, or look at the data of these steps in {ledger}."
        )

    def is_good(self, folder: Path) -> bool:
        """Whether the run could go back to a checkpoint: it was made after a good step; of steps done again, it is the one
        that was taken then."""
        try:
            progress, extra = read_progress(folder)
        except CheckpointError:
            return False
        step = self._session.progress.step
        # the next going-back that the ledger has from here on: its checkpoint alone will do
        taken = next(
            (taken for back, taken in sorted(self._taken_after.items()) if back >= step), None
        )
        if taken is not None:
            return progress.step == taken
        return extra.get("bad_steps", {}).get("in_a_row", 0) == 0


def _from_first_rank(
    recorded: list[tuple[int, str, int]], device: torch.device
) -> list[tuple[int, str, int]]:
    """The ledger's steps that will be done again, on all ranks."""
    words = [OK, NOT_FINITE, SPIKE]
    # rank zero alone has the ledger; the others add zeros, so that a sum is a broadcast
    count = int(sum_over_ranks(torch.tensor([len(recorded)], device=device)))
    table = torch.zeros(count, 3, dtype=torch.int64, device=device)
    for row, (step, fault, weights_of_step) in enumerate(recorded):
        table[row] = torch.tensor([step, words.index(fault), weights_of_step])
    return [
        (step, words[fault], weights_of_step)
        for step, fault, weights_of_step in sum_over_ranks(table).tolist()
    ]
