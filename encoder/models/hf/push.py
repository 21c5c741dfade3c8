"""An export goes to the Hugging Face hub: a folder that was proven, whole and as it was proven."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from encoder.base.errors import ExportError
from encoder.base.untrusted import read_json
from encoder.models.hf.card import CARD
from encoder.models.hf.write import FILES, PROOF, edited_since

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
LOGIN = "Log in (hf auth login), or put a token with write access into the environment as HF_TOKEN."


def push_export(
    folder: Path, repository: str, *, private: bool, revision: str | None, api: Any = None
) -> list[str]:
    """Uploads an export and returns lines for people. Raises ExportError; no message holds the token.

    folder: what tessera export wrote; its model card may have been edited since.
    repository: ORG/NAME, made where it is not there yet.
    private: whether a new repository can be seen by its owners alone.
    revision: a branch, made where it is not there yet; default: main.
    api: huggingface_hub.HfApi, or what stands for it in a test.
    """
    import huggingface_hub

    if not _NAME.fullmatch(repository):
        raise ExportError(f"{repository!r} is no name on the hub; needed: ORG/NAME.")
    names = _proven_files(folder)
    token = huggingface_hub.get_token()
    if not token:
        raise ExportError(f"no token for the Hugging Face hub is here. {LOGIN}")
    api = api or huggingface_hub.HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=str(folder),
            revision=revision,
            allow_patterns=names,
            commit_message="Export by Tessera",
        )
    except Exception as error:
        # the hub's library and its network each raise kinds of their own, which may hold the token
        raise ExportError(_told(error, repository, token)) from None
    lines = [
        f"pushed {folder} to {repository}: {len(names)} files, {getattr(done, 'commit_url', done)}"
    ]
    if not re.search(r"^license:", (folder / CARD).read_text(encoding="utf-8"), re.MULTILINE):
        lines.append(f"{folder / CARD} names no license yet: put one there and push again")
    return lines


def _proven_files(folder: Path) -> list[str]:
    if not (folder / PROOF).is_file():
        raise ExportError(
            f"{folder} has no {PROOF}, so it is no proven export. Make one: tessera export SOURCE "
            "OUT"
        )
    proof = read_json(folder / PROOF, error=ExportError, root=dict)
    names = proof.get(FILES)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ExportError(
            f"{folder} was exported before model cards were. Export again: tessera export SOURCE "
            "OUT"
        )
    # the card is a person's to edit; anything else was proven as it was
    if edited := [name for name in edited_since(folder, proof) if name != CARD]:
        raise ExportError(
            f"{folder / edited[0]} is not what was proven. Export again: tessera export SOURCE OUT"
        )
    lost = [name for name in (CARD, *names) if not (folder / name).is_file()]
    if lost:
        raise ExportError(f"{folder} lacks {lost[0]}. Export again: tessera export SOURCE OUT")
    return [*names, PROOF]


def _told(error: Exception, repository: str, token: str) -> str:
    """Why it was not pushed, without the token."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = " ".join(str(error).replace(token, "TOKEN").split())[:200] or type(error).__name__
    if status in (401, 403):
        return (
            f"the Hugging Face hub does not let this token write to {repository} ({said}). {LOGIN}"
        )
    return (
        f"{repository} was not pushed, the Hugging Face hub cannot be reached or refuses ({said}). "
        f"Where there is a network: hf upload {repository} FOLDER"
    )
