"""Two networks of one body for replaced-token detection: a generator fills masks in, a discriminator finds what it changed.

    generator        the [MASK] sat       ->  the dog sat         a masked-language model, narrower or with fewer layers
    discriminator    the  dog   sat       ->   0   1   0          a body, dense, GELU and one logit a token: what is used afterwards

Any settings of encoder.models.encoder can be the body: `TwoNetworks` adds to them how large the generator is and how both
share the embedding (Clark et al. 2020, section 3.2; He et al. 2021, DeBERTaV3, section 3.2):

    shared        one embedding, its norm too, trained by both losses (ELECTRA)
    difference    the discriminator's tables are the generator's, which it does not train, plus its own that begin at zero
    separate      each has its own

Parameters: generator.*, discriminator.*; a shared embedding is generator.model.embeddings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from encoder.base.batch import TokenBatch
from encoder.base.errors import ConfigError
from encoder.base.rng import address_seed
from encoder.models.contract import GrowthRules, NetworkRules, ParameterCounts
from encoder.models.encoder import ONE, C, PackedBody, PackedEncoder, PackedSettings
from encoder.models.flops import parameter_counts, train_flops
from encoder.nn.dropout import key_of_call
from encoder.nn.heads import PredictionHead, TokenDecoder
from encoder.nn.init import draw_, drawn_later
from encoder.nn.norm import make_norm

Sharing = Literal["shared", "difference", "separate"]
GENERATOR, DISCRIMINATOR = "generator", "discriminator"
NETWORKS = (DISCRIMINATOR, GENERATOR)  # the one that is used afterwards first
RTD = "rtd"  # the objective, and its loss term of all tokens
# the tokens' keys of the discriminator's dropout: its places have the same constants as the generator's
SECOND_NETWORK = 1
TABLES = ("tok_embeddings", "position_embeddings", "token_type_embeddings")
_EMBEDDINGS = "model.embeddings."

S = TypeVar("S")


class DetectionSettings(PackedSettings, Protocol):
    """What a discriminator asks of its settings beside those of a body."""

    @property
    def head_norm(self) -> bool:
        """Whether a norm stands between its dense layer and the logit."""


@dataclass(frozen=True, kw_only=True)
class OwnEmbeddingWidth:
    """The setting of a network whose tables may be narrower or wider than its stream."""

    # width of the tables; another than hidden_size: a dense layer brings it there
    embedding_size: int

    def __post_init__(self: Any) -> None:
        super().__post_init__()  # type: ignore[misc]  # the body's
        if self.embedding_size < 1:
            raise ConfigError(f"embedding_size is {self.embedding_size}; needed: at least 1.")
        if self.predicts_tokens and self.head == "none" and self.embedding_projection:
            raise ConfigError(
                f"head none with embedding_size {self.embedding_size} and hidden_size"
                f" {self.hidden_size}: the decoder is as wide as the embedding. Use head: dense."
            )

    @property
    def embedding_width(self) -> int:
        """Features of a token in the tables, and of what is decoded."""
        return self.embedding_size

    @property
    def embedding_projection(self: PackedSettings) -> bool:
        """Whether a dense layer brings the embedding to the stream's width."""
        return self.embedding_width != self.hidden_size


class DiscriminatorSettings:
    """What is different in the settings of a discriminator from those of its body, which is inherited behind it."""

    # nothing trains it alone
    TRAINED_BY: ClassVar[tuple[str, ...] | None] = ()
    predicts_tokens: ClassVar[bool] = False
    head_norm: ClassVar[bool] = False

    def parameter_counts(self: DetectionSettings) -> ParameterCounts:
        """Trained numbers by place, from the shape alone."""
        # dense C x C, perhaps a norm, and a logit
        width = self.hidden_size
        norm = self.head_norm * width * (1 + self.norm_bias)
        head = width * width + self.head_bias * width + norm + width + 1
        return dataclasses.replace(parameter_counts(self), head=head, decoder=0)

    def train_flops(
        self: DetectionSettings,
        *,
        lengths: Sequence[int] | np.ndarray,
        targets: Mapping[str, float],
    ) -> float:
        """Model FLOP of documents forward and backward.

        lengths: of the documents, in tokens
        targets: of each loss term; those of rtd reach the head
        """
        body = train_flops(self, lengths=lengths, decoded=0.0)
        # dense C x C and a logit, forward and twice backward
        return body + 6.0 * self.hidden_size * (self.hidden_size + 1) * targets.get(RTD, 0.0)

    def growth(self) -> GrowthRules:
        """It grows with what trains it."""
        rules: GrowthRules = super().growth()  # type: ignore[misc]  # of the body behind it
        heads = {"head.dense": (C, C), "head.norm": (C,), "classifier": (ONE, C)}
        return dataclasses.replace(
            rules,
            axes={**rules.axes, **heads},
            heads=(),
            refused="a discriminator does not grow or shrink: no objective trains it alone",
        )


@dataclass(frozen=True, kw_only=True)
class TwoNetworks:
    """The settings of both networks: those of the body, which is inherited behind this, are the discriminator's."""

    # the objective that trains both
    TRAINED_BY: ClassVar[tuple[str, ...] | None] = (RTD,)
    predicts_tokens: ClassVar[bool] = False
    GENERATOR: ClassVar[type[Any]]
    DISCRIMINATOR: ClassVar[type[Any]]

    # heads, width and MLP of the generator, as a share of the discriminator's
    generator_fraction: float = 0.25
    generator_layers: int | None = None  # of the generator; default: as the discriminator
    # shared: one for both (ELECTRA); difference: what the discriminator adds to the generator's (DeBERTa-v3); separate
    embedding_sharing: Sharing = "shared"
    # width of the tables; default: hidden_size
    embedding_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # the body's
        self._check_generator()
        # sizes that follow are checked where they are those of a model
        try:
            [getattr(self, name) for name in NETWORKS]
        except ConfigError as error:
            raise ConfigError(
                f"generator_fraction {self.generator_fraction:g} gives no generator: {error}"
            ) from error

    def _check_generator(self: Any) -> None:
        if not 0 < self.generator_fraction <= 1:
            raise ConfigError(
                f"generator_fraction is {self.generator_fraction}; needed: above 0, and at most 1:"
                " a generator is no wider than its discriminator. ELECTRA has 0.25 and 0.33333."
            )
        layers = self.generator_layers
        if layers is not None and not 1 <= layers <= self.num_hidden_layers:
            raise ConfigError(
                f"generator_layers is {layers}; needed: 1 to num_hidden_layers"
                f" ({self.num_hidden_layers}): a generator is no deeper than its discriminator."
            )
        if self.embedding_size is not None and self.embedding_size < 1:
            raise ConfigError(f"embedding_size is {self.embedding_size}; needed: at least 1.")

    @property
    def generator(self: Any) -> Any:
        """Settings of the generator: a masked-language model."""
        heads = max(1, round(self.generator_fraction * self.num_attention_heads))
        width = heads * self.hidden_size // self.num_attention_heads
        # tables that are not the discriminator's need no other width than the generator's own
        tables = width if self.embedding_sharing == "separate" else self.embedding_width
        return settings_as(
            self.GENERATOR,
            self,
            hidden_size=width,
            num_attention_heads=heads,
            intermediate_size=max(1, round(self.intermediate_size * width / self.hidden_size)),
            num_hidden_layers=self.generator_layers or self.num_hidden_layers,
            embedding_size=tables,
        )

    @property
    def discriminator(self: Any) -> Any:
        """Settings of the discriminator."""
        return settings_as(self.DISCRIMINATOR, self, embedding_size=self.embedding_width)

    @property
    def embedding_width(self: Any) -> int:
        """Features of a token in the discriminator's tables."""
        return self.embedding_size or self.hidden_size

    @property
    def facts(self) -> dict[str, str]:
        """The shape, for people: name and value."""
        body: dict[str, str] = super().facts  # type: ignore[misc]
        generator = self.generator
        return {
            **body,
            "generator": f"{generator.shape_text}, embedding {self.embedding_sharing}",
        }

    @property
    def shape_text(self) -> str:
        """Layers, width and vocabulary, in one line."""
        small = self.generator
        body: str = super().shape_text  # type: ignore[misc]
        return f"{body}, and a generator of {small.num_hidden_layers} of {small.hidden_size}"

    @property
    def activation_width(self) -> int:
        """Numbers per token that a layer of both networks writes in the forward pass."""
        small, large = self.generator, self.discriminator
        # of a generator of other depth the share that falls on one of the discriminator's layers
        share = small.num_hidden_layers / large.num_hidden_layers
        return large.activation_width + round(share * small.activation_width)

    def parameter_counts(self) -> ParameterCounts:
        """Trained numbers by place, from the shape alone; a shared embedding once."""
        generator = self.generator.parameter_counts()
        own = self.discriminator.parameter_counts()
        if self.embedding_sharing == "shared":
            own = dataclasses.replace(
                own, embedding=self._projection_numbers, norms=own.norms - self._embedding_norm
            )
        places = (f.name for f in dataclasses.fields(ParameterCounts))
        return ParameterCounts(**{p: getattr(own, p) + getattr(generator, p) for p in places})

    @property
    def _projection_numbers(self) -> int:
        large = self.discriminator
        projects = large.embedding_projection
        return projects * large.hidden_size * (large.embedding_width + 1)

    @property
    def _embedding_norm(self) -> int:
        large = self.discriminator
        return large.embedding_norm * large.embedding_width * (1 + large.norm_bias)

    def train_flops(
        self, *, lengths: Sequence[int] | np.ndarray, targets: Mapping[str, float]
    ) -> float:
        """Model FLOP of documents through both networks, forward and backward.

        lengths: of the documents, in tokens
        targets: of each loss term
        """
        each = (
            getattr(self, name).train_flops(lengths=lengths, targets=targets) for name in NETWORKS
        )
        return sum(each)

    def growth(self) -> GrowthRules:
        """It does not grow; the axes are those of both networks."""
        rules: GrowthRules = super().growth()  # type: ignore[misc]
        return dataclasses.replace(
            rules,
            grows=(),
            networks={
                name: NetworkRules(rules=getattr(self, name).growth(), config=attrgetter(name))
                for name in NETWORKS
            },
            refused=(
                "a model of two networks does not grow or shrink: which generator another"
                " discriminator needs is not known"
            ),
        )

    def without_effect(self, given: Any, *, longest_tokens: int) -> Iterator[str]:
        """Settings that change nothing beside the others, a sentence each.

        given: whether the run file has a setting of this name
        longest_tokens: of a document, in any phase
        """
        yield from super().without_effect(given, longest_tokens=longest_tokens)  # type: ignore[misc]
        if self.generator_fraction > 0.5 and self.generator_layers is None:
            yield (
                f"model.generator_fraction {self.generator_fraction:g}: a generator of more than"
                " half of its discriminator hurt ELECTRA (arXiv 2003.10555, figure 3)."
            )


def settings_as(kind: type[S], config: Any, **changes: object) -> S:
    """Settings of another class with the values of these where both have the field.

    kind: the class
    config: a settings object
    changes: values in place of its own
    """
    names = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    kept = {name: getattr(config, name) for name in names if name not in changes}
    return kind(**kept, **changes)


class Discriminator(PackedBody):
    """Packed tokens -> hidden states -> of each token a logit: above 0, it is not the text's own."""

    def __init__(
        self,
        config: DetectionSettings,
        *,
        attention: str = "auto",
        seed: int = 0,
        embedding_sharing: Sharing = "separate",
    ) -> None:
        """config: the shape
        attention, seed: as of any model
        embedding_sharing: shared: without tables; difference: with tables that begin at zero
        """
        embeds = embedding_sharing != "shared"
        super().__init__(config, attention=attention, seed=seed, embeds=embeds)
        with drawn_later():
            self.head = _detection_head(config)
            self.classifier = nn.Linear(config.hidden_size, 1)
        self._tables_at_zero = embedding_sharing == "difference"
        draw_(self)

    def decode(self, x_MC: Tensor) -> Tensor:
        """Hidden states [M, C] -> logits [M, 1]."""
        return self.classifier(self.head(x_MC))

    def initial_values(self, name: str, shape: Sequence[int]) -> Tensor:
        """What a parameter starts with, whole."""
        if self._tables_at_zero and name.split(".")[-2] in TABLES:
            return torch.zeros(tuple(shape), device="cpu")
        return super().initial_values(name, shape)


def _detection_head(config: DetectionSettings) -> PredictionHead:
    """Dense, GELU and, where the body's own head has one, a norm."""
    width = config.hidden_size
    norm: nn.Module = nn.Identity()
    if config.head_norm:
        norm = make_norm(config.norm, width, eps=config.norm_eps, bias=config.norm_bias)
    return PredictionHead(
        width=width,
        out_width=width,
        bias=config.head_bias,
        norm=norm,
        activation="gelu_tanh" if config.mlp == "gelu_tanh" else "gelu",
    )


class ReplacedTokenModel(nn.Module):
    """Both networks, with one embedding or two. What asks for states gets the discriminator's."""

    def __init__(self, config: Any, *, attention: str = "auto", seed: int = 0) -> None:
        """config: settings with TwoNetworks
        attention, seed: as of any model
        """
        super().__init__()
        self.config = config
        # two networks of one shape must not begin with the same weights
        self.generator = PackedEncoder(
            config.generator, attention=attention, seed=address_seed(seed, GENERATOR)
        )
        self.discriminator = Discriminator(
            config.discriminator,
            attention=attention,
            seed=address_seed(seed, DISCRIMINATOR),
            embedding_sharing=config.embedding_sharing,
        )
        self.phase_settings = dict(self.discriminator.phase_settings)

    def forward(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """States of both, of the same ids; under an engine this is replaced by the objective's loss."""
        return self.generator_states(batch), self.hidden_states(batch)

    def generator_states(self, batch: TokenBatch, *, at_M: Tensor | None = None) -> Tensor:
        """x_TC of the generator, after its last norm; or x_MC of tokens at_M alone."""
        return self.generator.hidden_states(batch, at_M=at_M)

    def generator_decoder(self, x_MC: Tensor) -> TokenDecoder:
        """States [M, C] of the generator -> its head's output, and the decoder's weight and bias."""
        return self.generator.token_decoder(x_MC)

    def hidden_states(self, batch: TokenBatch, *, at_M: Tensor | None = None) -> Tensor:
        """x_TC of the discriminator, after its last norm; or x_MC of tokens at_M alone."""
        keys_T = key_of_call(batch.token_key_T, SECOND_NETWORK)
        own = dataclasses.replace(batch, token_key_T=keys_T)
        return self.discriminator.hidden_states(own, embed=self._embed(), at_M=at_M)

    def replaced_logits(self, x_MC: Tensor) -> Tensor:
        """States [M, C] of the discriminator -> logits [M]: above 0, a token is not the text's own."""
        return self.discriminator.decode(x_MC)[:, 0]

    def _embed(self) -> Any:
        """The discriminator's embedding."""
        generators = self.generator.model.embeddings
        if self.config.embedding_sharing == "shared":
            return generators
        if self.config.embedding_sharing == "separate":
            return None
        own = self.discriminator.model.embeddings
        assert own is not None and generators is not None, "both have tables"

        def added(ids_T: Tensor, positions_T: Tensor, segments_T: Any, key_T: Tensor) -> Tensor:
            # its loss does not reach the generator's tables
            with torch.no_grad():
                beside_TC = generators.rows(ids_T, positions_T, segments_T)
            return own(ids_T, positions_T, segments_T, key_T, beside_TC=beside_TC)

        return added

    def initial_values(self, name: str, shape: Sequence[int]) -> Tensor:
        """What a parameter starts with, whole: for an engine that builds the model in parts (ZeRO stage 3)."""
        network, _, own = name.partition(".")
        return self._networks[network].initial_values(own, shape)

    def hidden_matrices(self) -> dict[str, int]:
        """The matrices of the layers of both, by parameter: how many stand in it, one above another."""
        return {
            f"{network}.{name}": several
            for network, body in self._networks.items()
            for name, several in body.hidden_matrices().items()
        }

    def set_phase_(self, settings: Mapping[str, float]) -> None:
        """Sets what a phase may change, in both."""
        for body in self._networks.values():
            body.set_phase_(settings)
        self.phase_settings = dict(self.discriminator.phase_settings)

    def compile_blocks_(self) -> None:
        """From now on the layers run compiled."""
        for body in self._networks.values():
            body.compile_blocks_()

    def recompute_blocks_(self) -> None:
        """From now on a layer keeps its input alone for the backward, which computes the rest again."""
        for body in self._networks.values():
            body.recompute_blocks_()

    def fp8_blocks_(self) -> None:
        """From now on the blocks' linear layers compute in FP8. Raises ConfigError for odd shapes."""
        for body in self._networks.values():
            body.fp8_blocks_()

    def parameter_count(self) -> int:
        """Trained numbers; a shared embedding counts once."""
        return sum(p.numel() for p in self.parameters())

    def attention_reason(self, device: torch.device | None = None) -> str:
        """Which backend runs in training, and why; heads of both are equally wide."""
        return self.discriminator.attention_reason(device)

    @property
    def _networks(self) -> dict[str, PackedBody]:
        return {GENERATOR: self.generator, DISCRIMINATOR: self.discriminator}


def weights_of_network(
    weights: Mapping[str, Tensor], config: Any, network: str
) -> dict[str, Tensor]:
    """One network's weights by its own names, of both networks'; values are taken or, of tables, added.

    weights: as ReplacedTokenModel.state_dict() names them
    config: settings with TwoNetworks
    network: generator or discriminator
    """
    found = _below(weights, f"{network}.")
    if network == GENERATOR or config.embedding_sharing == "separate":
        return found
    generators = _below(weights, f"{GENERATOR}.")
    tables = {name: w for name, w in generators.items() if name.startswith(_EMBEDDINGS)}
    if config.embedding_sharing == "shared":
        return {**tables, **found}
    # what the discriminator reads: the generator's rows, and its own difference to them
    for name in tables:
        if name.split(".")[-2] in TABLES:
            found[name] = tables[name] + found[name]
    return found


def _below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
