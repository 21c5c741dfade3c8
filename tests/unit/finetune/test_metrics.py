"""Metrics are those of the formulas; predictions that are all the same count as nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from encoder.base.errors import ConfigError
from encoder.data.examples import Examples
from encoder.finetune.kinds.texts import ClassifyConfig, LabelsConfig, RegressConfig, TextSet

COLUMNS = {"texts": ("text",), "label": "label"}
CLASSIFY, LABELS, REGRESS = (
    kind(**COLUMNS) for kind in (ClassifyConfig, LabelsConfig, RegressConfig)
)


def scores(kind, logits: np.ndarray, true: np.ndarray):
    """Of a data set whose targets these are."""
    nothing = np.zeros(0)
    examples = Examples(name="dev", ids_A=nothing, starts_N1=nothing, value_P=true)
    return TextSet(examples=examples, kind=kind).scores(logits, kind.metric_names())


def test_classes_are_counted_as_the_formulas_say():
    # TP 2, FP 1, FN 1, TN 3
    true = np.array([1, 1, 1, 0, 0, 0, 0])
    guessed = np.array([1, 1, 0, 1, 0, 0, 0])
    logits = np.stack([1.0 - guessed, guessed * 1.0], axis=1)
    found = scores(CLASSIFY, logits, true)
    assert found.metrics["accuracy"] == 5 / 7
    assert found.metrics["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found.metrics["matthews"] == pytest.approx((2 * 3 - 1 * 1) / math.sqrt(3 * 3 * 4 * 4))
    expected = F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(true))
    assert found.loss == pytest.approx(expected.item()) and not found.constant


def test_a_model_that_says_one_class_has_no_matthews_and_that_is_said():
    kind = ClassifyConfig(**COLUMNS, metrics=("matthews",))
    found = scores(kind, np.tile([0.0, 1.0], (4, 1)), np.array([0, 1, 1, 0]))
    assert found.constant and found.metrics == {"matthews": 0.0}


def test_f1_of_three_classes_is_their_mean_also_where_one_does_not_occur():
    true, guessed = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    found = scores(CLASSIFY, np.eye(3)[guessed], true)
    assert found.metrics["f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)


def test_several_labels_have_the_loss_of_torch():
    draw = np.random.default_rng(1)
    logits, true = draw.normal(size=(6, 3)), (draw.random((6, 3)) > 0.5).astype(np.float32)
    found = scores(LABELS, logits, true)
    expected = F.binary_cross_entropy_with_logits(torch.from_numpy(logits), torch.from_numpy(true))
    assert found.loss == pytest.approx(expected.item())
    rows = ((logits > 0) == (true > 0)).all(axis=1)
    assert found.metrics["exact_match"] == pytest.approx(rows.mean())


def test_of_one_label_both_f1_are_its_own():
    # TP 1, FP 1, FN 0, TN 2
    true = np.array([[1], [0], [0], [0]], dtype=np.float32)
    logits = np.array([[1.0], [1.0], [-1.0], [-1.0]])
    found = scores(LABELS, logits, true).metrics
    assert found["micro_f1"] == found["macro_f1"] == pytest.approx(2 * 1 / (2 * 1 + 1))
    assert found["exact_match"] == 3 / 4
    none = scores(LABELS, -np.ones((4, 1)), np.zeros((4, 1), dtype=np.float32))
    assert none.metrics["micro_f1"] == none.metrics["macro_f1"] == 0.0


def test_correlations_are_those_of_numpy_and_zero_without_variance():
    draw = np.random.default_rng(1)
    true = draw.normal(size=(20, 1)).astype(np.float32)
    guessed = true + draw.normal(size=(20, 1))
    found = scores(REGRESS, guessed, true).metrics
    assert found["pearson"] == pytest.approx(np.corrcoef(true[:, 0], guessed[:, 0])[0, 1])
    ranks = [np.argsort(np.argsort(x[:, 0])) for x in (true, guessed)]
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    same = scores(REGRESS, np.ones((20, 1)), true)
    assert same.constant and same.metrics["pearson"] == same.metrics["spearman"] == 0.0


@pytest.mark.parametrize("kind", [CLASSIFY, REGRESS], ids=["classify", "regress"])
def test_logits_that_are_no_numbers_have_no_score_and_null_in_a_file(kind):
    logits = np.array([[math.nan, 1.0], [0.0, 1.0]])[:, : 2 if kind is CLASSIFY else 1]
    true = np.array([0, 1]) if kind is CLASSIFY else np.array([[0.5], [1.0]], dtype=np.float32)
    found = scores(kind, logits, true)
    assert math.isnan(found.loss) and all(math.isnan(x) for x in found.metrics.values())
    assert {*found.plain().values()} == {None}


def test_an_unknown_metric_names_the_nearest():
    with pytest.raises(
        ConfigError, match="task.metrics: acuracy is unknown. Did you mean accuracy"
    ):
        ClassifyConfig(**COLUMNS, metrics=("acuracy",)).metric_names()
