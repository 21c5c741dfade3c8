"""A folder as a model of sentence-transformers, on one device, without code of the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from encoder.base.errors import ConfigError, ExportError
from encoder.base.files import native_path
from encoder.models.hf.quiet import quiet_transformers
from encoder.models.hf.stages import check_stages, default_prompt_of, prompts_of
from encoder.tools.embedding.config import EmbedConfig

SPARSE_AT_ONCE = 512  # texts: 62 MB of a vocabulary of 30,522


def device_of(settings: EmbedConfig) -> str:
    """cpu or cuda. Raises ConfigError where there is no CUDA."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, and torch sees none. Use device: cpu.")
    if settings.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return settings.device


def open_start(folder: Path, settings: EmbedConfig) -> Any:
    """A SentenceTransformer or a SparseEncoder with the settings' pooling, prompts and longest text. Raises ExportError."""
    import transformers

    check_stages(folder)
    device = device_of(settings)
    # parameters that the folder lacks, as a pooler that is not asked, are drawn
    transformers.set_seed(settings.seed)
    try:
        with native_path(folder) as path, quiet_transformers():
            if settings.kind == "sparse":
                model = _sparse(path, device)
            else:
                model = _dense(path, folder, settings, device)
    except Exception as error:  # whatever its version raises
        why = " ".join(str(error).split())[:200]
        raise ExportError(
            f"{folder} cannot be read by sentence-transformers ({why}). Export again with tessera"
            " export."
        ) from error
    if settings.data.max_tokens:
        longest = model.max_seq_length or settings.data.max_tokens
        if settings.data.max_tokens > longest:
            raise ConfigError(
                f"data.max_tokens {settings.data.max_tokens:,} is more than the model's"
                f" {longest:,}. Lower it."
            )
        model.max_seq_length = settings.data.max_tokens
    # their model card's examples are not shown
    model.model_card_data.widget = [{"text": ""}]
    model.prompts = _prompts(folder, settings)
    # training and evaluation name their prompts: this one is for who encodes without a name
    model.default_prompt_name = _default_prompt(folder, settings)
    return model


def _prompts(folder: Path, settings: EmbedConfig) -> dict[str, str]:
    """Those of the folder, and over them those of the settings."""
    asked = {"query": settings.prompts.query, "document": settings.prompts.document}
    given = {name: text for name, text in asked.items() if text is not None}
    return {"query": "", "document": "", **prompts_of(folder), **given}


def _default_prompt(folder: Path, settings: EmbedConfig) -> str | None:
    """The settings' one, else that of the folder."""
    asked = settings.prompts.default
    if asked is None:
        return default_prompt_of(folder)
    return None if asked == "none" else asked


def _dense(path: str, folder: Path, settings: EmbedConfig, device: str) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling

    told: dict[str, Any] = {
        "device": device,
        "local_files_only": True,
        "trust_remote_code": False,
        "model_kwargs": {"use_safetensors": True, "dtype": torch.float32},
    }
    model = SentenceTransformer(path, **told)
    if settings.pooling:
        body = model[0]
        pooling = Pooling(model.get_sentence_embedding_dimension(), settings.pooling)
        model = SentenceTransformer(modules=[body, pooling], device=device)
    return model


def _sparse(path: str, device: str) -> Any:
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder.models import MLMTransformer, SpladePooling

    of_disk = {"local_files_only": True, "trust_remote_code": False}
    body = MLMTransformer(
        path,
        model_args={"use_safetensors": True, "dtype": torch.float32, **of_disk},
        config_args={**of_disk},
        tokenizer_args={**of_disk},
    )
    return SparseEncoder(modules=[body, SpladePooling(pooling_strategy="max")], device=device)


def embed(
    model: Any, texts: list[str], *, prompt: str, precision: str = "fp32", batch: int = 32
) -> Any:
    """Vectors of texts, on the CPU: [N, C] numpy of length 1, or a scipy matrix [N, V] of a sparse model.

    model: of open_start
    texts: N
    prompt: query or document
    precision: fp32, or bf16 for autocast
    batch: texts in one forward, of like lengths
    """
    told = {"prompt_name": prompt, "batch_size": batch, "show_progress_bar": False}
    model.eval()
    cast = torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16")
    with cast:
        if is_sparse(model):
            return _sparse_rows(model, texts, told)
        x_NC = model.encode(texts, convert_to_tensor=True, **told)
    return F.normalize(x_NC.float(), dim=-1).cpu().numpy()


def _sparse_rows(model: Any, texts: list[str], told: dict[str, Any]) -> Any:
    """A few texts at a time: between two matrices a row has a value for each token of the vocabulary."""
    from scipy.sparse import csr_matrix, vstack

    parts = []
    for start in range(0, len(texts), SPARSE_AT_ONCE):
        some = texts[start : start + SPARSE_AT_ONCE]
        x_NV = model.encode(some, convert_to_sparse_tensor=False, **told)
        parts.append(csr_matrix(x_NV.float().cpu().numpy()))
    return vstack(parts).tocsr()


def is_sparse(model: Any) -> bool:
    """Whether it is a SparseEncoder."""
    from sentence_transformers import SparseEncoder

    return isinstance(model, SparseEncoder)


def unit(x_NC: np.ndarray) -> np.ndarray:
    """The vectors at length 1."""
    return x_NC / np.maximum(np.linalg.norm(x_NC, axis=1, keepdims=True), 1e-12)


def vector_scores(questions: Any, passages: Any) -> Any:
    """Dot products of vectors, for ranking.rank; of vectors of length 1 they are cosines."""

    def score(start: int, end: int) -> np.ndarray:
        found = questions[start:end] @ passages.T
        return np.asarray(found.todense() if hasattr(found, "todense") else found)

    return score
