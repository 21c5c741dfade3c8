"""Blocks to texts: parsed, filtered, and counted by reason where a document is left out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

from data_prep.config import ColumnSource, TextSource
from data_prep.filters import ABSENT, WrongType, look_up, named
from data_prep.readers.blocks import (
    SET_TEXT,
    SKIP,
    Block,
    NotUtf8,
    Parsed,
    TooLarge,
    has_surrogates,
)
from data_prep.readers.cures import dotted_names, holds, nearest_column
from data_prep.readers.structure import fields_of

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# a line of 70 MB can hold 20 million empty lists, each of which takes 64 bytes as an object of Python
LARGE_LINE_BYTES, MOST_CONTAINERS = 2**22, 10**6
LONG_CHARS = 2**20  # encoders look at such texts before they take them
WHOLE_NUMBERS = 2**63  # from here on orjson may have made a float of an integer


def parse(block: Block) -> Parsed:
    """Texts of a block in order. Documents that do not pass a filter, and those without any character but white space,
    are left out and counted; what should not be there at all is a problem as well."""
    source, result = block.source, Parsed()
    if block.too_large:
        _leave_out_large(block, block.too_large, result)
        return result
    if isinstance(source, TextSource):
        for place, text in _plain_texts(block, source.document, result):
            _take(place, text, result)
        return result
    for place, wrong in block.malformed:
        result.leave_out("not csv", f"{block.file} {place} {wrong}")
    if block.columns is not None:
        rows = _table_rows(block, block.columns)
    else:
        rows = _json_rows(block, source, result)
    for place, row in rows:
        try:
            # a document is counted under the first filter that it does not pass
            stopped_by = next(
                (f for f in source.filters if not f.passes(look_up(row, f.column))), None
            )
        except WrongType as error:
            result.leave_out(
                "filter cannot judge", f"{place}: {error}. Change the filter, or {SKIP}."
            )
            continue
        if stopped_by:
            result.left_out[stopped_by.label] += 1
            continue
        text = look_up(row, source.text)
        if isinstance(text, str):
            _take(place, text, result)
        elif isinstance(text, NotUtf8):
            result.leave_out(
                "not utf-8",
                f"{place}: byte {text.byte} of {source.text!r} is not UTF-8; needed: UTF-8 text. "
                f"Repair it, or {SKIP}.",
            )
        elif text is ABSENT:
            result.leave_out(
                "no text",
                f"{place} has no {source.text!r}. {_instead(source, row, result)}, or {SKIP}.",
            )
        else:
            cure = "Repair it"
            # the first sentence is kept; of an object it says what is in it
            if isinstance(text, dict) and not result.problem:
                cure = f"{holds(dotted_names(text, above=f'{source.text}.'))} {SET_TEXT}"
            result.leave_out(
                "no text",
                f"{place}: {source.text!r} is {named(text)}; needed: text. {cure}, or {SKIP}.",
            )
    return result


def _instead(source: ColumnSource, row: Mapping[str, Any], result: Parsed) -> str:
    """Which column may be meant, and where it is set; "" where another sentence is kept already."""
    # under on_error: skip all documents of a file may be so, and names take time to compare
    if result.problem:
        return ""
    keys = "The object is empty."
    if row:
        keys = nearest_column(source.text, dotted_names(row))
    return f"{keys} {SET_TEXT}"


def _leave_out_large(block: Block, large: TooLarge, result: Parsed) -> None:
    unit = {"item": "item", "line": "line"}.get(block.unit, "row")
    place = f"{block.file} {unit} {block.first}"
    if isinstance(block.source, TextSource) and block.source.document == "file":
        place = block.file
    result.leave_out("larger than max_document_bytes", large.sentence(place, block.most_bytes))
    # one was counted above; the block may stand for several
    result.left_out["larger than max_document_bytes"] += large.documents - 1
    result.problems += large.documents - 1


def _take(place: str, text: str, result: Parsed) -> None:
    """One text into the result, or the reason why not."""
    if not text or text.isspace():
        result.left_out["empty"] += 1
    elif "\0" in text:
        result.leave_out(
            "nul character",
            f"{place}: the text holds a NUL character, as files that are no text do; "
            f"needed: text. Remove it, or {SKIP}.",
        )
    elif not text.isascii() and has_surrogates(text):
        result.leave_out(
            "not unicode",
            f"{place}: the text holds half a surrogate pair, which is no character; "
            f"needed: whole characters. Repair it, or {SKIP}.",
        )
    else:
        if len(text) > LONG_CHARS:
            result.long[len(result.texts)] = place
        result.texts.append(text)


def _json_rows(
    block: Block, source: ColumnSource, result: Parsed
) -> Iterator[tuple[str, dict[str, Any]]]:
    if block.items is not None:
        values: Iterator[tuple[int, bytes]] = enumerate(block.items, start=block.first)
        unit, needed = "item", "one JSON array of objects"
    else:
        values = _numbered_lines(block)
        unit, needed = "line", "one JSON object a line"
    repair = f"Repair the {unit}, or {SKIP}."
    for number, line in values:
        place = f"{block.file} {unit} {number}"
        if number == 1 and not block.counted_from and line.startswith(BYTE_ORDER_MARK):
            line = line[3:]
        if not line.strip():
            result.left_out["empty"] += 1
            continue
        # as objects of Python such a line would take gigabytes
        if _is_crowded(line) and (value := _used_fields(source, line)) is not ABSENT:
            yield place, value
            continue
        if (row := _good_row(source, line)) is not None:
            yield place, row
            continue
        try:
            value = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            # what the parser refuses may lie in a field that nobody uses
            value = _used_fields(source, line)
            if value is ABSENT and isinstance(error, UnicodeDecodeError):
                result.leave_out(
                    "not utf-8",
                    f"{place}: byte {error.start + 1} is not UTF-8; needed: UTF-8 text. {repair}",
                )
            elif value is ABSENT:
                result.leave_out(
                    "not json", f"{place} is not JSON ({_why(error)}); needed: {needed}. {repair}"
                )
        if isinstance(value, dict):
            yield place, value
        elif value is not ABSENT:
            result.leave_out(
                "not json",
                f"{place} is {named(value)}; needed: a JSON object with {source.text!r}. {repair}",
            )


def _good_row(source: ColumnSource, line: bytes) -> dict[str, Any] | None:
    """The object of a line with which all is well, in two thirds of json's time. None: json is to judge it, or says in its
    words what is wrong. (Lists in 1,000 to 1,023 others are taken, which are too deep for json.)"""
    # it takes 16 bytes for each value of a line beside the objects of Python
    if len(line) > LARGE_LINE_BYTES:
        return None
    try:
        row = orjson.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(look_up(row, source.text), str):
        return None
    if all(_is_as_written(look_up(row, f.column)) for f in source.filters):
        return row
    return None


def _is_as_written(value: Any) -> bool:
    """Whether a value that a filter judges can be no integer of more than 64 bits: orjson rounds it to a float."""
    items = value if isinstance(value, list) else [value]
    return not any(isinstance(item, float) and abs(item) >= WHOLE_NUMBERS for item in items)


def _is_crowded(line: bytes) -> bool:
    """Whether a line holds so many lists and objects that only the fields in use are made values of."""
    return len(line) > LARGE_LINE_BYTES and line.count(b"[") + line.count(b"{") > MOST_CONTAINERS


def _numbered_lines(block: Block) -> Iterator[tuple[int, bytes]]:
    """The lines of a block without their ends, and their numbers."""
    lines = block.whole_lines.split(b"\n")
    if not lines[-1]:
        lines.pop()  # the nothing after the last line end
    return enumerate(lines, start=block.first)


def _used_fields(source: ColumnSource, line: bytes) -> Any:
    """The fields of a line that the source names, where the rest is what Python's parser does not take: an integer of
    5,000 digits, a list 2,000 levels deep, bytes that are not UTF-8. ABSENT where these are not to be had.
    """
    # of a dotted name the outer key, too
    names = {*source.used_columns, *(name.partition(".")[0] for name in source.used_columns)}
    try:
        return fields_of(line, names)
    except (ValueError, RecursionError):
        return ABSENT


def _why(error: Exception) -> str:
    """Why a line is no JSON, in words for people."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if not isinstance(error, json.JSONDecodeError):
        return "an integer of thousands of digits"
    return error.msg


def _table_rows(
    block: Block, columns: Mapping[str, list[Any]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    count = len(next(iter(columns.values())))
    numbers: Sequence[int] = range(block.first, block.first + count)
    if block.numbers is not None:
        numbers = block.numbers
    for number, values in zip(numbers, zip(*columns.values(), strict=True), strict=True):
        row = {
            name: value for name, value in zip(columns, values, strict=True) if value is not ABSENT
        }
        yield f"{block.file} {block.unit} {number}", row


def _plain_texts(block: Block, document: str, result: Parsed) -> Iterator[tuple[str, str]]:
    """Lines, paragraphs (between empty lines) or the whole file; a paragraph's place is the line it begins at."""
    number = block.first
    # in a group, so that the split keeps the separators: text, separator, text, ...
    separator = {"line": rb"(\r?\n)", "paragraph": rb"(\r?\n(?:\r?\n)+)"}.get(document)
    lines = block.whole_lines
    parts: list[bytes] = re.split(separator, lines) if separator else [lines]
    for raw, end in zip(parts[::2], [*parts[1::2], b""], strict=True):
        if separator and not raw and not end:
            continue  # the nothing after the last line end
        if number == 1 and not block.counted_from and raw.startswith(BYTE_ORDER_MARK):
            raw = raw[3:]
        if document == "paragraph":  # more empty lines, at the beginning of a block
            raw, before = raw.lstrip(b"\r\n"), raw
            number += before.count(b"\n") - raw.count(b"\n")
            if not raw:
                number += end.count(b"\n")
                continue
        try:
            yield (
                block.file if document == "file" else f"{block.file} line {number}",
                raw.decode("utf-8"),
            )
        except UnicodeDecodeError as error:
            # where the bad byte is, in lines and bytes for people
            line = number + raw.count(b"\n", 0, error.start)
            byte = error.start - raw.rfind(b"\n", 0, error.start)
            result.leave_out(
                "not utf-8",
                f"{block.file} line {line}: byte {byte} is not UTF-8; needed: UTF-8 text. "
                f"Convert the file, or {SKIP}.",
            )
        number += raw.count(b"\n") + end.count(b"\n")
