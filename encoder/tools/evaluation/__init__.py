"""A pretrained encoder judged without fine-tuning: loss on text, the shape of its embeddings, probes, long context.

    pieces.py     texts as documents of tokens, and how many go through the model at once
    masked.py     masked-token loss, perplexity, bits a byte, pseudo-perplexity
    features.py   mean-pooled states of every layer
    health.py     how the embeddings fill their space
    context.py    loss against context length and position; a needle in other text
    table.py      several models side by side

Probes are scored by encoder/train/probe_scores.py, as they are during a run. Everything here takes what encoder.load gives,
so that a model made elsewhere stands beside ours.
"""
