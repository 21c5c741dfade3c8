"""Layer-wise decay of the learning rate: the nearer to the input, the smaller.

    rate of layer l of L    peak d^(L - l)        embeddings    peak d^L        final norm, head, classifier    peak

With L = 12 and d = 0.8 the top layer has 1, the bottom one 0.086, the embeddings 0.069. ELECTRA's code has d^2 times that for
layers and embeddings (Clark et al. 2020; its paper says otherwise). XLNet's code multiplies clipped gradients instead, which
under Adam is another rule.
"""

from __future__ import annotations

import re

from encoder.base.model import TorchModule

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def layer_rates(model: TorchModule, *, layers: int, decay: float) -> dict[str, float]:
    """Factor of the learning rate of each parameter that is not at the full rate.

    model: a body under `model`, with a head beside it
    layers: L
    decay: d
    """
    if decay == 1.0:
        return {}
    rates = {}
    for name, _ in model.named_parameters():
        found = _LAYER.match(name)
        if found:
            # layer l is number l - 1 in names
            rates[name] = decay ** (layers - 1 - int(found[1]))
        elif name.startswith("model.embeddings."):
            rates[name] = decay**layers
    return rates
