"""`mixture` of a run file: the sources that data-prep prints for it, from any folder, or one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from data_prep.config import PrepareConfig
from encoder.base.errors import ConfigError
from encoder.base.schema import from_mapping, parse_yaml, read_settings, to_plain, to_yaml
from encoder.runs.config import SourceConfig, changed_settings, identity_of, read_run
from encoder.runs.short_forms import read_run_mapping
from launch import plan
from tests.helpers.prep import run as prepare

ROOT = Path(__file__).resolve().parents[3]
MIXTURE_2T = ROOT / "configs" / "prep" / "mixture_2t.yaml"
RUN = """
name: mixed
data:
  mixture: {file: prep.yaml, name: first}
model: {hidden_size: 64, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}
phases:
  - {tokens: 8K, batch_tokens: 1024, lr: 1e-3}
  - {tokens: 8K, batch_tokens: 1024, lr: 1e-3, mixture: {name: second}}
evaluation: {mixture: {name: first}, every_tokens: 8K}
"""
PREP = {
    "out": "shards/mine",
    "mixtures": {
        "first": {"tokens": "10B", "sources": {"web": "8B", "books": "2B"}},
        "second": {"tokens": "5.5B", "sources": {"web": "4.5B", "code": "1B"}},
    },
}
FIRST = [
    {"name": "web", "path": "shards/mine/web/train", "weight": 8.0},
    {"name": "books", "path": "shards/mine/books/train", "weight": 2.0},
]
SECOND = [
    {"name": "web", "path": "shards/mine/web/train", "weight": 4.5},
    {"name": "code", "path": "shards/mine/code/train", "weight": 1.0},
]
HELD_OUT = [
    {"name": "web", "path": "shards/mine/web/held_out"},
    {"name": "books", "path": "shards/mine/books/held_out"},
]


@pytest.fixture
def run_file(tmp_path, monkeypatch):
    """A run file and its preparation file; the working folder is another one."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "run.yaml").write_text(RUN)
    (folder / "prep.yaml").write_text(json.dumps(PREP))
    (tmp_path / "working").mkdir()
    monkeypatch.chdir(tmp_path / "working")
    return folder / "run.yaml"


def as_text(sources: list) -> str:
    """Sources as a resolved run file has them."""
    return to_yaml([from_mapping(SourceConfig, source) for source in sources])


def refused(run_file: Path, *overrides: str) -> str:
    """What the plan says, which is one line, with exit code 2."""
    with pytest.raises(ConfigError) as caught:
        read_run(run_file, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_mixture_stands_for_what_data_prep_prints(run_file, capsys):
    """Character by character once both are read, for every mixture that is shipped."""
    for name in read_settings(PrepareConfig, MIXTURE_2T).mixtures:
        assert prepare("plan", MIXTURE_2T, "--mixture", name, "--yaml") == 0
        printed = parse_yaml(capsys.readouterr().out, where="printed")["sources"]
        ours = read_run_mapping(
            run_file,
            [
                f"data.mixture={{file: {MIXTURE_2T}, name: {name}}}",
                "phases.1.mixture=null",
                "evaluation=null",
            ],
        )["data"]["sources"]
        assert len(ours) >= 12
        assert as_text(ours) == as_text(printed)


def test_data_phases_and_evaluation_have_the_plain_sources(run_file):
    mapping = read_run_mapping(run_file)
    assert mapping["data"] == {"sources": FIRST}
    assert "sources" not in mapping["phases"][0] and mapping["phases"][1]["sources"] == SECOND
    assert mapping["evaluation"]["sources"] == HELD_OUT
    resolved = to_yaml(read_run(run_file))
    assert "mixture" not in resolved
    assert yaml.safe_load(resolved)["phases"][1]["sources"][1]["weight"] == 1.0


def test_the_file_is_found_beside_the_run_file_then_in_the_working_folder(run_file):
    """And last among those that Tessera brings."""
    shutil.copy(run_file.parent / "prep.yaml", "prep.yaml")
    Path("prep.yaml").write_text(json.dumps({**PREP, "out": "elsewhere"}))
    assert read_run(run_file).data.sources[0].path == "shards/mine/web/train"
    (run_file.parent / "prep.yaml").unlink()
    assert read_run(run_file).data.sources[0].path == "elsewhere/web/train"
    shipped = [
        "data.mixture.file=configs/prep/mixture_2t.yaml",
        "data.mixture.name=pretrain_1024",
        "phases.1.mixture.name=decay_8192",
        "evaluation=null",
    ]
    run = read_run(run_file, shipped)
    assert (
        run.data.sources[0].path == "shards/mixture_2t/fineweb_edu/train"
        and len(run.phases[1].sources) == 12
    )


@pytest.mark.parametrize("name", ["base", "large"])
def test_a_recipe_that_was_copied_elsewhere_is_the_same_run(run_file, name):
    """What `tessera new` writes into a folder without configs/."""
    recipe = ROOT / "configs" / "pretrain" / f"modernbert_{name}.yaml"
    shutil.copy(recipe, "copied.yaml")
    assert read_run("copied.yaml") == read_run(recipe)


def test_the_file_and_its_out_may_name_variables(run_file, monkeypatch):
    monkeypatch.setenv("SCRATCH", str(run_file.parent))
    (run_file.parent / "prep.yaml").write_text(json.dumps({**PREP, "out": "$SCRATCH/shards"}))
    run = read_run(run_file, ["data.mixture.file=$SCRATCH/prep.yaml"])
    assert run.data.sources[0].path == f"{run_file.parent}/shards/web/train"


def test_overrides_change_the_mixture_or_a_source_of_it(run_file):
    """The same as in a file that has the sources."""
    assert to_plain(read_run(run_file, ["data.mixture.name=second"]).data.sources) == to_plain(
        read_run(run_file).phases[1].sources
    )
    run = read_run(
        run_file, ["data.sources.1.weight=3", "data.mixture.name=second", "phases.1.mixture=null"]
    )
    assert [(s.name, s.weight) for s in run.data.sources] == [("web", 4.5), ("code", 3.0)]
    assert run.phases[1].sources is None
    run = read_run(
        run_file,
        ["data.sources=[shards/a]", "phases.1.sources=shards/b", "evaluation.sources=[shards/c]"],
    )
    assert run.data.sources[0].path == "shards/a" and run.phases[1].sources[0].path == "shards/b"
    assert [s.path for s in run.evaluation.sources] == ["shards/c"]


def test_a_budget_that_changed_is_another_run(run_file):
    before = to_plain(read_run(run_file))
    changed = {"tokens": "10B", "sources": {"web": "7B", "books": "3B"}}
    (run_file.parent / "prep.yaml").write_text(
        json.dumps({**PREP, "mixtures": {**PREP["mixtures"], "first": changed}})
    )
    after = read_run(run_file)
    assert changed_settings(before, after) == [
        ("data.sources.0.weight", 8.0, 7.0),
        ("data.sources.1.weight", 2.0, 3.0),
    ]
    assert identity_of(before) != identity_of(after)


def test_mistakes_are_one_sentence_with_what_to_do(run_file):
    for override, said in [
        ("data.mixture.name=frist", "data.mixture.name is 'frist', which is no mixture of"),
        ("data.mixture.name=frist", "prep.yaml. Did you mean first?"),
        ("phases.1.mixture.name=secnd", "phases.1.mixture.name is 'secnd', which is no mixture of"),
        (
            "data.mixture.file=perp.yaml",
            (
                "data.mixture.file perp.yaml does not exist, neither from the run file's folder nor"
                " from"
            ),
        ),
        ("data.mixture.file=perp.yaml", "Did you mean prep.yaml?"),
        (
            "data.mixture.file=s3://bucket/prep.yaml",
            "data.mixture.file: s3://bucket/prep.yaml begins with s3://",
        ),
        ("data.mixture.file=/dev", "it is a folder"),
        ("data.mixture=first", "data.mixture is text; needed: a mapping with keys file, name."),
        ("data.mixture={nmae: first}", "data.mixture.nmae is unknown. Did you mean name?"),
        ("data.mixture={name: first}", "data.mixture.file is missing."),
        ("evaluation.mixture.name=third", "evaluation.mixture.name is 'third'"),
        ("phases.0.mixtures={name: first}", "Here it is data.sources"),
    ]:
        message = refused(run_file, override)
        assert said in message, message


def test_sources_beside_a_mixture_are_refused(run_file):
    text = RUN.replace("  mixture: {file", "  sources: [shards/a]\n  mixture: {file")
    run_file.write_text(text)
    assert "data has both sources and mixture; needed: one of them." in refused(run_file)


@pytest.mark.parametrize(
    ("mixtures", "said"),
    [
        (None, "which is no mixture of"),
        ({}, "It has none; `mixtures` is where they stand."),
        ([], "mixtures is a list; needed: a mapping."),
        ({"first": None}, "mixtures.first is empty"),
        (
            {"first": {"tokens": "1B", "sources": ["web"]}},
            "mixtures.first.sources is a list; needed: a mapping.",
        ),
        (
            {"first": {"tokens": "1B", "sources": {"web": "x"}}},
            "mixtures.first.sources.web: 'x' is no number of tokens.",
        ),
        (
            {"first": {"tokens": "2B", "sources": {"web": "1B"}}},
            "add up to 1,000,000,000 tokens; needed: 2,000,000,000",
        ),
        (
            {"first": {"tokens": 0, "sources": {}}},
            "mixtures.first.sources is empty; needed: tokens by source",
        ),
    ],
)
def test_a_preparation_file_that_cannot_be_used_is_one_sentence(run_file, mixtures, said):
    content = {"out": "shards"} if mixtures is None else {"out": "shards", "mixtures": mixtures}
    (run_file.parent / "prep.yaml").write_text(json.dumps(content))
    message = refused(run_file)
    assert said in message and "prep.yaml" in message, message


def test_a_preparation_file_without_out_says_so(run_file):
    (run_file.parent / "prep.yaml").write_text(json.dumps({"mixtures": PREP["mixtures"]}))
    assert "prep.yaml: out is missing." in refused(run_file)


def test_the_plan_shows_the_mixture_and_a_mistake_ends_with_2(run_file, capsys):
    assert plan.main([str(run_file)]) == 0
    assert "web 80.0%, books 20.0%" in capsys.readouterr().out
    assert plan.main([str(run_file), "data.mixture.name=frist"]) == 2
    said = capsys.readouterr()
    assert (
        said.err.startswith("error: ")
        and said.err.count("\n") == 1
        and "Did you mean first?" in said.err
    )
