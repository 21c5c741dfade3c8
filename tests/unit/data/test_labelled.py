"""Labelled files of every format give the same rows; what is wrong in one is said with file and row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from encoder.data.labelled import DataError, held_out_rows, read_rows, texts_of

ROWS = [{"text": 'a "fine" film', "label": "good"}, {"text": "dull, and long", "label": "bad"}]


def write(path: Path) -> Path:
    import pyarrow
    import pyarrow.feather
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(ROWS)
    kind = path.suffix
    if kind == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    elif kind == ".csv":
        path.write_text('\ufefftext,label\n"a ""fine"" film",good\n"dull, and long",bad\n')
    elif kind == ".tsv":
        path.write_text('label\ttext\ngood\ta "fine" film\nbad\tdull, and long\n')
    elif kind == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif kind == ".feather":
        pyarrow.feather.write_feather(table, path)
    else:
        with pyarrow.OSFile(str(path), "wb") as file:
            with pyarrow.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet", "feather", "arrow"])
def test_a_file_of_any_format_gives_the_same_rows(tmp_path, kind):
    rows = read_rows(write(tmp_path / f"rows.{kind}"), ["text", "label"])
    assert rows.columns == {name: [row[name] for row in ROWS] for name in ("text", "label")}
    assert rows.place(1).endswith(
        "row 2" if kind in ("parquet", "feather", "arrow") else f"line {2 + (kind != 'jsonl')}"
    )


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet", "arrow"])
def test_a_missing_column_names_the_nearest_one(tmp_path, kind):
    path = write(tmp_path / f"rows.{kind}")
    with pytest.raises(DataError, match=r"rows.* has no (column )?txt\. Did you mean text"):
        read_rows(path, ["txt"])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl line 2 is no JSON"),
        ("a.jsonl", b'["x"]\n', "line 1 is no object"),
        ("a.jsonl", b"\n", "has no rows"),
        ("a.jsonl", b'{"text": "\xff"}\n', "is no UTF-8 at byte"),
        ("a.csv", b"text,label\nx,1\ny\n", "line 3 has 1 cells, the header 2"),
        ("a.csv", b"", "a.csv is empty"),
        ("a.tsv", b"", "a.tsv is empty"),
        ("a.conll", b"\n\n", "a.conll is empty"),
        ("a.csv", b"text,label,text\nx,1,y\n", "has 2 columns called text; needed: one"),
        ("a.parquet", b"PAR1 no", "cannot be read"),
        ("a.arrow", b"no", "cannot be read"),
        ("a.xlsx", b"", "ends in '.xlsx'; needed: .jsonl"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said) as error:
        read_rows(tmp_path / name, ["text"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cell", ['""', '" "', "null", "3"])
def test_a_cell_that_is_no_text_is_refused_with_its_line(tmp_path, cell):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "x"}}\n{{"text": {cell}}}\n')
    with pytest.raises(DataError, match=r"a\.jsonl line 2: text is .*needed: a text"):
        list(texts_of(read_rows(tmp_path / "a.jsonl", ["text"]), "text"))


@pytest.mark.parametrize(
    ("name", "separator", "word"),
    [("a.csv", ";", "semicolons"), ("a.csv", "\t", "tabs"), ("a.tsv", ",", "commas")],
)
def test_cells_parted_by_another_letter_are_told_by_its_name(tmp_path, name, separator, word):
    (tmp_path / name).write_text(f"label{separator}text\n1{separator}fine\n")
    with pytest.raises(DataError, match=f"has no column text. Its first line is parted by {word}"):
        read_rows(tmp_path / name, ["text", "label"])


def test_held_out_rows_are_chosen_by_what_they_say(tmp_path):
    # some texts with both labels
    lines = [
        {"text": f"text {number % 400}", "label": "ab"[number // 400 % 2]} for number in range(1000)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "turned.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines[::-1]))
    rows = read_rows(tmp_path / "rows.jsonl", ["text", "label"])
    kept, held_out = held_out_rows(rows, share=0.2, by=["text"])
    assert len(kept) + len(held_out) == 1000 and 140 < len(held_out) < 260
    # a text that stands three times is on one side, and the file's order decides nothing
    assert not {*kept.columns["text"]} & {*held_out.columns["text"]}
    turned = held_out_rows(
        read_rows(tmp_path / "turned.jsonl", ["text", "label"]), share=0.2, by=["text"]
    )[1]
    assert turned.columns["text"] == held_out.columns["text"][::-1]
    first = [lines.index({"text": t, "label": "a"}) for t in held_out.columns["text"][:5]]
    assert [rows.place(number) for number in first] == [held_out.place(row) for row in range(5)]
    with pytest.raises(DataError, match="needed: at least one on either side"):
        held_out_rows(rows.some([0, 1]), share=0.001, by=["text"])
