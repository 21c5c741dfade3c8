"""Every backend that can run on this CUDA device: values, gradients, windows, isolation, and no waiting for the device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from encoder.models.modernbert import ModernBertConfig, ModernBertForMaskedLM
from encoder.nn.attend import BACKENDS, AttentionRequest, choose_backend
from tests.helpers.packed import packed
from tests.reference.dense import dense_attention

pytestmark = pytest.mark.gpu

ON_CUDA = AttentionRequest(
    device=torch.device("cuda"), dtype=torch.bfloat16, head_width=64, training=True
)
LENGTHS = [127, 1, 128, 129, 2, 300, 130, 64, 65, 500, 90]  # 1,536 tokens: 12 blocks of 128
DOCUMENTS = {
    "packed": LENGTHS,
    "one document": [512],
    "no whole block": [30, 1, 170],
    "one token": [1],
}


@pytest.fixture(params=list(BACKENDS))
def name(request) -> str:
    why = BACKENDS[request.param].why_not(ON_CUDA)
    if why:
        pytest.skip(f"{request.param} cannot run here: {why}")
    return request.param


def planned(name: str, lengths: list[int], *, radius: int = 64, spare: int = 3):
    ends = torch.tensor([0, *lengths, *[0] * spare]).cumsum(0).int().cuda()
    return BACKENDS[name].plan(
        ends, max_seqlen=max(lengths), tokens=sum(lengths), window_radius_tokens=radius
    )


def drawn(tokens: int, *, width: int = 64) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    return [torch.randn(tokens, 4, width, generator=draw).bfloat16() for _ in range(4)]


def computed(attention, q, k, v, d_out) -> list[torch.Tensor]:
    """Output and gradients, on the CPU in fp64."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    out.backward(d_out.to(out))
    return [x.detach().cpu().double() for x in (out, *(leaf.grad for leaf in leaves))]


# the wider heads on one set of documents: flex compiles for every shape, some seconds each
@pytest.mark.parametrize(
    "lengths, width",
    [*((d, 64) for d in DOCUMENTS.values()), (LENGTHS, 128)],
    ids=[*DOCUMENTS, "packed, wider heads"],
)
@pytest.mark.parametrize("radius", [None, 1, 64])
def test_values_and_gradients_are_as_near_to_the_truth_as_plain_bf16(name, lengths, radius, width):
    tensors = drawn(sum(lengths), width=width)

    def dense(q, k, v):
        return dense_attention(q, k, v, lengths=lengths, radius=radius)

    truth = computed(dense, *(x.double() for x in tensors))
    plain = computed(dense, *tensors)
    plan = planned(name, lengths, radius=radius or 64)
    ours = computed(
        lambda q, k, v: plan(q, k, v, local=radius is not None), *(x.cuda() for x in tensors)
    )
    for a, b, exact in zip(ours, plain, truth, strict=True):
        # at most twice the error of the plain computation (the rule of flash-attn's own tests), and one unit in the last
        # place of 1 to 2, because the plain gradient of one token is exactly 0
        assert (a - exact).abs().max() <= 2 * (b - exact).abs().max() + 2**-7


@pytest.mark.parametrize("local", [False, True], ids=["global", "local"])
def test_a_changed_document_changes_no_bit_of_the_others(name, local):
    q, k, v, _ = (x.cuda() for x in drawn(sum(LENGTHS)))
    start, end = sum(LENGTHS[:5]), sum(LENGTHS[:6])
    before = planned(name, LENGTHS)(q, k, v, local=local)
    for x in (q, k, v):
        x[start:end] = 100 * torch.randn_like(x[start:end])
    after = planned(name, LENGTHS)(q, k, v, local=local)
    assert torch.equal(before[:start], after[:start]) and torch.equal(before[end:], after[end:])
    assert not torch.equal(before[start:end], after[start:end])


def test_a_changed_document_changes_no_bit_of_the_others_in_the_whole_model(name):
    config = ModernBertConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=0.1,
    )
    model = ModernBertForMaskedLM(config, attention=name, seed=1).eval().to("cuda", torch.bfloat16)
    batch = packed(LENGTHS, vocab=64).to("cuda")
    start, end = sum(LENGTHS[:5]), sum(LENGTHS[:6])
    changed = replace(batch, ids_T=batch.ids_T.clone())
    changed.ids_T[start:end] = (changed.ids_T[start:end] + 1) % 64
    with torch.no_grad():
        before, after = (model.hidden_states(b) for b in (batch, changed))
    assert torch.equal(before[:start], after[:start]) and torch.equal(before[end:], after[end:])
    assert (before[start:end] != after[start:end]).any(dim=1).all()


def test_planning_and_running_never_wait_for_the_device(name):
    if name in ("tiles", "sdpa"):
        pytest.skip(f"{name} plans on the host")
    q, k, v, d_out = (x.cuda() for x in drawn(sum(LENGTHS)))
    ends = torch.tensor([0, *LENGTHS, 0, 0]).cumsum(0).int().cuda()

    def step() -> None:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        plan = BACKENDS[name].plan(
            ends, max_seqlen=max(LENGTHS), tokens=len(q), window_radius_tokens=64
        )
        (plan(*leaves, local=False) + plan(*leaves, local=True)).backward(d_out)

    step()  # compiles, where there is something to compile
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_layer_compiles_whole_and_other_documents_do_not_compile_it_again(name):
    if name in ("tiles", "sdpa"):
        pytest.skip(f"{name} plans on the host")
    compiled = torch.compile(lambda plan, q, k, v: plan(2 * q, k, v, local=True), fullgraph=True)
    q, k, v, _ = (x.cuda() for x in drawn(1024))
    for again, lengths in enumerate(([512, 512], [300, 424, 300], [1, 511, 512])):
        plan = planned(name, lengths, spare=6 - len(lengths))
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.compiler.set_stance("fail_on_recompile" if again else "default"):
            out = compiled(plan, *leaves)
            out.sum().backward()
        assert torch.allclose(out, plan(2 * q, k, v, local=True), rtol=0, atol=0.02)
        assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_auto_takes_a_kernel_for_packed_documents_in_bf16():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    assert choose_backend("auto", ON_CUDA).backend.name in ("flash4", "flash3", "flash2", "varlen")
