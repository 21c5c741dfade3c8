"""The head of a task on its body, from a task file whose body and labels are known."""

from __future__ import annotations

from encoder.base.tokenizer_json import SpecialIds
from encoder.finetune.config import FineTuneConfig
from encoder.models.with_task import HeadShape, head_family

# before the classifier, as transformers' classes have it
HEAD_DROPOUT = {"modernbert": 0.0, "bert": 0.1, "roberta": 0.1, "distilbert": 0.2}


def head_shape(task: FineTuneConfig, specials: SpecialIds) -> HeadShape:
    """Family, outputs, pooling and dropout. Raises ConfigError."""
    family = head_family(task.model, specials)
    dropout = HEAD_DROPOUT[family] if task.dropout.head is None else task.dropout.head
    return HeadShape(
        family=family, outputs=task.task.outputs, pooling=task.task.pooling, dropout=dropout
    )
