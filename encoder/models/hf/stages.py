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
from encoder.base.untrusted import inside, read_json

MODULES = "modules.json"
STAGES = [("", "Transformer"), ("1_Pooling", "Pooling")]
PROMPTS = "config_sentence_transformers.json"
# the stages that are read, under every name that versions 2 to 6 gave them. Others may load code or pickles of a folder:
# Router takes class names from a file of its own, Dense takes functions by name
CLASSES = frozenset(
    {
        "sentence_transformers.models.Transformer",
        "sentence_transformers.models.Pooling",
        "sentence_transformers.models.Normalize",
        "sentence_transformers.base.modules.transformer.Transformer",
        "sentence_transformers.base.modules.normalize.Normalize",
        "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
        "sentence_transformers.sentence_transformer.modules.normalize.Normalize",
        "sentence_transformers.sparse_encoder.models.MLMTransformer",
        "sentence_transformers.sparse_encoder.models.SpladePooling",
        "sentence_transformers.sparse_encoder.modules.mlm_transformer.MLMTransformer",
        "sentence_transformers.sparse_encoder.modules.splade_pooling.SpladePooling",
    }
)
# an adapter names other weights, which may be anywhere
_ADAPTER = "adapter_config.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """How the states of a text's tokens become its vector."""

    pooling: str = "mean"  # or cls
    normalized: bool = False
    # name -> text before every text
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None  # name of the one before a text that comes without a name


def write_sentence_transformers(
    folder: Path, *, width: int, max_tokens: int, embedding: Embedding | None = None
) -> None:
    """Writes what SentenceTransformer(folder) reads, in the words of versions 2 to 6.

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
        folder / PROMPTS,
        {
            "prompts": dict(embedding.prompts),
            "default_prompt_name": embedding.default_prompt,
            "similarity_fn_name": "cosine",
        },
    )


def check_stages(folder: Path) -> list[Path]:
    """The folders of a model's stages, its own first. Nothing of them is loaded.

    Raises ExportError for what sentence-transformers would take code, pickles or files of elsewhere for: it trusts a
    folder of this machine whatever it is told.
    """
    stages = [folder]
    # a fifo or a broken link is refused by read_json
    if (folder / MODULES).exists() or (folder / MODULES).is_symlink():
        where = folder / MODULES
        for module in read_json(where, error=ExportError, root=list):
            stages.append(_stage(folder, module, where))
    stages = [*dict.fromkeys(stages)]
    for stage in stages:
        _check_weights(stage)
    return stages


def prompts_of(folder: Path) -> dict[str, str]:
    """The texts that a folder of sentence-transformers has before others, by their names. Raises ExportError."""
    found = _prompt_settings(folder).get("prompts")
    if not isinstance(found, dict):
        return {}
    return {name: text for name, text in found.items() if isinstance(text, str)}


def default_prompt_of(folder: Path) -> str | None:
    """The name of the one of these that stands before a text without a name; None: none does. Raises ExportError."""
    name = _prompt_settings(folder).get("default_prompt_name")
    return name if isinstance(name, str) and name in prompts_of(folder) else None


def _prompt_settings(folder: Path) -> dict[str, Any]:
    if not (folder / PROMPTS).is_file():
        return {}
    found: dict[str, Any] = read_json(folder / PROMPTS, error=ExportError, root=dict)
    return found


def _stage(folder: Path, module: Any, where: Path) -> Path:
    """The folder of an entry of modules.json."""
    told = module if isinstance(module, dict) else {}
    found = told.get("type")
    if str(found) not in CLASSES:
        known = sorted({name.rpartition(".")[2] for name in CLASSES})
        raise ExportError(
            f"{where} names the stage {str(found)[:80]!r}, which may run code of its folder and is"
            f" not read; needed: {', '.join(known)}, by sentence-transformers' names. Use a folder"
            " of these."
        )
    # the folder itself
    if told.get("path") == "":
        return folder
    return inside(folder, told.get("path"), where=where, error=ExportError)


def _check_weights(stage: Path) -> None:
    """Weights of a stage are safetensors of its own folder."""
    if (stage / _ADAPTER).exists():
        raise ExportError(
            f"{stage} has {_ADAPTER}: its other weights are elsewhere. Merge the adapter into the"
            " model, and use that folder."
        )
    pickles = sorted(path.name for pattern in _PICKLES for path in stage.glob(pattern))
    if pickles and not any(stage.glob("*.safetensors")):
        raise ExportError(
            f"{stage} has weights in {pickles[0]} alone, a pickle, which is not read; needed:"
            " model.safetensors. Save the model with it."
        )
