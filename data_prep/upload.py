"""`data-prep upload`: verified shard folders to object storage, the card last."""

from __future__ import annotations

import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data_prep.verify import find_shard_folders, verify_folder
from encoder.base.errors import ShardError, UserError
from encoder.base.log import say
from encoder.base.untrusted import inside
from encoder.data.shard_format import (
    CARD,
    HASHES,
    INDEX,
    LENGTHS,
    SENTENCES,
    TOKENIZER,
    read_index,
    stored_info,
)

THREADS = 8  # uploads at a time
TRIES = 3  # of each file


def upload(folder: Path, remote: str) -> None:
    """Copy every shard folder at or below `folder` to the same place below `remote`. Raises ShardError for a damaged one,
    before any of it is copied, and UserError for a place that cannot be written."""
    if not urlsplit(remote).scheme and os.path.realpath(remote) == os.path.realpath(folder):
        raise UserError(f"{remote} is the folder that is to be copied; needed: another place.")
    found = find_shard_folders([folder])
    uploader = _uploader(folder, remote)
    for shards in found:
        card, count = verify_folder(shards)
        names = [stored_info(entry)["basename"] for entry in read_index(shards)] + [
            INDEX,
            LENGTHS,
            TOKENIZER,
        ]
        names += [HASHES] if card.hashes_sha256 else []
        names += [SENTENCES] if card.sentences_sha256 else []
        # what was verified is what is copied, and no file of elsewhere
        for name in (*names, CARD):
            inside(shards, name, where=shards / INDEX, error=ShardError)
        place = shards.relative_to(folder)
        paths = [str(place / name) for name in names]
        try:
            # a list, so that the first error is raised here
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(uploader.upload_file, paths))
            # without its card a folder counts as unfinished
            uploader.upload_file(str(place / CARD))
        except Exception as error:
            # as many kinds as there are clients below streaming's uploaders
            raise UserError(
                f"{shards} could not be copied to {remote}:"
                f" {' '.join(str(error).split())[:200].rstrip('.')}. Run the same command again."
            ) from error
        say(f"{shards} -> {remote.rstrip('/')}/{place.as_posix()}: {count:,} shards")


class _Copier:
    """An uploader to another disk."""

    def __init__(self, folder: Path, remote: Path) -> None:
        self._folder, self._remote = folder, remote

    def upload_file(self, name: str) -> None:
        """One file, under its name only when it is whole."""
        path = self._remote / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        shutil.copyfile(self._folder / name, part)
        os.replace(part, path)


def _uploader(folder: Path, remote: str) -> Any:
    """streaming's uploader for the remote's scheme, reading from `folder`; for a path our own. Raises UserError."""
    scheme = urlsplit(remote).scheme
    if not scheme:
        return _Copier(folder, Path(remote))
    try:
        from streaming.base.storage.upload import UPLOADERS, CloudUploader
    except ModuleNotFoundError as error:
        raise UserError(
            f"{remote} is written by mosaicml-streaming, which is not here ({error.name}). Install"
            " the extra: pip install 'tessera-encoders[remote]'."
        ) from error
    if scheme not in UPLOADERS:
        raise UserError(
            f"{remote} begins with {scheme}://; needed: one of"
            f" {', '.join(f'{s}://' for s in UPLOADERS if s)}, or a path."
        )
    # HFUploader puts files into the repository's root, wherever the path points
    if scheme == "hf":
        # hf: | (nothing) | datasets | ORGANISATION | NAME
        if len(remote.rstrip("/").split("/")) != 5:
            raise UserError(
                f"{remote} is not hf://datasets/ORGANISATION/NAME, which is all that an upload to"
                " hf can name."
            )
        remote = f"{remote.rstrip('/')}/"
    # it warns that `folder` holds files
    logging.getLogger("streaming.base.storage.upload").setLevel(logging.ERROR)
    try:
        uploader = CloudUploader.get(remote, keep_local=True, retry=TRIES)
    except Exception as error:
        raise UserError(
            f"{remote} cannot be written to: {' '.join(str(error).split())[:200].rstrip('.')}. "
            "Check the name and the credentials of its client."
        ) from error
    # it made a temporary folder of its own, which is empty; files are read from ours
    os.rmdir(uploader.local)
    uploader.local = str(folder)
    return uploader
