"""The folder of a command's results: there before the work begins, and as it was when the work fails."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from encoder.base.errors import UserError


@contextlib.contextmanager
def output(folder: Path, names: Sequence[str]) -> Iterator[None]:
    """Makes the folder that the files `names` will be written to. After an error, Ctrl-C too, the files and folders
    that were not there before are gone again. Raises UserError for a place that cannot be written or is full.
    """
    # the nearest place that exists must be a folder
    for place in (folder, *folder.parents):
        if place.exists():
            if not place.is_dir():
                raise UserError(
                    f"{place} is a file; needed: a folder to write {names[0]} in. Name another"
                    " place."
                )
            break
    for name in names:
        if (folder / name).is_dir():
            raise UserError(
                f"{folder / name} is a folder; needed: the name of a file to write, such as "
                f"{folder / name / 'tokenizer.json'}."
            )
    # from the inside out, so that each is empty when it is removed
    new_folders = [place for place in (folder, *folder.parents) if not place.exists()]
    new_files = [folder / name for name in names if not (folder / name).exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise UserError(
                f"{folder} may not be written to. Change its rights, or name another place."
            )
        yield
    except BaseException as error:
        for path in new_files:
            with contextlib.suppress(OSError):
                path.unlink()
        for place in new_folders:
            with contextlib.suppress(OSError):  # never made, or others write to it, too
                place.rmdir()
        if isinstance(error, OSError):
            # a full disk has no name
            place = error.filename or (folder / names[0] if len(names) == 1 else folder)
            raise UserError(
                f"{place}: {error.strerror or error}. Make room, or name another place."
            ) from error
        raise
