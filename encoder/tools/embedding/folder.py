"""The folder of an embedding model: sentence-transformers 2 to 5 read it, and give the vectors that were trained.

OUT/
    config.json, model.safetensors, tokenizer.json    the body
    modules.json, 1_Pooling/config.json, ...          how its states become a vector; by class names that every version knows
    result.json                                       settings, hashes of the data, numbers before and after
    README.md                                         a model card
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from encoder.base.errors import ConfigError, ExportError
from encoder.base.files import atomic_folder, files_below, native_path, write_json
from encoder.base.schema import differences, to_plain, to_yaml
from encoder.base.untrusted import read_json
from encoder.models.hf.card import CARD, Table, plain, table_text
from encoder.models.hf.quiet import quiet_transformers, without_bars
from encoder.models.hf.stages import MODULES, Embedding, write_sentence_transformers
from encoder.tools.embedding.config import EmbedConfig
from encoder.tools.embedding.models import embed, is_sparse

RESULT = "result.json"
TOLERANCE = 1e-5  # of a value of a vector, read back
SAMPLES = ["a text", "a second text, which is longer than the first one", "the third?"]
# what changes no number
_PLACES = ("name", "out", "start_from", "device", "tfidf")
# the names that 5.4 and later write, and those that every version reads
_SPARSE = {
    "Transformer": "sentence_transformers.sparse_encoder.models.MLMTransformer",
    "MLMTransformer": "sentence_transformers.sparse_encoder.models.MLMTransformer",
    "SpladePooling": "sentence_transformers.sparse_encoder.models.SpladePooling",
}


def identity_of(settings: EmbedConfig, hashes: Mapping[str, str]) -> dict[str, Any]:
    """What decides the numbers: settings, and hashes of the data and of the first weights."""
    plain_settings = to_plain(settings)
    kept = {key: value for key, value in plain_settings.items() if key not in _PLACES}
    data = kept["data"]
    kept["data"] = {key: value for key, value in data.items() if key not in ("beir", "pairs")}
    return {"settings": kept, "sha256": dict(hashes)}


def finished(out: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result that lies at `out`, of this very training; None where nothing is there. Raises ConfigError for another's."""
    if not (out / RESULT).is_file():
        return None
    found = read_json(out / RESULT, error=ConfigError, root=dict)
    changed = differences(found.get("identity"), dict(identity))
    if changed:
        key, old, new = changed[0]
        raise ConfigError(
            f"{out} is of another training: {key} is {old} there, {new} here. Name another out, or"
            " remove the folder."
        )
    return found


def write_folder(model: Any, settings: EmbedConfig, result: Mapping[str, Any]) -> None:
    """Writes settings.out, whole or not at all, and reads it back. Raises ExportError where it gives other vectors."""
    out = Path(settings.out)
    expected = embed(model, SAMPLES, prompt="query")
    earlier = None
    if (out / RESULT).is_file():
        earlier = read_json(out / RESULT, error=ConfigError, root=dict).get("files")
    with atomic_folder(out, mark=RESULT, ours=earlier) as part:
        if is_sparse(model):
            _write_sparse(model, part)
        else:
            _write_dense(model, part)
        _write_card(part, settings, result)
        found = embed(_read_back(part, model), SAMPLES, prompt="query")
        worst = float(np.abs(found - expected).max())
        if not worst <= TOLERANCE:
            raise ExportError(
                f"the folder, read back, gives vectors that differ by {worst:.1e}; needed: at most"
                f" {TOLERANCE:.0e}. Nothing was written. Use version 5 or 6 of"
                " sentence-transformers."
            )
        said = {**result, "read_back_difference": worst}
        write_json(part / RESULT, {**said, "files": [*files_below(part), RESULT]})


def _write_dense(model: Any, part: Path) -> None:
    body = model[0]
    with native_path(part) as path, without_bars():
        body.auto_model.save_pretrained(path, safe_serialization=True)
        body.tokenizer.save_pretrained(path)
    write_sentence_transformers(
        part,
        width=int(body.auto_model.config.hidden_size),
        max_tokens=int(model.max_seq_length or body.tokenizer.model_max_length),
        embedding=Embedding(
            pooling=pooling_of(model),
            normalized=any(type(stage).__name__ == "Normalize" for stage in model),
            prompts=model.prompts,
            default_prompt=model.default_prompt_name,
        ),
    )


def pooling_of(model: Any) -> str:
    """mean or cls. Raises ExportError for stages that we cannot write."""
    names = [type(stage).__name__ for stage in model]
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ExportError(
            f"start_from has the stages {', '.join(names)}; needed: Transformer, Pooling and at"
            " most Normalize. Set pooling: mean, which drops the others."
        )
    told = model[1].get_config_dict()
    # since 5.4 a word, before that a switch for each
    words = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    on = [word for key, word in words.items() if told.get(key)]
    mode = told.get("pooling_mode", on[0] if len(on) == 1 else None)
    if mode not in ("mean", "cls"):
        raise ExportError(f"start_from pools by {mode}; needed: mean or cls. Set pooling: mean.")
    return str(mode)


def _write_sparse(model: Any, part: Path) -> None:
    with native_path(part) as path, without_bars():
        model.save_pretrained(path, create_model_card=False, safe_serialization=True)
    modules = read_json(part / MODULES, error=ExportError, root=list)
    for module in modules:
        word = str(module["type"]).rpartition(".")[2]
        module["type"] = _SPARSE.get(word, module["type"])
    write_json(part / MODULES, modules)


def _read_back(part: Path, model: Any) -> Any:
    with native_path(part) as path, quiet_transformers():
        return type(model)(
            path, device=str(model.device), local_files_only=True, trust_remote_code=False
        )


def _write_card(part: Path, settings: EmbedConfig, result: Mapping[str, Any]) -> None:
    """README.md; the license is left to be chosen by whoever publishes it."""
    dense = settings.kind == "dense"
    measured = [
        [when, name, f"{value:.4f}"]
        for when in ("tfidf", "before", "after")
        for name, value in result.get(when, {}).items()
    ]
    results = [
        {
            "task": {"type": "information-retrieval"},
            "dataset": {"name": Path(settings.data.beir or "none").name, "type": "beir"},
            "metrics": [
                {"type": name, "value": value} for name, value in result.get("after", {}).items()
            ],
        }
    ]
    head = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity" if dense else "feature-extraction",
        "tags": ["sentence-transformers", "dense" if dense else "sparse", "tessera"],
        "model-index": [{"name": settings.name, "results": results if settings.data.beir else []}],
    }
    facts = {
        "pairs": f"{result['pairs']:,}",
        "negatives": settings.data.negatives.mine,
        "steps": f"{result['steps']:,} of {settings.batch_examples} pairs",
        "loss": settings.loss.name,
        "peak rate": f"{settings.lr.peak:g}",
        "seed": str(settings.seed),
    }
    cls = "SentenceTransformer" if dense else "SparseEncoder"
    text = "\n".join(
        [
            "---\n# license: name one before you publish, for example apache-2.0\n"
            f"{to_yaml(head)}---\n",
            f"# {plain(settings.name)}\n",
            "Vectors of texts for search, trained by sentence-transformers with Tessera's data and"
            " settings.\n",
            f'```python\nfrom sentence_transformers import {cls}\n\nmodel = {cls}("FOLDER")\n'
            'question = model.encode_query("a question?")\n'
            'answers = model.encode_document(["a passage", "another passage"])\n'
            "print(model.similarity(question, answers))\n```\n",
            table_text(Table(title="Training", head=("", ""), rows=list(facts.items()))),
            table_text(Table(title="Results", head=("", "metric", "value"), rows=measured)),
            "Of equal scores the wrong passage counts as the better one.\n",
        ]
    )
    (part / CARD).write_text(text, encoding="utf-8", errors="backslashreplace")
