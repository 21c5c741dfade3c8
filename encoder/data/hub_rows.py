"""Rows of a dataset of the Hugging Face hub, or of its copy on this machine: a split is read as a file of rows is.

    nyu-mll/glue           fetched once to the cache of `datasets`, and read from there without a network
    copies/glue            the same files here, as `hf download --repo-type dataset` lays them
    saved/rte              what `DatasetDict.save_to_disk` wrote, or `Dataset.save_to_disk`

Code from the hub is never run: `datasets` reads files of rows alone, of a folder those inside (hub_folders.py). The commit
that was read is in the name of the rows.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoder.base.errors import ConfigError, nearest
from encoder.base.hub import cached_commit, reason_in_short
from encoder.base.log import warn_once
from encoder.base.schema import PathText
from encoder.data.hub_folders import SAVED, check_card, check_reader, check_saved, files_digest
from encoder.data.labelled import DataError, Rows

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """A dataset of the Hugging Face hub, or its copy on this machine: train, dev and test then name its splits."""

    # organisation/name; or a folder: the same files, or what save_to_disk wrote
    dataset: PathText
    config: str | None = None  # the subset
    # of the dataset's files, in place of a config: converted repositories have one for each subset
    folder: str | None = None
    # branch, tag or commit on the hub; which commit it was, the run says; default: main
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.config and self.folder:
            raise ConfigError("hub has both config and folder; needed: one of them.")

    @property
    def is_here(self) -> bool:
        """Whether it is a folder of this machine, which comes before a name of the hub."""
        return os.path.isdir(self.dataset)

    @property
    def subset(self) -> str:
        """Its config or folder."""
        return self.config or self.folder or ""

    def check(self) -> None:
        """What can be seen without a network. Raises ConfigError."""
        if not self.is_here and not _NAME.fullmatch(self.dataset):
            raise ConfigError(
                f"data.hub.dataset {self.dataset} is no folder here, and no name of the hub; needed:"
                " organisation/name, such as nyu-mll/glue, or a folder."
            )
        if self.revision and self.is_here:
            raise ConfigError(
                f"data.hub.revision has no effect on {self.dataset}, a folder of this machine. Leave"
                " it out, or name the dataset of the hub."
            )


def read_split(source: HubConfig, split: str, columns: Sequence[str]) -> Rows:
    """These columns of all rows of a split, each once, with the names of their classes. Raises DataError.

    source: the dataset
    split: train, validation, ...
    columns: that the dataset must have
    """
    columns = [*dict.fromkeys(columns)]
    opened = _open(source)
    if split not in opened.splits:
        raise DataError(f"{opened.name} has no split {split}. {nearest(split, [*opened.splits])}")
    place = f"{opened.name} {split}"
    try:
        rows = opened.splits[split]()
        for name in columns:
            if name not in rows.column_names:
                raise DataError(f"{place} has no column {name}. {nearest(name, rows.column_names)}")
        table = rows.select_columns(columns).with_format("arrow")[:]
        found = {name: table.column(name).to_pylist() for name in columns}
    except DataError:
        raise
    except Exception as error:
        raise _unreadable(source, place, error) from error
    if not len(rows):
        raise DataError(f"{place} has no rows; needed: at least one.")
    return Rows(
        path=Path(place),
        columns=found,
        word="row",
        numbers=[*range(1, len(rows) + 1)],
        classes=_classes(rows.features, columns),
    )


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A dataset whose splits are known."""

    name: str  # with commit and subset
    splits: Mapping[str, Callable[[], Any]]  # name -> what gives a `datasets.Dataset`


# a run reads several splits, and a sweep many times
@functools.lru_cache(maxsize=8)
def _open(source: HubConfig) -> _Opened:
    """Fetched, if it must be. Raises DataError."""
    import datasets

    datasets.disable_progress_bars()
    # it prints errors that are raised, too; and five tries in 23 s, each in 500 characters
    datasets.logging.set_verbosity(logging.CRITICAL)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        if saved := _saved_splits(source):
            return _Opened(name=_name(source), splits=saved)
        builder = _builder(source)
        commit = None if source.is_here else str(builder.hash)
        if commit and builder.name == "cache":
            _check_cached(source, commit)
        builder.download_and_prepare()
    except DataError:
        raise
    except Exception as error:
        # as many kinds as there are libraries between here and the hub
        raise _unreadable(source, f"dataset {source.dataset}", error) from error
    names = [str(name) for name in builder.info.splits or {}]
    splits = {name: functools.partial(builder.as_dataset, split=name) for name in names}
    return _Opened(name=_name(source, commit), splits=splits)


def _builder(source: HubConfig) -> Any:
    """What `datasets` will read the rows with, and no more than rows. Raises DataError."""
    import datasets

    here = source.is_here
    place = source.dataset
    cache: str | None = None
    if here:
        check_card(Path(place))
        # one for each state of the files: with a README.md `datasets` looks at their names alone
        cache = os.path.join(datasets.config.HF_DATASETS_CACHE, f"here-{files_digest(Path(place))}")
        # absolute: a bare pandas, json, ... is a reader of `datasets`, of any file around
        place = os.path.abspath(place)
    builder = datasets.load_dataset_builder(
        place,
        source.config,
        data_dir=source.folder,
        cache_dir=cache,
        revision=None if here else source.revision,
    )
    check_reader(builder, source.dataset, here=here)
    return builder


def _saved_splits(source: HubConfig) -> dict[str, Callable[[], Any]]:
    """Of a folder of save_to_disk: a folder a split, or one dataset, which counts as train; none of another folder."""
    folder = Path(source.dataset, source.subset)
    folders = {"train": folder}
    if not (folder / SAVED).is_file():
        folders = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{SAVED}"))}
    return {
        name: functools.partial(_load_saved, path, root=Path(source.dataset))
        for name, path in folders.items()
    }


def _load_saved(folder: Path, *, root: Path) -> Any:
    import datasets

    check_saved(folder, root)
    # datasets.load_from_disk would follow a dataset_dict.json to splits anywhere
    return datasets.Dataset.load_from_disk(os.path.abspath(folder))


def _classes(features: Mapping[str, Any], columns: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Names of the classes of columns of classes, or of lists of them."""
    found = {}
    for name in columns:
        feature = getattr(features[name], "feature", features[name])
        if names := getattr(feature, "names", None):
            found[name] = tuple(names)
    return found


def _name(source: HubConfig, commit: str | None = None) -> str:
    """nyu-mll/glue@bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c rte."""
    at = f"@{commit}" if commit else ""
    return f"{source.dataset}{at} {source.subset}".rstrip()


def _check_cached(source: HubConfig, commit: str) -> None:
    """What the cache has of a dataset, where the hub gave nothing, may be of another commit than asked. Raises DataError."""
    asked = source.revision or "main"
    if asked == "main":
        warn_once(
            f"the hub gave nothing: rows of dataset {source.dataset} are those of commit {commit} in"
            f" the cache of this machine. data.hub.revision={commit} asks for these"
        )
        return
    is_it = _COMMIT.fullmatch(asked) and commit.startswith(asked)
    if not is_it and cached_commit(source.dataset, asked) != commit:
        raise DataError(
            f"dataset {source.dataset} is in the cache of this machine at {commit}, not at revision"
            f" {asked} as far as is known here, and the hub gave none. Set"
            f" data.hub.revision={commit}, or go on where there is a network."
        )


def _unreadable(source: HubConfig, place: str, error: Exception) -> DataError:
    """A failure of `datasets` in one line, with the way to go on."""
    said = f"{place} cannot be read: {reason_in_short(error).rstrip('.')}."
    if "scripts are no longer supported" in str(error):
        return DataError(
            f"{said} Code of the hub is never run; read the files that the hub converted it to:"
            f" data.hub={{dataset: {source.dataset}, folder: {source.subset or 'CONFIG'}, revision:"
            " refs/convert/parquet}."
        )
    if source.is_here:
        return DataError(said)
    revision = f" --revision {source.revision}" if source.revision else ""
    return DataError(
        f"{said} On a machine without a way to the hub, fetch it elsewhere (hf download"
        f" {source.dataset}{revision} --repo-type dataset --local-dir FOLDER) and set"
        " data.hub.dataset=FOLDER."
    )
