"""A pretrained body with the head of a task: on a text, on tokens, on the spans of a text, or on several choices.

Each family has the head that transformers gives it, so that the weights become a folder of its classes:

    modernbert    place, dense, GELU, norm, dropout, classifier            dense and norm are the pretrained head's
    bert, albert  [CLS], dense, tanh, dropout, classifier                  dense is the pooler's, where there is one
    roberta       [CLS], dropout, dense, tanh, dropout, classifier         new; of choices as BERT's
    distilbert    [CLS], dense, ReLU, dropout, classifier                  new
    electra       [CLS], dropout, dense, GELU, dropout, classifier         new; of choices without the first dropout
    xlnet         <cls> at the end, dense, tanh, dropout, classifier       new; none for spans
    all but modernbert on tokens and spans: token, dropout, classifier

Parameters: model.*, head.dense, head.norm (modernbert), classifier; encoder/models/hf/task.py has transformers' names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from encoder.base.batch import TokenBatch
from encoder.base.errors import ConfigError, ModelError
from encoder.base.tokenizer_json import SpecialIds
from encoder.base.units import with_article
from encoder.models.bert import BertConfig
from encoder.models.contract import ModelConfig
from encoder.models.encoder import PackedBody, PackedSettings, prediction_head
from encoder.models.hf.catalog import CHOICES
from encoder.models.modernbert import ModernBertConfig
from encoder.models.xlnet import XlnetBody, XlnetConfig
from encoder.nn.init import draw_
from encoder.nn.task_heads import DenseHead, HeadDropout, Place, Pooling, pooled

HeadFamily = Literal["modernbert", "bert", "roberta", "distilbert", "albert", "electra", "xlnet"]
# on a vector for each text, on each token, on each token as start or end of a span, on a vector for each choice
HeadKind = Literal["text", "token", "span", "choice"]


@dataclass(frozen=True, kw_only=True)
class HeadLayers:
    """What stands before a classifier, as transformers' class has it."""

    # the pretrained head's dense, GELU and norm; or a dense layer and this; or nothing
    dense: Literal["pretrained", "tanh", "relu", "gelu"] | None = None
    dropout: float = 0.1  # before the classifier, by default
    drops_before_dense: bool = False  # as well
    from_pooler: bool = False  # its dense layer is the pretrained pooler's, where there is one
    at_last: bool = False  # on a text's last token, which is [CLS] there


_MODERN = HeadLayers(dense="pretrained", dropout=0.0)
_POOLED = HeadLayers(dense="tanh", from_pooler=True)
_RELU = HeadLayers(dense="relu", dropout=0.2)
_BARE = HeadLayers()
_LAST = HeadLayers(dense="tanh", at_last=True)
LAYERS: dict[HeadKind, dict[HeadFamily, HeadLayers]] = {
    "text": {
        "modernbert": _MODERN,
        "bert": _POOLED,
        "roberta": HeadLayers(dense="tanh", drops_before_dense=True),
        "distilbert": _RELU,
        "albert": _POOLED,
        "electra": HeadLayers(dense="gelu", drops_before_dense=True),
        "xlnet": _LAST,
    },
    "token": {
        "modernbert": _MODERN,
        "bert": _BARE,
        "roberta": _BARE,
        "distilbert": _BARE,
        "albert": _BARE,
        "electra": _BARE,
        "xlnet": HeadLayers(dropout=0.0),
    },
    "span": {
        "modernbert": _MODERN,
        "bert": HeadLayers(dropout=0.0),
        "roberta": HeadLayers(dropout=0.0),
        "distilbert": _BARE,
        "albert": HeadLayers(dropout=0.0),
        "electra": HeadLayers(dropout=0.0),
    },
    "choice": {
        "modernbert": _MODERN,
        "bert": _POOLED,
        "roberta": _POOLED,
        "distilbert": _RELU,
        "albert": _POOLED,
        "electra": HeadLayers(dense="gelu"),
        "xlnet": _LAST,
    },
}


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """The head of a task on a body."""

    family: HeadFamily
    outputs: int  # logits of a place
    kind: HeadKind = "text"
    pooling: Pooling = "cls"  # on tokens and spans cls, the token itself
    dropout: float = 0.0  # before the classifier; RoBERTa's on a text: before dense, too

    def __post_init__(self) -> None:
        if self.pooling != "cls" and self.family != "modernbert":
            raise ConfigError(
                f"pooling {self.pooling} with {with_article(self.family)}: its classifier stands on"
                " the first token, in transformers as well. Use pooling: cls."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout {self.dropout} of the head; needed: 0 to below 1.")

    @property
    def place_text(self) -> str:
        """Where it stands, for people."""
        return "on each token" if self.kind in ("token", "span") else f"pooling {self.pooling}"


def layers_of(kind: HeadKind, family: HeadFamily) -> HeadLayers:
    """What stands before the classifier. Raises ConfigError where the family has no such head."""
    found = LAYERS[kind].get(family)
    if found is None:
        able = ", ".join(LAYERS[kind])
        raise ConfigError(
            f"{with_article(family)} has no head of kind {kind} here; needed: one of {able}. Name such a model"
            " in start_from, or use another task."
        )
    return found


def head_family(config: ModelConfig, specials: SpecialIds) -> HeadFamily:
    """Whose head a model gets: that of the class of transformers that it becomes. Raises ConfigError where there is none."""
    if not isinstance(config, (BertConfig, ModernBertConfig, XlnetConfig)):
        raise ConfigError(
            "this model has no head for a task; needed: a ModernBERT, BERT, RoBERTa, DistilBERT or"
            " ALBERT. Name another in start_from."
        )
    return cast(HeadFamily, CHOICES[type(config)](config, specials))


class _WithHead(nn.Module):
    """What a body gets beside its layers."""

    def add_head_(self, config: ModelConfig, head: HeadShape) -> None:
        """config: of the body
        head: of the task
        """
        self.head_shape = head
        width = config.hidden_size
        layers = layers_of(head.kind, head.family)
        self.head: nn.Module = nn.Identity()
        if layers.dense == "pretrained":
            self.head = prediction_head(cast(PackedSettings, config))
        elif layers.dense is not None:
            self.head = DenseHead(width=width, activation=layers.dense)
        self.place: Place = "last" if layers.at_last else head.pooling
        into_head = head.dropout if layers.drops_before_dense else 0.0
        self.dropout_in = HeadDropout(width=width, layer=0, p=into_head, place="head")
        self.dropout = HeadDropout(width=width, layer=0, p=head.dropout, place="head_output")
        self.classifier = nn.Linear(width, head.outputs)

    def hidden_states(self, batch: TokenBatch, *, at_M: Tensor | None = None) -> Tensor:
        """x_TC, or x_MC of tokens at_M: the body's."""
        raise NotImplementedError

    def answers(self, batch: TokenBatch, index_M: Tensor) -> Tensor:
        """Logits [M, K] at tokens index_M; where a text is pooled they are the first tokens of documents."""
        x_MC = pooled(self.hidden_states, batch, index_M, self.place)
        # a document's key is its first token's
        key_M = batch.token_key_T.index_select(0, index_M)
        return self.classifier(self.dropout(self.head(self.dropout_in(x_MC, key_M)), key_M))


class TaskModel(PackedBody, _WithHead):
    """Packed tokens -> logits at the places that are asked."""

    def __init__(
        self, config: PackedSettings, head: HeadShape, *, attention: str = "auto", seed: int = 0
    ) -> None:
        """config: of the body
        head: of the task
        attention, seed: as of any model
        """
        super().__init__(config, attention=attention, seed=seed)
        self.add_head_(config, head)
        draw_(self)


class XlnetTaskModel(XlnetBody, _WithHead):
    """The same on XLNet's content stream."""

    def __init__(
        self, config: XlnetConfig, head: HeadShape, *, attention: str = "auto", seed: int = 0
    ) -> None:
        """config: of the body
        head: of the task
        attention, seed: as of any model
        """
        super().__init__(config, attention=attention, seed=seed)
        self.add_head_(config, head)
        draw_(self)


AnyTaskModel = TaskModel | XlnetTaskModel


def build_task_model(
    config: ModelConfig, head: HeadShape, *, attention: str = "auto", seed: int = 0
) -> AnyTaskModel:
    """The model of a task, of a family that has heads.

    config: of the body
    head: of the task
    attention, seed: as of any model
    """
    if isinstance(config, XlnetConfig):
        return XlnetTaskModel(config, head, attention=attention, seed=seed)
    return TaskModel(cast(PackedSettings, config), head, attention=attention, seed=seed)


def first_weights(
    weights: Mapping[str, Tensor], model: AnyTaskModel, *, of_task: bool = False
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Weights of a task's model from those of another one, and the names of those that are drawn.

    weights: by our names
    model: whose parameters are filled; it may be without data
    of_task: they are of a model with a task, whose head is taken over; a classifier of other outputs is not

    Raises ModelError where the body is not whole.
    """
    given = dict(weights) if of_task else _of_pretrained(weights, model.head_shape)
    found: dict[str, Tensor] = {}
    drawn: list[str] = []
    for name, parameter in model.named_parameters():
        if name in given and given[name].shape == parameter.shape:
            found[name] = given[name].to(torch.float32)
            continue
        if name.startswith("model."):
            raise ModelError(
                f"the weights lack {name} {list(parameter.shape)}. Give complete ones."
            )
        found[name] = model.initial_values(name, parameter.shape)
        drawn.append(name)
    return found, tuple(drawn)


def _of_pretrained(weights: Mapping[str, Tensor], head: HeadShape) -> dict[str, Tensor]:
    """What a head takes over of a pretrained model: ModernBERT's that over masked tokens, BERT's the pooler."""
    layers = layers_of(head.kind, head.family)
    if layers.dense == "pretrained":
        # a discriminator's own classifier tells replaced tokens, and no task
        return {name: w for name, w in weights.items() if not name.startswith("classifier.")}
    body = {name: w for name, w in weights.items() if name.startswith("model.")}
    poolers = _POOLER if layers.from_pooler else {}
    return body | {ours: weights[name] for name, ours in poolers.items() if name in weights}


_POOLER = {f"pooler.dense.{kind}": f"head.dense.{kind}" for kind in ("weight", "bias")}
