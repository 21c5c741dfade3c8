"""The run files of published families: each is planned, and its parameters are the published ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.families.run import BEFORE, RUNS
from encoder.base.errors import ConfigError, ModelError, UserError
from encoder.base.schema import to_yaml
from encoder.models.bert import BertConfig
from encoder.models.catalog import PRESETS, build_model
from encoder.models.electra import ElectraConfig
from encoder.models.growth import differing
from encoder.models.modernbert import ModernBertConfig
from encoder.models.stored import StoredModel, write_stored
from encoder.objectives.rtd import RtdConfig
from encoder.runs.config import read_run
from encoder.runs.folder import RUN_FILE
from encoder.runs.initial import read_fitting, with_heads
from encoder.runs.objective_models import plan_texts
from encoder.tools.plan.forecast import gpu
from encoder.tools.plan.plan import plan_text
from encoder.tools.report.told import told_of
from launch.new_file import FAMILIES
from tests.helpers.small_runs import SIZES

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "configs" / "pretrain"
SMALL_RUNS = ROOT / "benchmarks" / "families"

# by transformers' classes, with the heads that are trained; of the others by shape
COUNTS = {
    "bert_tiny": 4_433_468,
    "bert_mini": 11_267_900,
    "bert_small": 29_058_876,
    "bert_medium": 41_668_412,
    "bert_base": 110_106_428,
    "bert_large": 336_226_108,
    "roberta_base": 124_697_433,
    "roberta_large": 355_412_057,
    "distilbert_base": 66_985_530,
    "albert_base": 11_813_810,
    "albert_large": 17_847_474,
    "albert_xlarge": 59_021_490,
    "albert_xxlarge": 223_158_450,
    "xlnet_base": 116_750_336,
    "xlnet_large": 360_300_800,
    # both networks, their embedding once
    "electra_small": 14_196_219,
    "electra_base": 119_386_427,
    "electra_large": 354_655_291,
    "mini_roberta": 17_699_072,
    "mini_roberta_readme": 17_757_017,
    "ettin_150m": 149_655_232,
    "ettin_400m": 395_881_664,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_run_file_is_planned_with_its_parameters(name):
    run = read_run(CONFIGS / f"{name}.yaml")
    said = plan_text(run, ranks=8, machine=gpu("h100"))
    counted = run.model.parameter_counts().total
    assert f"{counted:,} parameters" in said and "does NOT fit" not in said
    assert counted == COUNTS.get(name, counted)
    assert name in PRESETS and run.name == name


def test_every_small_run_is_in_the_list_of_those_that_are_made():
    files = {path.stem for path in SMALL_RUNS.glob("*.yaml") if not path.stem.startswith("prep_")}
    assert sorted(RUNS) == sorted(files)
    assert set(BEFORE) <= set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_a_small_run_has_a_file_that_can_be_trained(name):
    settings = []
    if name.startswith("minilm") or name == "mini_task":
        # its weights are made before it is read
        settings = ["init_from=null", "model={preset: bert_mini}"]
    run = read_run(SMALL_RUNS / f"{name}.yaml", settings)
    assert run.name == name and f"runs/{name}" == run.out


# one of each objective that only these have
@pytest.mark.parametrize("name", ["albert_small", "electra_mini", "xlnet_memory", "distilbert"])
def test_a_small_run_is_planned(name):
    run = read_run(SMALL_RUNS / f"{name}.yaml")
    assert "memory a rank" in plan_text(run, ranks=1, machine=None)


TASKS = {
    "modernbert_base": "masked tokens, 30% of the text",
    "bert_base": "masked tokens, 15% of the text and the next sentence",
    "albert_base": "masked tokens, 15% of the text and the order of sentences",
    "distilbert_base": "masked tokens, 15% of the text and a teacher's answers",
    "electra_large": "replaced tokens, by a generator of masked tokens, 25% of the text",
    "xlnet_base": "tokens in an order that chance gives, 17% of the text",
}


@pytest.mark.parametrize("name", TASKS)
def test_what_is_learned_is_said_by_the_objective(name, tmp_path):
    run = read_run(CONFIGS / f"{name}.yaml")
    (tmp_path / RUN_FILE).write_text(to_yaml(run))
    told = told_of(tmp_path, [], {})
    assert told.trained["objective"] == TASKS[name]
    asked = "predicted" if name == "xlnet_base" else "masked"
    assert told.evaluated.loss_title == f"{asked}-token loss"
    assert told.evaluated.score_unit == f"share of the {asked} tokens"


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("modernbert")])
def test_a_run_file_that_picks_a_preset_needs_nothing_else(name, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"name: a\ndata: shards/web/train\nmodel: {{preset: {name}}}\n"
        "phases: {tokens: 1M, batch_tokens: 8192, lr: 1.0e-3}\n"
    )
    run = read_run(tmp_path / "run.yaml")
    longest = run.phases[0].max_tokens_per_document
    assert longest == min(1024, run.model.max_position_embeddings)
    expected = 0.02 if getattr(run.model, "initialization", "megatron") != "megatron" else None
    assert expected in (None, run.model.initializer_range)


def written(folder: Path, config) -> Path:
    """A weights folder of the settings, without a tokenizer."""
    weights = build_model(config, seed=9).state_dict()
    model = StoredModel(config=config, weights=weights, tokenizer_json=None, origin="a test")
    write_stored(model, folder)
    return folder


def run_from(tmp_path: Path, source: Path, *, objective: str, model: str = ""):
    """The run of a file that starts from stored weights."""
    (tmp_path / "run.yaml").write_text(
        f"name: a\ndata: shards/web/train\ninit_from: {source}\n{model}objective: {objective}\n"
        "phases: {tokens: 1M, batch_tokens: 8192, lr: 1.0e-3, max_tokens_per_document: 32}\n"
    )
    return read_run(tmp_path / "run.yaml")


def test_a_model_takes_the_heads_that_its_objective_needs(tmp_path):
    """From a body with a sentence head to masked tokens alone, and from one without to pairs."""
    with_head, without = (
        written(tmp_path / str(head), BertConfig(**SIZES, sentence_head=head))
        for head in (True, False)
    )
    run = run_from(tmp_path, with_head, objective="{name: mlm}")
    assert not run.model.sentence_head
    fitting = with_heads(read_fitting(run), run)
    assert "pooler.dense.weight" not in fitting.weights
    assert fitting.lines == ("left out, for the run's model has none: nsp, pooler.dense",)

    for model in (
        "",
        "model: {system: bert, " + ", ".join(f"{k}: {v}" for k, v in SIZES.items()) + "}\n",
    ):
        run = run_from(tmp_path, without, objective="{name: mlm_nsp}", model=model)
        assert run.model.sentence_head
        fitting = with_heads(read_fitting(run), run)
        drawn = build_model(run.model, seed=run.seed).state_dict()
        assert torch.equal(fitting.weights["pooler.dense.weight"], drawn["pooler.dense.weight"])
        assert fitting.weights.keys() == drawn.keys()
        assert fitting.lines == ("drawn, for it has none: pooler.dense, nsp",)


def test_a_head_that_nothing_would_train_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "name: a\ndata: shards/web/train\nmodel: {preset: bert_tiny, sentence_head: true}\n"
        "phases: {tokens: 1M, batch_tokens: 8192, lr: 1.0e-3}\n"
    )
    with pytest.raises(ConfigError, match="this objective has no loss for it: nothing would"):
        read_run(tmp_path / "run.yaml")


def test_segments_are_not_asked_of_a_model_without_them(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "name: a\ndata: shards/web/train\nobjective: {name: mlm_nsp}\n"
        "model: {preset: distilbert_base, type_vocab_size: 1}\n"
        "phases: {tokens: 1M, batch_tokens: 8192, lr: 1.0e-3}\n"
    )
    with pytest.raises(ConfigError, match="model.type_vocab_size is 1; this objective needs 2"):
        read_run(tmp_path / "run.yaml")


def test_a_document_longer_than_the_table_of_positions_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "name: a\ndata: shards/web/train\nmodel: {preset: roberta_base}\n"
        "phases: {tokens: 1M, batch_tokens: 8192, lr: 1.0e-3, max_tokens_per_document: 514}\n"
    )
    with pytest.raises(ConfigError, match="above model.max_position_embeddings 512"):
        read_run(tmp_path / "run.yaml")


def test_weights_of_another_family_are_refused_in_a_sentence(tmp_path):
    source = written(tmp_path / "modernbert", ModernBertConfig(**SIZES))
    shape = ", ".join(f"{k}: {v}" for k, v in SIZES.items())
    with pytest.raises(UserError, match="model"):
        run = run_from(
            tmp_path, source, objective="{name: mlm}", model=f"model: {{system: bert, {shape}}}\n"
        )
        read_fitting(run)
    with pytest.raises(ModelError, match="the source is a modernbert, the new model a bert"):
        differing(ModernBertConfig(**SIZES), BertConfig(**SIZES))


def test_a_model_of_two_networks_brings_its_objective_and_takes_no_other(tmp_path):
    for model in ("{preset: electra_small}", "{preset: modernbert_rtd}"):
        (tmp_path / "run.yaml").write_text(
            f"name: a\ndata: shards/web/train\nmodel: {model}\n"
            "phases: {tokens: 1M, batch_tokens: 8192, lr: 1.0e-3}\n"
        )
        run = read_run(tmp_path / "run.yaml")
        assert type(run.objective) is RtdConfig
        assert "objective.name" in {derived.key for derived in run.derived}


@pytest.mark.parametrize(
    ("model", "objective", "words"),
    [
        ("preset: electra_small", "mlm", "needed: objective: .name: rtd"),
        ("preset: bert_tiny", "rtd", "needs a model with generator_fraction.* such as electra"),
        ("system: electra_discriminator", "mlm", "half of a model, which no objective trains"),
        ("system: electra_generator", "rtd", "needs a model with generator_fraction"),
        ("preset: electra_small, generator_fraction: 2", "rtd", "no wider than its discriminator"),
        ("preset: electra_small, generator_layers: 13", "rtd", "no deeper than its discriminator"),
        ("preset: electra_small, embedding_sharing: all", "rtd", "shared"),
    ],
)
def test_networks_and_objectives_that_do_not_fit_are_one_line(model, objective, words, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"name: a\ndata: shards/web/train\nmodel: {{{model}}}\nobjective: {{name: {objective}}}\n"
        "phases: {tokens: 1M, batch_tokens: 8192, lr: 1.0e-3}\n"
    )
    with pytest.raises(ConfigError, match=words) as error:
        read_run(tmp_path / "run.yaml")
    assert "\n" not in str(error.value)


def test_weights_of_another_vocabulary_or_generator_are_refused(tmp_path):
    config = ElectraConfig(**SIZES)
    source = written(tmp_path / "electra", config)
    for other, words in (("vocab_size: 128", "vocab_size"), ("generator_fraction: 1", "generator")):
        shape = {**SIZES, **dict([other.split(": ")])}
        text = ", ".join(f"{k}: {v}" for k, v in shape.items())
        model = f"model: {{system: electra, {text}}}\n"
        run = run_from(tmp_path, source, objective="{name: rtd}", model=model)
        with pytest.raises(ModelError, match=f"another shape: {words}"):
            read_fitting(run)
    run = run_from(tmp_path, source, objective="{name: rtd}")
    assert run.model == config and read_fitting(run).config == config


def test_a_discriminator_teaches_no_tokens(tmp_path):
    teacher = written(tmp_path / "teacher", ElectraConfig(**SIZES))
    shape = ", ".join(f"{k}: {v}" for k, v in SIZES.items())
    (tmp_path / "run.yaml").write_text(
        f"name: a\ndata: shards/web/train\nmodel: {{system: bert, {shape}}}\n"
        f"objective: {{name: distill, teacher: {teacher}}}\n"
        "phases: {tokens: 1M, batch_tokens: 8192, lr: 1.0e-3, max_tokens_per_document: 32}\n"
    )
    run = read_run(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match="predicts no tokens.*--network generator"):
        plan_texts(run)
