"""Frozen features of texts: the mean of their states after every layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from encoder.base.batch import packed_documents
from encoder.base.errors import ConfigError
from encoder.tools.evaluation.pieces import check_length, plain_tokenizer
from encoder.tools.notebook import LoadedModel, in_forwards
from encoder.train.probes import framed_ids


def text_documents(bert: LoadedModel, texts: Sequence[str], *, longest: int) -> list[Tensor]:
    """The ids of each text in its frame.

    bert: the model and its tokenizer
    texts: N of them
    longest: tokens of a text, its frame included; what is longer is cut

    Raises ConfigError for a text without a token.
    """
    check_length(bert, longest)
    found = framed_ids(plain_tokenizer(bert), bert.specials, texts, longest=longest)
    if not all(found):
        raise ConfigError(
            f"text {found.index([]) + 1} has no token; needed: texts that say something. Leave it"
            " out."
        )
    return [torch.tensor(ids) for ids in found]


def layer_features(bert: LoadedModel, documents: Sequence[Tensor]) -> list[Tensor]:
    """[N, C] after the embeddings and after each layer, fp32: the mean over a text's tokens, [CLS] and [SEP] among them.

    bert: the model, of L layers: L + 1 tensors, of which the last one is after the final norm
    documents: ids of N texts, as text_documents gives them
    """
    parts: list[list[Tensor]] = []
    with torch.no_grad():
        for some in in_forwards([len(d) for d in documents]):
            batch = packed_documents(documents[some])
            with _kept_states(bert) as states:
                last_TC = bert.model.hidden_states(batch)
            lengths_S = torch.tensor([len(d) for d in documents[some]])
            # transformers' last hidden state is behind the final norm, too
            parts.append([_means(x_TC, lengths_S) for x_TC in [*states[:-1], last_TC]])
    return [torch.cat(layer) for layer in zip(*parts, strict=True)]


@contextlib.contextmanager
def _kept_states(bert: LoadedModel) -> Iterator[list[Tensor]]:
    """What the embeddings and the layers return during one forward pass."""
    assert isinstance(bert.model, nn.Module), "models are torch modules"
    body = bert.model.get_submodule("model")
    layers = body.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    states: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], x_TC: Tensor) -> None:
        states.append(x_TC)

    modules = [body.get_submodule("embeddings"), *layers]
    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _means(x_TC: Tensor, lengths_S: Tensor) -> Tensor:
    """[S, C], the mean of each document."""
    document_T = torch.repeat_interleave(torch.arange(len(lengths_S)), lengths_S)
    sums_SC = torch.zeros(len(lengths_S), x_TC.shape[-1]).index_add_(0, document_T, x_TC.float())
    return sums_SC / lengths_S[:, None]
