"""The tensors of a checkpoint: slices of parameters in one safetensors file a rank, read back by name and range.

key  model.layers.0.attn.Wqkv.weight@192/exp_avg      elements from 192 on of the flattened parameter's exp_avg
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from encoder.base.errors import CheckpointError
from encoder.base.files import fsync_path, native_path, usual_mode
from encoder.base.untrusted import open_regular
from encoder.engine.engine import StateShard


def rank_file(rank: int) -> str:
    """The name of the file with one rank's slices."""
    return f"rank{rank:05d}.safetensors"


def copy_pieces(pieces: Iterable[StateShard]) -> dict[str, torch.Tensor]:
    """One rank's slices in memory, by key, in their own precision: training may go on."""
    copies = {}
    for piece in pieces:
        for kind, tensor in piece.tensors.items():
            copies[f"{piece.name}@{piece.start}/{kind}"] = tensor.to("cpu", copy=True)
    return copies


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes and syncs one rank's file. Raises OSError or SafetensorError."""
    save_file(tensors, path)
    usual_mode(path)
    fsync_path(path)


# 18 digits: an int64 holds every start
_KEY = re.compile(r"(?P<name>.+)@(?P<start>[0-9]{1,18})/(?P<kind>[^/]+)", re.DOTALL)
_DTYPES = ("F32", "F64", "F16", "BF16")


class StretchReader:
    """The rank files of one checkpoint, open, and where each range of each parameter lies in them."""

    def __init__(self, folder: Path) -> None:
        self.dtype = torch.float32  # of the masters
        self._folder, self._open = folder, contextlib.ExitStack()
        self._where: dict[str, list[tuple[int, int, Any]]] = {}  # name -> (start, end, file)

    def __enter__(self) -> StretchReader:
        with contextlib.ExitStack() as opening:  # closes what is open if one of them cannot be
            for path in sorted(self._folder.glob("rank*.safetensors")):
                open_regular(path, error=CheckpointError).close()  # a fifo would be waited for
                with native_path(path) as name:
                    file = safe_open(name, framework="pt")
                self._index(opening.enter_context(file), path)
            self._open = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def copy_into(self, target: torch.Tensor, *, name: str, start: int, kind: str) -> None:
        """Fills a 1-d tensor with elements [start, start + len) of a parameter's state. Raises CheckpointError for a gap."""
        # all in elements of the parameter; [a, b) is what a stored slice has of the target
        end, filled = start + target.numel(), 0
        for low, high, file in self._where.get(name, []):
            a, b = max(start, low), min(end, high)
            if a < b:
                target[a - start : b - start].copy_(
                    file.get_slice(f"{name}@{low}/{kind}")[a - low : b - low]
                )
                filled += b - a
        if filled != target.numel():
            raise CheckpointError(
                f"{self._folder} holds {filled:,} of {target.numel():,} elements of {name}"
                f" ({kind}). Remove this folder to use the one before it."
            )

    def check_whole(self, name: str, elements: int) -> None:
        """The files hold so many elements of a parameter. Raises CheckpointError."""
        found = sum(high - low for low, high, _ in self._where.get(name, []))
        if found != elements:
            raise CheckpointError(
                f"{self._folder} holds {found:,} of {elements:,} elements of {name} (master). "
                "Remove this folder to use the one before it."
            )

    def _index(self, file: Any, path: Path) -> None:
        for key in file.keys():
            match, part = _KEY.fullmatch(key), file.get_slice(key)
            if match is None or len(part.get_shape()) != 1 or part.get_dtype() not in _DTYPES:
                raise CheckpointError(
                    f"{path} holds {ascii(key)[:80]} of {part.get_dtype()} {part.get_shape()};"
                    f" needed: slices of parameters, {' or '.join(_DTYPES)}. Remove this folder"
                    " to use the one before it."
                )

            # every slice has a master, and its other kinds have the same range
            if match["kind"] == "master":
                name, start = match["name"], match["start"]
                self._where.setdefault(name, []).append(
                    (int(start), int(start) + part.get_shape()[0], file)
                )
                self.dtype = torch.float64 if part.get_dtype() == "F64" else torch.float32
