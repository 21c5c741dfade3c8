"""Paths as people write them: ~ and variables are filled in, and what can name no file of this machine is refused.

Imports Python alone and this room: a job's first node may have no packages outside of its container.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from encoder.base.errors import ConfigError
from encoder.base.untrusted import MOST_NAME_BYTES, MOST_PATH_BYTES


def expand_path(path: Path | str) -> Any:
    """A path with ~, $NAME and ${NAME} filled in, of the class that it had; a URL stays as it is. Raises ConfigError.

    ~/shards -> /users/me/shards       $SCRATCH/runs -> /scratch/me/runs        s3://bucket/x -> s3://bucket/x
    """
    text = os.fspath(path)
    if not text or not text.strip():
        raise ConfigError(
            "it is empty; needed: a path. For the folder that you are in, write its name's path,"
            " such as ./runs."
        )

    # printable, but not in the locale's encoding: the locale is what is wrong
    if text.isprintable() and not names_a_file(text):
        raise ConfigError(
            f"{ascii(text)[:80]} has letters that the locale's encoding,"
            f" {sys.getfilesystemencoding()}, cannot spell. Set LC_ALL=C.UTF-8, or name another"
            " path."
        )
    if "\0" in text or not names_a_file(text):
        raise ConfigError(
            f"{ascii(text)[:80]} holds a character that no path has. Write the path again."
        )

    if "${oc." in text or re.search(r"\$\{[^}]*[:.][^}]*\}", text):
        raise ConfigError(
            f"{text[:200]} is a reference of OmegaConf, which is not read here. Write $NAME for a"
            " variable of the environment, such as $HOME/runs, or the path itself."
        )

    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", text):
        return path

    def filled(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if not os.environ.get(name):
            raise ConfigError(
                f"{text[:200]} names the variable {name}, which is not set. Set it, or write the"
                " path itself."
            )
        return os.environ[name]

    # the environment's own values are not looked through again
    new = re.sub(r"\$(?:\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*))", filled, text)

    longest = max(len(os.fsencode(part)) for part in new.split("/"))
    if longest > MOST_NAME_BYTES or len(os.fsencode(new)) > MOST_PATH_BYTES:
        raise ConfigError(
            f"{text[:60]}... is too long for a path: a name has at most {MOST_NAME_BYTES} bytes."
            " Shorten it."
        )

    if text.startswith("~"):
        new = os.path.expanduser(new)
        if new.startswith("~"):
            raise ConfigError(
                f"{text[:200]} begins with ~, and no such home folder is known. Write the path"
                " itself, or ./ before it for a folder of that name."
            )
    if isinstance(path, Path):
        return type(path)(new)
    return new


def local_path(path: str) -> str:
    """The path, if it is no URL, which would make a folder of this name here. Raises ConfigError."""
    if scheme := re.match(r"([a-zA-Z][a-zA-Z0-9+.-]+):/+", path):
        there = ""
        if scheme[1].lower() == "file":
            there = " Write the path itself: /" + path[scheme.end() :]
        raise ConfigError(
            f"{path[:200]} begins with {scheme[0]}; needed: a path of this"
            f" machine.{there or ' Name a folder here.'}"
        )
    return path


def names_a_file(text: str) -> bool:
    """Whether a text has the bytes of a file's name, also of one that is not UTF-8."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True
