"""Settings files: all mistakes at once, other trainers' words, paths as a shell writes them, and no text that breaks the reader."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import pytest

from data_prep.cli import _parsed as prep_arguments
from data_prep.config import PrepareConfig, read_preparation
from data_prep.other_words import OTHER_WORDS as PREP_WORDS
from encoder.base.command import CommandLine
from encoder.base.errors import ConfigError
from encoder.base.paths import expand_path
from encoder.base.schema import (
    _places,
    from_mapping,
    parse_yaml,
    read_mapping,
    read_settings,
)
from encoder.finetune.config import read_task
from encoder.finetune.sweeps.points import read_sweeps
from encoder.runs.config import CheckpointConfig, RunConfig, read_run
from encoder.runs.other_words import OTHER_WORDS
from encoder.tools.cluster.submit import _parser as submit_parser
from encoder.tools.embedding.config import read_embed

ROOT = Path(__file__).resolve().parents[3]
RUN = (ROOT / "tests" / "helpers" / "three_phases.yaml").read_text()


def run_file(tmp_path: Path, text: str) -> Path:
    (tmp_path / "run.yaml").write_text(text)
    return tmp_path / "run.yaml"


def refused(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_run(run_file(tmp_path, text), overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_all_mistakes_of_a_file_are_said_at_once_each_with_a_value():
    """Unknown, missing and wrong ones, in every part of the file."""
    text = """
    modle: {}
    data: {sources: [{pth: x}, {path: 7}], window_documents: many}
    phases: [{tokens: 1X, max_tokens_per_document: 64}]
    """
    with pytest.raises(ConfigError) as caught:
        from_mapping(RunConfig, parse_yaml(text, where="run.yaml"), where="run.yaml")
    said = str(caught.value)
    for words in (
        "modle is unknown. Did you mean model?",
        "name is missing. Add it: name: first.",
        "out is missing. Add it: out: runs/first.",
        "data.sources.0.pth is unknown. Did you mean path?",
        "data.sources.1.path is 7",
        "data.window_documents is 'many'",
        "data.row_tokens is missing. Add it: row_tokens: 1024.",
        "phases.0.tokens: '1X' is no number of tokens",
        "phases.0.batch_tokens is missing. Add it: batch_tokens: 64Ki.",
    ):
        assert words in said, words
    assert (
        said.startswith("run.yaml: ")
        and said.count("run.yaml") == 1
        and "\n" not in said
        and "(1) " in said
    )
    assert "data.sources.0.path is missing" not in said  # it was meant by pth


def test_the_example_of_a_missing_key_is_a_value_that_is_taken():
    with pytest.raises(ConfigError) as caught:
        from_mapping(PrepareConfig, {}, where="p.yaml")
    said = str(caught.value)
    mapping = {}
    for key in ("tokenizer", "out", "sources"):
        mapping[key] = parse_yaml(
            said.split(f"Add it: {key}: ")[1].split(". (")[0].removesuffix("."), where="example"
        )
    assert from_mapping(PrepareConfig, mapping).out


@pytest.mark.parametrize(
    "word, here",
    [
        ("learning_rate: 1e-3", "phases.0.lr"),
        ("num_train_epochs: 3", "max_epochs"),
        ("bf16: true", "engine.precision"),
        ("max_steps: 100", "phases.0.tokens"),
        ("per_device_train_batch_size: 8", "loader.micro_batch_rows"),
        ("warmup_ratio: 0.1", "warmup_tokens"),
        ("weight_decay: 0.1", "optimizer.weight_decay"),
        ("output_dir: x", "out: runs/first"),
        ("mlm_probability: 0.3", "mask_share"),
        ("max_duration: 10ba", "phases.0.tokens"),
        ("global_train_batch_size: 8", "batch_tokens"),
        ("device-batch-size: 8", "micro_batch_rows"),
        ("update_freq: 8", "leave it out"),
        ("keep_last: 3", "It belongs to checkpoints.keep_last"),
        ("micro_batch_rows: 3", "It belongs to loader.micro_batch_rows"),
    ],
)
def test_a_word_of_another_trainer_or_place_points_to_ours(tmp_path, word, here):
    said = refused(tmp_path, f"{RUN}\n{word}\n")
    assert f"{word.split(':')[0]} is unknown." in said and here in said


@pytest.mark.parametrize(
    "override, said",
    [
        ("device=gpu", "Did you mean cuda?"),
        ("engine.precision=fp16", "Did you mean autocast?"),
        ("engine.precision=bfloat16", "Did you mean bf16?"),
    ],
)
def test_a_value_of_another_trainer_points_to_ours(tmp_path, override, said):
    assert said in refused(tmp_path, RUN, override)


def test_every_word_of_another_program_points_to_a_setting_that_exists():
    for words, cls in ((OTHER_WORDS, RunConfig), (PREP_WORDS, PrepareConfig)):
        for word, here in words.items():
            if here.startswith(("no setting", "worked out")):
                continue
            key = here.split(":")[0]
            places = {place for place, _ in _places(key.rpartition(".")[2], cls, "", ())}
            assert key in places, (word, key, places)


def test_paths_of_every_setting_and_argument_are_expanded_or_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("NOT_SET", raising=False)
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    assert expand_path("~/x") == str(home / "x") and expand_path("$SCRATCH/x") == expand_path(
        "${SCRATCH}/x"
    ) == str(scratch / "x")
    assert (
        expand_path(Path("~")) == home
        and expand_path("a/b") == "a/b"
        and expand_path("s3://b/$x~") == "s3://b/$x~"
    )
    run = read_run(
        run_file(tmp_path, RUN),
        ["out=~/run", "data.sources=[{path: $SCRATCH/a, cache: ~/c}]", "evaluation=null"],
    )
    assert run.out == str(home / "run") and run.data.sources[0].path == str(scratch / "a")
    assert run.data.sources[0].cache == str(home / "c")
    prep = from_mapping(
        PrepareConfig,
        {
            "tokenizer": "~/t.json",
            "out": "${SCRATCH}/s",
            "root": "$HOME",
            "sources": [{"name": "a", "format": "jsonl", "files": ["~/*.jsonl"]}],
        },
    )
    assert (prep.tokenizer, prep.out, prep.root) == (
        str(home / "t.json"),
        str(scratch / "s"),
        str(home),
    )
    assert prep.sources[0].files == (str(home / "*.jsonl"),)
    for wrong, said in (
        ("'${oc.env:HOME}/x'", "is a reference of OmegaConf"),
        ("$NOT_SET/x", "names the variable NOT_SET"),
        ("'${NOT_SET}'", "names the variable NOT_SET"),
        ("''", "it is empty"),
        ('"a\\0b"', "holds a character"),
        ("~nobody_of_this_name/x", "no such home folder"),
        ("'${HOME:-x}'", "OmegaConf"),
    ):
        for key in ("out", "data.sources.0.path", "data.sources.0.cache"):
            message = refused(tmp_path, RUN, f"{key}={wrong}")
            assert said in message and key in message
    parser = CommandLine(prog="x")
    parser.add_argument("--out", type=Path)
    assert parser.parse_args(["--out=~/y"]).out == home / "y"
    for wrong in ("$NOT_SET/x", "", "${oc.env:HOME}"):
        with pytest.raises(SystemExit) as left:
            parser.parse_args([f"--out={wrong}"])
        assert left.value.code == 2
    assert not list(tmp_path.glob("*~*")) and not list(tmp_path.glob("*$*"))


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
MERGES = "m0: &m0 {a: 1}\n" + "".join(
    f"m{i}: &m{i}\n  <<: [{', '.join([f'*m{i - 1}'] * 9)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    "text, said",
    [
        ("[" * 30_000, "line 1: nested more than 64 levels deep"),
        ("{a: " * 5_000, "nested more than 64"),
        ("\n".join("  " * i + "a:" for i in range(400)), "line 64: nested more than 64"),
        ("- " * 1000 + "x", "nested more than 64"),
        (BOMB, "line 5: more than 20,000 values"),
        (MERGES, "more than 20,000 values"),
        ("&a [*a]", "stands inside of what it names"),
        ("a: !!int abc", "line 1: 'abc' cannot be read as a whole number"),
        ("a: !!bool x", "cannot be read as true or false"),
        ("a: !!timestamp x", "the tag !!timestamp is not read here"),
        ("a: !!python/object/apply:os.system [ls]", "the tag !!python"),
        ("a: !!float x", "cannot be read as a number"),
        ("a: !!set {x}", "tag !!set"),
        ("a: !!binary x", "tag !!binary"),
        ("a: !x y", "tag !x"),
        ("a: " + "1" * 5_000, "cannot be read as a whole number"),
        ("a: 0x" + "f" * 5_000, "cannot be read as"),
        ('a: "\\ud800"', "cannot be read as text"),
        ("a: \0", "a character that no text has (U+0000)"),
        ("<<: 3", "line 1: "),
        ("a: [" + "1, " * 300_000 + "]", "more than 20,000 values"),
        ("? {a: 1}\n: b", "a key is a mapping"),
        ("a: *b", "undefined alias"),
        ("a: 1\n\tb: 2", "line 2: "),
        ("%YAML 3.0\n---\na: 1", "line 1: "),
        ("a: 1\n---\nb: 2", "line 2: "),
        ("a: 1\na: 2", "stands twice"),
    ],
)
def test_yaml_of_any_depth_size_tag_and_alias_is_one_sentence(text, said):
    begun = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, where="run.yaml")
    assert (
        said in str(caught.value)
        and str(caught.value).startswith("run.yaml")
        and "\n" not in str(caught.value)
    )
    assert len(str(caught.value)) < 400 and time.monotonic() - begun < 20


def test_merge_keys_aliases_and_dates_are_read_as_they_stand():
    text = (
        "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]\nd: 2026-02-31\ne: 2026-02-28\nf:"
        " !!str 7\n"
    )
    found = parse_yaml(text, where="x")
    assert found == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 1, "y": 3},
        "c": [{"x": 1, "y": 2}] * 2,
        "d": "2026-02-31",
        "e": "2026-02-28",
        "f": "7",
    }
    assert found["c"][0] is not found["c"][1]  # an override changes one place


@pytest.mark.parametrize(
    "override, said",
    [
        ("phases.0.tokens=1e999999999", "no number of tokens"),
        ("phases.0.tokens=1e9999", "more tokens than 63 bits"),
        ("phases.0.tokens=9223372036854775808", "more tokens than 63 bits"),
        ("seed=1" + "0" * 200, "seed is a number of 201 digits"),
        ("model={preset: []}", "model.preset"),
        ("model={preset: {}}", "model.preset"),
        ("loader.workers=1e300", "loader.workers"),
        ('name="a\\0b"', "name is"),
        ("phases.0.lr={schedule: {}, peak: 1}", "lr.schedule"),
        (".".join("a" * 100) + "=1", "is no key"),
        ("phases.\u00b2.tokens=1", "is none of 0"),
        ("phases..tokens=1", "is no key"),
    ],
)
def test_values_beyond_any_measure_are_one_sentence(tmp_path, override, said):
    assert said in refused(tmp_path, RUN, override)


def test_a_settings_file_that_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "run.yaml")
    for path, said in (
        (tmp_path / "run.yaml", "it is a fifo"),
        (tmp_path, "it is a folder"),
        (Path("/dev/zero"), "it is a device"),
    ):
        with pytest.raises(ConfigError, match=said):
            read_mapping(path)
    (tmp_path / "big.yaml").write_text("# " + "x" * 2**21)
    with pytest.raises(ConfigError, match="it has 2,097,154 bytes"):
        read_settings(PrepareConfig, tmp_path / "big.yaml")


@pytest.mark.parametrize(
    "line, said",
    [
        ("seed: 1:30", "seed is '1:30' (text); needed: a whole number"),
        ("seed: 017", "seed is '017' (text)"),
        ("name: 7", "needed: text. Put it in quotes"),
        ("name: true", "needed: text. Put it in quotes"),
    ],
)
def test_no_value_means_another_one_than_is_written(tmp_path, line, said):
    """YAML 1.1 reads 1:30 as 90, 017 as 15, and the language no as false: nobody who wrote them meant that."""
    key = line.partition(":")[0]
    assert said in refused(
        tmp_path, "\n".join(line if old.startswith(f"{key}:") else old for old in RUN.splitlines())
    )


def test_words_of_yaml_1_1_are_text_but_where_a_truth_value_is_due():
    found = parse_yaml(
        "a: [en, no, on, off, yes, 007, 020, 2:30, true, 0x1f, -5, +3, 1_000, .5, 1e3, 1.5e3,"
        " .inf]",
        where="x",
    )
    assert found["a"][:9] == ["en", "no", "on", "off", "yes", "007", "020", "2:30", True]
    assert found["a"][9:] == [31, -5, 3, 1000, 0.5, "1e3", 1500.0, float("inf")]
    assert (
        from_mapping(CheckpointConfig, {"every_tokens": 1, "background": "no"}).background is False
    )
    assert (
        from_mapping(CheckpointConfig, {"every_tokens": 1, "background": "Yes"}).background is True
    )


def test_all_mistakes_of_overrides_and_of_a_choice_are_said_at_once(tmp_path):
    said = refused(tmp_path, RUN, "noequals", "phases.9.tokens=1", "phases.0.tokens.x=1", "a.=3")
    assert said.count("override") >= 4 and "4 mistakes" in said
    said = refused(tmp_path, RUN, "phases.0.lr={schedule: cosin, peek: 1, warmup_token: 2}")
    assert (
        "Did you mean cosine?" in said
        and "Did you mean peak?" in said
        and "Did you mean warmup_tokens?" in said
    )


@pytest.mark.parametrize(
    "override",
    [
        "out=s3://bucket/x",
        "out=file:///tmp/x",
        "out=FILE:/tmp/x",
        "branch_from=https://a/b",
        "init_from=https://huggingface.co/a/b",
        "init_from=file:///x",
        "data.sources.0.cache=gs://b/c",
        "out='runs/x '",
        "out=' runs/x'",
    ],
)
def test_a_url_or_a_stray_space_never_names_a_folder_here(tmp_path, override):
    said = refused(tmp_path, RUN, override)
    assert "begins with" in said or "begins or ends with white space" in said


def test_a_url_in_place_of_a_path_is_refused_by_every_command():
    line = CommandLine(prog="x")
    line.add_argument("--out", type=Path)
    for text in ("s3://b/x", "file:///tmp/x", "https://a/b"):
        with pytest.raises(SystemExit):
            line.parse_args(["--out", text])
    for key in ("root", "out", "tokenizer"):
        with pytest.raises(ConfigError, match="begins with"):
            from_mapping(
                PrepareConfig,
                {
                    "tokenizer": "t.json",
                    "out": "o",
                    "sources": [{"name": "a", "format": "text", "files": ["x"]}],
                    key: "https://a/b",
                },
            )


@pytest.mark.parametrize(
    "override, said",
    [
        ("loader.workers=100000", "must be at least 1, and 0 to 256"),
        ("data.window_documents=1000000000", "is more than 16,777,216"),
    ],
)
def test_a_number_that_no_machine_can_have_is_refused(tmp_path, override, said):
    assert said in refused(tmp_path, RUN, override)


def test_every_argument_that_names_a_place_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.delenv("NOT_SET_HERE", raising=False)
    for words in (
        ["upload", "x", "PLACE_HERE"],
        ["tokenizer", "train", "--out", "t", "--files", "PLACE_HERE"],
    ):
        found = vars(prep_arguments([word.replace("PLACE_HERE", "$PLACE/x") for word in words]))
        assert f"{tmp_path}/x" in (found.get("remote"), *(found.get("files") or ()))
        for wrong in ("$NOT_SET_HERE/x", "~nobody-here/x", " ", ""):
            with pytest.raises(SystemExit):
                prep_arguments([word.replace("PLACE_HERE", wrong) for word in words])
    monkeypatch.setattr("sys.argv", ["submit"])
    assert (
        submit_parser("").parse_args(["--prep", "$PLACE/p.yaml", "--export", "$PLACE/hf"]).export
        == f"{tmp_path}/hf"
    )


KINDS = {
    "pretrain/small.yaml": ("a pretraining run file", "tessera pretrain", read_run),
    "finetune/imdb.yaml": ("a task file", "tessera finetune", read_task),
    "finetune/sweeps/rte.yaml": ("a sweep file", "tessera sweep", lambda p: read_sweeps([p])),
    "embed/boolq.yaml": ("an embedding file", "tessera embed", read_embed),
    "prep/own_text.yaml": ("a preparation file", "data-prep prepare", read_preparation),
}


@pytest.mark.parametrize("given, needed", itertools.permutations(KINDS, 2))
def test_a_file_of_another_kind_is_one_mistake_that_names_its_command(given, needed):
    path = ROOT / "configs" / given
    with pytest.raises(ConfigError) as caught:
        KINDS[needed][2](path)
    said = str(caught.value)
    name, command, _ = KINDS[given]
    assert said.startswith(f"{path} is {name}; needed: {KINDS[needed][0]}") and len(said) < 350
    assert f"It is for: {command} {path}" in said or "One run alone: tessera finetune" in said
