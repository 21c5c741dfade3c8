"""XLNet: relative places in every layer, and a query stream that predicts a token without having seen it (Yang et al. 2019).

Its attention is its own (encoder/nn/two_streams.py). Which tokens see which is the objective's: encoder/objectives/plm.py.
Without a query stream it is an encoder with relative places that any objective of hidden states trains, such as `mlm`: the
paper's "DAE + Transformer-XL" (table 6).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder.base.batch import Targets, TokenBatch
from encoder.base.errors import ConfigError
from encoder.base.objective import Stretch
from encoder.base.units import counted
from encoder.models.contract import Axis, GrowthRules, ParameterCounts
from encoder.models.encoder import MOST
from encoder.models.flops import attended_pairs
from encoder.nn.attend import check_backend_name
from encoder.nn.dropout import AddressedDropout
from encoder.nn.embedding import TokenEmbedding
from encoder.nn.heads import Decoder, TokenDecoder
from encoder.nn.init import Initialization, draw_, drawn_later, initial_values
from encoder.nn.mlp import FeedForward, Gelu
from encoder.nn.norm import LayerNorm
from encoder.nn.recompute import recomputed
from encoder.nn.two_streams import (
    QueryRows,
    ReadingOrder,
    TwoStreamAttention,
    TwoStreamPlan,
    plain_order,
    plan_two_streams,
    score_bytes,
)

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
DROPOUTS = (
    "embedding_dropout",
    "attention_output_dropout",
    "mlp_inner_dropout",
    "mlp_output_dropout",
    "last_dropout",
    "attention_probability_dropout",
)
# odd, so that a query row's key is a token's by a bijection
_OF_QUERIES = 0x5851F42D4C957F2D


@dataclass(frozen=True, kw_only=True)
class XlnetConfig:
    """The shape of an XLNet; the defaults are XLNet-base's (Yang et al. 2019)."""

    PHASE_SETTINGS: ClassVar[tuple[str, ...]] = ()  # distances are no weights: a phase changes none
    # [MASK], [CLS] and pairs: segments are compared, and have no table
    type_vocab_size: ClassVar[int] = 3
    initialization: ClassVar[Initialization] = "normal"
    tie_word_embeddings: ClassVar[bool] = True

    vocab_size: int = 32000  # rows of the embedding; default: the shards' vocabulary in whole 64s
    hidden_size: int = 768  # width of the residual stream
    intermediate_size: int = 3072  # width inside the feed-forward layer
    num_hidden_layers: int = 12  # blocks of attention and feed-forward
    num_attention_heads: int = 12  # of every layer, hidden_size over them wide
    # gelu_tanh: as its own code computes it; gelu: by erf, as config.json of the released says
    mlp: Gelu = "gelu_tanh"
    norm_eps: float = 1e-12  # added to the variance
    # the query stream's first state; default: true where the objective is plm
    query_stream: bool = False
    max_position_embeddings: int = 512  # the longest document; no table is as long
    embedding_dropout: float = 0.1  # of the embedding
    attention_output_dropout: float = 0.1  # after attention's Wo
    mlp_inner_dropout: float = 0.1  # between the MLP's matrices, after GELU
    mlp_output_dropout: float = 0.1  # after the MLP's Wo
    last_dropout: float = 0.1  # of the last layer's output
    # of the published recipe, of sinusoids and probabilities: not applied; an export's config.json says it
    attention_probability_dropout: float = 0.1
    initializer_range: float = 0.02  # sigma of all matrices and vectors but norms, not cut

    def __post_init__(self) -> None:
        for name in SIZES:
            if not 1 <= getattr(self, name) <= MOST[name]:
                raise ConfigError(
                    f"{name} is {getattr(self, name):,}; needed: 1 to {MOST[name]:,}."
                )
        for name in ("norm_eps", "initializer_range"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}; needed: more than 0, and finite."
                )
        for name in DROPOUTS:
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"{name} is {getattr(self, name)}; needed: 0 to below 1.")
        heads = self.num_attention_heads
        # sinusoids come in pairs
        if self.hidden_size % heads or self.hidden_size % 2:
            width = math.lcm(heads, 2)
            down = max(width, self.hidden_size // width * width)
            raise ConfigError(
                f"hidden_size {self.hidden_size} over {heads} heads gives a head width of"
                f" {self.hidden_size / heads:g}; needed: a whole number, and an even hidden_size."
                f" Nearest hidden_size: {down} or {down + width}."
            )

    @property
    def head_width(self) -> None:
        """No kernel for packed documents is needed: the attention is its own."""
        return None

    @property
    def activation_width(self) -> int:
        """Numbers per token and layer that are kept: 12 of the stream's width and 4 of the MLP's, a sixth more of query rows."""
        return 14 * self.hidden_size + 5 * self.intermediate_size

    def attention_bytes(self, stretch: Stretch, *, tokens: int, width: int, device: str) -> int:
        """Scores of a block while its backward pass runs, and the masks of all blocks."""
        return score_bytes(
            stretch, tokens=tokens, heads=self.num_attention_heads, width=width, device=device
        )

    @property
    def shape_text(self) -> str:
        """Layers, width and vocabulary, in one line."""
        return (
            f"{counted(self.num_hidden_layers, 'layer')} of {self.hidden_size},"
            f" {counted(self.num_attention_heads, 'head')}, vocabulary {self.vocab_size:,}"
        )

    @property
    def facts(self) -> dict[str, str]:
        """The shape, for people: name and value, as a model card shows them."""
        return {
            "layers": f"{self.num_hidden_layers}, norms post",
            "width, heads": f"{self.hidden_size}, {self.num_attention_heads}",
            "positions": "relative sinusoids",
            "vocabulary": f"{self.vocab_size:,}",
        }

    @property
    def phase_texts(self) -> dict[str, str]:
        """What a phase may change, for people: nothing."""
        return {}

    def parameter_counts(self) -> ParameterCounts:
        """Trained numbers by place, from the shape alone."""
        width, inner = self.hidden_size, self.intermediate_size
        layers = self.num_hidden_layers
        return ParameterCounts(
            embedding=self.vocab_size * width + self.query_stream * width,
            # q, k, v, r and o; the MLP's two
            matrices=layers * (5 * width * width + 2 * width * inner),
            # r_w, r_r, r_s and two segments; those of the MLP
            biases=layers * (5 * width + inner + width),
            norms=layers * 2 * 2 * width,
            head=0,
            decoder=self.vocab_size,
        )

    def train_flops(
        self,
        *,
        lengths: Sequence[int] | np.ndarray,
        targets: Mapping[str, float],
        pairs: float | None = None,
        remembered: float = 0.0,
    ) -> float:
        """Model FLOP of documents forward and backward. Keys of distances, a few hundred rows a micro-batch, are not counted.

        lengths: of the documents, in tokens
        targets: of each loss term; those of `plm` have a query row each
        pairs: of a content row and a key that it is scored with; None: those of whole documents
        remembered: tokens that a layer makes keys and values of once more
        """
        tokens = float(np.sum(lengths, dtype=np.int64))
        if pairs is None:
            pairs = float(attended_pairs(lengths, None))
        queries = targets.get("plm", 0.0)
        decoded = queries + targets.get("mlm", 0.0)
        width, inner = self.hidden_size, self.intermediate_size

        # two for each multiply-add: Wq, Wkv, Wo and the MLP; a query row has no key and value
        feed_forward = 2 * width * inner
        layer = 2.0 * tokens * (4 * width * width + feed_forward)
        layer += 2.0 * queries * (2 * width * width + feed_forward)
        layer += 2.0 * remembered * 2 * width * width
        # content, distance and value, of content and of query rows
        layer += 6.0 * width * pairs * (1.0 + queries / max(tokens, 1.0))
        return 3.0 * (self.num_hidden_layers * layer + 2.0 * width * self.vocab_size * decoded)

    def growth(self) -> GrowthRules:
        """How a larger model takes over this one's weights: in depth and inside the MLP. Widths decide what sinusoids are."""
        return GrowthRules(
            axes=AXES,
            grows=("intermediate_size", "num_hidden_layers"),
            free=(*DROPOUTS, "norm_eps", "initializer_range", "max_position_embeddings"),
            heads=("query_stream",),
            layer_kinds=("global",) * self.num_hidden_layers,
        )

    def without_effect(self, given: Callable[[str], bool], *, longest_tokens: int) -> Iterator[str]:
        """Settings that change nothing beside the others, a sentence each.

        given: whether the run file has a setting of this name
        longest_tokens: of a document, in any phase
        """
        if self.attention_probability_dropout:
            yield (
                f"model.attention_probability_dropout {self.attention_probability_dropout:g} is not"
                " applied, neither to probabilities nor to sinusoids. An export's config.json says"
                " it, for fine-tuning."
            )


_C = Axis(name="hidden_size", length=lambda c: c.hidden_size)
_V = Axis(name="vocab_size", length=lambda c: c.vocab_size)
_KV = Axis(name="hidden_size", length=lambda c: c.hidden_size, blocks=lambda c: 2)
_H = Axis(name="num_attention_heads", length=lambda c: c.num_attention_heads)
_D = Axis(name="head width", length=lambda c: c.hidden_size // c.num_attention_heads)
_F = Axis(name="intermediate_size", length=lambda c: c.intermediate_size)
_ONE = Axis(name="one", length=lambda c: 1)
_TWO = Axis(name="segments", length=lambda c: 2)
# the end of a parameter's name -> its axes; of a bias, the first one
AXES: dict[str, tuple[Axis, ...]] = {
    "tok_embeddings": (_V, _C),
    "first_query": (_ONE, _C),
    "norm": (_C,),
    "attn.Wq": (_C, _C),
    "attn.Wkv": (_KV, _C),
    "attn.Wr": (_C, _C),
    "attn.Wo": (_C, _C),
    "attn.r_w": (_H, _D),
    "attn.r_r": (_H, _D),
    "attn.r_s": (_H, _D),
    "attn.segments": (_TWO, _C),
    "mlp.Wi": (_F, _C),
    "mlp.Wo": (_C, _F),
    "decoder": (_V,),
}


class XlnetBody(nn.Module):
    """Packed tokens -> hidden states: what a model has before any head. Who inherits it adds its heads and draws."""

    def __init__(self, config: XlnetConfig, *, attention: str = "auto", seed: int = 0) -> None:
        super().__init__()
        check_backend_name(attention)
        self.config = config
        self.seed = seed
        with drawn_later():
            self.model = _Layers(config)
        self.phase_settings: dict[str, float] = {}

    def forward(self, batch: TokenBatch) -> Tensor:
        """x_TC; under an engine this is replaced by the objective's loss."""
        return self.hidden_states(batch)

    def hidden_states(self, batch: TokenBatch, *, at_M: Tensor | None = None) -> Tensor:
        """x_TC of the content stream, every token of which sees its whole document; or x_MC of tokens at_M."""
        x_TC = self.model(batch, plain_order(batch.positions_T, batch.segments_T))
        return x_TC if at_M is None else x_TC.index_select(0, at_M)

    def initial_values(self, name: str, shape: Sequence[int]) -> Tensor:
        """What a parameter starts with, whole: for an engine that builds the model in parts (ZeRO stage 3)."""
        return initial_values(
            name,
            shape,
            seed=self.seed,
            initializer_range=self.config.initializer_range,
            cutoff_factor=1.0,
            layers=self.config.num_hidden_layers,
            rule=self.config.initialization,
        )

    def hidden_matrices(self) -> dict[str, int]:
        """The matrices of the layers, by parameter: how many stand in it, one above another (key and value in Wkv)."""
        found = {}
        for name, _ in self.model.layers.named_parameters():
            *_, matrix, kind = name.split(".")
            if kind == "weight" and matrix.startswith("W"):
                found[f"model.layers.{name}"] = 1 + (matrix == "Wkv")
        return found

    def set_phase_(self, settings: Mapping[str, float]) -> None:
        """A phase changes nothing."""
        self.phase_settings = {name: float(value) for name, value in settings.items()}

    def compile_blocks_(self, *, backend: str = "inductor") -> None:
        """The layers stay as they are: their blocks have other shapes in each micro-batch."""

    def recompute_blocks_(self) -> None:
        """From now on a layer keeps its input alone for the backward, which computes the rest again."""
        self.model.recomputes = True

    def fp8_blocks_(self) -> None:
        """Raises ConfigError: an FP8 layer was never tried here."""
        raise ConfigError("XLNet has no FP8 layers. Leave engine.fp8 out, or use fp8: off.")

    def parameter_count(self) -> int:
        """Trained numbers; a tied matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    def attention_reason(self, device: torch.device | None = None) -> str:
        """Which attention runs, and why: a line for the run's header."""
        return (
            "XLNet's own, dense blocks: no kernel for packed documents has distances in its scores"
        )

    @property
    def _embedding_weight(self) -> Tensor:
        return self.model.embeddings.tok_embeddings.weight


class Xlnet(XlnetBody):
    """The body, with the decoder that pretraining asks for."""

    def __init__(self, config: XlnetConfig, *, attention: str = "auto", seed: int = 0) -> None:
        super().__init__(config, attention=attention, seed=seed)
        if config.query_stream:
            self.first_query = _FirstQuery(config.hidden_size)
        self.decoder = Decoder(
            vocab_size=config.vocab_size, width=config.hidden_size, bias=True, tied=True
        )
        draw_(self)

    def predicted_states(self, batch: TokenBatch, targets: Targets, order: ReadingOrder) -> Tensor:
        """x_MC of the query stream, which knows a target's place and not the target.

        batch: the micro-batch
        targets: where the query stream stands
        order: who sees whom
        """
        queries = QueryRows(index_M=targets.index_M, real_M=targets.value_M >= 0)
        return self.model(batch, order, queries, self.first_query(len(targets.index_M)))

    def masked_states(self, batch: TokenBatch, index_M: Tensor) -> Tensor:
        """x_MC of the query stream at tokens that nobody sees, whatever ids stand there: what decodes to their answers.

        Without a query stream those of the content stream, which was trained on masks.
        """
        if not self.config.query_stream:
            return self.hidden_states(batch, at_M=index_M)
        targets = Targets(index_M=index_M, value_M=batch.ids_T[index_M], count=len(index_M))
        order = plain_order(batch.positions_T, batch.segments_T)
        # rank 1 is seen by none whose own is 1, and all are
        unseen_T = order.key_rank_T.index_fill(0, index_M, 1)
        return self.predicted_states(batch, targets, replace(order, key_rank_T=unseen_T))

    def logits(self, batch: TokenBatch) -> Tensor:
        """[T, V] of the content stream: for proofs."""
        return self.decode(self.hidden_states(batch))

    def decode(self, x_MC: Tensor) -> Tensor:
        """Hidden states [M, C] -> logits [M, V]."""
        return F.linear(*self.token_decoder(x_MC))

    def token_decoder(self, x_MC: Tensor) -> TokenDecoder:
        """Hidden states [M, C], the decoder's weight and bias: logits not yet computed. There is no head between them."""
        return TokenDecoder(x_MC, self._embedding_weight, self.decoder.bias)


class _Layers(nn.Module):
    """Embedding and layers."""

    def __init__(self, config: XlnetConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.embeddings = TokenEmbedding(
            vocab_size=config.vocab_size, width=width, norm=nn.Identity()
        )
        self.embedding_dropout = AddressedDropout(
            width=width, layer=0, p=config.embedding_dropout, place="embedding"
        )
        self.layers = nn.ModuleList(
            XlnetLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.last_dropout = AddressedDropout(
            width=width, layer=0, p=config.last_dropout, place="last"
        )
        self.recomputes = False

    def forward(
        self,
        batch: TokenBatch,
        order: ReadingOrder,
        queries: QueryRows | None = None,
        query_MC: Tensor | None = None,
    ) -> Tensor:
        """[T, C] of the content stream; with queries [M, C] of the query stream.

        batch: the micro-batch
        order: who sees whom
        queries: where the query stream stands
        query_MC: its first states
        """
        x_RC = self.embeddings(batch.ids_T, batch.positions_T)
        key_R = batch.token_key_T
        if queries is not None and query_MC is not None:
            x_RC = torch.cat((x_RC, query_MC.to(x_RC.dtype)))
            key_M = batch.token_key_T.index_select(0, queries.index_M) * _OF_QUERIES
            key_R = torch.cat((key_R, key_M))
        x_RC = self.embedding_dropout.alone(x_RC, key_R)

        plan = plan_two_streams(
            batch.cu_seqlens_S1, order, queries, heads=self.config.num_attention_heads
        )
        waves_PC = plan.waves(self.config.hidden_size, like=x_RC)
        # without gradients there is no backward to compute anything again for
        run = nn.Module.__call__
        if self.recomputes and torch.is_grad_enabled():
            run = recomputed
        for layer in self.layers:
            x_RC = run(layer, x_RC, plan=plan, waves_PC=waves_PC, dropout_key_R=key_R)
        first = plan.tokens if queries is not None else 0
        return self.last_dropout.alone(x_RC[first:], key_R[first:])


class _FirstQuery(nn.Module):
    """What the query stream begins with at every target."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, width))

    def forward(self, rows: int) -> Tensor:
        """[M, C]."""
        return self.weight.expand(rows, -1)


class XlnetLayer(nn.Module):
    """x = attn_norm(x + dropout(attention(x)));   x = mlp_norm(x + dropout(mlp(x))): of both streams alike."""

    def __init__(self, config: XlnetConfig, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        heads = config.num_attention_heads
        self.attn = TwoStreamAttention(width=width, heads=heads, head_width=width // heads)
        self.attn_dropout = AddressedDropout(
            width=width, layer=layer, p=config.attention_output_dropout
        )
        self.attn_norm = LayerNorm(width, eps=config.norm_eps)
        inner = AddressedDropout(
            width=config.intermediate_size,
            layer=layer,
            p=config.mlp_inner_dropout,
            place="mlp_inner",
        )
        self.mlp = FeedForward(
            kind=config.mlp,
            width=width,
            intermediate=config.intermediate_size,
            bias=True,
            inner_dropout=inner,
        )
        self.mlp_dropout = AddressedDropout(
            width=width, layer=layer, p=config.mlp_output_dropout, place="mlp"
        )
        self.mlp_norm = LayerNorm(width, eps=config.norm_eps)

    def forward(
        self, x_RC: Tensor, *, plan: TwoStreamPlan, waves_PC: Tensor, dropout_key_R: Tensor
    ) -> Tensor:
        """[R, C] -> [R, C].

        x_RC: content rows, then query rows
        plan, waves_PC: of the micro-batch
        dropout_key_R: of each row
        """
        out_RC = self.attn(x_RC, plan=plan, waves_PC=waves_PC)
        x_RC = self.attn_norm(self.attn_dropout(x_RC, out_RC, dropout_key_R))
        out_RC = self.mlp(x_RC, dropout_key_R)
        return self.mlp_norm(self.mlp_dropout(x_RC, out_RC, dropout_key_R))
