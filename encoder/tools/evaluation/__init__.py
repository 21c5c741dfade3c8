"""A pretrained encoder judged without fine-tuning: loss on text, the shape of its embeddings, probes, long context.

    pieces.py     texts as documents of tokens, and how many go through the model at once
    masked.py     masked-token loss, perplexity, bits a byte, pseudo-perplexity
    features.py   mean-pooled states of every layer
    health.py     how the embeddings fill their space
    probe.py      logistic regression and nearest neighbours on frozen embeddings
    context.py    loss against context length and position; a needle in other text
    table.py      several models side by side

Everything here takes what encoder.load gives, so that a model made elsewhere stands beside ours.
"""
