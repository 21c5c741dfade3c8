"""The library in a notebook: models, the hidden states and logits of texts, metrics and shards (docs/python.md).

    bert = encoder.load("runs/small")
    states_TC, other_TC = bert.hidden_states(["a text", "a second, longer text"])

Models run on the CPU, in fp32, without dropout and without gradients. Texts are packed end to end, never padded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from encoder.base.batch import packed_documents
from encoder.base.errors import ConfigError, ModelError, ShardError, UserError, nearest
from encoder.base.files import native_path
from encoder.base.paths import expand_path
from encoder.base.schema import from_mapping
from encoder.base.tokenizer_json import SpecialIds, special_ids_of
from encoder.base.untrusted import native_code
from encoder.data.shard_format import TOKENIZER, Card, tokenizer_fingerprint
from encoder.data.shards import Source, open_source
from encoder.models.catalog import PRESETS, SYSTEMS, build_model, predicts_tokens
from encoder.models.contract import Model
from encoder.models.hf.parity import MaskedModel, our_model
from encoder.models.hf.tokenizer import read_tokenizer
from encoder.models.stored import used_network
from encoder.runs.config import SourceConfig
from encoder.runs.folder import flat, read_metrics
from encoder.runs.weights import read_model

FORWARD_TOKENS = 8192  # packed into one forward pass; a longer text has one of its own


def preset(name: str, *, seed: int = 0, **settings: Any) -> Model:
    """Build a model of a published shape, with initial weights drawn from the seed; in training mode, as torch's own modules.

        encoder.preset("modernbert_17m", vocab_size=32_768, num_hidden_layers=4)

    name: one of encoder.PRESETS
    settings: of the model, put over the preset's

    Raises ConfigError.
    """
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}. {nearest(str(name), list(PRESETS))}")
    shape = dict(PRESETS[name])
    system = shape.pop("system")
    config = from_mapping(SYSTEMS[system], {**shape, **settings}, where=f"encoder.preset({name!r})")
    return build_model(config, seed=seed)


def load(
    path: Path | str, *, tokenizer: Path | str | None = None, untrained: int | None = None
) -> LoadedModel:
    """Open a stored model.

    path: a run folder (its newest checkpoint), a checkpoint, a weights folder, a Hugging Face folder, or ORG/NAME on the hub
    tokenizer: a tokenizer.json, for a model that is stored without one
    untrained: a seed; the same shape with weights drawn from it, to be compared with

    Raises UserError.
    """
    stored = used_network(read_model(Path(expand_path(path))))
    if untrained is not None:
        stored = dataclasses.replace(
            stored,
            weights=build_model(stored.config, seed=untrained).state_dict(),
            origin=f"the shape of {path}, with weights drawn from seed {untrained}",
            drawn=(),
        )
    tokenizer_json = stored.tokenizer_json if tokenizer is None else Path(expand_path(tokenizer))
    if tokenizer_json is None:
        raise ModelError(
            f"{path} has no {TOKENIZER}; needed: the one that the model was trained with. "
            "Name it: encoder.load(path, tokenizer=FILE)."
        )
    _, specials = special_ids_of(tokenizer_json)
    return LoadedModel(
        model=our_model(stored.weights, stored.config),
        tokenizer=read_tokenizer(tokenizer_json, specials, vocab_size=stored.config.vocab_size),
        specials=specials,
        origin=stored.origin,
        max_tokens=stored.max_tokens or stored.config.max_position_embeddings,
        drawn=stored.drawn if predicts_tokens(stored.config) else ("decoder", *stored.drawn),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedModel:
    """A stored model, ready to be asked."""

    # an nn.Module on the CPU, fp32, in evaluation mode
    model: MaskedModel = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)  # of the library tokenizers; it adds [CLS] and [SEP]
    specials: SpecialIds = field(
        repr=False
    )  # the ids of [CLS], [MASK] and the others, and the frame
    origin: str  # where the weights came from, for people
    max_tokens: int  # of a text, [CLS] and [SEP] included
    # parameters that the source lacked, as a body without heads does; their values are drawn. A discriminator lacks a decoder
    drawn: tuple[str, ...] = field(default=(), repr=False)

    def hidden_states(self, texts: Sequence[str]) -> list[Tensor]:
        """[T, C] of each text, after the last norm; T counts [CLS] and [SEP].

        Raises UserError for a text longer than max_tokens.
        """
        states = []
        # not inference_mode: its tensors could not train a probe
        with torch.no_grad():
            documents = self._documents(texts)
            lengths = [len(d) for d in documents]
            for some in in_forwards(lengths):
                x_TC = self.model.hidden_states(packed_documents(documents[some]))
                # copies: one text that is kept or saved does not hold the others
                states += [x.clone() for x in x_TC.split(lengths[some])]
        return states

    def logits(self, texts: Sequence[str]) -> list[Tensor]:
        """[T, V] of each text. 1,000 tokens of a vocabulary of 50,368 take 201 MB.

        Raises UserError for a text longer than max_tokens.
        """
        states = self.hidden_states(texts)
        with torch.no_grad():
            return [self.model.decode(x_TC) for x_TC in states]

    def _documents(self, texts: Sequence[str]) -> list[Tensor]:
        if isinstance(texts, str):
            raise UserError(
                f"texts is one text, {texts[:40]!r}; needed: a list of texts. Write [text]."
            )
        found = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        for number, ids in enumerate(found):
            if len(ids) > self.max_tokens:
                raise UserError(
                    f"texts[{number}] has {len(ids):,} tokens, [CLS] and [SEP] among them; needed:"
                    f" at most {self.max_tokens:,}, the model's longest document. Split the text,"
                    " or cut it."
                )
        return [torch.tensor(ids) for ids in found]


def in_forwards(lengths: Sequence[int]) -> Iterator[slice]:
    """Neighbouring documents, as many at a time as have FORWARD_TOKENS together; a longer one alone."""
    start = tokens = 0
    for number, length in enumerate(lengths):
        if number > start and tokens + length > FORWARD_TOKENS:
            yield slice(start, number)
            start = number
            tokens = 0
        tokens += length
    if len(lengths) > start:
        yield slice(start, len(lengths))


def metrics(run: Path | str) -> dict[str, list[Any]]:
    """The metrics of a run as a table by columns: pandas.DataFrame(encoder.metrics("runs/small")).

        {"step": [1, 2], "loss": [10.4, 9.8], "held_out_loss": [None, 9.9], "spent.training": [1.2, 2.3], ...}

    run: the run folder

    One entry per step and phase, None where a step has no such number. Raises UserError.
    """
    lines = [dict(flat(line)) for line in read_metrics(Path(expand_path(run)))]
    columns: dict[str, list[Any]] = {}
    for name in dict.fromkeys(chain.from_iterable(lines)):
        columns[name] = [line.get(name) for line in lines]
    return columns


def open_shards(path: Path | str, *, cache: Path | str | None = None) -> Shards:
    """Open a shard folder for random access. Reads its card and index, no shard.

    path: the folder with card.json; or a URL of one, with `cache`
    cache: a folder of this machine that the files are fetched to

    Raises ConfigError, ShardError.
    """
    where = SourceConfig(
        path=str(expand_path(path)), cache=None if cache is None else str(expand_path(cache))
    )
    source = open_source(
        where.path, name=where.path, cache=None if where.cache is None else Path(where.cache)
    )
    tokenizer_json = source.path / TOKENIZER
    # decode would show other words than were trained on
    if tokenizer_fingerprint(tokenizer_json) != source.card.tokenizer_sha256:
        raise ShardError(
            f"{tokenizer_json} is not the one that made these ids: its SHA-256 is not the card's. "
            "Copy the folder again."
        )
    what = f"{tokenizer_json} is not a tokenizer that tokenizers can read"
    with native_path(tokenizer_json) as name, native_code(what, error=ShardError):
        tokenizer = Tokenizer.from_file(name)
    return Shards(path=where.path, source=source, tokenizer=tokenizer)


@dataclass(frozen=True, kw_only=True, eq=False)
class Shards:
    """The documents of a shard folder: len(shards), shards[3], for ids_T in shards."""

    path: str
    source: Source = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)  # of the library tokenizers; the one that made the ids

    @property
    def card(self) -> Card:
        """Totals, special ids and the settings that made the shards."""
        return self.source.card

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document [documents], mapped from the file."""
        return self.source.lengths

    def decode(self, document: int) -> str:
        """The text of a document with its special tokens, as the model is trained on it. Raises ShardError."""
        return self.tokenizer.decode(self[document].tolist(), skip_special_tokens=False)

    def __len__(self) -> int:
        return self.source.documents

    def __getitem__(self, document: int) -> np.ndarray:
        """The ids of a document, int64 [T]. Raises IndexError, ShardError."""
        # negative numbers count from the end, and one beyond raises IndexError
        number = range(len(self))[document]
        return self.source.read(number).astype(np.int64)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[number] for number in range(len(self)))
