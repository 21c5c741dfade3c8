"""JSON lines are read by orjson where all is well; json judges the others: the texts, counts and sentences are those of json."""

from __future__ import annotations

import json
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.config import JsonlSource
from data_prep.filters import Filter
from data_prep.readers import Block, parse, parsing

PLAIN = JsonlSource(name="a", files=("x",))
NESTED = JsonlSource(name="a", files=("x",), text="text.body")
FILTERED = JsonlSource(
    name="a",
    files=("x",),
    filters=(Filter(column="n", at_most=2.0**64), Filter(column="n", none_of=(2**64 + 1, 7))),
)
UNWANTED = JsonlSource(name="a", files=("x",), filters=(Filter(column="n", none_of=(2**64 + 1,)),))

# what the two take differently: integers of many digits, halves of pairs, numbers without an end,
# bytes that are no UTF-8, controls, names that stand twice, depth
ODD = [
    b'{"text": "a", "n": 18446744073709551617}',
    b'{"text": "a", "n": [18446744073709551617]}',
    b'{"text": "a", "n": 18446744073709551616}',
    b'{"text": "a", "n": -18446744073709551617}',
    b'{"text": "a", "n": 9223372036854775809}',
    b'{"text": "a", "n": 1e400}',
    b'{"text": "a", "n": -0}',
    b'{"text": "a", "n": ' + b"9" * 5000 + b"}",
    b'{"text": "a", "n": NaN}',
    b'{"text": "a", "n": -Infinity}',
    b'{"text": 18446744073709551617}',
    b'{"text": "\\ud800"}',
    b'{"text": "a", "other": "\\ud800"}',
    b'{"text": "\\ud83d\\ude00"}',
    b'{"text": "a\x00b"}',
    b'{"text": "a\\u0000b"}',
    b'{"text": "a\tb"}',
    b'{"text": "a", "text": "b"}',
    b'{"text": "a", "text": 3}',
    b'{"text": {"body": "a"}}',
    b'{"text": {"body": 5}}',
    b'{"text.body": "a"}',
    b'{"text": "\xff"}',
    b'{"text": "a", "other": "\xff"}',
    b'{"text": "a", "deep": ' + b"[" * 1500 + b"]" * 1500 + b"}",
    b'\xef\xbb\xbf{"text": "a"}',
    b'  {"text": "a"}\t\r',
    b'{"text": "a"}{"text": "b"}',
    b'{"text": "a",}',
    b"{'text': 'a'}",
    b'{"text": "a"',
    b'{"text": " \\n "}',
    b'["text"]',
    b"null",
    b"{}",
    b"",
    b"\x0b",
]


def by_json(block: Block):
    with patch.object(parsing, "_good_row", lambda source, line: None):
        return parse(block)


@pytest.mark.parametrize(
    "source",
    [PLAIN, NESTED, FILTERED, UNWANTED],
    ids=["plain", "nested", "filtered", "unwanted"],
)
@pytest.mark.parametrize("line", ODD, ids=range(len(ODD)))
def test_an_odd_line_is_judged_as_json_judges_it(source, line):
    block = Block(source=source, file="a.jsonl", first=1, lines=line + b'\n{"text": "z", "n": 1}\n')
    assert parse(block) == by_json(block)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
rows = st.fixed_dictionaries({}, optional={"text": st.text() | values, "n": values, "m": values})


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    rows=st.lists(rows, max_size=4),
    ascii_alone=st.booleans(),
    cuts=st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=2)), max_size=3),
)
def test_lines_however_damaged_are_judged_as_json_judges_them(rows, ascii_alone, cuts):
    lines = "\n".join(json.dumps(row, ensure_ascii=ascii_alone) for row in rows).encode(
        "utf-8", "surrogatepass"
    )
    # some bytes are put over others
    for at, put in cuts:
        lines = lines[:at] + put + lines[at + len(put) :]
    for source in (PLAIN, FILTERED, UNWANTED):
        block = Block(source=source, file="a.jsonl", first=1, lines=lines)
        assert parse(block) == by_json(block)


def test_ordinary_lines_are_not_read_twice():
    line = json.dumps({"text": "déjà\n vu", "id": 2**63, "n": 3.5}).encode()
    block = Block(source=FILTERED, file="a.jsonl", first=1, lines=line + b"\n" + line + b"\n")
    with patch.object(parsing.json, "loads", side_effect=AssertionError):
        assert parse(block).texts == ["déjà\n vu"] * 2


def test_a_large_line_is_left_to_json_which_takes_less_memory(monkeypatch):
    monkeypatch.setattr(parsing, "LARGE_LINE_BYTES", 10)
    monkeypatch.setattr(parsing.orjson, "loads", None)
    block = Block(source=PLAIN, file="a.jsonl", first=1, lines=b'{"text": "a b c"}\n')
    assert parse(block).texts == ["a b c"]
