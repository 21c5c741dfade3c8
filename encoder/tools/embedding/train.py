"""The story of an embedding training: data, numbers before, negatives, their trainer, numbers after, the folder."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from encoder.base.errors import ConfigError
from encoder.base.files import sha256_of
from encoder.base.world import alone
from encoder.models.hf.stages import MODULES, PROMPTS, check_stages
from encoder.tools.embedding.config import EmbedConfig
from encoder.tools.embedding.folder import (
    finished,
    identity_of,
    pooling_of,
    write_folder,
)
from encoder.tools.embedding.lexical import tfidf_scores
from encoder.tools.embedding.models import (
    device_of,
    embed,
    is_sparse,
    open_start,
    unit,
    vector_scores,
)
from encoder.tools.embedding.negatives import mine, with_negatives
from encoder.tools.embedding.ranking import check_installed, measure, rank
from encoder.tools.embedding.retrieval import (
    ANCHOR,
    Corpus,
    Pairs,
    Questions,
    chosen,
    hashes_of,
    pairs_of,
    read_corpus,
    read_pairs,
    read_questions,
    some,
)
from encoder.tools.weights.export import export_run

Say = Callable[[str], None]
LOG_STEPS = 10
# of a stage: its shape, its longest text, and how a text becomes tokens
STAGE_FILES = (
    "config.json",
    "sentence_bert_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)


@dataclass(frozen=True, kw_only=True)
class Data:
    """All that is read."""

    corpus: Corpus | None
    test: Questions | None
    pairs: Pairs
    train: Questions | None
    numbers: list[tuple[int, int]]  # of each pair: question, passage
    hashes: dict[str, str]


def read_data(settings: EmbedConfig, *, training: bool = True) -> Data:
    """Corpus, questions and pairs of the settings. Raises DataError."""
    data = settings.data
    corpus = test = train = None
    pairs = Pairs(columns={"anchor": []})
    numbers: list[tuple[int, int]] = []
    splits: tuple[str, ...] = (data.test,)
    if data.beir:
        corpus = read_corpus(Path(data.beir))
        test = read_questions(Path(data.beir), data.test, corpus)
    if training and data.pairs:
        pairs = read_pairs(Path(data.pairs))
    elif training:
        assert corpus is not None and data.beir, "settings have beir or pairs"
        splits = (data.train, data.test)
        train = read_questions(Path(data.beir), data.train, corpus)
        pairs, numbers = pairs_of(train, corpus)
    kept = chosen(pairs, data.most_pairs, seed=settings.seed)
    return Data(
        corpus=corpus,
        test=test,
        pairs=some(pairs, kept),
        train=train,
        numbers=[numbers[n] for n in kept] if numbers else [],
        hashes=hashes_of(data.beir, data.pairs if training else None, splits),
    )


def check_one_gpu(settings: EmbedConfig) -> None:
    """Raises ConfigError where their trainer would spread a step over GPUs, each with batch_examples pairs of its own."""
    count = torch.cuda.device_count()
    if device_of(settings) == "cuda" and count > 1:
        raise ConfigError(
            f"torch sees {count} GPUs, and an embedding is trained on one. Choose it: set"
            " CUDA_VISIBLE_DEVICES=0."
        )


@alone()
def train_embedding(settings: EmbedConfig, *, say: Say = print) -> dict[str, Any]:
    """Trains and writes settings.out; returns what result.json says. Raises UserError."""
    check_installed()
    check_one_gpu(settings)
    data = read_data(settings)
    if len(data.pairs) < settings.batch_examples:
        raise ConfigError(
            f"there are {len(data.pairs):,} pairs and batch_examples is {settings.batch_examples}."
            " Lower it, or give more pairs."
        )
    with _start_folder(settings, say) as folder:
        identity = identity_of(settings, {**data.hashes, **start_hashes(folder)})
        if (found := finished(Path(settings.out), identity)) is not None:
            say(f"done already: {settings.out} is of this very training")
            return found
        model = open_start(folder, settings)
    if not is_sparse(model):
        pooling_of(model)
    tfidf = _tfidf(data, settings, say=say)
    passages = _passages(model, data, settings)
    before = _evaluation(model, data, settings, passages, say=say, when="before")
    pairs = _with_mined(model, data, settings, passages, say=say)
    begun = time.monotonic()
    losses, steps = _fit(model, pairs, settings, say=say)
    seconds = time.monotonic() - begun
    passages = _passages(model, data, settings)
    after = _evaluation(model, data, settings, passages, say=say, when="after")
    result = {
        "name": settings.name,
        "kind": settings.kind,
        "identity": identity,
        "seed": settings.seed,
        "pairs": len(pairs),
        "steps": steps,
        "training_seconds": round(seconds, 1),
        "tfidf": tfidf,
        **before,
        **after,
        "losses": losses,
        "versions": _versions(),
    }
    write_folder(model, settings, result)
    say(f"wrote {settings.out}")
    return result


@alone()
def evaluate_embedding(settings: EmbedConfig, *, say: Say = print) -> dict[str, Any]:
    """The numbers of start_from as it is. Raises UserError."""
    check_installed()
    if not settings.data.beir:
        raise ConfigError("data.beir is missing: without questions there is nothing to evaluate.")
    data = read_data(settings, training=False)
    with _start_folder(settings, say) as folder:
        hashes = {**data.hashes, **start_hashes(folder)}
        model = open_start(folder, settings)
    tfidf = _tfidf(data, settings, say=say)
    passages = _passages(model, data, settings)
    found = _evaluation(model, data, settings, passages, say=say, when="start")
    return {
        "name": settings.name,
        "sha256": hashes,
        "tfidf": tfidf,
        **found,
        "versions": _versions(),
    }


@contextmanager
def _start_folder(settings: EmbedConfig, say: Say) -> Iterator[Path]:
    """A folder that sentence-transformers reads, during the block. Raises UserError."""
    start = Path(settings.start_from)
    if not start.is_dir():
        raise ConfigError(
            f"start_from {start} is no folder; needed: a run, a weights folder or a Hugging Face"
            " folder. Look for a misspelling."
        )
    if (start / "config.json").is_file() or (start / "modules.json").is_file():
        yield start
        return
    say(f"exporting {start} to a temporary folder")
    with TemporaryDirectory(prefix="tessera-embed-") as scratch:
        out = Path(scratch) / "hf"
        export_run(start, out)
        yield out


def start_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of what decides a start's vectors, by its place: weights, tokenizer, shape, stages and prompts."""
    found = {}
    for stage in check_stages(folder):
        named = [stage / name for name in (*STAGE_FILES, MODULES, PROMPTS)]
        for path in (*named, *sorted(stage.glob("*.safetensors"))):
            if path.is_file():
                found[f"start/{path.relative_to(folder).as_posix()}"] = sha256_of(path)
    return found


def _passages(model: Any, data: Data, settings: EmbedConfig) -> Any:
    """Vectors of the corpus by the model as it is now; None without one."""
    if data.corpus is None:
        return None
    return embed(model, data.corpus.texts, prompt="document", precision=settings.precision)


def _evaluation(
    model: Any, data: Data, settings: EmbedConfig, passages: Any, *, say: Say, when: str
) -> dict[str, Any]:
    """Numbers by when they were measured, each also said.

    model: as it is now
    data, settings: of the training
    passages: vectors of the corpus by that model
    say: for lines
    when: before, after or start
    """
    if data.test is None:
        return {}
    answers = data.test.answers
    questions = embed(model, data.test.texts, prompt="query", precision=settings.precision)
    ranked = rank(vector_scores(questions, passages), answers)
    found: dict[str, Any] = {when: measure(ranked, answers), f"{when}_ties": ranked.tied}
    ties = f"   {ranked.tied:,} of {len(answers):,} questions tie" if ranked.tied else ""
    say(f"{when:<8}{_text(found[when])}{ties}")
    for width in settings.loss.matryoshka:
        if width < questions.shape[1]:
            cut = [unit(x[:, :width]) for x in (questions, passages)]
            numbers = measure(rank(vector_scores(*cut), answers), answers)
            found[f"{when}_at_{width}"] = numbers
            say(f"{when:<8}{_text(numbers)}   of the first {width} dimensions")
    return found


def _tfidf(data: Data, settings: EmbedConfig, *, say: Say) -> dict[str, float]:
    """The same numbers of words in common, where they are asked for."""
    if data.test is None or data.corpus is None or not settings.tfidf:
        return {}
    score = tfidf_scores(data.test.texts, data.corpus.texts)
    found = measure(rank(score, data.test.answers), data.test.answers)
    say(f"{'tf-idf':<8}{_text(found)}")
    return found


def _text(numbers: dict[str, float]) -> str:
    return "   ".join(f"{name.replace('_at_', '@')} {value:.4f}" for name, value in numbers.items())


def _with_mined(model: Any, data: Data, settings: EmbedConfig, passages: Any, *, say: Say) -> Pairs:
    """The pairs with their hard negatives, where they are asked for.

    model: that they are mined by
    data, settings: of the training
    passages: vectors of the corpus by that model
    say: for lines
    """
    asked = settings.data.negatives
    if asked.mine == "none":
        return data.pairs
    assert data.train is not None and data.corpus is not None, "settings refuse mining of pairs"
    if asked.mine == "tfidf":
        score = tfidf_scores(data.train.texts, data.corpus.texts)
    else:
        q = embed(model, data.train.texts, prompt="query", precision=settings.precision)
        score = vector_scores(q, passages)
    found = mine(score, data.train.answers, data.numbers, asked, seed=settings.seed)
    say(f"mined {asked.per_query} negatives of each pair by {asked.mine}")
    return with_negatives(data.pairs, data.corpus, found)


def _fit(
    model: Any, pairs: Pairs, settings: EmbedConfig, *, say: Say
) -> tuple[list[dict[str, float]], int]:
    """Their trainer over the pairs; the model is changed in place. Losses by step, and how many steps there were."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SparseEncoderTrainer,
    )
    from transformers import PrinterCallback, TrainerCallback

    steps = math.ceil(len(pairs) / settings.batch_examples) * settings.epochs
    say(
        f"training on {len(pairs):,} pairs, {settings.epochs} epochs of {settings.batch_examples}"
        f" a step: about {steps:,} steps"
    )
    losses: list[dict[str, float]] = []

    class Told(TrainerCallback):
        """A line of a step's loss."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                losses.append({"step": state.global_step, "loss": logs["loss"]})
                say(
                    f"step {state.global_step:>6,} of {state.max_steps:,}   loss {logs['loss']:.4f}"
                )

    with TemporaryDirectory(prefix="tessera-embed-") as scratch:
        cls = SparseEncoderTrainer if is_sparse(model) else SentenceTransformerTrainer
        trainer = cls(
            model=model,
            args=_arguments(
                settings, scratch, prompts=_prompts(model, pairs), sparse=is_sparse(model)
            ),
            train_dataset=Dataset.from_dict(pairs.columns),
            loss=_loss(model, settings),
            callbacks=[Told()],
        )
        trainer.remove_callback(PrinterCallback)
        model.train()
        trainer.train()
        # else its autocast stays in the model, and the folder would be compared in bf16
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    model.eval()
    return losses, int(trainer.state.global_step)


def _prompts(model: Any, pairs: Pairs) -> dict[str, str]:
    """Text before the texts of each column."""
    return {
        name: model.prompts["query" if name == ANCHOR else "document"] for name in pairs.columns
    }


def _arguments(
    settings: EmbedConfig, scratch: str, *, prompts: dict[str, str], sparse: bool
) -> Any:
    """Their training arguments.

    settings: ours
    scratch: a folder; nothing of it is kept
    prompts: by column of the pairs
    sparse: of a SparseEncoder
    """
    from sentence_transformers import (
        SentenceTransformerTrainingArguments,
        SparseEncoderTrainingArguments,
    )

    cls = SparseEncoderTrainingArguments if sparse else SentenceTransformerTrainingArguments
    return cls(
        output_dir=scratch,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_examples,
        learning_rate=settings.lr.peak,
        warmup_ratio=settings.lr.warmup_share,
        lr_scheduler_type="linear",
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.gradient_clipping,
        seed=settings.seed,
        data_seed=settings.seed,
        # an answer that stands twice in a batch would be a wrong negative
        batch_sampler="no_duplicates",
        prompts=prompts if any(prompts.values()) else None,
        bf16=settings.precision == "bf16",
        use_cpu=device_of(settings) == "cpu",
        save_strategy="no",
        eval_strategy="no",
        logging_steps=LOG_STEPS,
        logging_first_step=True,
        disable_tqdm=True,
        report_to="none",
    )


def _loss(model: Any, settings: EmbedConfig) -> Any:
    """Multiple negatives ranking, cached or not; around it Matryoshka, or SPLADE's regularizers."""
    asked = settings.loss
    cached = asked.name == "cached_mnrl"
    if is_sparse(model):
        from sentence_transformers.sparse_encoder import losses as sparse

        inner = sparse.SparseMultipleNegativesRankingLoss(model, scale=asked.scale or 1.0)
        told = {
            "document_regularizer_weight": asked.flops_document,
            "query_regularizer_weight": asked.flops_query,
        }
        if cached:
            size = asked.mini_batch_examples
            return sparse.CachedSpladeLoss(model, inner, mini_batch_size=size, **told)
        return sparse.SpladeLoss(model, inner, **told)

    from sentence_transformers import losses as dense

    scale = asked.scale or 20.0
    if cached:
        loss = dense.CachedMultipleNegativesRankingLoss(
            model, scale=scale, mini_batch_size=asked.mini_batch_examples
        )
    else:
        loss = dense.MultipleNegativesRankingLoss(model, scale=scale)
    if asked.matryoshka:
        width = int(model.get_sentence_embedding_dimension())
        above = [size for size in asked.matryoshka if size > width]
        if above:
            raise ConfigError(f"loss.matryoshka has {above[0]}, more than the model's {width}.")
        widths = sorted({width, *asked.matryoshka}, reverse=True)
        loss = dense.MatryoshkaLoss(model, loss, widths)
    return loss


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("sentence-transformers", "transformers", "torch", "accelerate")
    return {name: version(name) for name in names}
