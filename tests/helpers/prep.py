"""A small tokenizer, small corpora and the command, for the tests of data_prep."""

from __future__ import annotations

import functools
import json
import random
import tempfile
from pathlib import Path
from unittest.mock import patch

import yaml

from data_prep import worker
from data_prep.cli import main
from data_prep.config import TextSource
from data_prep.shards import read_shard
from data_prep.tokenizer_training import TrainingConfig, train_tokenizer
from encoder.data.shard_format import read_card, read_index

WORDS = "the a cat dog house tree runs sees under over quick slow red blue and or because when it was".split()


def texts(count: int, *, seed: int = 0, longest: int = 60) -> list[str]:
    """Sentences of 1 to `longest` words, no two alike in practice."""
    chance = random.Random(seed)
    return [
        " ".join(chance.choices(WORDS, k=chance.randint(1, longest))) + f" {i}."
        for i in range(count)
    ]


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in documents), encoding="utf-8")
    return path


@functools.cache
def tokenizer_bytes() -> bytes:
    """A tokenizer.json of 320 entries."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "text.txt").write_text("\n".join(texts(200)), encoding="utf-8")
        source = TextSource(name="t", files=("text.txt",), document="file")
        config = TrainingConfig(vocab_size=320, sample_mb=1)
        train_tokenizer([source], folder, folder / "tokenizer.json", config)
        return (folder / "tokenizer.json").read_bytes()


def settings(folder: Path, sources: list[dict] | None = None, **changes: object) -> Path:
    """A settings file in `folder`, with a tokenizer beside it and OUT at folder/shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(tokenizer_bytes())
    content = {
        "tokenizer": str(folder / "tokenizer.json"),
        "root": str(folder),
        "out": str(folder / "shards"),
        "held_out_share": 0.1,
        "processes": 1,
        "sources": sources or [{"name": "a", "format": "jsonl", "files": ["a.jsonl"]}],
        **changes,
    }
    path = folder / "prep.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def run(*words: object) -> int:
    """The data-prep command; its exit code. One process works in this one, where a test can look into it."""
    try:
        with patch.object(worker, "IN_CHILDREN", False):
            return main([str(word) for word in words])
    except SystemExit as left:
        return left.code


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by name."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def ids_of(folder: Path) -> list[list[int]]:
    """Every sample of a shard folder."""
    card = read_card(folder)
    return [
        ids.tolist() for entry in read_index(folder) for ids in read_shard(folder, entry, card=card)
    ]
