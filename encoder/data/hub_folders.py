"""What a dataset names is looked at before `datasets` reads it: plain rows, and of a copy here files inside its folder.

A README.md, a state.json and symbolic links come with a copy, and may name any file of this machine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any

from encoder.data.labelled import DataError

# readers of `datasets` that parse rows and run nothing; cache: what one of them has read before
PLAIN = ("arrow", "cache", "conll", "csv", "json", "parquet", "text")
PICKLES = (".pickle", ".pkl")
# beside the Arrow files of one dataset that was saved
SAVED = "state.json"


def check_card(folder: Path) -> None:
    """Its card names no address: `datasets` would ask there before its files can be looked at. Raises DataError."""
    import huggingface_hub
    import yaml
    from datasets import config

    found: list[Any] = []
    card = folder / config.REPOCARD_FILENAME
    if card.is_file():
        found.append(huggingface_hub.DatasetCard.load(card).data.to_dict())
    other = folder / config.REPOYAML_FILENAME
    if other.is_file():
        found.append(yaml.safe_load(other.read_text(encoding="utf-8")))
    for settings in filter(None, found):
        if "://" in json.dumps(settings.get("configs"), default=str):
            raise DataError(
                f"configs in the README.md of {folder} name an address (://); needed: files inside"
                " of that folder. Put them there, and name them in configs."
            )


def check_reader(builder: Any, dataset: str, *, here: bool) -> None:
    """Plain rows are read, and of a folder here no file outside of it. Raises DataError.

    builder: of `datasets`, which has read nothing yet
    dataset: a name of the hub, or a folder
    here: whether it is a folder of this machine
    """
    if builder.name not in PLAIN:
        raise DataError(
            f"dataset {dataset} would be read as {builder.name}; needed: {', '.join(PLAIN)}. Write"
            " its rows as Parquet."
        )
    splits = builder.config.data_files or {}
    files = [str(file) for files in splits.values() for file in files]
    pickled = [file for file in files if file.lower().endswith(PICKLES)]
    if pickled:
        raise DataError(
            f"dataset {dataset} has the file {pickled[0]}; needed: no pickle, which can run code."
            " Write its rows as Parquet."
        )
    if here:
        _check_inside(files, Path(dataset))


def check_saved(folder: Path, root: Path) -> None:
    """The files that a saved dataset consists of lie inside of `root`. Raises DataError; ValueError, KeyError for no such file."""
    state = json.loads((folder / SAVED).read_text(encoding="utf-8"))
    _check_inside([os.path.join(folder, part["filename"]) for part in state["_data_files"]], root)


def files_digest(root: Path) -> str:
    """16 hex digits of where a folder lies and of its files' names, sizes and times: what has changed has another one."""
    digest = blake2b(os.path.realpath(root).encode(), digest_size=8)
    for path in sorted(root.rglob("*")):
        if path.is_file():
            stat = path.stat()
            said = f"\n{path.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}"
            digest.update(said.encode("utf-8", errors="surrogateescape"))
    return digest.hexdigest()


def _check_inside(files: Iterable[str], root: Path) -> None:
    places = _places_of(root)
    for file in files:
        real = Path(os.path.realpath(file))
        is_path = "://" not in file and "::" not in file
        if not is_path or not any(real.is_relative_to(place) for place in places):
            raise DataError(
                f"dataset {root} names the file {file}, which is no file inside of that folder;"
                " needed: files inside. Copy it there, and mend what names it (README.md or"
                f" {SAVED})."
            )


def _places_of(root: Path) -> list[Path]:
    """The folder; of a snapshot in the cache of the hub also the files that its links lead to."""
    real = Path(os.path.realpath(root))
    if real.parent.name == "snapshots":
        return [real, real.parent.parent / "blobs"]
    return [real]
