"""The settings of an embedding training, checked before anything starts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from encoder.base.errors import ConfigError
from encoder.base.file_kinds import refuse_other_kinds
from encoder.base.schema import LocalText, PathText, from_mapping, put_overrides, read_mapping


@dataclass(frozen=True, kw_only=True)
class NegativesConfig:
    """Passages that look like an answer and are none, for each training pair."""

    # tfidf: by words in common; model: by the vectors of start_from; none: those of the batch alone
    mine: Literal["none", "tfidf", "model"] = "none"
    per_query: int = 1  # for each pair
    # a passage that scores above this share of the right one's score may be an answer itself, and is passed over
    most_score_share: float = 0.95
    depth: int = 50  # of the ranking that is looked at

    def __post_init__(self) -> None:
        if self.per_query < 1 or self.depth < self.per_query:
            raise ConfigError(
                f"negatives: per_query {self.per_query} must be at least 1, and depth {self.depth}"
                " at least as much."
            )
        if not 0.0 < self.most_score_share <= 1.0:
            raise ConfigError(
                f"most_score_share {self.most_score_share:g} must lie above 0, at most 1."
            )


@dataclass(frozen=True, kw_only=True)
class RetrievalDataConfig:
    """Where questions and answers are."""

    # folder with corpus.jsonl, queries.jsonl and qrels/NAME.tsv, as BEIR has them
    beir: PathText | None = None
    train: str = "train"  # the qrels that are trained on, where `pairs` names no file
    test: str = "test"  # the qrels that are evaluated, before and after
    # rows of anchor, positive and, in all of them or in none, negative or negative_1, negative_2, ...; instead of beir's train
    pairs: PathText | None = None
    most_pairs: int | None = None  # so many of the training pairs, chosen by the seed
    max_tokens: int | None = None  # of a text; a longer one is cut; default: the model's longest
    negatives: NegativesConfig = field(default_factory=NegativesConfig)

    def __post_init__(self) -> None:
        if not self.beir and not self.pairs:
            raise ConfigError("data has no beir and no pairs. Name a folder or a file.")
        if self.pairs and self.negatives.mine != "none":
            raise ConfigError(
                "data.negatives.mine needs the corpus of data.beir to train on, and data.pairs"
                " names rows. Leave one out."
            )
        for key in ("most_pairs", "max_tokens"):
            value = getattr(self, key)
            if value is not None and value < 2:
                raise ConfigError(f"data.{key} {value} must be at least 2.")


@dataclass(frozen=True, kw_only=True)
class EmbedLossConfig:
    """The loss: each question must find its answer among all answers of the batch."""

    # cached: the same gradient, in little memory, for one forward pass more
    name: Literal["mnrl", "cached_mnrl"] = "cached_mnrl"
    # of the scores; default: 20 of cosines, a temperature of 0.05; 1 of a sparse model's dot products
    scale: float | None = None
    mini_batch_examples: int = 32  # of cached_mnrl: in one forward
    matryoshka: tuple[int, ...] = ()  # vectors cut to these widths are trained, too
    # of kind sparse: weight of the FLOPS regularizer, which keeps vectors of documents sparse
    flops_document: float = 3.0e-5
    flops_query: float = 5.0e-5  # the same of questions

    def __post_init__(self) -> None:
        if self.scale is not None and not self.scale > 0:
            raise ConfigError(f"loss.scale {self.scale:g} must be above 0.")
        if self.mini_batch_examples < 1:
            raise ConfigError(
                f"loss.mini_batch_examples {self.mini_batch_examples} must be at least 1."
            )
        if self.flops_document < 0 or self.flops_query < 0:
            raise ConfigError("loss.flops_document and loss.flops_query must be at least 0.")
        if any(width < 1 for width in self.matryoshka):
            raise ConfigError(f"loss.matryoshka {self.matryoshka}: widths must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class EmbedRateConfig:
    """Linear: up over the warm-up, then down to 0."""

    peak: float  # the highest learning rate
    warmup_share: float = 0.05  # of the steps

    def __post_init__(self) -> None:
        if not self.peak > 0 or not 0.0 <= self.warmup_share < 1.0:
            raise ConfigError(
                f"lr: peak {self.peak:g} must be above 0, warmup_share {self.warmup_share:g} in"
                " [0, 1)."
            )


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """Text before every text, in training, in the evaluation and in the folder."""

    query: str | None = None  # before a question; default: as the folder has it, else none
    document: str | None = None  # before an answer; default: as the folder has it, else none
    # whose text `model.encode` takes where it is told no name, in the folder alone; default: as the folder has it, else none
    default: Literal["query", "document", "none"] | None = None


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """The whole settings file."""

    other_words: ClassVar[dict[str, str]] = {}

    name: str  # of the model, in its card and in hf/NAME
    # a run, a checkpoint, a weights folder, a Hugging Face folder or one of sentence-transformers
    start_from: PathText
    data: RetrievalDataConfig
    lr: EmbedRateConfig  # or its peak alone
    out: LocalText = ""  # the folder to write; default: hf/NAME
    kind: Literal["dense", "sparse"] = "dense"  # sparse: SPLADE, of a model that fills masks
    loss: EmbedLossConfig = field(default_factory=EmbedLossConfig)
    batch_examples: int = 64  # pairs of a step: as many answers does a question choose from
    epochs: int = 1  # how often the pairs are gone through
    seed: int = 17  # of the order of the pairs and of dropout
    weight_decay: float = 0.0  # AdamW's
    gradient_clipping: float = 1.0  # norm; 0: none
    # of token states; default: as the folder has it, else their mean
    pooling: Literal["mean", "cls"] | None = None
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    # bf16: autocast, in the evaluation as well; weights stay fp32
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where torch sees it
    tfidf: bool = True  # the evaluation also says what words in common give

    def __post_init__(self) -> None:
        if not self.out:
            object.__setattr__(self, "out", f"hf/{self.name}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed {self.seed} must be 0 to 2^32 - 1.")
        if self.epochs < 1 or self.batch_examples < 2:
            raise ConfigError(
                f"epochs {self.epochs} must be at least 1, batch_examples {self.batch_examples} at"
                " least 2: a question chooses among the answers of its batch."
            )
        if self.weight_decay < 0 or self.gradient_clipping < 0:
            raise ConfigError("weight_decay and gradient_clipping must be at least 0.")
        if self.kind == "sparse" and (self.loss.matryoshka or self.pooling):
            raise ConfigError(
                "kind sparse has one dimension a token and the maximum over tokens; loss.matryoshka"
                " and pooling have no effect. Leave them out."
            )


def read_embed(path: Path | str, overrides: Sequence[str] = ()) -> EmbedConfig:
    """A settings file with `key=value` overrides; lr may be the peak alone. Raises ConfigError."""
    mapping = _with_rate(read_mapping(Path(path)))
    refuse_other_kinds(mapping, "embedding", path=path)
    if isinstance(mapping.get("lr"), dict):
        overrides = [re.sub(r"^lr=(?=\s*[^{\s])", "lr.peak=", override) for override in overrides]
    put_overrides(mapping, overrides)
    return from_mapping(EmbedConfig, _with_rate(mapping), where=str(path))


def _with_rate(mapping: dict[str, Any]) -> dict[str, Any]:
    rate = mapping.get("lr")
    if isinstance(rate, (int, float, str)) and not isinstance(rate, bool):
        return {**mapping, "lr": {"peak": rate}}
    return mapping
