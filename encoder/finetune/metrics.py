"""The metrics of predictions, by scikit-learn and scipy: the same numbers as in papers' tables.

    classify    accuracy; f1 of the second class of two (macro of more); macro_f1; matthews
    labels      micro_f1, macro_f1, exact_match; a label is given from probability 1/2 on
    regress     pearson, spearman, mean_squared_error

Where a formula has no value (predictions that are all the same) the metric is 0, and that is said.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from encoder.base.errors import ConfigError, nearest
from encoder.objectives.text_tasks import TaskKind

# (true, guessed, outputs of the task) -> number
Metric = Callable[[np.ndarray, np.ndarray, int], float]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What was measured on one data set."""

    loss: float  # mean over examples
    metrics: dict[str, float]
    constant: bool  # all predictions are the same

    def plain(self) -> dict[str, float | None]:
        """For a file; null where there is no finite number."""
        numbers = {"loss": self.loss, **self.metrics}
        return {name: x if math.isfinite(x) else None for name, x in numbers.items()}


def metrics_of(kind: TaskKind, chosen: Sequence[str] | None) -> dict[str, Metric]:
    """The metrics of a kind of task by name, or the chosen ones. Raises ConfigError for an unknown one."""
    known = METRICS[kind]
    for name in chosen or ():
        if name not in known:
            raise ConfigError(f"task.metrics: {name} is unknown. {nearest(name, [*known])}")
    return {name: known[name] for name in chosen or known}


def check_packages() -> None:
    """Raises ConfigError where scikit-learn or scipy is not here."""
    for module, package in (("sklearn", "scikit-learn"), ("scipy", "scipy")):
        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"fine-tuning measures by {package}, which is not here. Install the extra: pip"
                " install -e '.[finetune]'"
            )


def scores(
    logits_NK: np.ndarray, value_N: np.ndarray, *, kind: TaskKind, metrics: dict[str, Metric]
) -> Scores:
    """Loss and metrics of the logits of a whole data set.

    logits_NK: fp64, in the data set's order
    value_N: the targets, as Examples has them
    kind: of the task
    metrics: by name
    """
    # without numbers there is no prediction: not the 0 of a formula without a value
    if not np.isfinite(logits_NK).all():
        return Scores(loss=math.nan, metrics=dict.fromkeys(metrics, math.nan), constant=False)
    guesses = predictions(logits_NK, kind=kind)
    found = {name: metric(value_N, guesses, logits_NK.shape[1]) for name, metric in metrics.items()}
    return Scores(
        loss=_loss(logits_NK, value_N, kind),
        metrics={name: 0.0 if math.isnan(value) else float(value) for name, value in found.items()},
        constant=len(guesses) > 1 and bool((guesses == guesses[:1]).all()),
    )


def predictions(logits_NK: np.ndarray, *, kind: TaskKind) -> np.ndarray:
    """Classes [N], labels [N, K] of 0 and 1, or numbers [N, K]."""
    if kind == "classify":
        return logits_NK.argmax(axis=1)
    return (logits_NK > 0).astype(np.int64) if kind == "labels" else logits_NK


def _loss(logits_NK: np.ndarray, value_N: np.ndarray, kind: TaskKind) -> float:
    if kind == "classify":
        top_N1 = logits_NK.max(axis=1, keepdims=True)
        logsumexp_N = np.log(np.exp(logits_NK - top_N1).sum(axis=1)) + top_N1[:, 0]
        return float((logsumexp_N - logits_NK[np.arange(len(value_N)), value_N]).mean())
    if kind == "labels":
        # -log sigmoid(x) = log(1 + exp(-x)); with target 0: that of -x
        return float(np.logaddexp(0.0, np.where(value_N > 0, -logits_NK, logits_NK)).mean())
    return float(np.square(logits_NK - value_N).mean())


def _accuracy(true: np.ndarray, guessed: np.ndarray, _outputs: int) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(true, guessed))


def _f1(true: np.ndarray, guessed: np.ndarray, outputs: int) -> float:
    """That of the second class of two, by the papers' custom the positive one."""
    return _averaged_f1("macro" if outputs > 2 else "binary")(true, guessed, outputs)


def _averaged_f1(average: str) -> Metric:
    def f1(true: np.ndarray, guessed: np.ndarray, _outputs: int) -> float:
        from sklearn.metrics import f1_score

        return float(f1_score(true, guessed, average=average, zero_division=0))

    return f1


def _matthews(true: np.ndarray, guessed: np.ndarray, _outputs: int) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(true, guessed))


def _correlation(name: str) -> Metric:
    def correlation(true: np.ndarray, guessed: np.ndarray, _outputs: int) -> float:
        from scipy import stats

        # without variance there is no correlation, and scipy would warn
        if len(true) < 2 or np.ptp(true) == 0 or np.ptp(guessed) == 0:
            return math.nan
        return float(getattr(stats, name)(true[:, 0], guessed[:, 0]).statistic)

    return correlation


def _squared_error(true: np.ndarray, guessed: np.ndarray, _outputs: int) -> float:
    return float(np.square(true - guessed).mean())


METRICS: dict[TaskKind, dict[str, Metric]] = {
    "classify": {
        "accuracy": _accuracy,
        "f1": _f1,
        "macro_f1": _averaged_f1("macro"),
        "matthews": _matthews,
    },
    "labels": {
        "micro_f1": _averaged_f1("micro"),
        "macro_f1": _averaged_f1("macro"),
        "exact_match": _accuracy,
    },
    "regress": {
        "pearson": _correlation("pearsonr"),
        "spearman": _correlation("spearmanr"),
        "mean_squared_error": _squared_error,
    },
}
