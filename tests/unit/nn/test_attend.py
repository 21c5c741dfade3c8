"""Every backend of attention against the dense mask, in values and gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from encoder.base.errors import ConfigError
from encoder.models.modernbert import ModernBertConfig, ModernBertForMaskedLM
from encoder.nn.attend import (
    BACKENDS,
    AttentionRequest,
    Word,
    check_backend_name,
    choose_backend,
    tiles,
)
from tests.helpers.attention import check_equals_the_dense_mask
from tests.helpers.packed import packed
from tests.reference.dense import dense_attention

RADIUS = 64
ON_CPU = AttentionRequest(
    device=torch.device("cpu"), dtype=torch.float32, head_width=8, training=True
)
HERE = [name for name, backend in BACKENDS.items() if not backend.why_not(ON_CPU)]
DOCUMENTS = {
    "one token": [1],
    "all inside one window": [65, 30, 1, 64],
    "short windows": [128, 100, 66, 1, 127],
    "the window's edge": [127, 128, 129, 130],
    "long, crossing blocks": [300, 2, 77, 257, 64],
    "a whole number of blocks": [192, 64],
}


def planned(name: str, lengths: list[int], *, radius: int = RADIUS, spare: int = 2):
    total = sum(lengths)
    ends = torch.tensor(
        [0, *torch.tensor(lengths).cumsum(0).tolist(), *[total] * spare], dtype=torch.int32
    )
    return BACKENDS[name].plan(
        ends, max_seqlen=max(lengths, default=0), tokens=total, window_radius_tokens=radius
    )


def drawn(
    tokens: int, *, heads: int = 2, width: int = 8, dtype=torch.float64
) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [
        torch.randn(tokens, heads, width, generator=draw, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for _ in range(3)
    ]


@pytest.mark.parametrize("local", [False, True], ids=["global", "local"])
@pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS.keys())
@pytest.mark.parametrize("name", HERE)
def test_every_backend_equals_the_dense_mask_in_values_and_gradients(name, lengths, local):
    check_equals_the_dense_mask(
        planned(name, lengths),
        lambda: drawn(sum(lengths)),
        lengths=lengths,
        radius=RADIUS if local else None,
    )


@pytest.mark.parametrize("elements", [1, 20_000, 60_000, 10**7], ids="{:,} at a time".format)
@pytest.mark.parametrize("local", [False, True], ids=["global", "local"])
@pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_products_however_many_heads_at_once_equal_the_dense_mask(
    monkeypatch, lengths, local, elements
):
    """What half precision runs, in fp64: one head, some of a tile's six, all of them, several tiles together."""
    at_once = elements

    def piece_rows(x, *, elements):
        return max(1, min(len(x), at_once // elements))

    monkeypatch.setattr(tiles, "_attend", tiles._Products.apply)
    monkeypatch.setattr(tiles, "piece_rows", piece_rows)
    check_equals_the_dense_mask(
        planned("tiles", lengths),
        lambda: drawn(sum(lengths), heads=6),
        lengths=lengths,
        radius=RADIUS if local else None,
    )


@pytest.mark.parametrize(("most", "sizes"), [(1, 1), (5, 3), (6, 6), (11, 6), (13, 12), (99, 36)])
def test_heads_are_taken_by_a_divisor_or_by_whole_tiles(monkeypatch, most, sizes):
    monkeypatch.setattr(tiles, "piece_rows", lambda x, *, elements: min(len(x), most))
    parts = [*tiles._parts(torch.zeros(36, 2, 2), heads=6)]
    assert {part.stop - part.start for part, _ in parts} == {sizes}
    assert [part.start for part, _ in parts] == [*range(0, 36, sizes)]
    for part, of in parts:
        assert (of.start, of.stop) == (part.start // 6, (part.stop + 5) // 6)


@pytest.mark.parametrize(
    ("device", "units", "most"),
    [
        ("cpu", {"amx_bf16": True, "avx512_bf16": True}, 256),
        ("cpu", {"avx512_bf16": True}, 512),
        ("cpu", {}, 512),
        ("cuda", {"avx512_bf16": True}, 256),
    ],
)
def test_products_end_sooner_where_they_were_slower_or_not_measured(
    monkeypatch, device, units, most
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    assert tiles.most_product_keys.__wrapped__(device) == most


@pytest.mark.parametrize("name", HERE)
def test_a_small_radius_hides_the_first_token_beyond_it(name):
    lengths = [9]
    q, k, v = drawn(9)
    out = planned(name, lengths, radius=2)(q, k, v, local=True)
    assert torch.allclose(
        out, dense_attention(q, k, v, lengths=lengths, radius=2), rtol=0, atol=1e-12
    )
    assert not torch.allclose(
        out, dense_attention(q, k, v, lengths=lengths, radius=3), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("local", [False, True], ids=["global", "local"])
@pytest.mark.parametrize("lengths", [[100, 40, 90], [300, 200, 140]], ids=["short", "long"])
@pytest.mark.parametrize("name", HERE)
def test_packed_documents_never_see_each_other(name, lengths, local):
    with torch.no_grad():
        q, k, v = drawn(sum(lengths), dtype=torch.float32)
        before = planned(name, lengths)(q, k, v, local=local)
        end = lengths[0] + lengths[1]
        for x in (q, k, v):
            x[lengths[0] : end] = 1e4 * torch.randn_like(x[lengths[0] : end])
        after = planned(name, lengths)(q, k, v, local=local)
    assert torch.equal(before[: lengths[0]], after[: lengths[0]])
    assert torch.equal(before[end:], after[end:])
    assert not torch.equal(before[lengths[0] : end], after[lengths[0] : end])


@pytest.mark.parametrize("local", [False, True], ids=["global", "local"])
@pytest.mark.parametrize("name", HERE)
def test_no_tokens_give_no_output_and_a_gradient(name, local):
    q, k, v = drawn(0)
    out = planned(name, [], spare=3)(q, k, v, local=local)
    out.sum().backward()
    assert out.shape == q.shape and v.grad.shape == v.shape


@pytest.mark.parametrize("name", HERE)
def test_bf16_stays_within_its_own_rounding_of_fp32(name):
    lengths = [100, 300]
    exact, rounded = drawn(400, width=64), drawn(400, width=64, dtype=torch.bfloat16)
    for local in (False, True):
        expected = dense_attention(*exact, lengths=lengths, radius=RADIUS if local else None)
        out = planned(name, lengths)(*rounded, local=local)
        assert out.dtype == torch.bfloat16
        assert (
            out - expected
        ).abs().max() < 0.02  # values up to 4: inputs and output are rounded to 2^-8


@pytest.mark.parametrize("name", HERE)
def test_a_changed_document_changes_no_bit_of_the_others_in_the_whole_model(name):
    config = ModernBertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        window_radius_tokens=8,
        initializer_range=0.3,
    )
    model = ModernBertForMaskedLM(config, attention=name, seed=1).eval()
    lengths = [40, 1, 23, 300]
    batch = packed(lengths, vocab=64)
    changed = replace(batch, ids_T=batch.ids_T.clone())
    changed.ids_T[41:64] = (changed.ids_T[41:64] + 1) % 64
    with torch.no_grad():
        before, after = (model.hidden_states(b) for b in (batch, changed))
    assert torch.equal(before[:41], after[:41]) and torch.equal(before[64:], after[64:])
    assert (before[41:64] != after[41:64]).any(dim=1).all()


def test_auto_takes_the_first_that_can_run_and_says_why_the_others_cannot():
    choice = choose_backend("auto", ON_CPU)
    assert choice.backend.name == "tiles"
    assert (
        choice.reason
        == "tiles: the fastest that can run here; flash4, flash3, flash2, varlen, flex cannot run"
        " here: needs a CUDA device, this is cpu"
    )
    assert choose_backend("sdpa", ON_CPU).reason.startswith("sdpa: asked for; flash4")


def test_a_misspelt_backend_names_its_neighbour():
    with pytest.raises(ConfigError, match="'spda' is unknown. Did you mean sdpa?"):
        check_backend_name("spda")
    with pytest.raises(ConfigError, match="'spda' is unknown"):
        choose_backend("spda", ON_CPU)


def test_a_run_file_may_name_every_backend():
    assert get_args(Word) == ("auto", "flash", *BACKENDS)


def test_a_backend_that_cannot_run_says_why_and_what_can():
    with pytest.raises(
        ConfigError,
        match=(
            "^varlen cannot run here: needs a CUDA device, this is cpu. "
            "Use attention: tiles or sdpa.$"
        ),
    ):
        choose_backend("varlen", ON_CPU)
    with pytest.raises(
        ConfigError, match="^flash4, flash3, flash2 cannot run here: needs a CUDA device"
    ):
        choose_backend("flash", ON_CPU)
