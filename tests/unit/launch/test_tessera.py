"""One command over all verbs, and the templates that it writes."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from encoder import __version__
from encoder.base.home import home
from encoder.base.schema import read_settings
from encoder.runs.config import read_run
from launch import new_file, tessera
from tests.helpers.shards import random_documents, write_source

ROOT = Path(__file__).resolve().parents[3]


def test_every_verb_has_a_file_that_does_it_and_an_example_in_the_help(capsys):
    assert tessera.main(["--help"]) == 0
    said = capsys.readouterr().out
    for word, verb in tessera.VERBS.items():
        assert f"$ tessera {word} " in said
        if verb.module == "slurm":
            assert (home() / "slurm" / "submit.py").is_file()
        elif importlib.util.find_spec(f"launch.{verb.module}"):
            assert callable(importlib.import_module(f"launch.{verb.module}").main)
        else:
            assert word == "push"
    assert len(said.splitlines()) < 60


def test_an_unknown_verb_names_the_nearest_and_ends_with_2(capsys):
    assert tessera.main(["pretrian", "run.yaml"]) == 2
    assert (
        capsys.readouterr().err
        == "error: pretrian is no verb. Did you mean pretrain? See tessera --help.\n"
    )
    assert tessera.main(["--version"]) == 0
    assert capsys.readouterr().out == f"tessera {__version__}\n"


def test_a_verb_speaks_of_itself_by_its_name(capsys):
    for word in ("plan", "submit", "status"):
        with pytest.raises(SystemExit) as ending:
            tessera.main([word, "--nonsense"])
        assert ending.value.code == 2 and f"See tessera {word} --help." in capsys.readouterr().err


@pytest.mark.parametrize("word", new_file.RUNS)
def test_a_template_is_the_shipped_run_file_and_loads(word, capsys, tmp_path):
    assert tessera.main(["new", word]) == 0
    text = capsys.readouterr().out
    assert text == (ROOT / "configs" / "pretrain" / f"{new_file.RUNS[word]}.yaml").read_text()
    assert text.startswith("# ")
    (tmp_path / "run.yaml").write_text(text)
    of_family = new_file.RUNS[word] in new_file.FAMILIES
    other = [] if of_family else ["model={preset: modernbert_17m}"]
    assert read_run(tmp_path / "run.yaml", other).phases


def test_every_shipped_run_file_is_a_template():
    assert sorted(new_file.RUNS.values()) == sorted(
        p.stem for p in (ROOT / "configs" / "pretrain").glob("*.yaml")
    )


def test_a_template_of_a_preparation_loads(capsys, tmp_path):
    from data_prep.config import PrepareConfig

    for name in new_file.preparations():
        assert tessera.main(["new", "prep", name]) == 0
        (tmp_path / "prep.yaml").write_text(capsys.readouterr().out)
        assert read_settings(PrepareConfig, tmp_path / "prep.yaml").sources


@pytest.mark.parametrize(
    "word", ["tiny", "small", "laptop", "one-gpu", "continue", "domain", "four-domains"]
)
def test_a_template_takes_the_shards_and_the_name_that_are_given(word, tmp_path):
    for split in ("train", "held_out"):
        write_source(tmp_path / "my shards" / split, random_documents(30), split=split)
    shards, file = tmp_path / "my shards" / "train", tmp_path / "run.yaml"
    words = [] if word == "tiny" else ["model={preset: modernbert_17m}"]
    assert (
        tessera.main(["new", word, "--data", str(shards), "--name", "mine", "--out", str(file)])
        == 0
    )
    run = read_run(file, words)
    assert {s.path for p in run.phases for s in run.sources_of(p)} == {str(shards)}
    assert [s.path for s in run.evaluation.sources] == [str(tmp_path / "my shards" / "held_out")]
    assert (run.name, run.out) == ("mine", "runs/mine")


def test_a_folder_above_shards_is_refused_and_a_plan_tells_the_one_meant(tmp_path, capsys):
    write_source(tmp_path / "mine" / "aj" / "train", random_documents(30))
    above = tmp_path / "mine"
    assert tessera.main(["new", "tiny", "--data", str(above)]) == 2
    meant = f"Did you mean {above / 'aj' / 'train'}?"
    assert f"{above} holds no shards (card.json is missing). {meant}" in capsys.readouterr().err
    # shards that are not there may be made later; a plan says what may be meant
    file = tmp_path / "run.yaml"
    later = tmp_path / "mine" / "ajj" / "train"
    assert tessera.main(["new", "tiny", "--data", str(later), "--out", str(file)]) == 0
    capsys.readouterr()
    assert tessera.main(["plan", str(file)]) == 0
    assert f"{later} not prepared yet. {meant}" in capsys.readouterr().out
    assert tessera.main(["plan", str(file), f"data.sources=[{above}]"]) == 0
    assert f"{above} not prepared yet. {meant}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["smal"], "smal is no template. Did you mean small?"),
        ([], "no template. Needed: one of tiny"),
        (["base", "--data", "x"], "base has other shards in other phases"),
        (["prep"], "prep without a name is no template"),
        (["small", "shards/a"], "Shards are given as --data shards/a"),
        (["prep", "demo", "--name", "x"], "are for run files"),
        (["finetune"], "finetune without a name is no template"),
        (["finetune", "rte", "--data", "x"], "--data is for run files"),
        (["small", "--like", "bert_base"], "--like is for task files"),
    ],
)
def test_a_template_that_cannot_be_is_one_sentence(words, said, capsys):
    try:
        code = tessera.main(["new", *words])
    except SystemExit as ending:
        code = ending.code
    assert code == 2 and said in capsys.readouterr().err


def test_a_template_is_never_written_over_a_file(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("mine")
    assert tessera.main(["new", "small", "--out", str(tmp_path / "run.yaml")]) == 2
    assert (
        "is there already" in capsys.readouterr().err
        and (tmp_path / "run.yaml").read_text() == "mine"
    )
    (tmp_path / "link.yaml").symlink_to("nowhere")
    assert tessera.main(["new", "small", "--out", str(tmp_path / "link.yaml")]) == 2
    assert (tmp_path / "link.yaml").is_symlink() and "is there already" in capsys.readouterr().err


def test_a_new_preparation_names_its_tokenizer_first_where_that_is_not_there(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert tessera.main(["new", "prep", "own_text", "--out", "a.yaml"]) == 0
    tokenizer = "data-prep tokenizer modernbert --out corpus/tokenizer.json"
    said = capsys.readouterr().out
    assert tokenizer in said and said.rstrip().endswith("then: data-prep prepare a.yaml")

    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "tokenizer.json").write_text("{}")
    assert tessera.main(["new", "prep", "own_text", "--out", "b.yaml"]) == 0
    assert capsys.readouterr().out == "wrote b.yaml. Look at it, then: data-prep prepare b.yaml\n"
