"""What the house asks of a model and of its settings; a family is one file that has both (encoder/models/modernbert.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import Tensor

from encoder.base.model import TrainedModel
from encoder.base.objective import Stretch
from encoder.base.schema import Settings


class ModelConfig(Settings, Protocol):
    """The settings of a model: a frozen dataclass that checks itself when it is made (ConfigError)."""

    # what a phase may change, with the same weights; each is a number
    PHASE_SETTINGS: ClassVar[tuple[str, ...]]

    # fields, which are properties here because a frozen class cannot set them
    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""

    @property
    def num_hidden_layers(self) -> int:
        """Layers."""

    @property
    def max_position_embeddings(self) -> int:
        """Tokens of the longest document."""

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the decoder is the embedding."""

    @property
    def initializer_range(self) -> float:
        """Sigma of the initial weights."""

    @property
    def head_width(self) -> int | None:
        """Features of one attention head; None: no attention kernel is needed."""

    @property
    def activation_width(self) -> int:
        """Numbers per token that a layer writes in the forward pass: what its time in memory is estimated by.

        Its memory, too, if the model cannot run on tensors without data (encoder/tools/plan/activations.py).
        """

    def attention_bytes(self, stretch: Stretch, *, tokens: int, width: int, device: str) -> int:
        """Bytes that attention takes for a moment beside what is kept; 0: its kernels keep no scores.

        stretch: the longest that attends to itself
        tokens: of a micro-batch
        width: bytes of a number
        device: cpu or cuda
        """

    @property
    def shape_text(self) -> str:
        """Layers, width and vocabulary, in one line."""

    @property
    def phase_texts(self) -> dict[str, str]:
        """What a phase may change, for people: a column of a table and its cell."""

    @property
    def facts(self) -> dict[str, str]:
        """The shape, for people: name and value, as a model card shows them."""

    def parameter_counts(self) -> ParameterCounts:
        """Trained numbers by place, from the shape alone."""

    def train_flops(
        self, *, lengths: Sequence[int] | np.ndarray, targets: Mapping[str, float]
    ) -> float:
        """Model FLOP of documents forward and backward.

        lengths: of the documents, in tokens
        targets: of each loss term
        """

    def growth(self) -> GrowthRules:
        """How a model of this family grows."""

    def without_effect(self, given: Callable[[str], bool], *, longest_tokens: int) -> Iterator[str]:
        """Settings that change nothing beside the others, a sentence each.

        given: whether the run file has a setting of this name
        longest_tokens: of a document, in any phase
        """


class Model(TrainedModel, Protocol):
    """A torch Module from packed tokens to hidden states, under Hugging Face's parameter names."""

    @property
    def config(self) -> ModelConfig:
        """Its settings."""

    def parameter_count(self) -> int:
        """Trained numbers; a tied matrix once."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One entry of the catalog."""

    settings: type[ModelConfig]
    model: Callable[..., Model]  # (settings, *, attention, seed)
    # of a model of several networks: their names, which are properties of its settings, the one used afterwards first
    networks: tuple[str, ...] = ()
    # (weights, settings, name of the network) -> its own weights by its own names
    network_weights: Callable[..., dict[str, Tensor]] | None = None


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Trained numbers by place. `total` counts a tied matrix once."""

    embedding: int  # tokens, learned positions and segments
    matrices: int  # of all layers: Wqkv, Wo, Wi, Wo
    biases: int  # of these
    norms: int  # embedding, layers, final
    head: int  # dense and norm
    decoder: int  # its bias, and its weight where that is not the embedding

    @property
    def total(self) -> int:
        """All of them: 149,655,232 for ModernBERT-base."""
        return self.embedding + self.matrices + self.biases + self.norms + self.head + self.decoder


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis of parameters: `blocks` matrices in one, each of `length`."""

    name: str  # in errors: the setting that decides the length
    length: Callable[[Any], int]
    blocks: Callable[[Any], int] = lambda config: 1


@dataclass(frozen=True, kw_only=True)
class GrowthRules:
    """What may grow, what is free, and along which axes the parameters lie."""

    # the end of a parameter's name -> its axes; of a bias, the first one
    axes: Mapping[str, tuple[Axis, ...]]
    # settings that may be larger in the new model
    grows: tuple[str, ...]
    # settings that may differ with the same weights; all others must be equal
    free: tuple[str, ...]
    # of each layer: weights of one kind mean something else in another
    layer_kinds: tuple[str, ...]
    # sizes that count blocks of features which are never cut -> features of one (of a head)
    uncut: Mapping[str, int] = field(default_factory=dict)
    # settings whose number follows from others where they are not given -> that number
    derived: Mapping[str, int] = field(default_factory=dict)
    # settings that add a head or take it away: a run that starts from a model without it draws it
    heads: tuple[str, ...] = ()
    # how many sets of weights the layers share; 0: each has its own, and layer_kinds says which fit each other
    shared_blocks: int = 0
    # how many layers a model with these sets of weights has; the most where a layer calls many blocks
    fewest_layers: int = 1
    most_layers: int | None = None
    # how the parameters of the norm behind the last layer begin; None: there is none
    final_norm: str | None = None
    # of a model of several networks: how each one's parameters begin -> its rules
    networks: Mapping[str, NetworkRules] = field(default_factory=dict)
    # why a model of this kind does not grow; None: it does
    refused: str | None = None


@dataclass(frozen=True, kw_only=True)
class NetworkRules:
    """One network of several."""

    rules: GrowthRules
    config: Callable[[Any], Any]  # its settings, of those of all
