"""What to do about bad input: the column that may be meant, and advice for commands that have no settings file.

    {"body": {"text": "a"}, "id": 1}     text: body.txt     Did you mean body.text?

Readers give the advice of a settings file. Where options name the files, `told_of_options` puts it into the words of these.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_prep.readers.blocks import SET_TEXT, without_skip
from encoder.base.errors import ConfigError, UserError, nearest

SHOWN_NAMES = 12
COMPARED_NAMES = 500  # of a row's or a table's
DEEPEST_NAME = 6  # names in a dotted one
OPTION_SOURCE = "files_"  # begins the name of a source that options made

_NAME_IT = "Name it: --text COLUMN"
# what a settings file can do, and what is done without one; the first that fits a place is taken
_OF_OPTIONS = (
    (rf"source {OPTION_SOURCE}\d+: ", ""),
    (rf"{SET_TEXT} or filters, or columns where no line names them", _NAME_IT),
    (rf"{SET_TEXT} or filters", _NAME_IT),
    (SET_TEXT, _NAME_IT),
    (r": set the source's delimiter to it", ": save it with commas as .csv, or with tabs as .tsv"),
    (r", or set quotes: false where quotes are letters as others", ""),
    (r"; the source says format: (\w+)\.", r"; it is read as \1."),
    (r"\bset format: json_array", "write one object a line (jq -c '.[]')"),
    (r"\bSet format: json_array", "Write one object a line (jq -c '.[]')"),
    (r"\bset format: (\w+)", r"give it the ending .\1"),
    (r"\bSet format: (\w+)", r"Give it the ending .\1"),
    (r"\bSet the format to what it is", "Give it the ending of what it is"),
    (r"at most (?:\d+ x )?max_document_bytes, ", "at most "),
    (r"Raise max_document_bytes \(a process takes about 8 times as much\)", "Leave it out"),
    (
        r"; zstd_window_bytes is ([\d,]+)\. Set the source's zstd_window_bytes: .*?\)",
        r"; needed: at most \1. Unpack it (zstd -d --long=31)",
    ),
    (r"Set root or the files\.", "Name other files."),
)


@contextlib.contextmanager
def told_of_options() -> Iterator[None]:
    """Around the reading of files that options name: errors name cures that such a command has. Raises ConfigError."""
    try:
        yield
    except UserError as error:
        said = without_skip(str(error))
        for settings, options in _OF_OPTIONS:
            said = re.sub(settings, options, said)
        raise ConfigError(said) from error


def nearest_column(column: str, names: Sequence[str]) -> str:
    """As `nearest`, of as many names as a table has; few are listed."""
    hint = nearest(column, [*names[:COMPARED_NAMES]])
    if hint.startswith("Did you mean"):
        return hint
    return nearest(column, [*names[:SHOWN_NAMES]])


def holds(names: Sequence[str]) -> str:
    """It holds a.b, a.c: the sentence about an object that was named in place of a text in it."""
    return f"It holds {', '.join(names[:SHOWN_NAMES]) or 'nothing'}."


def dotted_names(row: Mapping[str, Any], *, above: str = "") -> list[str]:
    """The names under which values of a row can be had, sorted; of an object those of what is in it.

    row: an object of JSON
    above: the name of the object that holds it, with its dot
    """
    found: list[str] = []
    for key in sorted(row)[:COMPARED_NAMES]:
        inner = row[key]
        # a dot inside of an inner name would be read as one between two
        if above and "." in key:
            continue
        name = f"{above}{key}"
        if isinstance(inner, Mapping) and inner and name.count(".") < DEEPEST_NAME:
            found += dotted_names(inner, above=f"{name}.")
        else:
            found.append(name)
    return found
