"""Small models, rows and task files, for tests of fine-tuning."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from encoder.base.rng import generator
from encoder.base.tokenizer_json import SpecialIds
from encoder.data.examples import Examples, Places
from encoder.data.labelled import Rows
from encoder.finetune.encoding import TextEncoder
from encoder.models.albert import AlbertConfig
from encoder.models.bert import BertConfig, DistilBertConfig, RobertaConfig
from encoder.models.contract import ModelConfig
from encoder.models.electra import ElectraDiscriminatorConfig
from encoder.models.hf.task import TrainedTask
from encoder.models.modernbert import ModernBertConfig
from encoder.models.stored import StoredModel, write_stored
from encoder.models.with_task import HeadShape, build_task_model
from tests.helpers.hf import SPECIALS, write_tokenizer_json

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
LETTERS = {**SMALL, "vocab_size": 280, "num_hidden_layers": 2, "max_position_embeddings": 64}
NO_DROPOUT = {
    "embedding_dropout": 0.0,
    "attention_output_dropout": 0.0,
    "mlp_output_dropout": 0.0,
}
# a small body of each family that transformers has a head for, and its special ids
BODIES: dict[str, tuple[ModelConfig, SpecialIds]] = {
    "modernbert": (
        ModernBertConfig(**LETTERS, window_radius_tokens=14, attention_output_dropout=0.0),
        SPECIALS,
    ),
    "bert": (BertConfig(**LETTERS, **NO_DROPOUT), SPECIALS),
    "roberta": (
        RobertaConfig(**LETTERS, **NO_DROPOUT, position_offset=SPECIALS.pad_id + 1),
        SPECIALS,
    ),
    "distilbert": (DistilBertConfig(**LETTERS, **NO_DROPOUT), SPECIALS),
    "albert": (AlbertConfig(**LETTERS, **NO_DROPOUT, embedding_size=12), SPECIALS),
    "electra": (ElectraDiscriminatorConfig(**LETTERS, **NO_DROPOUT, embedding_size=12), SPECIALS),
}


OUTPUTS = {"text": 3, "token": 3, "span": 2, "choice": 1}


def drawn_task(
    family: str,
    *,
    kind: str = "text",
    pooling: str = "cls",
    outputs: int | None = None,
    dropout: float = 0.0,
) -> TrainedTask:
    """A model with a task, norms and biases drawn as well, so that none of them could be missed."""
    config, specials = BODIES[family]
    outputs = outputs or OUTPUTS[kind]
    head = HeadShape(family=family, kind=kind, outputs=outputs, pooling=pooling, dropout=dropout)
    weights = build_task_model(config, head, attention="sdpa", seed=3).state_dict()
    draw = torch.Generator().manual_seed(4)
    weights = {
        name: w + (0.3 if w.dim() == 1 else 0.1) * torch.randn(w.shape, generator=draw)
        for name, w in weights.items()
    }
    return TrainedTask(
        name="small",
        config=config,
        head=head,
        weights=weights,
        tokenizer_json=Path("none"),
        specials=specials,
        max_tokens=40,
        labels=tuple("abc"[:outputs]) if kind in ("text", "token") else None,
        problem="single_label_classification" if kind == "text" else None,
        origin="a test",
    )


def drawn_examples(
    count: int, *, classes: int = 3, segments: bool = False, longest: int = 30
) -> Examples:
    """Random ids of 16 to `longest` tokens, a class each; with segments the second half of each is the second text."""
    draw = generator(1, "drawn examples")
    lengths = draw.integers(16, longest + 1, count)
    starts = [0, *lengths.cumsum()]
    ids = draw.integers(5, 280, starts[-1])
    halves = [i >= n // 2 for n in lengths for i in range(n)]
    return dataclasses.replace(
        _examples(ids, starts, draw.integers(0, classes, count)),
        segments_A=None if not segments else _array(halves, "int8"),
    )


def drawn_places(count: int, *, kind: str, segments: bool = False) -> Examples:
    """Random ids asked as a kind of head asks: one to four words each, a span of all tokens, or two to four choices."""
    examples = drawn_examples(count, segments=segments)
    if kind == "text":
        return examples
    draw = generator(2, "drawn places", kind)
    places, values = [], []
    for length in examples.lengths_N:
        asked = int(draw.integers(2, 5))
        tokens = np.sort(draw.permutation(np.arange(1, length))[:asked])
        if kind == "span":
            tokens = np.arange(length)
            right = np.zeros((length, 2))
            right[draw.integers(0, length, 2), [0, 1]] = 1
        if kind == "choice":
            tokens[0] = 0
            right = np.eye(asked)[draw.integers(asked)][:, None]
        places.append(tokens)
        values.append(draw.integers(0, 3, asked) if kind == "token" else right)
    return dataclasses.replace(
        examples,
        value_P=_array(np.concatenate(values), "int64" if kind == "token" else "int8"),
        places=Places(
            starts_N1=np.cumsum([0, *(len(one) for one in places)]),
            token_P=_array(np.concatenate(places), "int32"),
            grouped=kind != "token",
            documents=kind == "choice",
        ),
    )


def _examples(ids: Any, starts: Any, values: Any) -> Examples:
    return Examples(
        name="drawn",
        ids_A=_array(ids, "int32"),
        starts_N1=_array(starts, "int64"),
        value_P=_array(values, "int64"),
    )


def _array(values: Any, dtype: str) -> Any:
    return np.asarray(values, dtype=dtype)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(rows: list[dict[str, Any]]) -> Rows:
    """As if read from a.jsonl."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    numbers = list(range(1, len(rows) + 1))
    return Rows(path=Path("a.jsonl"), columns=columns, word="line", numbers=numbers)


def bpe(*, prefix_space: bool = False) -> Any:
    """A byte-level BPE that knows some words with the blank before them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        special_tokens=["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([" rejects lamb to German cott Black"] * 9, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return tokenizer


def encoder_of(tokenizer: Any, *, max_tokens: int, segments: bool = False) -> TextEncoder:
    """A tokenizer as tasks use it."""
    return TextEncoder(
        tokenizer=tokenizer,
        specials=SPECIALS,
        segments=segments,
        max_tokens=max_tokens,
        path=Path("none"),
    )


def letter_rows(count: int, *, seed: int = 1) -> list[dict[str, Any]]:
    """Texts of letters; the class says whether there are more of `a` than of `b`."""
    draw = generator(seed, "letter rows")
    rows = []
    for _ in range(count):
        text = "".join(draw.choice(list("abc "), int(draw.integers(3, 30)))) + "c"
        rows.append({"text": text, "label": "a" if text.count("a") > text.count("b") else "b"})
    return rows


def write_start(folder: Path, *, family: str = "modernbert", pair: bool = True) -> Path:
    """A weights folder to start from, with a tokenizer of letters; `pair`: it frames two texts."""
    from encoder.models.catalog import build_model

    config, _ = BODIES[family]
    tokenizer_json = write_tokenizer_json(folder.with_name(f"{folder.name}.tokenizer.json"))
    if pair:
        content = json.loads(tokenizer_json.read_text())
        content["post_processor"] = None  # the export's own then has the pair form
        tokenizer_json.write_text(json.dumps(content))
    weights = {name: w.clone() for name, w in build_model(config, seed=1).state_dict().items()}
    write_stored(
        StoredModel(config=config, weights=weights, tokenizer_json=tokenizer_json, origin="a test"),
        folder,
    )
    return folder


TASK = """
name: letters
out: {root}/run
seed: 5
start_from: {root}/start
task: {{kind: classify, texts: [text], label: label, labels: [a, b]}}
data: {{train: {root}/train.jsonl, dev: {{dev: {root}/dev.jsonl}}, test: {{more: {root}/more.jsonl}}, max_tokens: 24}}
batch_examples: 8
epochs: 2
lr: {{peak: 5.0e-3}}
layer_decay: 0.5
dropout: {{attention_output: 0.1, head: 0.1}}
evaluate: {{every_epochs: 0.5}}
checkpoints: {{every_epochs: 0.25, keep_last: 2}}
loader: {{micro_batch_tokens: 64}}
engine: {{zero_stage: 0, precision: fp64, gradient_clipping: 1.0}}
device: cpu
"""


def write_task(root: Path, *, train: int = 42) -> Path:
    """A task file with all that it names."""
    write_start(root / "start")
    write_rows(root / "train.jsonl", letter_rows(train))
    write_rows(root / "dev.jsonl", letter_rows(11, seed=2))
    write_rows(root / "more.jsonl", letter_rows(5, seed=3))
    path = root / "task.yaml"
    path.write_text(TASK.format(root=root))
    return path
