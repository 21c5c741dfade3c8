"""Settings are strict: a mistake is found where it stands, and named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from encoder.base.errors import ConfigError
from encoder.base.schema import (
    Tokens,
    chosen_by,
    differences,
    from_mapping,
    parse_yaml,
    read_mapping,
    to_plain,
)


@dataclass(frozen=True, kw_only=True)
class Flat:
    peak: float


@dataclass(frozen=True, kw_only=True)
class Warm:
    peak: float
    warmup_tokens: Tokens = 0


@dataclass(frozen=True, kw_only=True)
class Inner:
    rows: int = 4
    shares: tuple[float, ...] = (0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    tokens: Tokens
    mode: Literal["fast", "slow"] = "fast"
    inner: Inner = Inner()
    lr: Annotated[Flat | Warm, chosen_by("schedule", {"flat": Flat, "warm": Warm})] = Flat(peak=1.0)
    note: str | None = None
    wave: Annotated[
        Flat | Warm, chosen_by("kind", {"flat": Flat, "warm": Warm}, default="warm")
    ] = Flat(peak=1.0)


def build(text: str) -> Outer:
    return from_mapping(Outer, parse_yaml(text, where="run.yaml"), where="run.yaml")


def test_units_words_and_numbers_written_as_text_are_read():
    run = build("{name: a, tokens: 1.719T, lr: {schedule: warm, peak: 1e-4, warmup_tokens: 3B}}")
    assert run.tokens == 1_719_000_000_000 and run.lr == Warm(
        peak=1e-4, warmup_tokens=3_000_000_000
    )
    assert from_mapping(Outer, to_plain(run)) == run


def test_a_choice_with_a_usual_word_may_leave_it_out():
    assert build("{name: a, tokens: 1, wave: {peak: 2, warmup_tokens: 3}}").wave == Warm(
        peak=2.0, warmup_tokens=3
    )
    assert build("{name: a, tokens: 1, wave: {kind: flat, peak: 2}}").wave == Flat(peak=2.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{name: a, tokens: 1, lr: {peak: 1}}", "lr.schedule is missing. Known: flat, warm."),
        (
            "{name: a, tokens: 1, inner: {row: 3}}",
            "run.yaml: inner.row is unknown. Did you mean rows?",
        ),
        (
            "{name: a, tokens: 1, lr: {schedule: flat, peak: 1, warmup_tokens: 5}}",
            "lr.warmup_tokens is unknown",
        ),
        (
            "{name: a, tokens: 1, lr: {schedule: wram, peak: 1}}",
            "lr.schedule is 'wram'. Did you mean warm?",
        ),
        ("{name: a, tokens: 1, lr: {schedule: [flat], peak: 1}}", "lr.schedule is ['flat']. "),
        ("{name: a, tokens: 1, mode: fsat}", "mode is 'fsat'. Did you mean fast?"),
        (
            "{name: a, tokens: 1, lr: {schedul: warm, schedule: flat, peak: 1}}",
            "lr.schedul is unknown. Did you mean schedule?",
        ),
        (
            "{name: a, tokens: 1, wave: {knd: flat, peak: 2, warmup_tokens: 3}}",
            "wave.knd is unknown. Did you mean kind?",
        ),
        ("{name: a}", "tokens is missing"),
        ("{name: a, tokens: many}", "tokens: 'many' is no number of tokens"),
        ("{name: a, tokens: 1.5}", "tokens: 1.5 is not a whole number of tokens"),
        ("{name: a, tokens: -3}", "tokens"),
        ("{name: 7, tokens: 1}", "name is 7 (a number); needed: text"),
        ("{name: a, tokens: 1, inner: {rows: true}}", "inner.rows is True"),
        ("{name: a, tokens: 1, inner: {rows: '4'}}", "inner.rows is '4'"),
        ("{name: a, tokens: 1, inner: {shares: [1, x]}}", "inner.shares.1 is 'x'"),
        ("{name: a, tokens: 1, lr: {schedule: flat, peak: .nan}}", "lr.peak is nan"),
        ("{name: a, name: b, tokens: 1}", "'name' stands twice"),
        ("[1, 2]", "is a list"),
        ("{name: a, tokens: 1, inner: }", "inner is empty"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(text, said):
    with pytest.raises(ConfigError) as caught:
        build(text)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_broken_yaml_names_the_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: a\ntokens: [1\n")
    with pytest.raises(ConfigError, match="run.yaml line"):
        read_mapping(path)


def test_a_text_read_again_is_not_what_a_caller_made_of_its_value():
    text = "a: [1, {b: 2}]\n"
    first = parse_yaml(text, where="x")
    first["a"][1]["b"] = 9
    first["a"].append(3)
    assert parse_yaml(text, where="x") == {"a": [1, {"b": 2}]}


def test_a_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "tiny_cpu.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match="Did you mean tiny_cpu.yaml"):
        read_mapping(tmp_path / "tiny_gpu.yaml")


def test_overrides_reach_into_lists_and_make_sections(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("phases: [{tokens: 1}, {tokens: 2}]\n")
    assert read_mapping(path, ["phases.1.tokens=5M", "engine.zero_stage=2"]) == {
        "phases": [{"tokens": 1}, {"tokens": "5M"}],
        "engine": {"zero_stage": 2},
    }
    for wrong, said in (
        ("phases.2.tokens=1", "list of 2 items"),
        ("engine", "has no '='"),
        ("phases.0.tokens.x=1", "has no key"),
    ):
        with pytest.raises(ConfigError, match=said):
            read_mapping(path, [wrong])


def test_differences_name_the_dotted_key():
    assert differences({"a": {"b": [1, 2]}, "c": 1}, {"a": {"b": [1, 3]}}) == [
        ("a.b.1", 2, 3),
        ("c", 1, None),
    ]


def test_a_bare_off_is_the_word_where_there_is_one(tmp_path):
    """YAML reads it as false; `compile: off` is what our own messages advise."""

    @dataclass(frozen=True, kw_only=True)
    class Switch:
        compile: Literal["auto", "off"] = "auto"

    (tmp_path / "run.yaml").write_text("compile: off\n")
    assert (
        from_mapping(Switch, read_mapping(tmp_path / "run.yaml"), where="run.yaml").compile == "off"
    )


@pytest.mark.parametrize(
    "text, words",
    [
        ("files: [{{ path }}]", "line 1: a key is a mapping; needed: a word"),
        ("? [a]\n: 1", "line 1: a key is a list; needed: a word"),
    ],
)
def test_a_key_that_is_no_word_is_one_line(text, words):
    with pytest.raises(ConfigError, match=words):
        parse_yaml(text, where="run.yaml")
