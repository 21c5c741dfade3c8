"""Names of the Hugging Face hub: ORG/NAME, ORG/NAME@REVISION or hf://ORG/NAME, fetched to the hub's own cache on this machine.

    answerdotai/ModernBERT-base            ->  ~/.cache/huggingface/hub/.../snapshots/COMMIT

A folder or file of that name comes first. Only configs, tokenizers and weights are fetched, never code.
"""

from __future__ import annotations

import functools
import re
import socket
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from encoder.base.errors import UserError

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_NAME = re.compile(
    rf"(?P<scheme>hf:/{{1,2}})?(?P<id>{_PART}/{_PART})(?:@(?P<revision>[A-Za-z0-9][\w./-]*))?"
)
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
CONFIG = ("config.json", *TOKENIZER)
_SAFE = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
_OUR_FOLDERS = ("configs", "corpus", "hf", "runs", "shards", "weights")
_FILES = (".json", ".jsonl", ".pt", ".safetensors", ".yaml", ".yml")
# of httpx, requests and urllib3, by name: none of them is imported for this
_NO_CONNECTION = ("ConnectError", "ConnectTimeout", "ConnectionError", "NewConnectionError")
# of all that are safe, as the hub's library takes patterns
_SAFE_PATTERNS = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
)
# taken only where there is nothing else; read as tensors alone
PICKLED = "pytorch_model.bin"


@dataclass(frozen=True, kw_only=True)
class HubName:
    """A model on the hub."""

    id: str
    revision: str | None

    def __str__(self) -> str:
        if self.revision:
            return f"{self.id}@{self.revision}"
        return self.id


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A model of the hub as it lies on this machine."""

    folder: Path
    commit: str


def parse_hub_name(text: str | Path) -> HubName | None:
    """The name that a text is, unless it is a file or folder here, or a path into one. Raises nothing.

    `runs/base` with a folder `runs` is a path, and so is what lies in a folder that our documents
    name (weights/wider) or is called like a file (corpus/tokenizer.json). hf://runs/base is a name
    in any case.
    """
    # the hub allows neither .. nor -- in a name
    match = _NAME.fullmatch(str(text))
    if match is None or ".." in match["id"] or "--" in match["id"]:
        return None
    if not match["scheme"]:
        path = Path(str(text))
        # what is here, or begins with a folder that is here, is a path
        if path.exists() or path.is_symlink() or Path(path.parts[0]).exists():
            return None
        if path.parts[0] in _OUR_FOLDERS or path.suffix in _FILES:
            return None
    return HubName(id=match["id"], revision=match["revision"])


def fetch_model(
    name: HubName, *, weights: bool = True, error: type[UserError] = UserError
) -> Fetched:
    """Fetches config and tokenizer, and the weights where asked; on a machine without network, from the cache alone.

    Raises `error`, with the way for machines without network.
    """
    found = _asked_once(name, weights)
    if isinstance(found, str):
        raise error(found)
    return found


def fetch_tokenizer(name: HubName, *, error: type[UserError] = UserError) -> Path:
    """The tokenizer.json of a model on the hub. Raises `error`."""
    path = fetch_model(name, weights=False, error=error).folder / "tokenizer.json"
    if not path.is_file():
        raise error(
            f"{name} on the Hugging Face hub has no tokenizer.json. Name a model that has one, or "
            "a file."
        )
    return path


@functools.lru_cache(maxsize=32)
def _asked_once(name: HubName, weights: bool) -> Fetched | str:
    """What was fetched, or why it was not: a process asks a name once."""
    try:
        return _fetched(name, weights)
    except UserError as why:
        return str(why)


def _fetched(name: HubName, weights: bool) -> Fetched:
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        # asked for the list of files, so that no more than what is read is fetched
        info = huggingface_hub.HfApi().model_info(name.id, revision=name.revision, timeout=20)
    except GatedRepoError:
        raise UserError(
            f"{name} on the Hugging Face hub is given only to those who accepted its terms. Accept "
            "them on its page, then "
            "log in here: hf auth login"
        ) from None
    except RevisionNotFoundError:
        raise UserError(
            f"{name.id} on the Hugging Face hub has no revision {name.revision}. Leave it out, or "
            "name a branch, a tag or "
            "a commit."
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name} is no file or folder here, and the Hugging Face hub has no model of that "
            "name, or it is private. "
            "Mend the name, or log in: hf auth login"
        ) from None
    except Exception as why:
        # the hub's library and its network each raise their own kinds
        return _from_cache(name, weights, why)

    patterns = _wanted([s.rfilename for s in info.siblings or []], weights)
    try:
        folder = huggingface_hub.snapshot_download(
            name.id, revision=name.revision, allow_patterns=patterns
        )
    except LocalEntryNotFoundError as why:
        return _from_cache(name, weights, why)
    except OSError as why:
        # a file of the cache; errors of the network's libraries have neither name nor number
        if why.filename or why.errno:
            raise UserError(
                f"{name} cannot be written to the cache of the hub ({why}). Make room, or set "
                "HF_HOME to another "
                "folder."
            ) from why
        _no_network(name, why)
    except Exception as why:
        _no_network(name, why)
    return Fetched(folder=Path(folder), commit=Path(folder).name)  # snapshots/COMMIT


def _wanted(files: list[str], weights: bool) -> list[str]:
    """Of a model's files those that are read: at the top, no code, safetensors before pickles."""
    wanted = [f for f in files if f in CONFIG]
    if weights:
        safe = [f for f in files if _SAFE.fullmatch(f)]
        wanted += safe or [f for f in files if f == PICKLED]
    return wanted


def _from_cache(name: HubName, weights: bool, why: Exception) -> Fetched:
    """What an earlier time fetched, whole."""
    import huggingface_hub

    try:
        # of a folder that holds less than the whole model, version 2 wants to know what was fetched
        folder = Path(
            huggingface_hub.snapshot_download(
                name.id,
                revision=name.revision,
                local_files_only=True,
                allow_patterns=[*CONFIG, *(_SAFE_PATTERNS if weights else ())],
            )
        )
    except Exception:  # whatever the library raises: the network is what is missing
        _no_network(name, why)

    held = [path.name for path in folder.iterdir()]
    if (
        "config.json" not in held
        or weights
        and not any(_SAFE.fullmatch(f) or f == PICKLED for f in held)
    ):
        _no_network(name, why)
    return Fetched(folder=folder, commit=folder.name)


def cached_commit(dataset: str, revision: str) -> str | None:
    """The commit that a branch or tag of a dataset was when its files were last asked for here; None: they never were."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=dataset, repo_type="dataset")
    path = Path(constants.HF_HUB_CACHE, folder, "refs", revision)
    return path.read_text().strip() if path.is_file() else None


def _no_network(name: HubName, why: Exception) -> NoReturn:
    revision = ""
    if name.revision:
        revision = f" --revision {name.revision}"
    folder = name.id.partition("/")[2]
    raise UserError(
        f"{name} is no file or folder here, and the Hugging Face hub cannot be asked from this"
        f" machine ({reason_in_short(why)}). Where there is a network: hf download"
        f" {name.id}{revision} --local-dir {folder}, copy that folder here and name it."
    ) from why


def reason_in_short(error: BaseException) -> str:
    """Why the hub gave nothing: `no network` where that is all, else the library's own words, cut at 120 letters."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, (socket.gaierror, ConnectionError)):
            return "no network"
        if type(link).__name__ in _NO_CONNECTION:
            return "no network"
        link = link.__cause__ or link.__context__
    return textwrap.shorten(str(error), 120, placeholder=" ...") or type(error).__name__
