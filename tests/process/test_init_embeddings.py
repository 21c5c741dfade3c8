"""Rows of tokens from counts of neighbours: the same on any number of ranks and at any stage, once, and in every table."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from encoder.base.dist import World
from encoder.base.errors import CheckpointError, ConfigError
from encoder.data.neighbours import count_neighbours, first_documents
from encoder.nn.init import mimetic_values
from encoder.nn.token_vectors import TokenVectors, token_vectors
from encoder.runs.about import FIRST_VECTORS, what_was_trained
from encoder.runs.config import read_run
from encoder.runs.facts import check_data, named_sources
from encoder.runs.folder import read_jsonl
from encoder.train import first_vectors, pretraining
from encoder.train.build import open_mixture
from encoder.train.pretraining import Pretraining, pretrain
from encoder.train.start import start_run
from tests.helpers.shards import random_documents, write_source
from tests.process.ranks import run_ranks
from tests.process.test_one_curve import RUN

ASKED = ["init_embeddings.tokens=1000", "init_embeddings.window=3"]
RTD = [
    "model={system: modernbert_rtd, vocab_size: 64, hidden_size: 64, intermediate_size: 96,"
    " num_hidden_layers: 2, num_attention_heads: 2, window_radius_tokens: 8,"
    " max_position_embeddings: 64, generator_layers: 1, embedding_sharing: SHARING}",
    "objective={name: rtd}",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("init_embeddings")
    for name, seed in (("a", 1), ("b", 2), ("held", 3)):
        write_source(root / name, random_documents(60, seed=seed, longest=60), vocab_size=64)
    (root / "run.yaml").write_text(RUN.format(root=root))
    return root


def run_of(folder: str, name: str, *words: str):
    return read_run(f"{folder}/run.yaml", [f"out={folder}/{name}", *ASKED, *words])


def first_weights(world: World, *, folder: str, name: str, words: list[str]) -> dict:
    """The first weights of all parameters, as lists."""
    run = named_sources(run_of(folder, f"{name}-{world.size}", *words))
    course = Pretraining(run, check_data(run), world=world, device=torch.device("cpu"))
    with contextlib.ExitStack() as held:
        started = start_run(course, world, torch.device("cpu"), held)
        found = started.engine.whole_masters()
        drawn = {n: started.engine.module.initial_values(n, w.shape) for n, w in found.items()}
        started.engine.close()
    return {n: [w.tolist(), drawn[n].tolist()] for n, w in found.items()}


def expected_rows(folder: Path, *, width: int) -> TokenVectors:
    run = named_sources(run_of(str(folder), "none"))
    facts = check_data(run)
    documents = first_documents(
        open_mixture(run.data.sources), [2.0, 1.0], seed=run.seed, tokens=1000
    )
    found = count_neighbours(
        documents, window=3, vocab_size=64, left_out=facts.specials.all_special
    )
    return token_vectors(found, width=width, seed=run.seed)


def in_common(filled: torch.Tensor) -> torch.Tensor:
    """What every row has: half a deviation, up and down in turn."""
    share = 0.5 * filled.std()
    return torch.stack([share, -share]).repeat(filled.shape[1] // 2)


def check_table(folder: Path, now: list, drawn: list) -> None:
    table, before = torch.tensor(now), torch.tensor(drawn)
    expected = expected_rows(folder, width=table.shape[1])
    vectors, there = expected.vectors_VC, expected.there_V
    assert 0 < int(there.sum()) < 64, "special tokens are not counted"
    filled = before * 2.5
    # of one length, whatever is known of a token
    lengths = vectors[there].norm(dim=1, keepdim=True)
    assert lengths.max() > 1.2 * lengths.min()
    filled[there] = vectors[there] * table.shape[1] ** 0.5 / lengths * filled.std()
    assert table == pytest.approx(filled + in_common(filled), abs=1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_table_is_that_of_counts_and_all_else_of_the_seed(folder, ranks, stage):
    name, words = f"zero{stage}", [f"engine.zero_stage={stage}"]
    turn = expected_rows(folder, width=64).turn_CC
    assert (turn - torch.eye(64)).abs().max() > 0.1
    turns = {64: turn}
    for found in run_ranks(first_weights, ranks, folder=str(folder), name=name, words=words):
        for parameter, (now, drawn) in found.items():
            if parameter.endswith("tok_embeddings.weight"):
                check_table(folder, now, drawn)
                continue
            expected = mimetic_values(
                parameter, torch.tensor(drawn), seed=3, strength=0.5, turns=turns
            )
            assert torch.equal(torch.tensor(now), expected), parameter
            passes_on = ("attn.Wqkv.weight", "attn.Wo.weight", "head.dense.weight")
            assert (now != drawn) == parameter.endswith(passes_on), parameter


def test_without_mimetic_attention_is_drawn(folder):
    words = ["init_embeddings.mimetic=0"]
    (found,) = run_ranks(first_weights, 1, folder=str(folder), name="drawn", words=words)
    for parameter, (now, drawn) in found.items():
        assert (now != drawn) == parameter.endswith("tok_embeddings.weight"), parameter


@pytest.mark.parametrize("sharing", ["shared", "difference", "separate"])
def test_of_two_networks_each_table_but_a_difference_that_begins_at_zero(folder, sharing):
    (found,) = run_ranks(
        first_weights,
        1,
        folder=str(folder),
        name=sharing,
        words=[word.replace("SHARING", sharing) for word in RTD],
    )
    tables = {n: v for n, v in found.items() if n.endswith("tok_embeddings.weight")}
    assert len(tables) == (1 if sharing == "shared" else 2)
    # the detector's scores no tokens
    heads = {n: torch.tensor(v[0]) for n, v in found.items() if n.endswith("head.dense.weight")}
    turned = {n: not torch.equal(head, torch.eye(len(head))) for n, head in heads.items()}
    assert turned == {n: n.startswith("generator.") for n in heads} and len(turned) == 2, turned
    zeros = 0
    for now, drawn in tables.values():
        if not torch.tensor(drawn).any():
            zeros += 1
            assert now == drawn
        else:
            check_table(folder, now, drawn)
    assert zeros == (sharing == "difference")


def trained_then_resumed(world: World, *, folder: str) -> list[str]:
    """A run, cut short and taken up again where counting anew would be an error; and one with another window."""
    run = run_of(folder, "resumed")
    assert pretrain(run, world).done
    path = Path(folder) / "resumed"
    (path / "done.json").unlink()

    def never(*_: object) -> None:
        raise AssertionError("counted again")

    pretraining.set_first_vectors = never
    try:
        assert pretrain(run, world).done
    finally:
        pretraining.set_first_vectors = first_vectors.set_first_vectors
    (path / "done.json").unlink()
    with pytest.raises((CheckpointError, ConfigError)) as refused:
        pretrain(run_of(folder, "resumed", "init_embeddings.window=2"), world)
    return [str(refused.value)]


def test_a_resume_counts_nothing_and_another_window_is_another_run(folder):
    ((refused,),) = run_ranks(trained_then_resumed, 1, folder=str(folder))
    assert "init_embeddings.window" in refused
    starts = [e for e in read_jsonl(folder / "resumed" / "events.jsonl") if "about" in e]
    assert [FIRST_VECTORS in e["about"] for e in starts] == [True, *[False] * (len(starts) - 1)]
    told = what_was_trained(read_run(folder / "resumed" / "run.yaml"), folder / "resumed")
    counted = starts[0]["about"][FIRST_VECTORS]
    assert f"{counted['rows']:,} began with their neighbours in" in told["rows of tokens"]
    # as many as were found, not as were asked for
    assert 900 < counted["tokens"] < 1000 + 2 * 60


@pytest.mark.parametrize(("precision", "stage"), [("bf16", 1), ("fp64", 0)])
def test_masters_of_every_precision_have_them(folder, precision, stage):
    name, words = precision, [f"engine.precision={precision}", f"engine.zero_stage={stage}"]
    (found,) = run_ranks(first_weights, 1, folder=str(folder), name=name, words=words)
    tables = [v for n, v in found.items() if n.endswith("tok_embeddings.weight")]
    check_table(folder, *tables[0])


def test_rows_beyond_the_vocabulary_stay(folder):
    words = ["model.vocab_size=96"]
    (found,) = run_ranks(first_weights, 1, folder=str(folder), name="padded", words=words)
    (table,) = (v for n, v in found.items() if n.endswith("tok_embeddings.weight"))
    now, drawn = map(torch.tensor, table)
    # the same of every row
    (common,) = (now[64:] - drawn[64:] * 2.5).mean(dim=0, keepdim=True)
    assert now[64:] - drawn[64:] * 2.5 == pytest.approx(common.expand(32, -1), abs=1e-6)
    assert common[0] > 0.01 and common[::2] == pytest.approx(-common[1::2], abs=1e-6)
    assert (now[:64] - drawn[:64] * 2.5 - common).abs().max() > 0.01


def ends_of_a_damaged_start(world: World, *, folder: str) -> str:
    """What each rank says where rank zero cannot read a shard."""
    run = run_of(folder, f"damaged-{world.size}", f"data.sources.0.path={folder}/damaged")
    try:
        pretrain(run, world)
    except Exception as error:
        return type(error).__name__
    return "nothing"


def test_a_shard_that_rank_zero_cannot_read_ends_all_ranks(folder):
    write_source(folder / "damaged", random_documents(60, seed=1, longest=60), vocab_size=64)
    for shard in (folder / "damaged").glob("*.mds"):
        shard.write_bytes(b"\xff" * shard.stat().st_size)
    assert run_ranks(ends_of_a_damaged_start, 2, folder=str(folder)) == [
        "DamagedShard",
        "SilentError",
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["init_embeddings.tokens=0"], "between 1 and 16,666,666 with a window of 3"),
        (["init_embeddings.tokens=1B"], "between 1 and 16,666,666"),
        (["init_embeddings.mimetic=.inf"], "needed|at least 0"),
        (["init_embeddings.window=0"], "between 1 and 16"),
        (["init_embeddings.window=17"], "between 1 and 16"),
        (["init_embeddings.times_drawn=0"], "must be above 0"),
        (["init_embeddings.mimetic=-1"], "must be at least 0"),
        (["init_from=somewhere"], "no effect with init_from or branch_from"),
        (["branch_from=somewhere"], "no effect with init_from or branch_from"),
    ],
)
def test_what_cannot_be_meant_is_refused(folder, words, says):
    with pytest.raises(ConfigError, match=says):
        run_of(str(folder), "refused", *words)
