"""How large a model is and what a token costs, by counting; checked against the built model in a test."""

from __future__ import annotations

from dataclasses import dataclass

from encoder.models.modernbert import ModernBertConfig


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Trained numbers by place. `total` counts the tied matrix once."""

    embedding: int          # the token matrix, also the decoder's
    matrices: int           # of all layers: Wqkv, Wo, Wi, Wo
    norms: int              # embedding, layers, final
    head: int               # dense, norm and the decoder's bias

    @property
    def total(self) -> int:
        """All of them: 149,655,232 for ModernBERT-base."""
        return self.embedding + self.matrices + self.norms + self.head


def parameter_counts(config: ModernBertConfig) -> ParameterCounts:
    """Counts from the shape alone."""
    width, layers = config.hidden_size, config.num_hidden_layers
    return ParameterCounts(
        embedding=config.vocab_size * width,
        matrices=layers * _matrix_numbers(config),
        norms=width * (2 * layers + 1),             # layer 0 has one norm instead of two; embedding and final add two
        head=width * width + width + config.vocab_size,
    )


def train_flops_per_token(config: ModernBertConfig, *, mean_attended_global: float, masked_share: float) -> float:
    """Model FLOP of one token forward and backward (3 x forward): matrix products and attention, nothing else.

    mean_attended_global: keys that a token sees on average in a global layer (the mean length of its document, weighted
    by tokens); a local layer sees at most its window of it. masked_share: share of tokens that reach head and decoder.
    """
    width = config.hidden_size
    local = sum(config.is_local(i) for i in range(config.num_hidden_layers))
    keys = (config.num_hidden_layers - local) * mean_attended_global \
        + local * min(2 * config.window_radius_tokens + 1, mean_attended_global)
    layers = 2.0 * config.num_hidden_layers * _matrix_numbers(config)
    head = masked_share * 2.0 * (width * width + width * config.vocab_size)
    return 3.0 * (layers + head + 4.0 * width * keys)


def _matrix_numbers(config: ModernBertConfig) -> int:
    return 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
