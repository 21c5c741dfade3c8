"""plan: tokens from cards, estimates or files, costs by hand, epochs, and weights that a run file takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.config import PrepareConfig
from data_prep.plan import mixture_yaml, source_plan
from encoder.base import log
from encoder.base.schema import from_mapping, parse_yaml, read_settings
from encoder.data.shard_format import read_card
from encoder.runs.config import SourceConfig
from tests.helpers.prep import run, settings, texts, write_jsonl
from tests.unit.prep.test_bad_input import refused

MIXTURE_2T = Path(__file__).resolve().parents[3] / "configs/prep/mixture_2t.yaml"


@pytest.fixture(autouse=True)
def every_warning_again(monkeypatch):
    monkeypatch.setattr(log._state, "said", set())


def hub(name: str, tokens: str | None) -> dict:
    given = {"name": name, "format": "hub", "dataset": f"nobody/{name}"}
    return (
        {**given, "estimate": {"tokens": tokens, "reference": "counted by hand"}}
        if tokens
        else given
    )


def test_costs_of_a_source_by_hand(tmp_path):
    path = settings(
        tmp_path, [hub("a", "7B")], mixtures={"m": {"tokens": "14B", "sources": {"a": "14B"}}}
    )
    for changes, id_bytes in (((), 2.0), (("compression=zstd",), 1.0)):
        config = read_settings(PrepareConfig, path, changes)
        plan = source_plan(config, config.sources[0], 2_000_000)
        assert plan.text_bytes == 28e9 and plan.core_hours == pytest.approx(7e9 / 2e6 / 3600)
        assert plan.disk_bytes == 7e9 * id_bytes + 10_000_000 * 13  # 700 tokens a sample


def test_a_card_counts_before_an_estimate_and_files_are_measured(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", texts(60))
    source = {"name": "a", "format": "jsonl", "files": ["a.jsonl"]}
    config = settings(tmp_path, [source])
    assert run("plan", config) == 0
    size = (tmp_path / "a.jsonl").stat().st_size
    assert f"{size // 4 / 1000:.4g}K  files" in capsys.readouterr().out
    assert run("prepare", config) == 0
    assert (
        run(
            "plan", settings(tmp_path, [{**source, "estimate": {"tokens": "5T", "reference": "x"}}])
        )
        == 0
    )
    tokens = read_card(tmp_path / "shards/a/train").tokens
    assert f"{tokens / 1000:.4g}K  card" in capsys.readouterr().out


def test_epochs_add_up_over_mixtures_and_too_many_are_said(tmp_path, capsys):
    mixtures = {
        "m": {"tokens": "10B", "sources": {"a": "8B", "b": "2B"}},
        "n": {"tokens": "1B", "sources": {"b": "1B"}},
    }
    config = settings(
        tmp_path, [hub("a", "16B"), hub("b", "500M"), hub("c", None)], mixtures=mixtures
    )
    assert run("plan", config) == 0
    said = capsys.readouterr()
    assert (
        "80.00 %    0.50" in said.out
        and "20.00 %    4.00" in said.out
        and "100.00 %    2.00" in said.out
    )
    assert (
        "b is gone through 6.0 times in all" in said.err
        and "nothing tells how much c holds" in said.err
    )
    assert run("plan", config, "--mixture", "n", "--speed", "10") == 0
    said = capsys.readouterr()
    assert (
        "b is gone through" not in said.err
        and "a is in no mixture shown here" in said.out
        and "at 10 Mtok a core" in said.out
    )


@pytest.mark.parametrize(
    "mixture, words",
    [
        (
            {"tokens": "10B", "sources": {"a": "8B", "b": "3B"}},
            "add up to 11,000,000,000 tokens; needed: 10,000,000,000, 1,000,000,000 fewer",
        ),
        ({"tokens": "8B", "sources": {"a": "8B", "b": "0"}}, "b has 0 tokens"),
        ({"tokens": "8B", "sources": {"aa": "8B"}}, "mixtures.m names the source aa. "),
        ({"tokens": "8B"}, "sources is missing"),
    ],
)
def test_a_mixture_that_does_not_add_up_is_one_line(tmp_path, capsys, mixture, words):
    config = settings(tmp_path, [hub("a", "1B"), hub("b", "1B")], mixtures={"m": mixture})
    assert words in refused(capsys, "plan", config)
    assert words in refused(capsys, "prepare", config)


def test_wrong_words_of_plan_are_one_line(tmp_path, capsys):
    config = settings(
        tmp_path, [hub("a", "1B")], mixtures={"one": {"tokens": "1B", "sources": {"a": "1B"}}}
    )
    assert "Did you mean one?" in refused(capsys, "plan", config, "--mixture", "ones")
    assert "needed: --mixture NAME" in refused(capsys, "plan", config, "--yaml")
    assert "--speed is 0" in refused(capsys, "plan", config, "--speed", "0")
    assert "Did you mean --mixture?" in refused(capsys, "plan", config, "--mixtur", "one")


def test_the_2t_recipe_adds_up_and_no_source_is_gone_through_too_often(capsys):
    config = read_settings(PrepareConfig, MIXTURE_2T)
    assert {n: m.tokens for n, m in config.mixtures.items()} == {
        "pretrain_1024": 2 * 10**12,
        "extend_8192": 250 * 10**9,
        "decay_8192": 50 * 10**9,
    }
    assert all(
        s.license and s.estimate.reference and s.dataset.count("/") == 1 for s in config.sources
    )
    taken = {name for m in config.mixtures.values() for name in m.sources}
    assert taken == {s.name for s in config.sources}
    assert run("plan", MIXTURE_2T) == 0
    said = capsys.readouterr()
    assert said.err == "" and said.out.count("epochs") == 3


def test_the_block_for_a_run_file_holds_the_budgets_as_weights():
    config = read_settings(PrepareConfig, MIXTURE_2T)
    for name, mixture in config.mixtures.items():
        block = parse_yaml(mixture_yaml(config, name), where="plan")
        sources = [from_mapping(SourceConfig, source) for source in block["sources"]]
        assert {s.name: s.weight * 1e9 for s in sources} == mixture.sources
        assert sources[0].path == f"shards/mixture_2t/{sources[0].name}/train"
