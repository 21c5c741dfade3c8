"""An epoch goes through all examples once, in an order of its own, whoever computes them and wherever it is taken up."""

from __future__ import annotations

import numpy as np
import pytest

from encoder.base.world import World
from encoder.data.assembly import wrap_int64
from encoder.data.examples import ExampleDealing, ExampleSteps, deal_examples
from encoder.data.loader import DataPosition
from tests.helpers.tasks import drawn_examples

EXAMPLES = drawn_examples(23)


def dealing(rank: int = 0, size: int = 1, tokens: int = 64) -> ExampleDealing:
    world = World(rank=rank, size=size, local_rank=rank, local_size=size)
    return ExampleDealing(world=world, micro_batch_tokens=tokens)


def steps(deals: ExampleDealing, start: DataPosition | None = None, *, seed: int = 3):
    return ExampleSteps(
        EXAMPLES,
        term="examples",
        seed=seed,
        epochs=2,
        batch_examples=8,
        dealing=deals,
        start=start or DataPosition(),
    )


def test_each_epoch_has_every_example_once_and_its_last_step_is_short():
    walk = steps(dealing(tokens=10_000))
    for epoch in (0, 1):
        made = [walk.next_step() for _ in range(3)]
        assert [step.rows for step in made] == [8, 8, 7]
        ids = np.sort(np.concatenate([b.ids_T for step in made for b in step.micro_batches]))
        assert np.array_equal(ids, np.sort(EXAMPLES.ids_A))
        assert made[-1].end.lanes == ((epoch + 1, 0),)
    assert walk.epochs_at(made[-1].end) == {"drawn": 1.0}, "no third epoch begins"


def test_a_step_is_a_function_of_its_position():
    walk = steps(dealing())
    made = [walk.next_step() for _ in range(5)]
    again = steps(dealing(), made[3].start).next_step()
    assert again.row_hash == made[3].row_hash and again.end == made[3].end
    keys = [b.token_key_T for b in again.micro_batches]
    assert all((a == b.token_key_T).all() for a, b in zip(keys, made[3].micro_batches))
    assert steps(dealing(), seed=4).next_step().row_hash != made[0].row_hash


@pytest.mark.parametrize("size", [1, 2, 3, 5, 30])
def test_ranks_share_a_step_and_its_hash_is_the_same(size):
    whole = steps(dealing(tokens=10_000)).next_step()
    made = [steps(dealing(rank, size, tokens=40)).next_step() for rank in range(size)]
    assert wrap_int64(sum(step.row_hash for step in made)) == whole.row_hash
    assert sum(step.counts["examples"] for step in made) == 8
    assert len({len(step.micro_batches) for step in made}) == 1, "as many on every rank"
    assert {step.tokens for step in made} == {whole.tokens}


def test_ranks_have_about_as_much_to_do():
    lengths = np.full(30, 10)
    shares = [deal_examples(lengths, dealing(rank, 3, tokens=1000)) for rank in range(3)]
    assert [[len(part) for part in share] for share in shares] == [[10], [10], [10]]
