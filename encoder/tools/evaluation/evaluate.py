"""Several models on the same texts, measure by measure: numbers for a table, and a file with everything that was seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from encoder.base.errors import ConfigError, nearest
from encoder.tools import notebook
from encoder.tools.evaluation.context import ContextScores, context_scores, context_windows
from encoder.tools.evaluation.features import layer_features, text_documents
from encoder.tools.evaluation.health import embedding_health
from encoder.tools.evaluation.masked import masked_loss, pseudo_perplexity
from encoder.tools.evaluation.minimal_pairs import (
    PairScores,
    SentencePairs,
    Sentences,
    framed,
    pair_scores,
)
from encoder.tools.evaluation.pieces import Pieces, cut_texts
from encoder.tools.notebook import LoadedModel
from encoder.train.probe_scores import (
    LabelledTexts,
    ProbeScores,
    check_labels,
    check_regression,
    probe_layers,
)

# what a measure asks for, and what it tells
MEASURES = {
    "loss": "masked-token loss, perplexity, bits a byte",
    "pseudo": "pseudo-perplexity: each token masked alone",
    "pairs": "minimal pairs: is the good sentence likelier, each token masked alone",
    "health": "anisotropy, uniformity and rank of mean-pooled embeddings",
    "probe": "logistic regression and nearest neighbours on frozen embeddings, by layer",
    "context": "loss against context length and position, and a needle",
}
# these ask the prediction head and the decoder
DECODED = ("loss", "pseudo", "pairs", "context")
# of rows of a file of their own; the others ask plain texts
OF_ROWS = ("pairs", "probe")
USUAL = ("loss", "health")  # of plain texts, where nothing is named


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What is asked of every model."""

    measures: tuple[str, ...]
    texts: Sequence[str] = ()
    train: LabelledTexts | None = None
    test: LabelledTexts | None = None
    pairs: SentencePairs | None = None
    document_tokens: int = 128  # of a document, [CLS] and [SEP] included
    mask_share: float = 0.15
    most_tokens: int = 100_000  # of the text that the loss asks
    pseudo_tokens: int = 2_000  # of the text that pseudo-perplexity asks, each one a forward pass
    health_texts: int = 1_000
    context_tokens: int | None = None  # the longest; None: the model's longest document
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Of one model."""

    name: str
    origin: str
    parameters: int
    numbers: dict[str, float]
    probe: ProbeScores | None = None
    context: ContextScores | None = None
    pairs: PairScores | None = None


def check_measures(words: Sequence[str]) -> tuple[str, ...]:
    """The measures in the order of the table. Raises ConfigError for a word that is none."""
    for word in words:
        if word not in MEASURES:
            raise ConfigError(f"there is no measure {word!r}. {nearest(word, list(MEASURES))}")
    return tuple(name for name in MEASURES if name in words)


def evaluate(
    models: Mapping[str, Path | str],
    questions: Questions,
    *,
    untrained: bool = False,
    say: Callable[[str], None] = print,
) -> list[Answers]:
    """Ask every model everything. Raises UserError before anything is asked.

    models: by name, whatever encoder.load opens
    questions: the same for all
    untrained: also ask the shape of each, with weights drawn from the seed of the questions
    say: told what is being done
    """
    # texts that do not serve a model are told before hours of another one
    documents = {name: _documents(notebook.load(path), questions) for name, path in models.items()}
    answers = []
    for name, path in models.items():
        answers.append(_answers(name, notebook.load(path), documents[name], questions, say))
        if untrained:
            drawn = notebook.load(path, untrained=questions.seed)
            answers.append(_answers(f"{name} untrained", drawn, documents[name], questions, say))
    return answers


@dataclass(frozen=True, kw_only=True)
class _Documents:
    """The texts as one model's tokens, of what is asked of it."""

    asked: tuple[str, ...]  # measures
    loss: Pieces | None = None
    pseudo: Pieces | None = None
    good: Sentences | None = None  # of minimal pairs
    bad: Sentences | None = None
    health: list[Tensor] | None = None
    train: list[Tensor] | None = None
    test: list[Tensor] | None = None
    windows: list[Tensor] | None = None


def _documents(bert: LoadedModel, questions: Questions) -> _Documents:
    texts, longest = questions.texts, questions.document_tokens
    asked = tuple(m for m in questions.measures if not (m in DECODED and bert.drawn))
    found: dict[str, Any] = {}
    if "loss" in asked:
        most = questions.most_tokens
        found["loss"] = cut_texts(bert, texts, longest=longest, most_tokens=most)
    if "pseudo" in asked:
        most = questions.pseudo_tokens
        found["pseudo"] = cut_texts(bert, texts, longest=longest, most_tokens=most)
    if "pairs" in asked:
        if questions.pairs is None:
            raise ConfigError(
                "the measure pairs needs sentences. Give --pairs FILE, rows with a good and a bad one."
            )
        found["good"] = framed(bert, questions.pairs.good)
        found["bad"] = framed(bert, questions.pairs.bad)
    if "health" in asked:
        some = texts[: questions.health_texts]
        if len(some) < 2:
            raise ConfigError(
                f"{len(some)} text; needed: at least two, whose embeddings are compared. Give more"
                " texts, or other measures."
            )
        found["health"] = text_documents(bert, some, longest=longest)
    if "probe" in asked:
        train, test = questions.train, questions.test
        if train is None or test is None:
            raise ConfigError(
                "the probe needs labelled texts. Give --train FILE and --test FILE, rows with a"
                " text and a label."
            )
        check_labels(train.labels, test.labels)
        check_regression()
        found["train"] = text_documents(bert, train.texts, longest=longest)
        found["test"] = text_documents(bert, test.texts, longest=longest)
    if "context" in asked:
        found["windows"] = context_windows(bert, texts, longest=questions.context_tokens)
    return _Documents(asked=asked, **found)


def _answers(
    name: str,
    bert: LoadedModel,
    documents: _Documents,
    questions: Questions,
    say: Callable[[str], None],
) -> Answers:
    """Everything about one model.

    name: of its column
    bert: the model
    documents: the texts as its tokens
    questions: what is asked
    say: told what is being done
    """
    say(f"{name}: {bert.origin}")
    for measure in questions.measures:
        if measure in documents.asked:
            say(f"  {measure}: {MEASURES[measure]}")
        else:
            say(f"  {measure}: left out, for the model came without {bert.drawn[0]}")

    numbers: dict[str, float] = {}
    probe = context = pairs = None
    if documents.loss is not None:
        share = questions.mask_share
        numbers |= masked_loss(bert, documents.loss, mask_share=share, seed=questions.seed)
    if documents.pseudo is not None:
        numbers |= pseudo_perplexity(bert, documents.pseudo)
    if documents.good is not None and documents.bad is not None:
        assert questions.pairs is not None, "they gave sentences"
        pairs = pair_scores(bert, documents.good, documents.bad, questions.pairs.groups)
        numbers |= pairs.numbers()
    if documents.health is not None:
        last_NC = layer_features(bert, documents.health)[-1]
        numbers |= {**embedding_health(last_NC), "width": last_NC.shape[-1]}
    if documents.train is not None and documents.test is not None:
        assert questions.train is not None and questions.test is not None, "they gave documents"
        probe = probe_layers(
            layer_features(bert, documents.train),
            questions.train.labels,
            layer_features(bert, documents.test),
            questions.test.labels,
            seed=questions.seed,
        )
        numbers |= probe.numbers()
    if documents.windows is not None:
        context = context_scores(bert, documents.windows, seed=questions.seed)
        numbers |= context.numbers()
    assert isinstance(bert.model, nn.Module), "models are torch modules"
    return Answers(
        name=name,
        origin=bert.origin,
        parameters=sum(p.numel() for p in bert.model.parameters()),
        numbers=numbers,
        probe=probe,
        context=context,
        pairs=pairs,
    )


def as_json(answers: Sequence[Answers], questions: Questions) -> dict[str, Any]:
    """Everything that was asked and seen, for a file."""
    asked = {
        key: value
        for key, value in asdict(questions).items()
        if key not in ("texts", "train", "test", "pairs")
    }
    asked["texts"] = len(questions.texts)
    asked["pairs"] = None if questions.pairs is None else len(questions.pairs)
    for side in ("train", "test"):
        rows = getattr(questions, side)
        asked[side] = None if rows is None else len(rows.texts)
    return _finite({"questions": asked, "models": [asdict(answer) for answer in answers]})


def _finite(value: Any) -> Any:
    """The same with null for what JSON has no number for: the loss of a broken model."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
