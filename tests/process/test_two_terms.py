"""A loss of two terms whose counts differ wildly between ranks gives one curve: each term has its own denominator.

masked tokens   0 to 7 in a row, and another number in each
rare            one in row 0 of a step, none in the others: with 2 or 3 ranks one rank has all of them; none at all in step 1
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from encoder.base.batch import IGNORE, LossTerm, Targets, TokenBatch
from encoder.base.dist import World
from encoder.base.errors import CheckpointError
from encoder.base.objective import MaskedRow, RowTargets
from encoder.engine.checkpoint.read import newest_checkpoint, read_progress, read_weights
from encoder.engine.engine import Engine, start_engine
from encoder.engine.zero.config import EngineConfig
from encoder.models.modernbert import ModernBertConfig, ModernBertForMaskedLM
from encoder.models.stored import StoredModel, read_stored, write_stored
from encoder.nn.loss import cross_entropy_sum
from encoder.objectives.catalog import OBJECTIVES
from encoder.objectives.mlm import MaskedLanguageModel, MlmConfig, mlm_loss
from encoder.optim.stable_adamw import StableAdamW, StableAdamWConfig
from encoder.runs.config import read_run
from encoder.runs.folder import EVENTS, LEDGER, METRICS, merged_metrics, read_jsonl
from encoder.runs.initial import weights_sha256
from encoder.runs.ledger import follow_chain
from encoder.train.pretraining import pretrain
from tests.helpers.memory_source import sentences_of
from tests.helpers.shards import random_documents, write_sentences, write_source
from tests.process import tiny
from tests.process.engine_cases import keep_weights
from tests.process.ranks import run_ranks
from tests.process.test_one_curve import RUN

STEPS, WEIGHT = 3, 5.0
CONFIG = StableAdamWConfig(weight_decay=0.01)


class TwoTerms(MaskedLanguageModel):
    """Masked tokens, and a rare second term: whether a document of this row is the one in eight that has a target."""

    terms = ("mlm", "rare")

    def mask(self, ids, generator, *, lengths=(), phase_tokens=0) -> MaskedRow:
        row = super().mask(ids, generator, lengths=lengths, phase_tokens=phase_tokens)
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        rare = [start for start, length in zip(starts, lengths) if length % 8 == 0]
        return dataclasses.replace(
            row,
            targets={
                **row.targets,
                "rare": RowTargets(
                    torch.tensor(rare, dtype=torch.int64).numpy(),
                    torch.tensor([3 + s % 2 for s in rare], dtype=torch.int64).numpy(),
                ),
            },
        )

    def loss(self, model, batch: TokenBatch) -> dict[str, LossTerm]:
        targets = batch.targets["rare"]
        x_MC = model.hidden_states(batch).index_select(0, targets.index_M)
        rare = cross_entropy_sum(*model.token_decoder(x_MC), targets.value_M)
        return {"mlm": mlm_loss(model, batch), "rare": rare._replace(weight=WEIGHT)}

    def all_targets(self, ids_T):
        first = Targets(index_M=torch.zeros(1, dtype=torch.int64), value_M=ids_T[:1], count=1)
        return {**super().all_targets(ids_T), "rare": first}

    def capacity(self, term, tokens):
        return tokens // 3 if term == "rare" else super().capacity(term, tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoTermsConfig(MlmConfig):
    """Its settings."""

    def build(self, facts) -> TwoTerms:
        return TwoTerms.of(self, facts)


def objective() -> TwoTerms:
    last = range(tiny.VOCAB - 4, tiny.VOCAB)
    return TwoTerms(
        TwoTermsConfig(),
        vocab_size=tiny.VOCAB,
        mask_id=last[3],
        pad_id=last[2],
        special_ids=tuple(last),
    )


def rare_in(step: int, row: int) -> int:
    return int(row == 0 and step != 1)


def counts_of(step: int) -> dict[str, int]:
    return {**tiny.counts_of(step), "rare": sum(rare_in(step, row) for row in range(tiny.ROWS))}


def micro_batch(step: int, rows: list[int]) -> TokenBatch:
    """As tiny.micro_batch, with the rare targets; one place is kept for each row."""
    batch = tiny.micro_batch(step, rows)
    index = torch.tensor([i * tiny.ROW_TOKENS for i in range(len(rows))])
    value = torch.tensor([7 if rare_in(step, row) else IGNORE for row in rows])
    rare = Targets(index_M=index, value_M=value, count=int((value != IGNORE).sum()))
    return dataclasses.replace(batch, targets={**batch.targets, "rare": rare})


def share_of_step(step: int, world: World, rows: int) -> list[TokenBatch]:
    mine = [world.rank + world.size * i for i in range(-(-tiny.ROWS // world.size))]
    return [micro_batch(step, mine[i : i + rows]) for i in range(0, len(mine), rows)]


def curves(world: World, *, out: str, settings: list[dict[str, Any]]) -> None:
    """Some steps of each setting; the final weights in OUT/label.safetensors."""
    for s in settings:
        with torch.device("meta" if s["zero_stage"] == 3 else "cpu"):
            model = tiny.tiny_model()
        config = EngineConfig(
            zero_stage=s["zero_stage"], precision=s["precision"], **s.get("memory", {})
        )
        engine = start_engine(
            model,
            objective=objective(),
            config=config,
            optimizer=CONFIG,
            world=world,
            device=torch.device("cpu"),
        )
        if s.get("mean_of_means"):
            take_means_of_means(engine, micro_batches=-(-tiny.ROWS // world.size) // s["rows"])
        for step in range(STEPS):
            result = engine.step(
                share_of_step(step, world, s["rows"]), counts=counts_of(step), lr=4e-3, max_lr=1e-2
            )
            assert result.applied and [*result.means] == ["mlm", "rare"]
            expected = result.means["mlm"] + (
                WEIGHT * result.means["rare"] if counts_of(step)["rare"] else 0.0
            )
            assert result.loss == pytest.approx(expected, rel=1e-12)
        keep_weights(engine, Path(out) / f"{s['label']}.safetensors")


def take_means_of_means(engine: Engine, *, micro_batches: int) -> None:
    """The usual mistake: each micro-batch's term is divided by its own count, and a step is the mean of those."""
    counts: dict[str, int] = {}
    plain = engine.step

    def step(*values: Any, **named: Any) -> Any:
        counts.update(named["counts"])
        return plain(*values, **named)

    def mean(_module: Any, _inputs: Any, loss: dict[str, LossTerm]) -> dict[str, LossTerm]:
        parts = micro_batches * engine.world.size
        return {
            name: term._replace(
                total=term.total * (counts[name] / (max(int(term.count), 1) * parts))
            )
            for name, term in loss.items()
        }

    engine.step = step
    engine.module.register_forward_hook(mean)


def plain_loop(out: Path) -> None:
    """The truth without an engine: all rows in one forward, autograd, whole tensors, fp64."""
    model = tiny.tiny_model().double()
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.ndim > 1]},
        {"params": [p for p in named.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = StableAdamW(groups, CONFIG)
    for step in range(STEPS):
        terms = objective().loss(model, micro_batch(step, [*range(tiny.ROWS)]))
        counts = counts_of(step)
        total = sum(
            term.weight * term.total / counts[name] for name, term in terms.items() if counts[name]
        )
        total.backward()
        for group in optimizer.param_groups:
            group.update(lr=4e-3, max_lr=1e-2)
        optimizer.step()
        model.zero_grad()
    save_file({n: p.detach() for n, p in named.items()}, out / "plain.safetensors")


RANKS = {1: 4, 2: 2, 3: 1}  # rows of a micro-batch, by the number of ranks
CASES = [
    ("fp64", 0, {}),
    ("fp32", 0, {}),
    ("fp32", 1, {}),
    ("fp32", 2, {}),
    ("fp32", 3, {}),
    ("fp32", 1, {"graphs": "micro_step"}),
]


# the exact one on any ranks, the others on two numbers of them: test_engine has every stage on every one
PAIRED = [(CASES[0], ranks) for ranks in RANKS]
for number, case in enumerate(CASES[1:]):
    PAIRED += [(case, ranks) for ranks in RANKS if ranks != 3 - number % 3]


def label_of(precision: str, stage: int, memory: dict[str, str], ranks: int) -> str:
    return f"{precision}-s{stage}{'-graphs' * bool(memory)}-{ranks}"


@pytest.fixture(scope="module")
def out() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="two-terms-"))
    plain_loop(folder)
    for ranks, rows in RANKS.items():
        settings = [
            {
                "label": label_of(*case, ranks),
                "precision": case[0],
                "zero_stage": case[1],
                "memory": case[2],
                "rows": rows,
            }
            for case, paired in PAIRED
            if paired == ranks
        ]
        if ranks == 2:
            settings.append(
                {
                    "label": "means",
                    "precision": "fp64",
                    "zero_stage": 0,
                    "rows": rows,
                    "mean_of_means": True,
                }
            )
        run_ranks(curves, ranks, out=str(folder), settings=settings)
    return folder


def distance(out: Path, label: str) -> float:
    one, other = (load_file(out / f"{name}.safetensors") for name in ("plain", label))
    off = sum(float((one[n].double() - other[n].double()).square().sum()) for n in one)
    return (off / sum(float(t.double().square().sum()) for t in one.values())) ** 0.5


@pytest.mark.parametrize(("case", "ranks"), PAIRED, ids=str)
def test_two_terms_give_the_plain_curve_on_any_ranks_and_stage(out, case, ranks):
    assert distance(out, label_of(*case, ranks)) < (1e-12 if case[0] == "fp64" else 1e-5)


def test_a_mean_of_means_is_another_curve(out):
    assert distance(out, "means") > 1e-4


# a pair objective on a small BERT; its phases are those of the run file
BERT = (
    "model={system: bert, vocab_size: 64, hidden_size: 64, intermediate_size: 96,"
    " num_hidden_layers: 2, num_attention_heads: 2, max_position_embeddings: 64,"
    " mlp: gelu_tanh, mlp_inner_dropout: 0.1, position_offset: 2}"
)
PAIRS = [BERT, "phases.0.model={}", "phases.1.model={}", "objective.short_share=0.3"]
# two groups of layers that share their weights, and n-grams of tokens
ALBERT = (
    "model={system: albert, vocab_size: 64, embedding_size: 16, hidden_size: 64,"
    " intermediate_size: 96, num_hidden_layers: 4, num_hidden_groups: 2, num_attention_heads: 2,"
    " max_position_embeddings: 64, embedding_dropout: 0.1, attention_output_dropout: 0.1,"
    " mlp_output_dropout: 0.1}"
)
ORDERED = [
    ALBERT,
    *PAIRS[1:],
    "objective.mask_count=round",
    "objective.spans=ngram",
    "engine.activation_checkpointing=blocks",
]
# a generator beside it, narrower and with the same embedding
ELECTRA = (
    "model={system: electra, vocab_size: 64, embedding_size: 16, hidden_size: 64,"
    " intermediate_size: 96, num_hidden_layers: 2, num_attention_heads: 2,"
    " max_position_embeddings: 64, generator_fraction: 0.5}"
)
DETECTED = [
    ELECTRA,
    *PAIRS[1:3],
    "objective={name: rtd}",
    "engine.activation_checkpointing=blocks",
]
DISTILLED = ["objective.teacher={folder}/teacher", "objective.soft_targets=all"]
# the weights of its terms, and its settings
OBJECTIVES_RUN = {
    "two": ({"mlm": 1.0, "rare": WEIGHT}, []),
    "mlm_nsp": ({"mlm": 1.0, "nsp": 1.0}, PAIRS),
    "mlm_sop": ({"mlm": 1.0, "sop": 1.0}, ORDERED),
    "rtd": ({"mlm": 1.0, "rtd": 50.0}, DETECTED),
    "distill": ({"mlm": 2.0, "soft": 5.0, "cosine": 1.0}, DISTILLED),
}
# of another depth and MLP than the student, with dropout that it must not have
TEACHER = ModernBertConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
    attention_output_dropout=0.3,
)


# resumes after a kill are those of test_killed_families.py
AT_STAGE = {"mlm_nsp": 3, "mlm_sop": 1, "rtd": 3, "distill": 3}


def trained(world: World, *, folder: str, runs: list[tuple[str, str, list[str]]]) -> None:
    """Some runs: (objective, run folder, further settings)."""
    OBJECTIVES["two"] = TwoTermsConfig
    for name, out, more in runs:
        settings = [
            f"out={folder}/{out}",
            "engine.precision=fp64",
            "engine.zero_stage=0",
            f"objective.name={name}",
            "phases.0.tokens=1K",
            "phases.1.tokens=1K",
            *(setting.replace("{folder}", folder) for setting in OBJECTIVES_RUN[name][1]),
            *more,
        ]
        pretrain(read_run(f"{folder}/run.yaml", settings), world)


def as_after_a_kill(run: Path, copy: Path) -> None:
    """The run as a kill after its first save leaves it."""
    shutil.copytree(run, copy)
    for path in sorted((copy / "checkpoints").glob("*/COMMITTED"))[1:]:
        shutil.rmtree(path.parent)
    (copy / "done.json").unlink()
    lines = (copy / LEDGER).read_text().splitlines(keepends=True)
    (copy / LEDGER).write_text("".join(lines[:-2]))


def write_texts(root: Path) -> Path:
    """Shards with sentences and with [CLS] last, two teachers and the run file, in a folder; returns it."""
    for number, (name, longest) in enumerate((("a", 60), ("b", 30), ("held", 60))):
        documents = random_documents(60, seed=number, longest=longest)
        folder = write_source(root / name, documents, vocab_size=64)
        write_sentences(folder, sentences_of([len(ids) for ids in documents]))
        # body [SEP] [CLS], as XLNet has it
        last = [np.roll(ids, -1) for ids in documents]
        write_source(root / f"{name}_cls_last", last, vocab_size=64, frame="end")
    (root / "run.yaml").write_text(RUN.format(root=root))
    for name, seed in (("teacher", 7), ("another", 8)):
        weights = ModernBertForMaskedLM(TEACHER, seed=seed).state_dict()
        tokenizer = root / "a" / "tokenizer.json"
        stored = StoredModel(config=TEACHER, weights=weights, tokenizer_json=tokenizer, origin=name)
        write_stored(stored, root / name)
    return root


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Each objective on one and on two ranks."""
    root = write_texts(tmp_path_factory.mktemp("loop"))
    alone = [(name, f"{name}-1", []) for name in OBJECTIVES_RUN]
    run_ranks(trained, 1, folder=str(root), runs=alone)
    for name in OBJECTIVES_RUN:
        run_ranks(trained, 2, folder=str(root), runs=[(name, f"{name}-2", [])])
    return root


def stored_weights(run: Path) -> dict[str, torch.Tensor]:
    return read_weights(newest_checkpoint(run / "checkpoints"))


@pytest.mark.parametrize("name", OBJECTIVES_RUN)
def test_two_terms_go_through_the_loop_on_one_and_two_ranks(runs, name):
    """Ledger, metrics, held-out losses and checkpoints have all terms."""
    weight_of = OBJECTIVES_RUN[name][0]
    term = [*weight_of][1]
    one, two = (read_jsonl(runs / f"{name}-{ranks}" / LEDGER) for ranks in (1, 2))
    assert one == two and any(line["other_targets"][term] for line in one)
    follow_chain(one, runs / f"{name}-1" / LEDGER)
    edited = [
        {**line, "other_targets": {term: 99}} if i == 3 else line for i, line in enumerate(one)
    ]
    with pytest.raises(Exception, match="chain breaks"):
        follow_chain(edited, runs / f"{name}-1" / LEDGER)
    metrics = merged_metrics(runs / f"{name}-1" / METRICS)
    steps = [m for m in metrics if m.get(f"loss_{term}") is not None]
    assert steps and all(
        m["loss"] == pytest.approx(sum(w * m[f"loss_{t}"] for t, w in weight_of.items()), rel=1e-9)
        for m in steps
    )
    # the held-out question of a distillation is that of mlm; no held-out document has the rare term
    is_judged = name not in ("distill", "two")
    judged = [m for m in metrics if "held_out_loss" in m]
    assert judged
    assert all((f"held_out_accuracy_{term}" in m) == is_judged for m in judged)
    weights = [stored_weights(runs / f"{name}-{ranks}") for ranks in (1, 2)]
    assert max(float((weights[0][n] - t).abs().max()) for n, t in weights[1].items()) < 1e-10


@pytest.mark.matrix
@pytest.mark.parametrize("name", AT_STAGE)
def test_terms_at_a_higher_zero_stage_give_the_curve_of_one_rank(runs, name):
    cut = [f"engine.zero_stage={AT_STAGE[name]}", "engine.precision=fp32"]
    run_ranks(trained, 2, folder=str(runs), runs=[(name, f"{name}-zero", cut)])
    one, other = (stored_weights(runs / f"{name}-{way}") for way in ("1", "zero"))
    assert read_jsonl(runs / f"{name}-zero" / LEDGER) == read_jsonl(runs / f"{name}-1" / LEDGER)
    off = sum(float((one[n].double() - other[n].double()).square().sum()) for n in one)
    assert (off / sum(float(t.double().square().sum()) for t in one.values())) ** 0.5 < 1e-5


def test_a_teacher_is_in_no_checkpoint_and_known_by_its_weights(runs):
    run = runs / "distill-1"
    checkpoint = newest_checkpoint(run / "checkpoints")
    assert stored_weights(run).keys() == stored_weights(runs / "two-1").keys()
    known = weights_sha256(read_stored(runs / "teacher").weights)
    assert read_progress(checkpoint)[1]["objective_sha256"] == {"teacher": known}
    begun = next(e for e in read_jsonl(run / EVENTS) if e["event"] == "start")
    assert begun["objective_sha256"] == {"teacher": known}


def resumed_with_another(world: World, *, folder: str) -> list[str]:
    """What a resume says with another teacher, and then with the same one elsewhere."""
    said = []
    for teacher in ("another", "elsewhere"):
        try:
            trained(
                world,
                folder=folder,
                runs=[("distill", "other", [f"objective.teacher={folder}/{teacher}"])],
            )
            said.append("done")
        except CheckpointError as error:
            said.append(str(error))
    return said


def test_another_teacher_under_the_same_run_is_refused_and_a_moved_one_is_not(runs):
    as_after_a_kill(runs / "distill-1", runs / "other")
    shutil.copytree(runs / "teacher", runs / "elsewhere")
    (said,) = run_ranks(resumed_with_another, 1, folder=str(runs))
    assert "objective.teacher" in said[0] and "this run was trained with" in said[0]
    assert said[1] == "done"
