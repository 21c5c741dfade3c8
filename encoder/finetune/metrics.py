"""The metrics of predictions, by scikit-learn and scipy: the same numbers as in papers' tables.

Which kind of task has which is said in encoder/finetune/kinds. Where a formula has no value (predictions that are all the same)
the metric is 0, and that is said.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from encoder.base.errors import ConfigError, nearest

# of all others more is better
LOWER_IS_BETTER = ("loss", "mean_squared_error")

# chosen on a dev set and told beside metrics: no measure of a model
NO_ANSWER_THRESHOLD = "no_answer_threshold"
CHOSEN = (NO_ANSWER_THRESHOLD,)
# of classes whose rows are in groups
GROUP_EXACT_MATCH = "group_exact_match"

# (true, guessed, outputs of the task) -> number
Metric = Callable[[np.ndarray, np.ndarray, int], float]
# (module, package) of what measures
SCIKIT = (("sklearn", "scikit-learn"), ("scipy", "scipy"))


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What was measured on one data set."""

    loss: float  # mean over what is counted
    metrics: dict[str, float]
    constant: bool  # all predictions are the same

    @classmethod
    def of(cls, *, loss: float, metrics: Mapping[str, float], constant: bool) -> Scores:
        """As measured; a metric without a value is 0."""
        found = {name: 0.0 if math.isnan(x) else float(x) for name, x in metrics.items()}
        return cls(loss=loss, metrics=found, constant=constant)

    @classmethod
    def without_numbers(cls, metrics: Iterable[str]) -> Scores:
        """Of logits that are no numbers: there is no prediction, which is not the 0 of a formula without a value."""
        return cls(loss=math.nan, metrics=dict.fromkeys(metrics, math.nan), constant=False)

    def plain(self) -> dict[str, float | None]:
        """For a file; null where there is no finite number."""
        numbers = {"loss": self.loss, **self.metrics}
        return {name: x if math.isfinite(x) else None for name, x in numbers.items()}


def chosen(known: Iterable[str], given: Sequence[str] | None) -> tuple[str, ...]:
    """Names of metrics: all of a kind of task, or the given ones. Raises ConfigError for an unknown one."""
    known = [*known]
    for name in given or ():
        if name not in known:
            raise ConfigError(f"task.metrics: {name} is unknown. {nearest(name, known)}")
    return tuple(given or known)


def check_packages(needed: Sequence[tuple[str, str]]) -> None:
    """Raises ConfigError where one is not here.

    needed: (module, package)
    """
    for module, package in needed:
        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"fine-tuning measures by {package}, which is not here. Install the extra: pip"
                " install -e '.[finetune]'"
            )


def cross_entropy(logits_NK: np.ndarray, value_N: np.ndarray) -> float:
    """Mean of -log softmax(logits)[value]."""
    top_N1 = logits_NK.max(axis=1, keepdims=True)
    logsumexp_N = np.log(np.exp(logits_NK - top_N1).sum(axis=1)) + top_N1[:, 0]
    return float((logsumexp_N - logits_NK[np.arange(len(value_N)), value_N]).mean())


def yes_no_loss(logits_NK: np.ndarray, value_NK: np.ndarray) -> float:
    """Mean of binary cross entropy: -log sigmoid(x) = log(1 + exp(-x)); with target 0 that of -x."""
    return float(np.logaddexp(0.0, np.where(value_NK > 0, -logits_NK, logits_NK)).mean())


def pick_loss(logits_PK: np.ndarray, right_PK: np.ndarray, starts_N: np.ndarray) -> float:
    """Mean over groups, and over K picks, of -log softmax(logits of the group)[right].

    logits_PK: of all places
    right_PK: 1 at those that are right
    starts_N: the first place of each group
    """
    counts = np.diff(starts_N, append=len(logits_PK))
    top_NK = np.maximum.reduceat(logits_PK, starts_N)
    shares_PK = np.exp(logits_PK - np.repeat(top_NK, counts, axis=0))
    logsumexp_NK = np.log(np.add.reduceat(shares_PK, starts_N)) + top_NK
    right_NK = np.add.reduceat(logits_PK * right_PK, starts_N)
    return float((logsumexp_NK - right_NK).mean())


def accuracy(true: np.ndarray, guessed: np.ndarray, _outputs: int) -> float:
    """The share that is right; of rows with several labels, those that are right in all."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(true, guessed))


def group_exact_match(true: np.ndarray, guessed: np.ndarray, group_N: np.ndarray) -> float:
    """The share of groups whose rows are all right: EM of MultiRC (Khashabi et al. 2018).

    true, guessed: classes [N]
    group_N: numbers of the groups, from 0
    """
    wrong_G = np.bincount(group_N, weights=true != guessed)
    return float((wrong_G == 0).mean())


def f1(true: np.ndarray, guessed: np.ndarray, outputs: int) -> float:
    """That of the second class of two, by the papers' custom the positive one."""
    return _averaged_f1("macro" if outputs > 2 else "binary")(true, guessed, outputs)


def _averaged_f1(average: str) -> Metric:
    def f1(true: np.ndarray, guessed: np.ndarray, _outputs: int) -> float:
        from sklearn.metrics import f1_score

        # one label, yes or no: scikit-learn takes its column for two classes, and would average both
        one_label = true.ndim == 2 and true.shape[1] == 1
        how = "binary" if one_label else average
        return float(f1_score(true, guessed, average=how, zero_division=0))

    return f1


def matthews(true: np.ndarray, guessed: np.ndarray, _outputs: int) -> float:
    """Matthews' correlation."""
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


def squared_error(true: np.ndarray, guessed: np.ndarray, _outputs: int) -> float:
    """The mean square of the differences."""
    return float(np.square(true - guessed).mean())


micro_f1 = _averaged_f1("micro")
macro_f1 = _averaged_f1("macro")
pearson = _correlation("pearsonr")
spearman = _correlation("spearmanr")
