"""Layer-wise decay: the nearer to the input, the smaller the step. Two rules, which under Adam are not the same.

    layer_decay d             rate of layer l of L is d^(L - l) of the peak, embeddings d^L; norm, head and classifier 1
    gradient_layer_decay d    clipped gradients of layer l are multiplied by d^(L - l); nothing else

With L = 12 and d = 0.8 the top layer has 1, the bottom one 0.086, the embeddings 0.069. ELECTRA's code has d^2 times that for
layers and embeddings (Clark et al. 2020; its paper says otherwise). The second is what XLNet's code does under the name of a rate
(Yang et al. 2019, model_utils.py). A factor c on gradients of size g changes an Adam step by c (g + eps) / (c g + eps): hardly,
where gradients are far above eps.
"""

from __future__ import annotations

import re

from encoder.base.model import TorchModule
from encoder.optim.groups import Factors

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def layer_factors(
    model: TorchModule, *, layers: int, decay: float, gradient_decay: float
) -> dict[str, Factors]:
    """Factors of each parameter that is not updated at the full rate.

    model: a body under `model`, with a head beside it
    layers: L
    decay: d of rates
    gradient_decay: d of gradients
    """
    found = {}
    for name, _ in model.named_parameters():
        layer = _LAYER.match(name)
        if layer:
            # layer l is number l - 1 in names
            above = layers - 1 - int(layer[1])
            found[name] = Factors(rate=decay**above, gradient=gradient_decay**above)
        elif name.startswith(("model.embeddings.", "model.embedding_projection.")):
            found[name] = Factors(rate=decay**layers)
    return {name: factors for name, factors in found.items() if factors != Factors()}
