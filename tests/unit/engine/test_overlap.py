"""Buckets go in one order whatever order gradients come in, each once in a backward pass, with all that it has to have."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from encoder.base.dist import World
from encoder.engine import overlap
from encoder.engine.overlap import Bucket, Overlap, Sent, bucket_elements, buckets_of


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch) -> None:
    monkeypatch.setattr(overlap, "BUCKET_ELEMENTS", 6)
    monkeypatch.setattr(overlap, "BUCKETS", 1)
    monkeypatch.setattr(overlap, "PART_ELEMENTS", 1)


class Written:
    """A stage that writes down what it is told. A work is done when it is waited for."""

    def __init__(self, groups: Sequence[Sequence[nn.Parameter]], *, every_backward: bool) -> None:
        self.groups = groups
        self.every_backward = every_backward
        self.told: list[str] = []
        self.sums: dict[int, Tensor] = {}
        self.most_waiting = 0
        self._waiting = 0

    def begin_step(self) -> None:
        self.told.append("begin")
        self.sums = {}

    def buffer(self, bucket: Bucket) -> Tensor:
        return torch.full((bucket.numel,), float("nan"))

    def put(self, bucket: Bucket, buffer: Tensor, index: int, grad: Tensor) -> None:
        start = bucket.starts[index]
        buffer[start : start + grad.numel()] = grad.view(-1)

    def send(self, bucket: Bucket, buffer: Tensor) -> Sent:
        self.told.append(f"{bucket.group}.{bucket.start}")
        self._waiting += bucket.numel
        self.most_waiting = max(self.most_waiting, self._waiting)
        return Sent(bucket=bucket, buffer=buffer, sums=buffer, works=[])

    def receive(self, sent: Sent) -> None:
        self._waiting -= sent.bucket.numel
        for p, start in zip(sent.bucket.parameters, sent.bucket.starts, strict=True):
            part = sent.sums[start : start + p.numel()].view(p.shape)
            self.sums[id(p)] = self.sums.get(id(p), torch.zeros_like(p)) + part

    def end_step(self) -> None:
        self.told.append("end")


def weights(*sizes: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(size)) for size in sizes]


def made(
    groups: list[list[nn.Parameter]], *, every_backward: bool = True
) -> tuple[Overlap, Written]:
    way = Written(groups, every_backward=every_backward)
    parameters = [*itertools.chain.from_iterable(groups)]
    return Overlap(way, parameters=parameters, world=World()), way


def loss_of(parameters: Sequence[nn.Parameter], factors: Sequence[float]) -> Tensor:
    """Its backward pass gives each parameter's gradient, the last one's first."""
    total = torch.zeros(())
    for p, factor in zip(parameters, factors, strict=True):
        total = total + factor * p.sum()
    return total


def step(sent: Overlap, losses: Sequence[Tensor]) -> None:
    for number, loss in enumerate(losses, start=1):
        with sent.backward(last=number == len(losses)):
            loss.backward()
    sent.finish()


def test_buckets_are_neighbours_from_the_end_and_cover_every_group():
    groups = [weights(4, 1, 1, 9, 2, 3), weights(2)]
    found = buckets_of(groups, elements=6)
    assert [(b.group, b.start, b.numel) for b in found] == [
        (0, 15, 5),
        (0, 6, 9),
        (0, 0, 6),
        (1, 0, 2),
    ]
    for bucket in found:
        flat = [*itertools.chain.from_iterable(_addresses(groups[bucket.group]))]
        own = [*itertools.chain.from_iterable(_addresses(bucket.parameters))]
        assert own == flat[bucket.start : bucket.start + bucket.numel]
        assert bucket.starts[0] == 0


def _addresses(parameters: Sequence[nn.Parameter]) -> Iterator[list[tuple[int, int]]]:
    for p in parameters:
        yield [(id(p), i) for i in range(p.numel())]


def test_a_bucket_is_a_share_of_the_model_and_grows_with_the_ranks(monkeypatch):
    monkeypatch.setattr(overlap, "BUCKETS", 4)
    assert [bucket_elements(total, ranks=2) for total in (4, 16, 24, 10**6)] == [2, 4, 6, 6]
    assert [bucket_elements(24, ranks=ranks) for ranks in (1, 2, 64)] == [6, 6, 64]


@pytest.mark.parametrize("micro_batches, every_backward", [(1, True), (3, True), (1, False)])
def test_what_is_sent_is_the_gradient_and_none_is_left(micro_batches, every_backward):
    group = weights(4, 3, 2, 5)
    sent, way = made([group[:3], group[3:]], every_backward=every_backward)
    losses = [loss_of(group, [i + 1.0, 2.0, 3.0, 4.0]) for i in range(micro_batches)]
    step(sent, losses)
    first = sum(range(1, micro_batches + 1))
    wanted = [first, 2.0 * micro_batches, 3.0 * micro_batches, 4.0 * micro_batches]
    for p, value in zip(group, wanted, strict=True):
        assert torch.equal(way.sums[id(p)], torch.full_like(p, value))
        assert p.grad is None


def test_stages_that_keep_gradients_send_once_a_step_with_those_of_all_micro_batches():
    group = weights(4, 3)
    sent, way = made([group], every_backward=False)
    step(sent, [loss_of(group, [1.0, 2.0]), loss_of(group, [5.0, 7.0])])
    assert way.told == ["begin", "0.4", "0.0", "end"]
    assert way.sums[id(group[0])].tolist() == [6.0] * 4


def test_the_order_is_the_same_where_gradients_come_in_another():
    """Two ranks, as it were: one whose autograd takes the parameters the other way round, after the order was learned."""
    told = []
    for turned in (False, True):
        group = weights(4, 3, 5, 6)
        sent, way = made([group])
        step(sent, [loss_of(group, [1.0] * 4)])
        others = group[::-1] if turned else group
        way.told.clear()
        step(sent, [loss_of(others, [1.0] * 4)])
        told.append(way.told)
        assert all(torch.equal(way.sums[id(p)], torch.ones_like(p)) for p in group)
    assert told[0] == told[1]


def test_buckets_go_as_they_were_complete_in_the_first_backward_pass():
    """The parameters made first come first here, as of a generator that stands behind its discriminator."""
    group = weights(5, 5, 5)
    sent, way = made([group])
    for _ in range(2):
        step(sent, [loss_of(group[::-1], [1.0] * 3)])
    assert way.told == ["begin", "0.10", "0.5", "0.0", "end", "begin", "0.0", "0.5", "0.10", "end"]


def test_a_parameter_without_a_gradient_is_sent_as_zeros_at_its_place():
    group = weights(5, 5, 5)
    sent, way = made([group])
    step(sent, [loss_of([group[0], group[2]], [1.0, 2.0])])
    assert way.told == ["begin", "0.10", "0.5", "0.0", "end"]
    assert way.sums[id(group[1])].tolist() == [0.0] * 5


def test_a_gradient_of_an_earlier_micro_batch_alone_is_sent_too():
    group = weights(5, 5)
    sent, way = made([group], every_backward=False)
    step(sent, [loss_of(group, [3.0, 1.0]), loss_of(group[1:], [1.0])])
    assert way.sums[id(group[0])].tolist() == [3.0] * 5


def test_a_tied_parameter_is_sent_once_with_both_of_its_parts():
    group = weights(5, 5)
    sent, way = made([group])
    step(sent, [loss_of(group, [1.0, 1.0]) + 10.0 * group[0].sum()])
    assert way.told.count("0.0") == 1 and way.sums[id(group[0])].tolist() == [11.0] * 5


def test_the_backward_pass_waits_when_the_link_is_behind(monkeypatch):
    monkeypatch.setattr(overlap, "WAITING_ELEMENTS", 10)
    group = weights(*[5] * 8)
    sent, way = made([group])
    step(sent, [loss_of(group, [1.0] * 8)] * 1)
    # one more than may wait is sent before one is waited for
    assert way.most_waiting == 15


def test_an_evaluation_and_a_closed_engine_send_nothing():
    group = weights(5, 5)
    sent, way = made([group])
    loss_of(group, [1.0, 1.0]).backward()
    assert way.told == [] and group[0].grad is not None
    sent.close()
    group[0].grad = group[1].grad = None
    with sent.backward(last=True):
        loss_of(group, [1.0, 1.0]).backward()
    # what no hook took is sent at the end
    assert way.told == ["begin", "0.5", "0.0"]
