"""What optimizer, engine and objectives ask of a model: torch's module, and what is ours (encoder/models/contract.py)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from encoder.base.batch import TokenBatch


class TorchModule(Protocol):
    """The part of torch.nn.Module that is used; a class that also has methods of ours cannot be named otherwise."""

    training: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Of a micro-batch; an engine puts the objective's loss in its place."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward, with its hooks."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As torch's."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """As torch's."""

    def buffers(self) -> Iterator[Tensor]:
        """As torch's."""

    def modules(self) -> Iterator[nn.Module]:
        """As torch's."""

    def state_dict(self) -> dict[str, Any]:
        """As torch's."""

    def load_state_dict(self, state_dict: Mapping[str, Any], *, assign: bool = False) -> Any:
        """As torch's."""

    def train(self, mode: bool = True) -> Any:
        """As torch's."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's."""

    def double(self) -> Any:
        """As torch's."""


class DrawnModel(TorchModule, Protocol):
    """A model that says what its weights are at the start."""

    def initial_values(self, name: str, shape: Sequence[int]) -> Tensor:
        """The initial weights of a parameter, whole: a function of the seed."""


class TrainedModel(DrawnModel, Protocol):
    """A model that an engine trains."""

    phase_settings: dict[str, float]  # what it runs with now

    def hidden_states(self, batch: TokenBatch, *, at_M: Tensor | None = None) -> Tensor:
        """x_TC after the last norm; or x_MC of tokens at_M alone, which may take less."""

    def hidden_matrices(self) -> dict[str, int]:
        """The matrices of the layers (what Muon orthogonalizes): how many stand in each, one above another."""

    def set_phase_(self, settings: Mapping[str, float]) -> None:
        """Sets what a phase may change."""

    def compile_blocks_(self) -> None:
        """From now on the layers run compiled."""

    def recompute_blocks_(self) -> None:
        """From now on a layer keeps its input alone for the backward pass."""

    def fp8_blocks_(self) -> None:
        """From now on the layers' matmuls run in FP8. Raises ConfigError for odd shapes."""

    def attention_reason(self, device: torch.device | None = None) -> str:
        """Which attention kernel runs in training, and why."""
