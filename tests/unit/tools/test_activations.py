"""What autograd keeps of a forward, counted on a few tokens, is what torch's tensors without data keep."""

from __future__ import annotations

from dataclasses import replace

import pytest

from encoder.models.contract import ModelConfig
from encoder.models.modernbert import ModernBertForMaskedLM
from encoder.tools.plan import activations
from tests.helpers.tasks import BODIES
from tests.reference import fake_activations

DROPPED = {"attention_output_dropout": 0.1, "embedding_dropout": 0.1, "mlp_output_dropout": 0.1}
FAMILIES = {name: config for name, (config, _) in BODIES.items()}
MODERN = FAMILIES["modernbert"]
CONFIGS: dict[str, ModelConfig] = {
    **FAMILIES,
    "dropped": replace(MODERN, attention_output_dropout=0.1),
    "bert_dropped": replace(FAMILIES["bert"], **DROPPED),
    "rmsnorm": replace(MODERN, norm="rmsnorm"),
    "swiglu": replace(MODERN, mlp="swiglu"),
    "biases": replace(MODERN, attention_bias=True, mlp_bias=True, norm_bias=True),
}
PLAIN = {"fp8": False, "zero_3": False}
WAYS = [
    {"precision": "fp32", "device": "cpu", **PLAIN},
    {"precision": "fp64", "device": "cuda", **PLAIN},
    {"precision": "autocast", "device": "cpu", **PLAIN},
    {"precision": "bf16", "device": "cpu", "fp8": False, "zero_3": True},
    {"precision": "autocast", "device": "cuda", **PLAIN},
    {"precision": "autocast", "device": "cuda", "fp8": False, "zero_3": True},
    {"precision": "bf16", "device": "cuda", **PLAIN},
]
# 8 bits want widths of whole 16s
IN_8_BITS = {"precision": "autocast", "device": "cuda", "fp8": True, "zero_3": False}
WIDE = replace(MODERN, intermediate_size=32)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_forward_of_few_tokens_keeps_what_fake_tensors_keep(name):
    for way in WAYS:
        ours = activations._bytes_kept(CONFIGS[name], **way)
        assert ours == fake_activations.bytes_kept(CONFIGS[name], **way), way


def test_layers_in_8_bits_keep_what_fake_tensors_keep():
    ours = activations._bytes_kept(WIDE, **IN_8_BITS)
    assert ours == fake_activations.bytes_kept(WIDE, **IN_8_BITS)


class OfProducts(ModernBertForMaskedLM):
    """As a model of somebody else may have them: autocast gives products bf16, and a softmax fp32."""

    def hidden_states(self, batch):
        x_TC = super().hidden_states(batch)
        return (x_TC @ x_TC.T).softmax(-1) @ x_TC


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_products_of_a_models_own_keep_what_fake_tensors_keep(monkeypatch, device):
    def build(config, *, seed):
        return OfProducts(config, seed=seed)

    way = {"precision": "autocast", "device": device, **PLAIN}
    for module in (activations, fake_activations):
        monkeypatch.setattr(module, "build_model", build)
    assert activations._bytes_kept(MODERN, **way) == fake_activations.bytes_kept(MODERN, **way)
