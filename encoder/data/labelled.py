"""Rows of labelled data, by column, from one file: JSON lines, CSV, TSV, Parquet, Arrow, CoNLL or SQuAD. Every row knows its place.

Splits of a dataset of the hub are read by encoder/data/hub_rows.py.

    train.jsonl      {"text": "a fine film", "label": "positive"}     place: train.jsonl line 1
    train.csv        text,label                                       the line of the file, its header counted
    train.tsv        the same with tabs; quotes are text, as in GLUE's files
    train.parquet    columns                                          row 1, 2, ...
    train.conll      a word a line, a blank line behind a row         the line of its first word
    train.json       SQuAD's own layout                               question 1, 2, ...

A whole file is read: labelled data are small beside a model.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from encoder.base.errors import UserError, nearest, why_unreadable
from encoder.base.files import meant_beside


class DataError(UserError):
    """A labelled file that cannot be used: its text names file and row."""


class NoColumn(DataError):
    """A labelled file without a column that was asked for; a command whose options name columns says which."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Some columns of a file. N rows."""

    path: Path  # of a dataset its name and split
    columns: dict[str, list[Any]]  # [N] each
    word: str  # what a row is called: line or row
    numbers: list[int]  # [N], counted from 1
    # column -> names of its classes in the order of their numbers, where the data say them
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.numbers)

    def some(self, chosen: Sequence[int]) -> Rows:
        """These of its rows; each still knows its place."""
        return replace(
            self,
            columns={name: [cells[row] for row in chosen] for name, cells in self.columns.items()},
            numbers=[self.numbers[row] for row in chosen],
        )

    def place(self, row: int) -> str:
        """`train.jsonl line 3`."""
        return f"{self.path} {self.word} {self.numbers[row]:,}"


def held_out_rows(rows: Rows, *, share: float, by: Sequence[str]) -> tuple[Rows, Rows]:
    """(the others, about such a share of them); rows that are equal in `by` are on one side. Raises DataError.

    rows: of a file
    share: above 0, below 1
    by: columns
    """
    kept: list[int] = []
    held_out: list[int] = []
    for row in range(len(rows)):
        said = json.dumps([rows.columns[name][row] for name in by], default=str)
        number = int.from_bytes(blake2b(said.encode(), digest_size=8).digest(), "little")
        # a row is held out where its hash, as a fraction of all, is below the share
        side = held_out if number < share * 2**64 else kept
        side.append(row)
    if not kept or not held_out:
        raise DataError(
            f"{rows.path}: of {len(rows):,} rows a share of {share:g} is {len(held_out):,}; needed:"
            f" at least one on either side. Give more rows that differ in {', '.join(by)}, or another"
            " dev_share."
        )
    return rows.some(kept), rows.some(held_out)


NO_NAME = re.compile("(?!)")  # matches nothing
# a cell of a CSV file may be a whole document; Python's own limit is 131,072
MOST_CELL_BYTES = 2**27


def check_file(path: Path) -> None:
    """A file is there, of a kind that is read. Raises DataError."""
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        meant = meant_beside(path, endings=READERS)
        raise DataError(f"{path} {found}; needed: a file ending in {', '.join(READERS)}.{meant}")
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path} ends in {path.suffix!r}; needed: {', '.join(READERS)}.")


def read_rows(path: Path, columns: Sequence[str], *, optional: re.Pattern[str] = NO_NAME) -> Rows:
    """These columns of all rows of a file, each once. Raises DataError.

    path: of one of the kinds above
    columns: that every row must have
    optional: names of more, where the file has them; a row of JSON lines without one has None there
    """
    columns = [*dict.fromkeys(columns)]
    check_file(path)
    try:
        rows = READERS[path.suffix.lower()](path, columns, optional)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 at byte {error.start:,}. Write it as UTF-8.") from None
    if not len(rows):
        raise DataError(f"{path} has no rows; needed: at least one.")
    return rows


def _json_lines(path: Path, columns: Sequence[str], optional: re.Pattern[str]) -> Rows:
    found: dict[str, list[Any]] = {name: [] for name in columns}
    # optional column -> row -> cell
    more: dict[str, dict[int, Any]] = {}
    numbers: list[int] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path} line {number:,}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place} is no JSON ({error}). Write one object a line.") from None
            if not isinstance(row, dict):
                raise DataError(f"{place} is no object; needed: one of {', '.join(columns)}.")
            for name in columns:
                if name not in row:
                    raise NoColumn(f"{place} has no {name}. {nearest(name, [*map(str, row)])}")
                found[name].append(row[name])
            for name in filter(optional.fullmatch, row):
                more.setdefault(name, {})[len(numbers)] = row[name]
            numbers.append(number)
    for name, cells in more.items():
        found.setdefault(name, [cells.get(row) for row in range(len(numbers))])
    return Rows(path=path, columns=found, word="line", numbers=numbers)


def _delimited(path: Path, columns: Sequence[str], optional: re.Pattern[str], **form: Any) -> Rows:
    numbers: list[int] = []
    csv.field_size_limit(MOST_CELL_BYTES)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True, **form)
        try:
            header = next(reader, [])
            if not header:
                raise DataError(
                    f"{path} is empty, or its first line is; needed: column names, then rows."
                )
            places = _places(path, header, _with_optional(columns, optional, header))
            found: dict[str, list[Any]] = {name: [] for name in places}
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise DataError(
                        f"{path} line {reader.line_num:,} has {len(cells)} cells, the header"
                        f" {len(header)}. Quote or escape what stands inside of a cell."
                    )
                for name, place in places.items():
                    found[name].append(cells[place])
                numbers.append(reader.line_num)
        except csv.Error as error:
            raise DataError(f"{path} line {reader.line_num:,}: {error}. Correct it.") from None
    return Rows(path=path, columns=found, word="line", numbers=numbers)


def _with_optional(
    columns: Sequence[str], optional: re.Pattern[str], header: Sequence[str]
) -> list[str]:
    """The columns, and those of a file's header that are optional."""
    return [*dict.fromkeys([*columns, *filter(optional.fullmatch, header)])]


def _places(path: Path, header: list[str], columns: Sequence[str]) -> dict[str, int]:
    for name in columns:
        if name not in header:
            raise NoColumn(f"{path} has no column {name}. {_other_separator(header, name)}")
        _refuse_twice(path, header, name)
    return {name: header.index(name) for name in columns}


def _refuse_twice(path: Path, header: Sequence[str], name: str) -> None:
    """A column that is read stands once. Raises DataError."""
    if header.count(name) > 1:
        raise DataError(
            f"{path} has {header.count(name)} columns called {name}; needed: one. Rename the others."
        )


def _other_separator(header: list[str], name: str) -> str:
    """What to do about a column that is missing: the cells may be parted by another letter than the file's name says."""
    if len(header) == 1:
        for separator, word in ((";", "semicolons"), ("\t", "tabs"), (",", "commas")):
            if name in header[0].split(separator):
                return (
                    f"Its first line is parted by {word}; needed: .csv by commas, .tsv by tabs."
                    " Save it so, or rename it."
                )
    return nearest(name, header)


def _comma(path: Path, columns: Sequence[str], optional: re.Pattern[str]) -> Rows:
    return _delimited(path, columns, optional)


def _tab(path: Path, columns: Sequence[str], optional: re.Pattern[str]) -> Rows:
    return _delimited(path, columns, optional, delimiter="\t", quoting=csv.QUOTE_NONE)


def _parquet(path: Path, columns: Sequence[str], optional: re.Pattern[str]) -> Rows:
    import pyarrow.parquet

    return _table(path, columns, optional, lambda: pyarrow.parquet.ParquetFile(path).read())


def _arrow(path: Path, columns: Sequence[str], optional: re.Pattern[str]) -> Rows:
    import pyarrow

    def read() -> Any:
        # a file, as feather and as `datasets` caches it: the latter is a stream
        with pyarrow.memory_map(str(path)) as source:
            try:
                return pyarrow.ipc.open_file(source).read_all()
            except pyarrow.ArrowInvalid:
                source.seek(0)
                return pyarrow.ipc.open_stream(source).read_all()

    return _table(path, columns, optional, read)


def _table(
    path: Path, columns: Sequence[str], optional: re.Pattern[str], read: Callable[[], Any]
) -> Rows:
    """Columns of a table of pyarrow.

    path: for messages
    columns, optional: as of read_rows
    read: gives the table
    """
    import pyarrow

    try:
        table = read()
        names = _with_optional(columns, optional, table.column_names)
        for name in names:
            if name not in table.column_names:
                raise NoColumn(f"{path} has no column {name}. {nearest(name, table.column_names)}")
            _refuse_twice(path, table.column_names, name)
        found = {name: table.column(name).to_pylist() for name in names}
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, PermissionError):
            raise DataError(f"{path} cannot be read: {why_unreadable(error)}") from error
        why = " ".join(str(error).split())[:200]
        raise DataError(f"{path} cannot be read: {why}. Copy or write the file again.") from error
    return Rows(path=path, columns=found, word="row", numbers=list(range(1, table.num_rows + 1)))


def _conll(path: Path, columns: Sequence[str], _: re.Pattern[str]) -> Rows:
    """Words in columns: `words` is the first, `tags` the last, and each is named by its number from 1."""
    rows: list[list[list[str]]] = [[]]
    numbers: list[int] = []
    width = 0
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            cells = line.rstrip("\n").split("\t") if "\t" in line else line.split()
            if not line.strip() or cells[0] == "-DOCSTART-":
                rows += [[]] if rows[-1] else []
                continue
            width = width or len(cells)
            if len(cells) != width:
                raise DataError(
                    f"{path} line {number:,} has {len(cells)} columns, the first {width}. Write a"
                    " word with its columns on each line."
                )
            if not rows[-1]:
                numbers.append(number)
            rows[-1].append(cells)
    if not numbers:
        raise DataError(f"{path} is empty; needed: a word with its columns on each line.")
    header = ["words", *(str(k + 1) for k in range(1, width - 1)), "tags"][:width]
    by_number = [str(k + 1) for k in range(width)]
    found = {}
    for name in columns:
        names = by_number if name in by_number else header
        (place,) = _places(path, names, [name]).values()
        found[name] = [[cells[place].strip() for cells in row] for row in rows if row]
    return Rows(path=path, columns=found, word="line", numbers=numbers)


def _squad(path: Path, columns: Sequence[str], _: re.Pattern[str]) -> Rows:
    """SQuAD's own file: data, paragraphs, qas; a row is a question, with the context of its paragraph."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        rows = [
            {**question, "context": paragraph["context"], "title": part.get("title", "")}
            for part in content["data"]
            for paragraph in part["paragraphs"]
            for question in paragraph["qas"]
        ]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is no file of SQuAD ({error}); needed: data, paragraphs, qas. Write other rows"
            " as .jsonl, an object a line."
        ) from None
    for number, row in enumerate(rows, start=1):
        for name in columns:
            if name not in row:
                raise DataError(
                    f"{path} question {number:,} has no {name}. {nearest(name, [*row])}"
                )
    found = {name: [row[name] for row in rows] for name in columns}
    return Rows(path=path, columns=found, word="question", numbers=[*range(1, len(rows) + 1)])


READERS: dict[str, Callable[[Path, Sequence[str], re.Pattern[str]], Rows]] = {
    ".jsonl": _json_lines,
    ".csv": _comma,
    ".tsv": _tab,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".feather": _arrow,
    ".conll": _conll,
    ".json": _squad,
}


def texts_of(rows: Rows, column: str) -> Iterator[str]:
    """The texts of a column. Raises DataError for a cell that is none, or empty."""
    for row, value in enumerate(rows.columns[column]):
        if not isinstance(value, str):
            raise DataError(f"{rows.place(row)}: {column} is {_kind(value)}; needed: a text.")
        if not value.strip():
            raise DataError(f"{rows.place(row)}: {column} is empty; needed: a text.")
        check_unicode(value, rows, row)
        yield value


def label_name(value: Any, rows: Rows, row: int) -> str:
    """A label as its name: a number of a table is the text of it."""
    if isinstance(value, bool):
        return str(value).lower()
    # a column of whole numbers with a gap is one of floats
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, (str, int)) and str(value).strip():
        name = str(value).strip()
        check_unicode(name, rows, row)
        return name
    raise DataError(f"{rows.place(row)}: the label is {value!r}; needed: a name or a whole number.")


def check_unicode(text: str, rows: Rows, row: int) -> None:
    """No half of a surrogate pair, as a cut emoji leaves it. Raises DataError."""
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise DataError(
            f"{rows.place(row)} holds half a surrogate pair, which is no character; needed: whole"
            " characters. Repair the row, or leave it out."
        )


def _kind(value: Any) -> str:
    return "empty" if value is None else f"{str(value)[:40]!r} ({type(value).__name__})"
