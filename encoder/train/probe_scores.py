"""What frozen embeddings tell about labels: logistic regression and nearest neighbours, layer by layer.

The strength of the regression, the number of neighbours and the layer are chosen on texts held back from training, a tenth of
it; test texts are asked once, with what was chosen. Embeddings are brought to length 1 first.

Of a whole model by `tessera evaluate` (encoder/tools/evaluation), of its last layer during a run (probes.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from encoder.base.errors import ConfigError
from encoder.base.rng import generator
from encoder.data.labelled import label_name, read_rows, texts_of

STRENGTHS = (0.1, 1.0, 10.0)  # C of the logistic regression: larger is weaker regularization
NEIGHBOURS = (5, 20, 50)
HELD_BACK = 0.1  # of the training texts, to choose by
LEAST_TEXTS_PER_LABEL = 5  # training texts a label, at least
MOST_ITERATIONS = 1000  # of the regression; mteb's rule has 100 for few examples


@dataclass(frozen=True, kw_only=True)
class LabelledTexts:
    """Texts, each with the word of its class."""

    texts: list[str]
    labels: list[str]


def read_labelled(path: Path, *, text: str, label: str, most: int | None = None) -> LabelledTexts:
    """Rows of a file in their order; a label is its word. Raises DataError.

    path: .jsonl, .csv, .tsv, .parquet or .arrow
    text, label: the columns
    most: rows that are kept, drawn: a file may be sorted by its labels; None: all
    """
    rows = read_rows(path, [text, label])
    if most is not None and most < len(rows):
        drawn = generator(0, "probe rows").permutation(len(rows))[:most]
        rows = rows.some(sorted(drawn.tolist()))
    texts = list(texts_of(rows, text))
    labels = [label_name(value, rows, row) for row, value in enumerate(rows.columns[label])]
    return LabelledTexts(texts=texts, labels=labels)


@dataclass(frozen=True, kw_only=True)
class LayerScore:
    """Accuracies of one layer's embeddings, 0 to 1."""

    layer: int  # 0: the embeddings
    setting: float  # C, or the number of neighbours
    held_back: float
    test: float


@dataclass(frozen=True, kw_only=True)
class ProbeScores:
    """Of each layer, and the layer that the held-back texts choose."""

    linear: list[LayerScore]
    neighbours: list[LayerScore]
    majority: float  # accuracy of the commonest class of the training texts

    @property
    def best_linear(self) -> LayerScore:
        """By the held-back texts; of equal ones the last layer."""
        return max(self.linear, key=lambda s: (s.held_back, s.layer))

    @property
    def best_neighbours(self) -> LayerScore:
        return max(self.neighbours, key=lambda s: (s.held_back, s.layer))

    def numbers(self) -> dict[str, float]:
        """The short form, for a table."""
        return {
            "probe_accuracy": self.best_linear.test,
            "probe_layer": self.best_linear.layer,
            "probe_last_layer": self.linear[-1].test,
            "neighbours_accuracy": self.best_neighbours.test,
            "majority": self.majority,
        }


def check_labels(train: Sequence[str], test: Sequence[str]) -> None:
    """They can be learned, and asked. Raises ConfigError."""
    classes = sorted({*train})
    if len(classes) < 2:
        raise ConfigError(
            f"the training texts have one label, {classes[0]!r}; needed: at least two."
        )
    if unknown := sorted({*test} - {*classes}):
        raise ConfigError(
            f"label {unknown[0]!r} of the test texts is none of the training texts'"
            f" {', '.join(map(repr, classes[:5]))}. Needed: the same words on both sides."
        )
    if len(train) < LEAST_TEXTS_PER_LABEL * len(classes):
        raise ConfigError(
            f"{len(train):,} training texts for {len(classes):,} labels; needed: at least"
            f" {LEAST_TEXTS_PER_LABEL} texts a label, of which a tenth is held back. Give more."
        )


def check_regression() -> None:
    """scikit-learn is there. Raises ConfigError."""
    _regression()


def probe_layers(
    train: Sequence[Tensor],
    train_labels: Sequence[str],
    test: Sequence[Tensor],
    test_labels: Sequence[str],
    *,
    seed: int = 0,
) -> ProbeScores:
    """Scores of each layer's embeddings.

    train, test: [N, C] of each layer, as layer_features gives them
    train_labels, test_labels: of the texts, which check_labels let pass
    seed: chooses the texts that are held back
    """
    linear, neighbours = [], []
    for number, (train_NC, test_NC) in enumerate(zip(train, test, strict=True)):
        layer = _embedded(train_NC, train_labels, test_NC, test_labels, layer=number, seed=seed)
        linear.append(_linear(layer))
        neighbours.append(_neighbours(layer))
    return ProbeScores(
        linear=linear, neighbours=neighbours, majority=majority(train_labels, test_labels)
    )


def linear_probe(
    train_NC: Tensor,
    train_labels: Sequence[str],
    test_MC: Tensor,
    test_labels: Sequence[str],
    *,
    seed: int,
) -> float:
    """Accuracy of logistic regression on one layer's embeddings: what probe_layers has of it.

    train_NC, test_MC: embeddings
    train_labels, test_labels: of the texts, which check_labels let pass
    seed: chooses the texts that are held back
    """
    return _linear(_embedded(train_NC, train_labels, test_MC, test_labels, layer=0, seed=seed)).test


def majority(train_labels: Sequence[str], test_labels: Sequence[str]) -> float:
    """Accuracy of always saying the commonest class of the training texts; of equally common ones the first by name."""
    classes, counts = np.unique(np.asarray(train_labels), return_counts=True)
    return float((np.asarray(test_labels) == classes[counts.argmax()]).mean())


def held_back(y: np.ndarray, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(held back, fitted): a tenth of each class, at least one text in all, and of no class all.

    y: class numbers [N], at least five texts a class on average
    seed: who is held back
    """
    order = generator(seed, "probe").permutation(len(y))
    # a text is held back where it is among the first tenth of its class in the drawn order
    back = np.zeros(len(y), dtype=bool)
    for number in np.unique(y):
        own = order[y[order] == number]
        back[own[: int(HELD_BACK * len(own))]] = True
    if not back.any():
        largest = np.bincount(y).argmax()
        back[order[y[order] == largest][0]] = True
    return order[back[order]], order[~back[order]]


@dataclass(frozen=True, kw_only=True)
class _Embedded:
    """The texts of both sides as one layer embeds them, of length 1, with their class numbers."""

    layer: int
    x: np.ndarray  # [N, C] of the training texts
    y: np.ndarray  # [N]
    fit_N: np.ndarray  # which of them are learned from,
    dev_N: np.ndarray  # and which are held back to choose by
    x_test: np.ndarray
    y_test: np.ndarray


def _embedded(
    train_NC: Tensor,
    train_labels: Sequence[str],
    test_MC: Tensor,
    test_labels: Sequence[str],
    *,
    layer: int,
    seed: int,
) -> _Embedded:
    classes, train_y = np.unique(np.asarray(train_labels), return_inverse=True)
    dev_N, fit_N = held_back(train_y, seed=seed)
    return _Embedded(
        layer=layer,
        x=_unit(train_NC),
        y=train_y,
        fit_N=fit_N,
        dev_N=dev_N,
        x_test=_unit(test_MC),
        y_test=np.searchsorted(classes, np.asarray(test_labels)),
    )


def _linear(layer: _Embedded) -> LayerScore:
    """Regression with the strength that is best on the held-back texts, fitted again on all texts."""
    x, y, fit_N, dev_N = layer.x, layer.y, layer.fit_N, layer.dev_N
    model = _regression()
    scores = {}
    for strength in STRENGTHS:
        fitted = model(C=strength, max_iter=MOST_ITERATIONS).fit(x[fit_N], y[fit_N])
        scores[strength] = float(fitted.score(x[dev_N], y[dev_N]))
    strength = max(scores, key=lambda s: (scores[s], -s))
    whole = model(C=strength, max_iter=MOST_ITERATIONS).fit(x, y)
    return LayerScore(
        layer=layer.layer,
        setting=strength,
        held_back=scores[strength],
        test=float(whole.score(layer.x_test, layer.y_test)),
    )


def _regression() -> type:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ConfigError(
            "probes need scikit-learn, which is not installed. Install it: pip install"
            " 'scikit-learn>=1.4'."
        ) from error
    return LogisticRegression


def _neighbours(layer: _Embedded) -> LayerScore:
    """Majority of the nearest texts by cosine, their number the best one on the held-back texts."""
    x, y, fit_N, dev_N = layer.x, layer.y, layer.fit_N, layer.dev_N
    sizes = [k for k in NEIGHBOURS if k <= len(fit_N)] or [len(fit_N)]
    near_dev = vote(x[fit_N], y[fit_N], x[dev_N], sizes)
    scores = {k: float((near_dev[k] == y[dev_N]).mean()) for k in sizes}
    size = max(scores, key=lambda k: (scores[k], -k))
    answers = vote(x, y, layer.x_test, [size])[size]
    return LayerScore(
        layer=layer.layer,
        setting=size,
        held_back=scores[size],
        test=float((answers == layer.y_test).mean()),
    )


def vote(
    known: np.ndarray, y: np.ndarray, asked: np.ndarray, sizes: Sequence[int]
) -> dict[int, np.ndarray]:
    """For each number of neighbours the class of each asked text: the commonest among its nearest ones, of equally common ones
    the first.

    known, y: unit vectors [N, C] and their classes
    asked: unit vectors [M, C]
    sizes: numbers of neighbours, at most N
    """
    # stable: of equally near texts the first
    order = np.argsort(-(asked @ known.T), axis=1, kind="stable")[:, : max(sizes)]
    classes = int(y.max()) + 1
    found = {}
    for size in sizes:
        votes = np.zeros((len(asked), classes), dtype=np.int64)
        np.add.at(votes, (np.arange(len(asked))[:, None], y[order[:, :size]]), 1)
        found[size] = votes.argmax(1)
    return found


def _unit(x_NC: Tensor) -> np.ndarray:
    return F.normalize(x_NC.to(torch.float64), dim=-1).numpy()
