"""The files of sentence-transformers beside a model: the stages from a text's tokens to its vector.

OUT/
    modules.json, 1_Pooling/config.json     the list of stages, and how states are pooled
    sentence_bert_config.json, config_sentence_transformers.json
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from encoder.base.errors import ExportError
from encoder.base.files import write_json
from encoder.base.untrusted import read_json

MODULES = "modules.json"
STAGES = [("", "Transformer"), ("1_Pooling", "Pooling")]
# classes of sentence-transformers; another one would be code of the folder
_THEIRS = "sentence_transformers."


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """How the states of a text's tokens become its vector."""

    pooling: str = "mean"  # or cls
    normalized: bool = False
    # name -> text before every text
    prompts: Mapping[str, str] = field(default_factory=dict)


def write_sentence_transformers(
    folder: Path, *, width: int, max_tokens: int, embedding: Embedding | None = None
) -> None:
    """Writes what SentenceTransformer(folder) reads, in the words of versions 2 to 5.

    folder: of a body and its tokenizer
    width: of the states
    max_tokens: of a text
    embedding: default: the mean over all tokens of a text
    """
    embedding = embedding or Embedding()
    stages = [*STAGES]
    if embedding.normalized:
        stages.append(("2_Normalize", "Normalize"))
    # the list of stages: the transformer in the folder itself, others in their own
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": path,
            "type": f"sentence_transformers.models.{kind}",
        }
        for number, (path, kind) in enumerate(stages)
    ]
    pooling: dict[str, Any] = {"word_embedding_dimension": width}
    chosen = {"mean": "mean_tokens", "cls": "cls_token"}[embedding.pooling]
    kinds = (
        "cls_token",
        "mean_tokens",
        "max_tokens",
        "mean_sqrt_len_tokens",
        "weightedmean_tokens",
    )
    pooling |= {f"pooling_mode_{kind}": kind == chosen for kind in (*kinds, "lasttoken")}
    for path, _ in stages[1:]:
        (folder / path).mkdir()
    write_json(folder / MODULES, modules)
    write_json(folder / "1_Pooling" / "config.json", {**pooling, "include_prompt": True})
    write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": max_tokens, "do_lower_case": False}
    )
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "prompts": dict(embedding.prompts),
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )


def check_stages(folder: Path) -> None:
    """Raises ExportError for a folder whose stages are code of its own, which sentence-transformers would run."""
    if not (folder / MODULES).is_file():
        return
    for module in read_json(folder / MODULES, error=ExportError, root=list):
        found = module.get("type") if isinstance(module, dict) else None
        if not str(found).startswith(_THEIRS):
            raise ExportError(
                f"{folder / MODULES} names {str(found)[:80]!r}, code from outside of"
                " sentence-transformers, which is not run. Use a folder without it."
            )
