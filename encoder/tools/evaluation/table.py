"""Several models side by side: a row a measure, a column a model."""

from __future__ import annotations

from collections.abc import Mapping

# what a number is, and how it is written; in the order of the table
MEASURES = {
    "loss": ("masked-token loss, nats", "{:.3f}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "bits_per_byte": ("bits a byte", "{:.3f}"),
    "accuracy": ("masked tokens right", "{:.1%}"),
    "unigram_loss": ("loss of token frequencies alone", "{:.3f}"),
    "asked_tokens": ("masked tokens asked", "{:,.0f}"),
    "pseudo_perplexity": ("pseudo-perplexity", "{:.2f}"),
    "pseudo_perplexity_of_words": ("pseudo-perplexity, rest of the word masked", "{:.2f}"),
    "pseudo_bits_per_byte": ("bits a byte, one mask at a time", "{:.3f}"),
    "pairs_right": ("minimal pairs right", "{:.1%}"),
    "pairs_right_of_words": ("minimal pairs right, rest of the word masked", "{:.1%}"),
    "pairs_right_by_group": ("minimal pairs right, mean over groups", "{:.1%}"),
    "anisotropy": ("mean cosine of two texts", "{:.3f}"),
    "uniformity": ("uniformity", "{:.2f}"),
    "rank_me": ("RankMe", "{:.1f}"),
    "width": ("width of the embeddings", "{:,.0f}"),
    "probe_accuracy": ("linear probe, chosen layer", "{:.1%}"),
    "probe_layer": ("chosen layer", "{:.0f}"),
    "probe_last_layer": ("linear probe, last layer", "{:.1%}"),
    "neighbours_accuracy": ("nearest neighbours", "{:.1%}"),
    "majority": ("commonest label alone", "{:.1%}"),
    "context_gain": ("loss less by the longest context, nats", "{:.3f}"),
    "needle_accuracy": ("needle found", "{:.1%}"),
    "needle_chance": ("needle by chance", "{:.1%}"),
}
CONTEXT_LOSS = "context_loss_"  # and the context's tokens


def table(models: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Rows of words, the head first: [["", "ours", "theirs"], ["perplexity", "12.10", "9.33"], ...]; "-" where a model has no such
    number.

    models: the numbers of each, by name
    """
    rows = [["", *models]]
    for measure, (text, form) in _measures(models).items():
        cells = [form.format(n[measure]) if measure in n else "-" for n in models.values()]
        rows.append([text, *cells])
    return rows


def _measures(models: Mapping[str, Mapping[str, float]]) -> dict[str, tuple[str, str]]:
    """Those that some model has; context lengths, by number, before what is gained by them."""
    names = {name for numbers in models.values() for name in numbers}
    lengths = sorted(
        int(name.removeprefix(CONTEXT_LOSS)) for name in names if name.startswith(CONTEXT_LOSS)
    )
    found: dict[str, tuple[str, str]] = {}
    for name, words in MEASURES.items():
        if name == "context_gain":
            for length in lengths:
                found[f"{CONTEXT_LOSS}{length}"] = (f"loss with {length:,} tokens", "{:.3f}")
        if name in names:
            found[name] = words
    return found
