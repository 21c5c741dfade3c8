"""The kinds of task that a task file can name."""

from __future__ import annotations

from encoder.finetune.kinds.choice import ChoiceConfig
from encoder.finetune.kinds.cloze import ClozeConfig
from encoder.finetune.kinds.contract import TaskConfig
from encoder.finetune.kinds.spans import SpansConfig
from encoder.finetune.kinds.tags import TagsConfig
from encoder.finetune.kinds.texts import ClassifyConfig, LabelsConfig, RegressConfig

TASKS: dict[str, type[TaskConfig]] = {
    "classify": ClassifyConfig,
    "labels": LabelsConfig,
    "regress": RegressConfig,
    "tags": TagsConfig,
    "spans": SpansConfig,
    "choice": ChoiceConfig,
    "cloze": ClozeConfig,
}
