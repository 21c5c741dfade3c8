"""The head of a task on its body, from a task file whose body and labels are known."""

from __future__ import annotations

from encoder.base.tokenizer_json import SpecialIds
from encoder.finetune.config import FineTuneConfig
from encoder.models.with_task import HeadShape, head_family, layers_of


def head_shape(task: FineTuneConfig, specials: SpecialIds) -> HeadShape:
    """Family, kind, outputs, pooling and dropout. Raises ConfigError."""
    kind = task.task
    family = head_family(task.model, specials)
    usual = layers_of(kind.HEAD, family).dropout
    return HeadShape(
        family=family,
        kind=kind.HEAD,
        outputs=kind.outputs,
        pooling=kind.pooling,
        dropout=usual if task.dropout.head is None else task.dropout.head,
    )
