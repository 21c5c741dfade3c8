"""Metrics and events of a run, into its folder and, where asked for, to wandb and TensorBoard.

    metrics.jsonl   loss, rate, speed, held-out loss: floating point, for curves
    events.jsonl    starts, resumes, checkpoints, stops

A line carries the `start` that wrote it and the seconds `spent` by that start so far, by kind: a kill loses no more of
where the time went than what passed since the last line.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from pathlib import Path
from typing import Any

from encoder.base.files import open_to_append
from encoder.base.log import warn_once
from encoder.runs.config import TrackingConfig
from encoder.runs.folder import EVENTS, METRICS, TENSORBOARD, append_line, drop_torn_tail
from encoder.train.meters import Clock


class Tracker:
    """Metrics and events of rank zero; other ranks have none. `start` is the number of this start of the run."""

    def __init__(
        self,
        folder: Path,
        config: TrackingConfig,
        *,
        clock: Clock,
        start: int,
        run_name: str,
        settings: dict[str, Any],
    ) -> None:
        # or this start's first line would be glued to half a line of the one before
        drop_torn_tail(folder / METRICS)
        drop_torn_tail(folder / EVENTS)
        self._metrics = open_to_append(folder / METRICS)
        self._events = open_to_append(folder / EVENTS)
        self._clock, self._start = clock, start
        self._wandb: Any = (
            _start_wandb(folder, config.wandb_project, run_name, settings)
            if config.wandb_project
            else None
        )
        self._tensorboard = _start_tensorboard(folder) if config.tensorboard else None

    def metrics(self, step: int, **values: Any) -> None:
        """Numbers of a step. After a resume a step may stand twice: the later line counts."""
        append_line(self._metrics, {"step": step, **values, **self._time()})
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float))}
        if self._wandb is not None:
            self._log_to_wandb(numbers, step)
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)

    def event(self, what: str, **values: Any) -> None:
        """Something that happened, with the time of day (UTC)."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        append_line(self._events, {"time": stamp, "event": what, **values, **self._time()})

    def _log_to_wandb(self, numbers: dict[str, Any], step: int) -> None:
        import wandb

        try:
            self._wandb.log(numbers, step=step)
        except (wandb.errors.Error, OSError) as error:
            warn_once(
                f"wandb gets no more of this start ({' '.join(str(error).split())[:200]});"
                f" {METRICS} has all of it"
            )
            self._wandb = None

    def _time(self) -> dict[str, Any]:
        return {
            "start": self._start,
            "spent": {kind: round(s, 3) for kind, s in self._clock.seconds().items()},
        }

    def close(self) -> None:
        """Close the files, the wandb run and the TensorBoard file."""
        self._metrics.close()
        self._events.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _start_tensorboard(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / TENSORBOARD))


def _start_wandb(folder: Path, project: str, name: str, settings: dict[str, Any]) -> Any:
    import wandb

    logged_in = bool(os.environ.get("WANDB_API_KEY")) or wandb.api.api_key is not None
    # a word that wandb refuses is its to refuse
    mode: Any = os.environ.get("WANDB_MODE") or ("online" if logged_in else "offline")
    # the same run folder goes on in the same wandb run; another folder of the same name does not
    identity = hashlib.blake2b(os.fsencode(os.path.realpath(folder)), digest_size=6).hexdigest()

    told: dict[str, Any] = dict(
        project=project,
        name=name,
        config=settings,
        dir=str(folder),
        resume="allow",
        id=f"{re.sub('[^a-zA-Z0-9_.-]+', '-', name)[:100]}-{identity}",
    )

    # as asked; where wandb does not answer, offline; where that fails too, not at all
    try:
        return wandb.init(mode=mode, **told)
    except (wandb.errors.Error, OSError) as error:
        # no run ends for want of its curves elsewhere
        warn_once(
            f"wandb does not answer ({' '.join(str(error).split())[:200]}); it is written to"
            f" {folder / 'wandb'}, and goes up with: wandb sync"
        )
    try:
        return wandb.init(mode="offline", **told)
    except (wandb.errors.Error, OSError) as error:
        warn_once(
            f"wandb cannot be used ({' '.join(str(error).split())[:200]}); {METRICS} has all of it"
        )
        return None
