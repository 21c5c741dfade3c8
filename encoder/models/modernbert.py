"""ModernBERT (Warner et al. 2024) with a masked-language head, on packed tokens, under Hugging Face's parameter names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder.base.batch import TokenBatch
from encoder.base.errors import ConfigError
from encoder.nn.attend import Backend, Situation, check_word, choose_backend
from encoder.nn.block import Block
from encoder.nn.embedding import TokenEmbedding
from encoder.nn.heads import DecoderBias, PredictionHead
from encoder.nn.init import init_megatron_
from encoder.nn.loss import cross_entropy_sum
from encoder.nn.norm import layer_norm
from encoder.nn.rope import rope_table


@dataclass(frozen=True, kw_only=True)
class ModernBertConfig:
    """The shape of a model; the defaults are ModernBERT-base before its context extension."""

    vocab_size: int = 50368
    hidden_size: int = 768
    intermediate_size: int = 1152               # one half of the gated layer
    num_hidden_layers: int = 22
    num_attention_heads: int = 12
    global_attn_every_n_layers: int = 3         # layers 0, n, 2n, ... see the whole document
    window_radius_tokens: int = 64              # the others see |i - j| <= 64: 129 keys
    global_rope_theta: float = 10000.0
    local_rope_theta: float = 10000.0
    attention_output_dropout: float = 0.1       # after attention's Wo; the only dropout
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    initializer_cutoff_factor: float = 2.0
    max_position_embeddings: int = 8192         # what an export promises; nothing is learned per position

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "global_attn_every_n_layers", "window_radius_tokens", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; needed: at least 1.")
        for name in ("global_rope_theta", "local_rope_theta", "norm_eps", "initializer_range",
                     "initializer_cutoff_factor"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; needed: more than 0.")
        if not 0.0 <= self.attention_output_dropout < 1.0:
            raise ConfigError(f"attention_output_dropout is {self.attention_output_dropout}; needed: 0 to below 1.")
        if self.hidden_size % self.num_attention_heads or self.head_width % 2:
            width = 2 * self.num_attention_heads
            down = max(width, self.hidden_size // width * width)
            raise ConfigError(f"hidden_size {self.hidden_size} over {self.num_attention_heads} heads gives a head width "
                              f"of {self.hidden_size / self.num_attention_heads:g}; needed: a whole even number, "
                              f"because rotary positions turn pairs. Nearest hidden_size: {down} or {down + width}.")

    @property
    def head_width(self) -> int:
        """Features of one head."""
        return self.hidden_size // self.num_attention_heads

    def is_local(self, layer: int) -> bool:
        """Whether a layer sees only its window."""
        return layer % self.global_attn_every_n_layers != 0


class ModernBertForMaskedLM(nn.Module):
    """Packed tokens -> sum of cross entropy at the predicted positions. The decoder's weight is the embedding.

    `attention` is a word of encoder.nn.attend ("auto": the fastest that can run on the batch's device).
    """

    def __init__(self, config: ModernBertConfig, *, attention: str = "auto", seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.attention = attention
        self.model = _Encoder(config)
        self.head = PredictionHead(width=config.hidden_size, norm_eps=config.norm_eps)
        self.decoder = DecoderBias(vocab_size=config.vocab_size)
        self.set_rope_theta_(global_theta=config.global_rope_theta, local_theta=config.local_rope_theta)
        check_word(attention)
        init_megatron_(self, seed=seed, initializer_range=config.initializer_range,
                       cutoff_factor=config.initializer_cutoff_factor, layers=config.num_hidden_layers)

    def forward(self, batch: TokenBatch) -> Tensor:
        """Sum of -log p(target) over the predicted positions, a scalar in fp32 (fp64 for fp64 weights).

        Every parameter is connected: with nothing to predict the gradients are zeros, not None.
        """
        x_MC = self.hidden_states(batch).index_select(0, batch.predict_index_M)
        return cross_entropy_sum(self.head(x_MC), self._tied_weight, self.decoder.bias, batch.predict_target_M)

    def hidden_states(self, batch: TokenBatch) -> Tensor:
        """x_TC after the final norm."""
        backend = choose_backend(self.attention, self._situation(batch.ids_T.device)).backend
        return self.model(batch, backend=backend, global_theta=self.global_rope_theta,
                          local_theta=self.local_rope_theta)

    def logits(self, batch: TokenBatch) -> Tensor:
        """[T, V] at all positions: for proofs and for asking questions, not for training."""
        return F.linear(self.head(self.hidden_states(batch)), self._tied_weight, self.decoder.bias)

    def set_rope_theta_(self, *, global_theta: float, local_theta: float) -> None:
        """The base of the rotary angles of global and local layers, from now on."""
        self.global_rope_theta, self.local_rope_theta = float(global_theta), float(local_theta)

    def parameter_count(self) -> int:
        """Trained numbers; the tied matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    def attention_reason(self, device: torch.device | None = None) -> str:
        """Which backend runs, why, and why others cannot: a line for the run's header."""
        return choose_backend(self.attention, self._situation(device or self._tied_weight.device)).reason

    def _situation(self, device: torch.device) -> Situation:
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self._tied_weight.dtype
        return Situation(device=device, dtype=dtype, head_width=self.config.head_width, training=self.training)

    @property
    def _tied_weight(self) -> Tensor:
        return self.model.embeddings.tok_embeddings.weight


class _Encoder(nn.Module):
    """Embedding, layers, final norm: the part that Hugging Face calls `model`."""

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = TokenEmbedding(vocab_size=config.vocab_size, width=config.hidden_size,
                                         norm_eps=config.norm_eps)
        self.layers = nn.ModuleList(
            Block(layer=i, width=config.hidden_size, heads=config.num_attention_heads,
                  intermediate=config.intermediate_size, norm_eps=config.norm_eps, local=config.is_local(i),
                  attention_output_dropout=config.attention_output_dropout)
            for i in range(config.num_hidden_layers))
        self.final_norm = layer_norm(config.hidden_size, eps=config.norm_eps)

    def forward(self, batch: TokenBatch, *, backend: Backend, global_theta: float, local_theta: float) -> Tensor:
        """[T] ids -> [T, C]. What depends on the documents alone is made here, once, and shared by all layers."""
        plan = backend.plan(batch.cu_seqlens_S1, max_seqlen=batch.max_seqlen, tokens=len(batch.ids_T),
                            heads=self.config.num_attention_heads,
                            window_radius_tokens=self.config.window_radius_tokens)
        ropes = {theta: rope_table(batch.positions_T, theta=theta, head_width=self.config.head_width)
                 for theta in {global_theta, local_theta}}
        x_TC = self.embeddings(batch.ids_T)
        for block in self.layers:
            x_TC = block(x_TC, plan=plan, rope=ropes[local_theta if block.local else global_theta],
                         dropout_key_T=batch.dropout_key_T)
        return self.final_norm(x_TC)
