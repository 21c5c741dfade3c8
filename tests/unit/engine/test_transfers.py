"""encoder.engine.transfers: the copy of a micro-batch runs beside the kernels of the one before it, and over nobody's memory."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch

from encoder.engine import transfers
from encoder.engine.transfers import on_device
from tests.helpers.packed import packed

CUDA = torch.device("cuda", 0)


class Stream:
    """Writes down what is put on it, and how much of the other one it waits for."""

    def __init__(self, name: str, log: list) -> None:
        self.name, self.log, self.put = name, log, 0

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name} {other.put}")

    def record_event(self) -> int:
        return self.put

    def wait_event(self, event: int) -> None:
        self.log.append(f"{self.name} waits for copies {event}")


def test_copies_are_a_batch_ahead_and_wait_for_the_kernels_before_the_last(monkeypatch):
    log: list[str] = []
    copies, kernels = Stream("copies", log), Stream("kernels", log)

    class Batch:
        def __init__(self, number: int) -> None:
            self.number = number

        def to(self, device, *, non_blocking):
            assert non_blocking and device == CUDA
            copies.put += 1
            log.append(f"copy {self.number}")
            return self.number

    monkeypatch.setattr(transfers, "_stream", lambda device: copies)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: kernels)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    for number in on_device([Batch(i) for i in range(3)], CUDA):
        log.append(f"compute {number}")
        kernels.put += 1
    assert log == [
        "copies waits for kernels 0",
        "copy 0",
        "copies waits for kernels 0",
        "copy 1",
        "kernels waits for copies 1",
        "compute 0",
        "copies waits for kernels 1",
        "copy 2",
        "kernels waits for copies 2",
        "compute 1",
        "kernels waits for copies 3",
        "compute 2",
    ]
    assert list(on_device([], CUDA)) == []


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_batch_arrives_whole_whatever_is_copied_meanwhile(device):
    batches = [packed([3000, 1, 500], vocab=96, seed=i) for i in range(12)]
    if device == "cuda":
        batches = [
            replace(
                b, **{k: v.pin_memory() for k, v in vars(b).items() if isinstance(v, torch.Tensor)}
            )
            for b in batches
        ]
    sums, work = [], torch.ones(2048, 2048, device=device) if device == "cuda" else torch.ones(8, 8)
    for batch in on_device(batches, torch.device(device)):
        for _ in range(20):
            work = (work @ work).clamp(
                max=1.0
            )  # the reads below come long after the next copy was asked for
        sums.append((batch.ids_T.double() * work[0, 0]).sum() + batch.token_key_T.double().sum())
    expected = [b.ids_T.double().sum() + b.token_key_T.double().sum() for b in batches]
    assert torch.stack(sums).cpu().allclose(torch.stack(expected), rtol=1e-9)
