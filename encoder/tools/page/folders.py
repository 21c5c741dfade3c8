"""What a folder is, by its config.json and modules.json, and its model, on the CPU in fp32.

    ...ForMaskedLM, ...ForPreTraining  fill_mask       ...ForTokenClassification   tags
    ...ForSequenceClassification       classify        ...ForQuestionAnswering     span
    ...ForMultipleChoice               choice          a body alone                similarity
    a discriminator, an XLNet          similarity: no word is to be filled in

Vectors of a folder with modules.json are those of sentence-transformers, of another one means over tokens.
No code of a folder is run, no pickle is read, and nothing is fetched: transformers is told so, and of sentence-transformers
the stages are read that encoder/models/hf/stages.py lists.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from encoder.base.command import as_typed, importing
from encoder.base.errors import ExportError
from encoder.base.files import native_path
from encoder.base.untrusted import read_json
from encoder.models.hf.quiet import quiet_transformers
from encoder.models.hf.stages import MODULES, check_stages

CONFIG = "config.json"
# the ending of an architecture -> kind, transformers' class
ARCHITECTURES = {
    # their heads tell what was replaced, and what comes next in an order: bodies are left
    "ElectraForPreTraining": ("similarity", "AutoModel"),
    "XLNetLMHeadModel": ("similarity", "AutoModel"),
    "ForMaskedLM": ("fill_mask", "AutoModelForMaskedLM"),
    "ForPreTraining": ("fill_mask", "AutoModelForMaskedLM"),
    "ForSequenceClassification": ("classify", "AutoModelForSequenceClassification"),
    "ForTokenClassification": ("tags", "AutoModelForTokenClassification"),
    "ForQuestionAnswering": ("span", "AutoModelForQuestionAnswering"),
    "ForMultipleChoice": ("choice", "AutoModelForMultipleChoice"),
    "Model": ("similarity", "AutoModel"),
}
MOST_TOKENS = 8192  # of a model that names no longest text, as one with relative positions
KINDS = tuple(dict.fromkeys(kind for kind, _ in ARCHITECTURES.values()))


@dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """A model that can be asked."""

    name: str  # for people
    kind: str  # one of KINDS
    # transformers' class of that kind, or a SentenceTransformer
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    max_tokens: int  # of a text, special tokens included
    architecture: str  # a class's name
    sentence_transformers: bool = False

    @property
    def parameters(self) -> int:
        """How many values the model has."""
        return sum(p.numel() for p in self.model.parameters())

    def labels(self, count: int) -> list[str]:
        """The names of that many outputs; LABEL_k for one that the folder leaves out."""
        names = self.model.config.id2label or {}
        return [str(names.get(k, f"LABEL_{k}")) for k in range(count)]


def is_hf_folder(folder: Path) -> bool:
    """Whether transformers or sentence-transformers could read it."""
    return (folder / CONFIG).is_file() or (folder / MODULES).is_file()


def kind_of(folder: Path) -> tuple[str, str, str]:
    """Kind, class of transformers and architecture of a folder. Raises ExportError."""
    if not (folder / CONFIG).is_file():
        # sentence-transformers may have the body in a folder below
        if (folder / MODULES).is_file():
            return "similarity", "AutoModel", ""
        raise ExportError(
            f"{folder} holds no {CONFIG}; needed: a folder written by tessera export."
        )
    found = read_json(folder / CONFIG, error=ExportError, root=dict).get("architectures")
    architecture = str(found[0]) if isinstance(found, list) and found else ""
    for ending, (kind, class_name) in ARCHITECTURES.items():
        if architecture.endswith(ending):
            return kind, class_name, architecture
    known = ", ".join(f"...{ending}" for ending in ARCHITECTURES)
    raise ExportError(
        f"{folder / CONFIG} names the architecture {architecture or 'of nothing'}; needed: one of"
        f" {known}."
    )


def open_folder(folder: Path, *, name: str = "", kind: str | None = None) -> Opened:
    """Reads tokenizer and model.

    folder: as tessera export writes it, or from elsewhere
    name: for people; default: the folder's
    kind: the one that is needed; `similarity` is had of any

    Raises ExportError.
    """
    own, class_name, architecture = kind_of(folder)
    if kind not in (None, own, "similarity"):
        raise ExportError(
            f"{folder} is a model for {own} ({architecture}); needed: one for {kind}. Look at it"
            f" with {as_typed('serve', folder)}"
        )
    shown = name or folder.resolve().name
    kind = kind or own
    if kind == "similarity":
        class_name = "AutoModel"
        if (folder / MODULES).is_file():
            return _sentence_transformer(folder, shown)

    with importing():
        import torch  # noqa: F401
        import transformers

    try:
        # transformers imports a family's model where it is first asked for
        with native_path(folder) as path, quiet_transformers(), importing():
            of_disk = {"local_files_only": True, "trust_remote_code": False}
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, **of_disk)
            model = _model(getattr(transformers, class_name), path, of_disk)
            longest = longest_text(model, tokenizer.model_max_length)
    except Exception as error:
        # transformers, tokenizers and safetensors each raise their own kinds
        raise _unreadable(folder, error) from error
    return Opened(
        name=shown,
        kind=kind,
        model=model,
        tokenizer=tokenizer,
        max_tokens=longest,
        architecture=type(model).__name__,
    )


def longest_text(model: Any, of_tokenizer: int) -> int:
    """How many tokens a model of transformers takes: as many as its tokenizer says, and as it has positions.

    BERT's 512 rows of positions are for 512 tokens. RoBERTa's 514 are, too: its first text token has the position
    padding_idx + 1, which is 2.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    # XLNet says -1
    if not isinstance(positions, int) or positions < 1:
        return min(of_tokenizer, MOST_TOKENS)
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            positions -= padding + 1
            break
    return min(of_tokenizer, positions)


def _model(cls: Any, path: str, of_disk: dict[str, bool]) -> Any:
    """From safetensors alone, without dropout. Raises ExportError where weights of it are missing."""
    import torch

    told = {**of_disk, "dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    try:
        model, notes = cls.from_pretrained(path, attn_implementation="sdpa", **told)
    except ValueError as error:
        # a family without torch's attention, such as DeBERTa
        if "scaled_dot_product" not in str(error):
            raise
        model, notes = cls.from_pretrained(path, attn_implementation="eager", **told)
    # BERT's pooler is not asked for states
    missing = sorted(name for name in notes["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ExportError(f"it lacks {', '.join(missing[:3])}")
    return model.eval()


def _sentence_transformer(folder: Path, name: str) -> Opened:
    check_stages(folder)
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ExportError(
            f"{folder} is a model of sentence-transformers, which is not installed. Install it:"
            " pip install -e '.[embed]'"
        ) from error
    try:
        with native_path(folder) as path, quiet_transformers():
            model = SentenceTransformer(
                path,
                device="cpu",
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True},
            )
    except Exception as error:  # whatever its version raises
        raise _unreadable(folder, error) from error
    return Opened(
        name=name,
        kind="similarity",
        model=model.eval(),
        tokenizer=model.tokenizer,
        max_tokens=int(model.max_seq_length or model.tokenizer.model_max_length),
        architecture="SentenceTransformer",
        sentence_transformers=True,
    )


def _unreadable(folder: Path, error: Exception) -> ExportError:
    why = " ".join(str(error).split())[:200]
    return ExportError(
        f"{folder} cannot be read as a model ({why}). Export again with tessera export."
    )
