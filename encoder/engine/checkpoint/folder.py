"""The folders of a run's checkpoints: their names, which start of the run may touch them, what is whole, what is kept."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from encoder.base.errors import CheckpointError
from encoder.base.files import fsync_path, sha256_of
from encoder.base.untrusted import inside, number_in_name, read_bytes, read_json

FORMAT = 1
INCARNATIONS = "incarnations"
MANIFEST, COMMITTED, MILESTONE = "MANIFEST.json", "COMMITTED", "MILESTONE"
# no run comes to numbers of 19 digits, and a tensor of int64 could not carry them
_NAME = re.compile(r"tokens([0-9]{13,18})-i([0-9]{4,18})")


def folder_name(*, tokens: int, incarnation: int) -> str:
    """tokens0000001234567-i0002; sorts by tokens up to 9.9 T."""
    return f"tokens{tokens:013d}-i{incarnation:04d}"


def tokens_of(folder: Path) -> int:
    """Of a checkpoint's name; -1 of another one's."""
    match = _NAME.fullmatch(folder.name)
    return int(match.group(1)) if match else -1


def claim_next(run_folder: Path) -> int:
    """Takes the next incarnation number of a run: an empty file that only one process can create."""
    folder = run_folder / INCARNATIONS
    folder.mkdir(parents=True, exist_ok=True)
    number = newest_incarnation(run_folder)
    while True:
        number += 1
        # O_EXCL: of starts in the same moment one alone creates the file
        with contextlib.suppress(FileExistsError):  # another start took it in this moment
            os.close(os.open(folder / f"{number:04d}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            # durable, so that after a crash no start gets the same number again
            fsync_path(folder)
            return number


def newest_incarnation(run_folder: Path) -> int:
    """The highest number claimed, 0 before the first.

    The names of checkpoints count too: a run folder that was copied without its (empty) claims must not start again at 1,
    where every new save would be the oldest.
    """
    claimed = [number_in_name(p.name) for p in (run_folder / INCARNATIONS).glob("[0-9]*")]
    saved = [
        int(match.group(2))
        for p in (run_folder / "checkpoints").glob("tokens*")
        if (match := _NAME.fullmatch(p.name))
    ]
    return max([*filter(None, claimed), *saved], default=0)


def check_not_stale(root: Path, incarnation: int) -> None:
    """Raises CheckpointError if a newer start of the run was claimed. `root` is RUN/checkpoints."""
    newest = newest_incarnation(root.parent)
    if newest < incarnation:
        raise CheckpointError(
            f"{root.parent} is not what this start of the run began in: it, or its {INCARNATIONS},"
            " was removed or replaced since. This start saves nothing more; put the folder back"
            " and start again."
        )
    if newest > incarnation:
        raise CheckpointError(
            f"this is start {incarnation} of the run in {root.parent}, but start {newest} has taken"
            " over. This one saves nothing more: let it end, and go on with the other."
        )


def committed_folders(root: Path) -> list[Path]:
    """Committed folders, the last written last: by incarnation, then by tokens."""
    if not root.is_dir():
        return []
    found = []
    # a newer start may have gone back, so its checkpoint of fewer tokens is the last written
    for path in root.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and (path / COMMITTED).exists():
            found.append(((int(match.group(2)), int(match.group(1))), path))
    return [path for _, path in sorted(found)]


def damage(folder: Path) -> str | None:
    """The first file that is not what the manifest says, in one sentence; None if all are."""
    try:
        # from cheap to dear: the mark, the sizes, then all hashes
        committed = read_bytes(folder / COMMITTED, error=CheckpointError, most_bytes=2**16)
        if committed.decode("ascii", "replace") != sha256_of(folder / MANIFEST):
            return (
                f"{folder / MANIFEST} is damaged: its SHA-256 is not the one in {COMMITTED}, or"
                " that one is."
            )
        manifest = read_json(folder / MANIFEST, root=dict, error=CheckpointError)
        for name, fact in manifest.items():
            path = inside(
                folder, name, where=folder / MANIFEST, error=CheckpointError, folders=False
            )
            size = path.stat().st_size
            if size != fact["bytes"]:
                return f"{folder / name} has {size:,} bytes, {fact['bytes']:,} were written."
        with ThreadPoolExecutor(4) as pool:  # hashing lets go of the interpreter's lock
            for name, digest in zip(
                manifest, pool.map(lambda n: sha256_of(folder / n), manifest), strict=True
            ):
                if digest != manifest[name]["sha256"]:
                    return f"{folder / name} is damaged: its SHA-256 is not the one in {MANIFEST}."

        # a load reads every rank file it finds, also one that the manifest does not name
        if unknown := sorted(
            p.name for p in folder.glob("rank*.safetensors") if p.name not in manifest
        ):
            return f"{folder / unknown[0]} is not in {MANIFEST}."
    except FileNotFoundError as error:
        return f"{error.filename} is missing."
    except CheckpointError as error:
        # a file that is not there is named as such; anything else says itself what it is
        lost = error.__cause__
        if isinstance(lost, FileNotFoundError):
            return f"{lost.filename} is missing."
        return str(error)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder / MANIFEST} cannot be read ({error})."
    return None


def remove_old(
    root: Path,
    *,
    incarnation: int,
    keep_last: int,
    is_whole: Callable[[Path], bool],
    is_good: Callable[[Path], bool] = lambda _: True,
    stands_on: Callable[[Path], Collection[int]] = lambda _: (),
) -> None:
    """Keeps the last whole folders and the milestones; removes older ones, and what uncommitted saves left behind.

    The last whole one that `is_good`, to which the run may have to go back, stays however many others are newer.
    So do those whose tokens a kept one `stands_on`: the best weights so far.
    A damaged folder counts for nothing; it goes when it is older than what is kept. Folders of a newer start are never
    touched. Raises CheckpointError if there is one.
    """
    check_not_stale(root, incarnation)
    committed = committed_folders(root)
    kept, whole, good = {path for path in committed if (path / MILESTONE).exists()}, 0, False

    # from the newest on; a folder is hashed only where it would be kept
    for path in reversed(committed):
        wanted = not good and is_good(path)
        if whole < keep_last or wanted:
            kept.add(path)
            found = is_whole(path)
            whole, good = whole + found, good or (wanted and found)

    needed = {tokens for path in kept for tokens in stands_on(path)}
    kept |= {path for path in committed if tokens_of(path) in needed}

    # `.NAME.part` is an uncommitted save; a higher incarnation is a newer start's
    for path in sorted(root.iterdir()):
        match = _NAME.fullmatch(path.name.removeprefix(".").removesuffix(".part"))
        if match and int(match.group(2)) <= incarnation and path not in kept:
            # laid by a person: what lies behind it is not this run's to remove
            if path.is_symlink():
                path.unlink()
                continue
            # the mark goes first: a kill while removing must not leave a committed folder with files missing
            (path / COMMITTED).unlink(missing_ok=True)
            shutil.rmtree(path)
