"""Where the time of training steps goes: each operation's own CPU time, by the part of the program that asked for it.

    part        forward          an operation inside the innermost named range
                backward         that of the forward operation with the same sequence number

A range is a module's call, a function of ours or an autograd.Function. `matrices` are all nn.Linear, `attention` is a layer's
without them, `other` mostly norms, GELU and sums.
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

import encoder.models.xlnet as xlnet
import encoder.nn.loss as loss
import encoder.objectives.plm as plm
from encoder.nn.block import Block

PARTS = (
    "matrices",
    "attention",
    "embedding",
    "loss",
    "sampling",
    "order",
    "optimizer",
    "data",
    "other",
)
_PREFIX = "part: "
# the end of a module's name -> its part
MODULES = {"attn": "attention", "embeddings": "embedding"}
# functions of ours, where they are looked up
FUNCTIONS: tuple[tuple[Any, str, str], ...] = (
    (loss, "draw_from_logits", "sampling"),
    (xlnet, "plan_two_streams", "order"),
    (plm.PermutationLanguageModel, "order", "order"),
)
# the beginning of what torch calls an autograd.Function or an optimizer
TORCH = {"_CrossEntropySum": "loss", "Optimizer.": "optimizer"}


def in_part(name: str) -> contextlib.AbstractContextManager[Any]:
    """What runs inside belongs to the part."""
    return record_function(_PREFIX + name)


def shares_of(model: Any, run: Callable[[], object]) -> dict[str, float]:
    """The share of each of PARTS in the CPU time of `run`, which trains the model, an nn.Module; those of nothing are left out."""
    with _named(model), profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
        with in_part("other"):
            run()
    seconds = seconds_by_part(seen.events())
    total = sum(seconds.values())
    return {part: seconds[part] / total for part in PARTS if seconds[part] > 0.0}


def seconds_by_part(events: Any) -> Mapping[str, float]:
    """Of the operations that torch's profiler saw, their own time by part.

    events: torch.autograd.profiler_util.FunctionEvent, with their parents
    """
    forward: dict[int, str] = {}
    for event in events:
        part = _part_around(event)
        if event.sequence_nr >= 0 and part not in (None, "other"):
            # the first with a number is the forward's
            forward.setdefault(event.sequence_nr, part)
    found: dict[str, float] = defaultdict(float)
    for event in events:
        found[_part_of(event, forward)] += event.self_cpu_time_total * 1e-6
    return found


def _part_of(event: Any, forward: Mapping[int, str]) -> str:
    """The innermost part around it, or around the forward of what the backward pass computes."""
    while event is not None:
        part = _own_part(event)
        if part is None and event.name.startswith("autograd::engine::evaluate_function"):
            part = forward.get(event.sequence_nr)
        if part is not None:
            return part
        event = event.cpu_parent
    return "other"


def _part_around(event: Any) -> str | None:
    while event is not None:
        part = _own_part(event)
        if part is not None:
            return part
        event = event.cpu_parent
    return None


def _own_part(event: Any) -> str | None:
    """Of what names a part itself."""
    name: str = event.name
    if name.startswith(_PREFIX):
        return name.removeprefix(_PREFIX)
    return next((part for begin, part in TORCH.items() if name.startswith(begin)), None)


@contextlib.contextmanager
def _named(model: Any) -> Iterator[None]:
    """Modules and functions say in which part they are."""
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            part = MODULES.get(name.rpartition(".")[2])
            if isinstance(module, nn.Linear):
                part = "matrices"
            if part is not None:
                _wrap(stack, module, "forward", part)
            if isinstance(module, Block):
                # attention is what a block does between its two halves
                _wrap(stack, module, "forward", "attention")
                for half in ("pre_attention", "post_attention"):
                    _wrap(stack, module, half, "other")
        for owner, name, part in FUNCTIONS:
            _wrap(stack, owner, name, part)
        yield


def _wrap(stack: contextlib.ExitStack, owner: Any, name: str, part: str) -> None:
    """Calls of owner.name are in the part until the stack ends."""
    plain = getattr(owner, name)
    own = name in vars(owner)

    @functools.wraps(plain)
    def call(*values: Any, **named: Any) -> Any:
        with in_part(part):
            return plain(*values, **named)

    setattr(owner, name, call)
    # a method of a module was its class's before
    undo = functools.partial(setattr, owner, name, plain)
    stack.callback(undo if own else functools.partial(delattr, owner, name))
