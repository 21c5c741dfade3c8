"""What an exported model is for, as its card says it: a sentence, tags of the hub, and a snippet that runs as it stands."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from encoder.models.catalog import predicts_tokens
from encoder.models.contract import ModelConfig

FILL_MASK = "fill-mask"  # transformers' pipeline, and the hub's tag


@dataclass(frozen=True, kw_only=True)
class Named:
    """The names in a snippet."""

    shown_as: str  # the folder, or its name on the hub
    mask_token: str  # as the tokenizer spells it
    auto_class: str  # of transformers, that loads it

    @property
    def model_line(self) -> str:
        """The line that a reader changes."""
        return f"model = {json.dumps(self.shown_as)}        # this folder, or its name on the hub"

    @property
    def question(self) -> str:
        """A text with one mask, as a literal."""
        return json.dumps(f"The capital of France is {self.mask_token}.")


@dataclass(frozen=True, kw_only=True)
class Use:
    """What a model is for."""

    kind: str  # behind the family's title: encoder, discriminator
    says: str  # what it was pretrained by, and what it gives
    pipeline_tag: str  # of the hub
    task_tag: str  # what it was pretrained by
    snippet: Callable[[Named], str]  # in Python


def usual_use(config: ModelConfig) -> Use:
    """By what the model's states become."""
    return FILLS_MASKS if predicts_tokens(config) else TELLS_REPLACED


def _fill_mask(named: Named) -> str:
    return f"""from transformers import pipeline

{named.model_line}
for answer in pipeline("{FILL_MASK}", model=model)({named.question}):
    print(answer["token_str"], answer["score"])
"""


def _detection(named: Named) -> str:
    return f"""from transformers import {named.auto_class}, AutoTokenizer

{named.model_line}
tokens = AutoTokenizer.from_pretrained(model)("The capital of France is music.", return_tensors="pt")
logits = {named.auto_class}.from_pretrained(model)(**tokens).logits
print(logits > 0)        # of each token: was it put in?
"""


FILLS_MASKS = Use(
    kind="encoder",
    says=(
        "pretrained by masked language modelling with Tessera. It fills in masked tokens and gives"
        " vectors of tokens and texts; for a task, fine-tune it."
    ),
    pipeline_tag=FILL_MASK,
    task_tag="masked-language-modelling",
    snippet=_fill_mask,
)
TELLS_REPLACED = Use(
    kind="discriminator",
    says=(
        "pretrained by replaced-token detection with Tessera. It tells which tokens of a text were"
        " put in by a generator, and gives vectors of tokens and texts; for a task, fine-tune it."
    ),
    pipeline_tag="feature-extraction",
    task_tag="replaced-token-detection",
    snippet=_detection,
)
