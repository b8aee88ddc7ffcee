"""Causal attention against the formula written out, and the parts of the layer spec by themselves."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training import cpu_backend

cpu_backend.install()

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402

from model.attention import SDPAttention, causal_attention  # noqa: E402
from model.packing import zigzag_positions  # noqa: E402
from model.spec import RMSNorm, scaled_bias_dropout_add  # noqa: E402


def by_the_formula(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale * Q K^T) V, row by row, in float64; query row i is position Sk - Sq + i."""
    out = torch.empty(query.shape, dtype=torch.float64)
    per_group = query.size(2) // key.size(2)
    for i in range(query.size(0)):
        seen = key.size(0) - query.size(0) + i + 1
        for b in range(query.size(1)):
            for h in range(query.size(2)):
                scores = scale * key[:seen, b, h // per_group].double() @ query[i, b, h].double()
                out[i, b, h] = scores.softmax(0) @ value[:seen, b, h // per_group].double()
    return out


@settings(max_examples=30, deadline=None)
@given(keys=st.integers(1, 12), data=st.data())
def test_causal_attention_is_the_formula(keys: int, data: st.DataObject) -> None:
    queries = data.draw(st.integers(1, keys))
    groups, per_group, head = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), 8
    scale = data.draw(st.sampled_from([1 / 64, 1 / 128, 0.5, 3.0]))
    generator = torch.Generator().manual_seed(keys * 100 + queries)
    query = torch.randn(queries, 2, groups * per_group, head, generator=generator)
    key, value = torch.randn(2, keys, 2, groups, head, generator=generator)
    found = causal_attention(query, key, value, scale)
    torch.testing.assert_close(found.double(), by_the_formula(query, key, value, scale), rtol=1e-5, atol=1e-5)


def test_a_whole_sequence_needs_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    import model.attention as attention

    monkeypatch.setattr(attention, "_mask", lambda *_: pytest.fail("a mask was made"))
    query, key = torch.randn(5, 1, 2, 4), torch.randn(5, 1, 1, 4)
    causal_attention(query, key, key, 1.0)
    causal_attention(query[-1:], key, key, 1.0)


def test_masks_are_made_once() -> None:
    from model.attention import _mask

    assert _mask(2, 3, torch.device("cpu")) is _mask(2, 3, torch.device("cpu"))
    assert _mask(2, 3, torch.device("cpu")).tolist() == [[True, True, False], [True, True, True]]


def attention(**changes: object) -> SDPAttention:
    config = SimpleNamespace(attention_dropout=0.0)
    options = {
        "attn_mask_type": AttnMaskType.causal,
        "attention_type": "self",
        "softmax_scale": 1.0,
        "pg_collection": SimpleNamespace(cp=None),
    }
    return SDPAttention(config, 1, **(options | changes))


@pytest.mark.parametrize(("changes", "message"), [
    ({"softmax_scale": None}, "softmax_scale is not set"), ({"attn_mask_type": AttnMaskType.padding}, "asked for padding self-attention"),
    ({"attention_type": "cross"}, "asked for causal cross-attention"), ({"attention_dropout": 0.1}, "has no dropout")])  # fmt: skip
def test_what_it_cannot_do_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(**changes)


def test_biases_and_other_packed_formats_are_refused() -> None:
    query = torch.randn(2, 1, 1, 4)
    with pytest.raises(ValueError, match="no attention bias"):
        attention()(query, query, query, None, attention_bias=torch.ones(1))
    with pytest.raises(ValueError, match="thd format without padding between them, not sbhd"):
        attention()(query, query, query, None, packed_seq_params=PackedSeqParams(qkv_format="sbhd"))
    assert attention()(query, query, query, None).shape == (2, 1, 4)


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_packed_samples_are_attended_to_as_if_alone(lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    query = torch.randn(sum(lengths), 4, 8, generator=generator)
    key, value = torch.randn(2, sum(lengths), 2, 8, generator=generator)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    found = attention()(query, key, value, None, packed_seq_params=packed)
    assert found.shape == query.shape
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        q, k, v = (t[start:end].unsqueeze(1) for t in (query, key, value))
        alone = attention()(q, k, v, None)
        assert torch.equal(found[start:end].flatten(1), alone.squeeze(1))
    with pytest.raises(ValueError, match="packed tokens for"):
        attention()(query[:-1], key, value, None, packed_seq_params=packed)


@given(pieces=st.lists(st.integers(1, 3), min_size=1, max_size=4), ranks=st.sampled_from([1, 2, 4]))
def test_every_packed_token_is_on_one_rank(pieces: list[int], ranks: int) -> None:
    bounds = [0, *torch.tensor([2 * ranks * n for n in pieces]).cumsum(0).tolist()]
    places = [zigzag_positions(bounds, ranks, rank) for rank in range(ranks)]
    assert sorted(torch.cat(places).tolist()) == list(range(bounds[-1]))
    assert len({len(p) for p in places}) == 1
    if ranks > 1:
        assert places[0][: pieces[0]].tolist() == list(range(pieces[0]))  # the first rank begins with the first piece
        with pytest.raises(ValueError, match="pad it when packing"):
            zigzag_positions([0, 2 * ranks + 1], ranks, 0)


def test_attention_saves_nothing() -> None:
    assert attention().sharded_state_dict("x.") == {}
    assert not list(attention().parameters())


def test_residual_multiplier_and_its_gradient() -> None:
    add = scaled_bias_dropout_add(0.22)(True, False)
    x, residual = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    bias = torch.randn(4)
    out = add((x, None), residual, 0.0)
    torch.testing.assert_close(out, residual + 0.22 * x)
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((3, 4), 0.22))
    torch.testing.assert_close(residual.grad, torch.ones(3, 4))
    torch.testing.assert_close(add((x, bias), residual, 0.0), residual + 0.22 * (x + bias))


def test_dropout_acts_in_training_only() -> None:
    x, residual = torch.ones(1000), torch.zeros(1000)
    torch.manual_seed(0)
    trained = scaled_bias_dropout_add(0.5)(True, False)((x, None), residual, 0.25)
    kept = trained[trained > 0]
    assert 600 < len(kept) < 900
    torch.testing.assert_close(kept, torch.full_like(kept, 0.5 / 0.75))
    assert torch.equal(scaled_bias_dropout_add(0.5)(False, False)((x, None), residual, 0.25), x * 0.5)


@pytest.mark.parametrize("fused", [True, False])
def test_the_multiplier_keeps_its_precision_in_bf16(fused: bool) -> None:
    """0.22 in bf16 would be 0.2197: the product must be formed with more bits, as Hugging Face's is."""
    x, residual = torch.randn(2, 1000).bfloat16()
    found = scaled_bias_dropout_add(0.22)(False, fused)((x, None), residual, 0.0)
    assert torch.equal(found, residual + (0.22 * x.float()).bfloat16())


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_norm_is_rms_and_marks_its_weight(sequence_parallel: bool) -> None:
    config = SimpleNamespace(sequence_parallel=sequence_parallel, params_dtype=torch.float32)
    norm = RMSNorm(config=config, hidden_size=8, eps=1e-5)
    assert norm.weight.sequence_parallel is sequence_parallel
    norm.weight.data.uniform_(0.5, 2.0)
    x = torch.randn(3, 8)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
    assert RMSNorm(SimpleNamespace(sequence_parallel=False, params_dtype=torch.bfloat16), 8).weight.dtype == torch.bfloat16
    assert math.isclose(norm.eps, 1e-5)
