"""The backends for CUDA, judged without it: what they hand to their kernel, what a block mask lets see, why they refuse."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch._dynamo.utils import counters

from encoder.base.errors import ConfigError
from encoder.nn.attend import BACKENDS, AttentionRequest, choose_backend, flash, flex, varlen
from encoder.nn.attend.flex import FlexPlan, block_mask
from tests.helpers.attention import check_equals_the_dense_mask
from tests.reference.dense import dense_attention

ON_CUDA = AttentionRequest(
    device=torch.device("cuda"), dtype=torch.bfloat16, head_width=64, training=True
)
ENDS = [0, 5, 6, 6, 20, 20, 20]  # documents of 5, 1 and 14 tokens, empty ones between and behind
LENGTHS = [5, 1, 14]
KERNELS = ("flash4", "flash3", "flash2", "varlen")


class FakeKernel:
    """Attention by a dense mask made of what the kernel was given; windows in the words of flash-attn."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def __call__(self, q, k, v, ends, longest, window) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            self.calls.append((ends, longest, window))
        return torch.einsum("hqk,khd->qhd", seen_share(q, k, ends, window), v)


def seen_share(q, k, ends, window) -> torch.Tensor:
    """The softmax, [H, T, T]."""
    place = torch.arange(len(q))
    document = torch.searchsorted(ends[1:], place.int(), right=True)
    away = place - place[:, None]
    left, right = (len(q) if side in (-1, None) else side for side in window)
    sees = (document == document[:, None]) & (away <= right) & (-away <= left)
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    return scores.masked_fill(~sees, -torch.inf).softmax(-1)


@pytest.fixture
def kernel(monkeypatch) -> FakeKernel:
    """Every package is installed, on a Hopper, and computes by one fake."""
    fake = FakeKernel()

    def torch_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
        assert cu_seq_q is cu_seq_k and max_q == max_k
        return fake(query, key, value, cu_seq_q, max_q, window_size)

    def flash_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_size=(-1, -1)
    ):
        assert cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
        return fake(q, k, v, cu_seqlens_q, max_seqlen_q, window_size)

    def flash4_varlen(
        q,
        k,
        v,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        window_size=(None, None),
        return_lse=False,
    ):
        assert return_lse
        return (
            fake(q, k, v, cu_seqlens_q, max_seqlen_q, window_size),
            q.new_full((q.shape[1], len(q)), 7.0).float(),
        )

    def flash4_backward(
        q,
        k,
        v,
        out,
        d_out,
        lse,
        *,
        window_size_left,
        window_size_right,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
    ):
        assert (
            (lse == 7).all()
            and lse.shape == (q.shape[1], len(q))
            and max_seqlen_q == max_seqlen_k == 16
        )
        p = seen_share(q, k, cu_seqlens_q, (window_size_left, window_size_right))
        assert torch.allclose(torch.einsum("hqk,khd->qhd", p, v), out)
        d_p = torch.einsum("qhd,khd->hqk", d_out, v)
        d_scores = p * (d_p - (p * d_p).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
        return (
            torch.einsum("hqk,khd->qhd", d_scores, k),
            torch.einsum("hqk,qhd->khd", d_scores, q),
            torch.einsum("hqk,qhd->khd", p, d_out),
        )

    for b in flash.FLASH:
        module = ModuleType(b.module)
        module.flash_attn_varlen_func = flash4_varlen if b.name == "flash4" else flash_varlen
        module._flash_attn_bwd = flash4_backward
        monkeypatch.setitem(sys.modules, b.module, module)
        for parent in ("flash_attn", "flash_attn.cute"):
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torch_varlen)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    forget()
    yield fake
    forget()


def forget() -> None:
    for cached in (flash._import, flash._flash4_op, varlen._missing):
        cached.cache_clear()


@pytest.fixture
def bare_cuda(monkeypatch) -> None:
    """A Hopper without any package."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    forget()


def planned(name: str, *, radius: int = 3):
    return BACKENDS[name].plan(
        torch.tensor(ENDS, dtype=torch.int32), max_seqlen=14, tokens=20, window_radius_tokens=radius
    )


def drawn(tokens: int = 20) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    return [
        torch.randn(tokens, 2, 8, generator=draw, dtype=torch.float64).requires_grad_()
        for _ in range(3)
    ]


@pytest.mark.parametrize("local", [False, True], ids=["global", "local"])
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_handed_the_documents_as_they_are_and_gives_the_dense_values_and_gradients(
    kernel, name, local
):
    check_equals_the_dense_mask(planned(name), drawn, lengths=LENGTHS, radius=3 if local else None)
    ends, longest, window = kernel.calls[0]
    assert ends.dtype == torch.int32 and ends.tolist() == ENDS
    assert longest == 16  # 14, to a power of two
    assert window == ((3, 3) if local else (None, None) if name == "flash4" else (-1, -1))


@pytest.mark.parametrize("name", KERNELS)
def test_a_layer_compiles_whole_and_other_documents_do_not_compile_it_again(kernel, name):
    def layer(plan, q, k, v):
        return plan(2 * q, k, v, local=True)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for again, lengths in enumerate(([14, 6], [3, 9, 8], [1, 10, 9], [12, 8])):
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
        ends = torch.cat((ends, ends.new_full((5 - len(ends),), 20)))
        plan = BACKENDS[name].plan(ends, max_seqlen=max(lengths), tokens=20, window_radius_tokens=3)
        ours, truth = drawn(), drawn()
        with torch.compiler.set_stance("fail_on_recompile" if again else "default"):
            out = compiled(plan, *ours)
            out.square().sum().backward()
        expected = dense_attention(2 * truth[0], *truth[1:], lengths=lengths, radius=3)
        expected.square().sum().backward()
        assert torch.allclose(out, expected, rtol=0, atol=1e-12)
        assert all(
            torch.allclose(a.grad, b.grad, rtol=0, atol=1e-11)
            for a, b in zip(ours, truth, strict=True)
        )


def test_the_newest_flash_that_can_run_is_taken(kernel, monkeypatch):
    assert choose_backend("flash", ON_CUDA).reason.startswith(
        "flash4: the newest that can run here"
    )
    assert choose_backend("auto", ON_CUDA).backend.name == "flash4"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    choice = choose_backend("auto", ON_CUDA)
    assert choice.reason.startswith(
        "flash2: the fastest that can run here; flash4 cannot run here: needs compute "
        "capability 9.0 and below 12.0, this device is 8.0; flash3 cannot run here: needs"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert "and below 10.0, this device is 10.0" in BACKENDS["flash3"].why_not(
        ON_CUDA
    )  # as numbers, not as text


@pytest.mark.parametrize(
    "situation, why",
    [
        (replace(ON_CUDA, device=torch.device("cpu")), "needs a CUDA device, this is cpu"),
        (replace(ON_CUDA, dtype=torch.float32), "needs float16 or bfloat16, this is float32"),
        (replace(ON_CUDA, head_width=60), "needs a head width of a multiple of 8 from 8 to"),
    ],
)
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_names_the_need_that_is_not_met(kernel, name, situation, why):
    assert BACKENDS[name].why_not(ON_CUDA) is None
    assert why in BACKENDS[name].why_not(situation)


def test_without_packages_torchs_own_kernel_serves_and_the_header_says_what_is_missing(bare_cuda):
    choice = choose_backend("auto", ON_CUDA)
    assert choice.backend.name == "varlen"
    for name in ("flash-attn-4", "flash-attn-3", "flash-attn"):
        assert f"cannot run here: {name} is not installed" in choice.reason
    with pytest.raises(ConfigError, match="Use attention: varlen or "):
        choose_backend("flash3", ON_CUDA)


def test_fp32_on_cuda_goes_to_what_can_multiply_it(bare_cuda):
    name = choose_backend("auto", replace(ON_CUDA, dtype=torch.float32)).backend.name
    assert name == (
        "tiles" if BACKENDS["flex"].why_not(replace(ON_CUDA, dtype=torch.float32)) else "flex"
    )


def test_a_package_that_breaks_or_differs_is_an_answer_and_no_crash(kernel, monkeypatch, tmp_path):
    del sys.modules["flash_attn_interface"]
    (tmp_path / "flash_attn_interface.py").write_text("raise OSError('libcudart.so.99 is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    forget()
    assert (
        BACKENDS["flash3"].why_not(ON_CUDA)
        == "flash-attn-3 does not import: libcudart.so.99 is missing"
    )
    sys.modules["flash_attn.flash_attn_interface"].flash_attn_varlen_func = (
        lambda q, k, v, cu_seqlens_q: None
    )
    assert "takes no cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_size" in BACKENDS[
        "flash2"
    ].why_not(ON_CUDA)
    monkeypatch.setattr(
        "torch.nn.attention.varlen.varlen_attn", lambda query, key, value, cu_seq_q, max_q: None
    )
    assert (
        BACKENDS["varlen"].why_not(ON_CUDA)
        == "this torch's varlen_attn takes no cu_seq_k, max_k, window_size"
    )


@pytest.mark.parametrize("radius", [None, 1, 64, 127, 128, 300])
@pytest.mark.parametrize(
    "lengths", [[1], [128, 128, 1, 127], [300, 1, 1, 200, 10], [640, 5], [127, 130, 700]]
)
def test_a_block_mask_lets_see_exactly_what_the_dense_mask_does(lengths, radius):
    tokens = sum(lengths)
    ends = torch.tensor([0, *lengths, 0, 0], dtype=torch.int32).cumsum(0).int()
    mask = block_mask(ends, tokens=tokens, radius=radius)
    place = torch.arange(mask.seq_lengths[0])
    asked = mask.mask_mod(torch.tensor(0), torch.tensor(0), place[:, None], place[None, :])

    def spread(count, which):
        blocks = torch.zeros(len(place) // 128, len(place) // 128, dtype=torch.bool)
        for row, (n, columns) in enumerate(zip(count[0, 0], which[0, 0], strict=True)):
            blocks[row, columns[:n].long()] = True
        return blocks

    document = torch.repeat_interleave(
        torch.arange(len(lengths) + 1), torch.tensor([*lengths, len(place) - tokens])
    )
    sees = document[:, None] == document
    if radius is not None:
        sees &= (place[:, None] - place).abs() <= radius
    pairs = sees.view(len(place) // 128, 128, len(place) // 128, 128)
    every, some = pairs.all(3).all(1), pairs.any(3).any(1)
    assert torch.equal(asked, sees)
    assert torch.equal(spread(mask.full_kv_num_blocks, mask.full_kv_indices), every)
    assert torch.equal(spread(mask.kv_num_blocks, mask.kv_indices), some & ~every)
    assert torch.equal(spread(mask.q_num_blocks, mask.q_indices), some & ~every)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("local", [False, True], ids=["global", "local"])
@pytest.mark.parametrize(
    "lengths", [[1], [65, 30, 1, 64], [130, 2, 77, 175]], ids=["one", "short", "three blocks"]
)
def test_flex_equals_the_dense_mask(lengths, local):
    tokens = sum(lengths)
    draw = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(tokens, 2, 16, generator=draw) for _ in range(3))
    ends = torch.tensor([0, *lengths, 0], dtype=torch.int32).cumsum(0).int()
    plan = BACKENDS["flex"].plan(
        ends, max_seqlen=max(lengths), tokens=tokens, window_radius_tokens=64
    )
    expected = dense_attention(q, k, v, lengths=lengths, radius=64 if local else None)
    assert torch.allclose(plan(q, k, v, local=local), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_flex_compiled_visits_the_right_blocks_and_other_documents_do_not_compile_it_again():
    compiled = torch.compile(
        lambda plan, q, k, v: plan(q, k, v, local=False) + plan(q, k, v, local=True), fullgraph=True
    )
    q, k, v = (
        torch.randn(300, 2, 16, generator=torch.Generator().manual_seed(4)) for _ in range(3)
    )
    for again, lengths in enumerate(([100, 200], [7, 250, 43], [300], [128, 172])):
        ends = (
            torch.tensor([0, *lengths, *[0] * (4 - len(lengths))], dtype=torch.int32)
            .cumsum(0)
            .int()
        )
        plan = BACKENDS["flex"].plan(
            ends, max_seqlen=max(lengths), tokens=300, window_radius_tokens=64
        )
        expected = sum(
            dense_attention(q, k, v, lengths=lengths, radius=radius) for radius in (None, 64)
        )
        with torch.compiler.set_stance("fail_on_recompile" if again else "default"):
            assert torch.allclose(compiled(plan, q, k, v), expected, rtol=0, atol=2e-5)


def test_flex_compiles_for_more_shapes_than_torchs_limit(monkeypatch):
    """torch runs the ninth shape uncompiled, with scores of T x T, and says so in a warning at most."""
    torch._dynamo.reset()
    flex._compiled.cache_clear()
    torch._dynamo.config.recompile_limit = 8  # torch's own, whatever other tests have asked for
    counters.clear()
    plain = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *args, **named: plain(*args, backend="eager", **named)
    )
    for blocks in range(1, 11):
        tokens = 128 * blocks
        whole = block_mask(
            torch.tensor([0, 100, tokens], dtype=torch.int32), tokens=tokens, radius=None
        )
        q, k, v = (torch.randn(tokens, 1, 16) for _ in "qkv")
        ours = FlexPlan(flex._compiled(), whole=whole, windowed=whole)(q, k, v, local=False)
        assert torch.allclose(
            ours,
            dense_attention(q, k, v, lengths=[100, tokens - 100], radius=None),
            rtol=0,
            atol=1e-5,
        )
    assert counters["stats"]["unique_graphs"] == 10
    flex._compiled.cache_clear()
