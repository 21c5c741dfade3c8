"""The optimizers by name."""

from __future__ import annotations

from collections.abc import Mapping

from encoder.base.model import TrainedModel
from encoder.optim.adamw import AdamW, AdamWConfig
from encoder.optim.groups import Factors, decay_groups
from encoder.optim.lamb import Lamb, LambConfig
from encoder.optim.muon import Muon, MuonConfig
from encoder.optim.stable_adamw import StableAdamW, StableAdamWConfig
from encoder.optim.whole_tensors import MomentsConfig, WholeTensorOptimizer

OPTIMIZERS: dict[str, type[MomentsConfig]] = {
    "stable_adamw": StableAdamWConfig,
    "adamw": AdamWConfig,
    "muon": MuonConfig,
    "lamb": LambConfig,
}

_RULES: dict[type, type[WholeTensorOptimizer]] = {
    StableAdamWConfig: StableAdamW,
    AdamWConfig: AdamW,
    MuonConfig: Muon,
    LambConfig: Lamb,
}


def build_optimizer(
    model: TrainedModel, config: MomentsConfig, *, factors: Mapping[str, Factors] | None = None
) -> WholeTensorOptimizer:
    """The optimizer of a settings object over a whole model's parameters; for Muon the model says its `hidden_matrices()`.

    factors: parameter -> of its rate and gradient; 1 for all others
    """
    hidden = None
    if isinstance(config, MuonConfig):
        hidden = model.hidden_matrices()
    groups = decay_groups(
        model, weight_decay=config.weight_decay, hidden_matrices=hidden, factors=factors
    )
    return _RULES[type(config)](groups, config)


def state_elements(model: TrainedModel, config: MomentsConfig) -> int:
    """Numbers that the optimizer keeps beside the weights, over all ranks."""
    optimizer = build_optimizer(model, config)
    elements = 0
    for group in optimizer.param_groups:
        kinds = len(optimizer.kinds_of(group))
        elements += kinds * sum(p.numel() for p in group["params"])
    return elements
