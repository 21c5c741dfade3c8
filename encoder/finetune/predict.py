"""Predictions in the order of the rows, from all ranks, and what a run writes of them.

RUN/predictions/NAME.jsonl    {"row": 0, "label": "positive", "probability": 0.97, "logits": [...], "target": "positive"}
RUN/result.json               the settings' and the data's hashes, the seed, the metrics of every set
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from encoder.base.dist import sum_over_ranks
from encoder.base.files import write_atomic, write_json
from encoder.base.schema import to_yaml
from encoder.data.examples import Examples, NumberedBatch
from encoder.engine.engine import Engine
from encoder.finetune.metrics import Scores, predictions
from encoder.finetune.tasks import TaskConfig
from encoder.objectives.text_tasks import TextTask

if TYPE_CHECKING:
    from encoder.finetune.config import FineTuneConfig

PREDICTIONS, RESULT = "predictions", "result.json"


def predicted(
    engine: Engine,
    batches: Sequence[NumberedBatch],
    *,
    examples: int,
    outputs: int,
    objective: TextTask,
) -> np.ndarray:
    """Logits [N, K] in fp64 of a whole data set, in its order, the same on every rank.

    engine: whose model answers
    batches: this rank's share of the data set
    examples, outputs: N, K
    objective: that asks the model
    """
    answers = engine.predict([made.batch for made in batches], objective.answers)
    logits_NK = torch.zeros(examples, outputs, dtype=torch.float64)
    for made, answer_MK in zip(batches, answers, strict=True):
        logits_NK[torch.from_numpy(made.numbers_M)] = answer_MK.double()
    # every example is on one rank, and zero on the others
    return sum_over_ranks(logits_NK.to(engine.device)).cpu().numpy()


def write_predictions(
    folder: Path, examples: Examples, logits_NK: np.ndarray, *, task: TaskConfig
) -> None:
    """Writes RUN/predictions/NAME.jsonl, a line for each row.

    folder: of the run
    examples: of the data set
    logits_NK: of its rows
    task: whose labels they are
    """
    guesses = predictions(logits_NK, kind=task.KIND)
    lines = [
        json.dumps(
            {
                "row": row,
                **_said(logits_NK[row], guesses[row], task),
                "logits": [float(x) for x in logits_NK[row]],
                "target": _target(examples.value_N[row], task),
            },
            ensure_ascii=False,
        )
        for row in range(len(examples))
    ]
    (folder / PREDICTIONS).mkdir(exist_ok=True)
    write_atomic(folder / PREDICTIONS / f"{examples.name}.jsonl", "\n".join(lines) + "\n")


def write_result(
    folder: Path, task: FineTuneConfig, train: Examples, results: dict[str, Scores]
) -> None:
    """Writes RUN/result.json.

    folder: of the run
    task: its settings
    train: what it was trained on
    results: by the name of a data set
    """
    settings = to_yaml(task).encode()
    write_json(
        folder / RESULT,
        {
            "name": task.name,
            "seed": task.seed,
            "settings_sha256": hashlib.sha256(settings).hexdigest(),
            "examples_sha256": train.sha256(),
            "weights_of": "last epoch",
            "metrics": {name: measured.plain() for name, measured in results.items()},
            "constant_predictions": [name for name, s in results.items() if s.constant],
        },
    )


def _said(logits_K: np.ndarray, guess: Any, task: TaskConfig) -> dict[str, Any]:
    if task.KIND == "regress":
        return {"value": float(logits_K[0])}
    labels = task.labels
    assert labels, "a class has a name"
    if task.KIND == "labels":
        return {"labels": [name for name, is_it in zip(labels, guess, strict=True) if is_it]}
    shifted = np.exp(logits_K - logits_K.max())
    probability = float(shifted[guess] / shifted.sum())
    return {"label": labels[int(guess)], "probability": probability}


def _target(value: Any, task: TaskConfig) -> Any:
    if task.KIND == "regress":
        return float(value[0])
    labels = task.labels
    assert labels, "a class has a name"
    if task.KIND == "labels":
        return [name for name, is_it in zip(labels, value, strict=True) if is_it]
    return labels[int(value)]
