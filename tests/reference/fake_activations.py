"""What autograd keeps of a forward, by torch's tensors without data (FakeTensorMode): the judge of encoder.tools.plan.activations.

Nothing is computed and nothing stands in for anything: autocast, kernels' outputs and devices are torch's own.
"""

from __future__ import annotations

import contextlib

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from encoder.models.catalog import build_model
from encoder.models.contract import ModelConfig
from encoder.nn.attend import attend_by
from encoder.tools.plan import activations as ours


def bytes_kept(
    config: ModelConfig, *, precision: str, device: str, fp8: bool, zero_3: bool
) -> list[int]:
    """For one document of each of ours.TOKENS, through the same model; the parameters are those of ours."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        with ours._default_dtype(precision), torch.device(device):
            model = build_model(config, seed=0)
            batches = [ours._one_document(tokens) for tokens in ours.TOKENS]
        # made by numpy, so not where torch.device says
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module.register_buffer(name, buffer.to(device), persistent=False)
        if fp8:
            model.fp8_blocks_()
        if zero_3:
            stack.enter_context(ours._linear_keeps_its_input())
        stack.enter_context(attend_by(ours._Counted()))
        stack.enter_context(ours._autocast(device, enabled=precision == "autocast"))
        return [ours._kept_by(model, batch) for batch in batches]
