"""Bytes made elsewhere: a value or one sentence, and no file outside the folder."""

from __future__ import annotations

import os
import socket
import time

import pytest

from encoder.base.errors import ShardError
from encoder.base.untrusted import (
    MOST_DEPTH,
    inside,
    missing,
    number_in_name,
    parse_json,
    plain_name,
    read_bytes,
    read_json,
)


def refused(text: str) -> str:
    with pytest.raises(ShardError) as caught:
        parse_json(text, where="card.json", error=ShardError)
    said = str(caught.value)
    assert said.startswith("card.json ") and "\n" not in said and len(said) < 300
    return said


def test_json_is_read_as_it_stands():
    text = (
        '{"a": [1, -2.5e3, "\\u00e9\\ud83d\\ude00", null, true], "b": {"a": 18446744073709551615}}'
    )
    assert parse_json(text, where="x") == {
        "a": [1, -2500.0, "\u00e9\U0001f600", None, True],
        "b": {"a": 2**64 - 1},
    }
    assert parse_json("NaN", where="x", non_finite=True) != parse_json("1", where="x")


@pytest.mark.parametrize(
    "text, said",
    [
        ("[" * 30_000, "cannot be read: line 1 is nested more than 64 levels deep"),
        ('{"a":\n' * 100_000 + "1" + "}" * 100_000, "line 65 is nested more than 64 levels deep"),
        ("[" * 200 + "]" * 200, "nested more than 64"),
        ('"' + '\\"' * 10**6, "Unterminated string"),
        ("[" * 70 + '"' + '\\"[' * 10**6, "Unterminated string"),
        ("1" * 5_000, "holds an integer of 5,000 digits"),
        ("-" + "1" * 10**7, "holds an integer of 10,000,001 digits"),
        ("1e999999999", "holds the number 1e999999999, which is too large"),
        ('{"a": NaN}', "holds NaN"),
        ("[-Infinity]", "holds -Infinity"),
        ('{"a": 1, "a": 2}', "has the key 'a' twice"),
        ('{"x": {"b": 1, "a": 1, "a": 2}}', "has the key 'a' twice"),
        ('"\\ud800"', "half of a character ('\\ud800')"),
        ('{"\\udc80": 1}', "half of a character"),
        ("", "it is empty"),
        (" \n", "it is empty"),
        ('{\n"a": 1,\n}', "in line 3; needed: JSON"),
        ('{"a": 1} x', "Extra data in line 1"),
        ("[" + "[]," * 5_000_001 + "1]", "more than 5,000,000 lists"),
    ],
)
def test_json_of_any_depth_size_and_digits_is_one_sentence(text, said):
    begun = time.monotonic()
    assert said in refused(text)
    assert time.monotonic() - begun < 5


def test_the_deepest_allowed_value_is_read():
    deepest = "[" * MOST_DEPTH + '"\\ud83d\\ude00"' + "]" * MOST_DEPTH
    assert parse_json(deepest, where="x")
    assert "64 levels" in refused("[" + deepest + "]")


def test_only_a_regular_file_within_its_bytes_is_opened(tmp_path):
    """A fifo would be waited for without an end, a device would never end."""

    def said(path, **more) -> str:
        with pytest.raises(ShardError) as caught:
            read_json(path, error=ShardError, **more)
        return str(caught.value)

    os.mkfifo(tmp_path / "fifo")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    (tmp_path / "big").write_bytes(b" " * 101)
    (tmp_path / "latin").write_bytes('{\n"a": "\u00e9"}'.encode("latin-1"))
    (tmp_path / "utf16").write_bytes('{"a": 1}'.encode("utf-16"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "list").write_text("[]")
    assert "cannot be read: it is a fifo; needed: a file." in said(tmp_path / "fifo")
    assert "is a socket" in said(tmp_path / "socket")
    assert "is a device; needed: a file." in said("/dev/zero")
    assert "is a folder; needed: a file." in said(tmp_path)
    assert "cannot be read: No such file or directory." in said(tmp_path / "none")
    assert "cannot be read" in said(tmp_path / "loop")
    assert "no file has such a name" in said(f"{tmp_path}/a\0b")
    assert "it has 101 bytes, and no such file has more than 100" in said(
        tmp_path / "big", most_bytes=100
    )
    assert "latin cannot be read: line 2 is not UTF-8" in said(tmp_path / "latin")
    assert "is UTF-16; needed: UTF-8" in said(tmp_path / "utf16")
    assert "holds a list; needed: a mapping." in said(tmp_path / "list", root=dict)
    server.close()


def test_a_missing_file_can_be_told_from_a_broken_one(tmp_path):
    for name, is_missing in (("none", True), (".", False)):
        with pytest.raises(ShardError) as caught:
            read_bytes(tmp_path / name, error=ShardError)
        assert missing(caught.value) is is_missing


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(tmp_path / "a.json", root=list) == [1]


@pytest.mark.parametrize(
    "name, said",
    [
        ("../victim/evil.pth", "leaves its folder"),
        ("a/../../b", "leaves its folder"),
        ("..", "leaves its folder"),
        ("/etc/passwd", "is absolute"),
        ("", "is empty"),
        (".", "is no plain path"),
        ("a//b", "is no plain path"),
        ("a/", "is no plain path"),
        ("./a", "is no plain path"),
        ("a\0b", "holds a character"),
        ("a\nb", "holds a character"),
        ("\ud800", "holds a character"),
        ("C:a", "path of Windows"),
        ("..\\a", "path of Windows"),
        ("a" * 256, "is too long"),
        ("a/" * 3000 + "a", "is too long"),
        (None, "is no text"),
        (7, "is no text"),
        (["a"], "is no text"),
        (b"a", "is no text"),
    ],
)
def test_a_name_from_a_file_stays_below_its_folder(tmp_path, name, said):
    with pytest.raises(ShardError) as caught:
        inside(tmp_path, name, where=tmp_path / "index.json", error=ShardError)
    assert (
        said in str(caught.value)
        and str(tmp_path / "index.json") in str(caught.value)
        and len(str(caught.value)) < 500
    )


def test_good_names_are_taken_and_folders_only_where_they_may_be(tmp_path):
    for name in ("shard.00000.mds.zstd", "train/shard.0", "\u00e9 a", "a" * 255, "..a", "~x"):
        assert inside(tmp_path, name, where="index.json") == tmp_path / name
    with pytest.raises(
        ShardError, match="lies in another folder; needed: the name of a file beside it"
    ):
        plain_name("a/b", where="MANIFEST.json", error=ShardError, folders=False)


def test_a_symbolic_link_that_leaves_the_folder_is_refused(tmp_path):
    home, away = tmp_path / "home", tmp_path / "away"
    (home / "below").mkdir(parents=True)
    away.mkdir()
    (home / "near").symlink_to(home / "below" / "x")
    (home / "far").symlink_to(away / "x")
    (home / "folder").symlink_to(away)
    (tmp_path / "alias").symlink_to(home)
    assert inside(home, "near", where="m") == home / "near"
    assert inside(tmp_path / "alias", "near", where="m") == tmp_path / "alias" / "near"
    for name in ("far", "folder/x"):
        with pytest.raises(ShardError, match="is a symbolic link that leaves its folder"):
            inside(home, name, where="m", error=ShardError)


def test_links_of_the_hubs_cache_stay_in_their_repository(tmp_path):
    snapshot, blobs = tmp_path / "models--a" / "snapshots" / "rev", tmp_path / "models--a" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (snapshot / "config.json").symlink_to("../../blobs/1234")
    (snapshot / "other").symlink_to("../../../models--b/blobs/1234")
    assert inside(snapshot, "config.json", where="m") == snapshot / "config.json"
    with pytest.raises(ShardError, match="leaves its folder"):
        inside(snapshot, "other", where="m", error=ShardError)


def test_numbers_in_names_have_bounds():
    assert number_in_name("0012") == 12
    for text in ("", "-1", "1" * 19, "1" * 5000, "\u0661", "\u00b2", "1_0", " 1"):
        assert number_in_name(text) is None
