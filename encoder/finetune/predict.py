"""Predictions in the order of the rows, from all ranks, and what a run writes of them.

RUN/predictions/NAME.jsonl    {"row": 0, "label": "positive", "probability": 0.97, "logits": [...], "target": "positive"},
                              in other words for other kinds of task (encoder/finetune/kinds)
RUN/result.json               the settings' and the data's hashes, where the rows were read, the seed, the metrics of every set
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from encoder.base.files import write_atomic, write_json
from encoder.base.schema import to_yaml
from encoder.base.units import Progress
from encoder.data.examples import Examples, NumberedBatch
from encoder.engine.engine import Engine
from encoder.finetune.metrics import Scores
from encoder.objectives.text_tasks import TextObjective
from encoder.train.answers import answered

if TYPE_CHECKING:
    from encoder.finetune.config import FineTuneConfig

PREDICTIONS, RESULT = "predictions", "result.json"


@dataclass(frozen=True, kw_only=True)
class KeptWeights:
    """The weights that a run ends with."""

    text: str  # last step; best dev accuracy 0.8532, of step 20
    progress: Progress  # that they were made at


def predicted(
    engine: Engine,
    batches: Sequence[NumberedBatch],
    *,
    examples: Examples,
    outputs: int,
    objective: TextObjective,
) -> np.ndarray:
    """Logits [P, K] in fp64 at the places of a whole data set, in its order, the same on every rank.

    engine: whose model answers
    batches: this rank's share of the data set
    examples: the data set
    outputs: K
    objective: that asks the model
    """
    logits_PK = answered(
        engine,
        batches,
        objective.answers,
        examples=examples,
        width=outputs,
        dtype=torch.float64,
    )
    return logits_PK.numpy()


def write_predictions(folder: Path, name: str, lines: Iterable[dict[str, Any]]) -> None:
    """Writes RUN/predictions/NAME.jsonl, a line for each row.

    folder: of the run
    name: of the data set
    lines: what is told of its rows
    """
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / PREDICTIONS).mkdir(exist_ok=True)
    write_atomic(folder / PREDICTIONS / f"{name}.jsonl", text)


def write_result(
    folder: Path,
    task: FineTuneConfig,
    train: Examples,
    results: dict[str, Scores],
    *,
    kept: KeptWeights,
    decided: Mapping[str, float],
    rows_of: Mapping[str, str],
) -> None:
    """Writes RUN/result.json.

    folder: of the run
    task: its settings
    train: what it was trained on
    results: by the name of a data set
    kept: whose results they are
    decided: on the first dev set, or without one given
    rows_of: data set -> where its rows were read
    """
    settings = to_yaml(task).encode()
    write_json(
        folder / RESULT,
        {
            "name": task.name,
            "seed": task.seed,
            "settings_sha256": hashlib.sha256(settings).hexdigest(),
            "examples_sha256": train.sha256,
            "rows": dict(rows_of),
            "weights_of": kept.text,
            "weights_step": kept.progress.step,
            "weights_ledger_hash": kept.progress.ledger_hash,
            "metrics": {name: measured.plain() for name, measured in results.items()},
            # what a test set, an export and the page take as given
            "decided": {name: v for name, v in decided.items() if math.isfinite(v)},
            "constant_predictions": [name for name, s in results.items() if s.constant],
        },
    )
