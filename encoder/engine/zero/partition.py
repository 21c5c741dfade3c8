"""ZeRO stage 3 from the first moment on: each parameter is drawn and cut over the ranks before the next one is drawn.

meta device            one parameter at a time         for ever
name, shape     ->     its values, whole        ->     1 / ranks of them on each rank
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder.base.model import DrawnModel
from encoder.engine.zero.config import quiet

# (name, shape) of a parameter -> its initial weights, whole
Values = Callable[[str, Sequence[int]], Tensor]


def partition_(
    model: DrawnModel, *, deepspeed: ModuleType, dtype: torch.dtype, device: torch.device
) -> None:
    """Gives a model on the meta device its `initial_values`, cut over the ranks; no rank ever holds two whole parameters.

    deepspeed.zero.Init as a context would do the same while the modules are made, but hands them dtype and device by
    replacing torch.empty and every Module's __init__, and what it partitions has no shape left to be drawn by.
    """
    assert all(p.is_meta for p in model.parameters()), (
        "stage 3 needs the model on the meta device: it builds it in parts"
    )
    assert not any(b.is_meta for b in model.buffers()), "a buffer on the meta device has no values"
    with quiet():
        deepspeed.init_distributed(dist_init_required=False)
        for name, parameter in model.named_parameters():
            values = model.initial_values(name, parameter.shape).to(device=device, dtype=dtype)
            # in place: the optimizer's groups hold the parameter
            torch.utils.swap_tensors(parameter, nn.Parameter(values, parameter.requires_grad))

            # cut over the ranks at once: the whole values are gone before the next are drawn
            deepspeed.zero.Init(
                nn.ParameterList([parameter]), mem_efficient_linear=False, dtype=dtype
            )
    model.to(device)  # the buffers


@contextlib.contextmanager
def weights_may_go() -> Iterator[None]:
    """A forward that lets weights be given back after use: torch's own F.linear keeps the whole weight for its backward
    (as a transposed view), DeepSpeed's keeps the parameter, which is gathered again. DeepSpeed would replace it for ever.
    """
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    plain = F.linear
    F.linear = zero3_linear_wrap
    try:
        yield
    finally:
        F.linear = plain
