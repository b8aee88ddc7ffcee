"""The loss in chunks equals torch's cross entropy of whole logits, and holds no more than one chunk's. Over ranks: test_long_context.py."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from training import cpu_backend

cpu_backend.install()

import megatron.core.tensor_parallel.layers as layers  # noqa: E402

from model.chunked_loss import ChunkedLossGPTModel, chunked_cross_entropy  # noqa: E402
from model.errors import ModelError  # noqa: E402


def layer(*, fusion: bool = False) -> SimpleNamespace:
    """What the loss reads of Megatron's output layer, without tensor parallelism."""
    return SimpleNamespace(tp_group=None, sequence_parallel=False, gradient_accumulation_fusion=fusion)


def sample(tokens: int, samples: int, hidden: int, entries: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, ...]:
    """(hidden [S, B, H], weight [V, H], labels [B, S], weight of each token's loss [B, S])"""
    generator = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((tokens, samples, hidden), (entries, hidden))
    ]
    labels = torch.randint(0, entries, (samples, tokens), generator=generator)
    mask = torch.rand(samples, tokens, generator=generator, dtype=torch.float64) * (
        labels % 3 > 0
    )  # as if some were not to be learned
    return *(t.to(dtype).requires_grad_() for t in made), labels, mask.to(dtype)


def whole(hidden_SBH: torch.Tensor, weight_VH: torch.Tensor, labels_BS: torch.Tensor, scale: float) -> torch.Tensor:
    logits_BSV = (hidden_SBH @ weight_VH.t() * scale).transpose(0, 1)
    return torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), reduction="none").view_as(labels_BS)


def gradients(loss_BS: torch.Tensor, mask_BS: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad((loss_BS * mask_BS).sum(), inputs)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 13), samples=st.integers(1, 3), entries=st.integers(2, 40), chunk=st.integers(1, 50),
       scale=st.sampled_from([1.0, 1 / 16, 0.1, 3.0]), double=st.booleans(), seed=st.integers(0, 99))  # fmt: skip
def test_any_chunk_gives_the_loss_and_the_gradients_of_whole_logits(
    tokens: int, samples: int, entries: int, chunk: int, scale: float, double: bool, seed: int
) -> None:
    dtype, tolerance = (torch.float64, 1e-14) if double else (torch.float32, 1e-6)
    hidden, weight, labels, mask = sample(tokens, samples, 8, entries, dtype, seed)
    expected = whole(hidden, weight, labels, scale)
    found = chunked_cross_entropy(hidden, weight, labels, layer(), scale=scale, chunk_tokens=chunk)
    assert (found.shape, found.dtype) == (labels.shape, dtype)
    assert (found - expected).detach().abs().max() <= tolerance * max(1.0, float(expected.detach().abs().max()))
    for ours, theirs in zip(gradients(found, mask, hidden, weight), gradients(expected, mask, hidden, weight), strict=True):
        assert relative(ours, theirs) <= tolerance or (ours - theirs).abs().max() <= tolerance


def test_its_gradient_is_the_loss_s_by_finite_differences() -> None:
    hidden, weight, labels, _ = sample(5, 1, 4, 7, torch.float64, seed=1)
    loss = lambda h, w: chunked_cross_entropy(h, w, labels, layer(), scale=0.3, chunk_tokens=2)  # noqa: E731
    assert torch.autograd.gradcheck(loss, (hidden, weight))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation has returned, in either pass."""

    elements = 0

    def __torch_dispatch__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_holds_more_than_one_chunk_of_logits(dtype: torch.dtype) -> None:
    tokens, entries, chunk = 96, 512, 8
    hidden, weight, labels, mask = sample(tokens, 1, 4, entries, dtype, seed=2)
    kept: list[int] = []
    pack = lambda tensor: kept.append(tensor.numel()) or tensor  # noqa: E731

    def largest(loss: Callable[[], torch.Tensor]) -> int:
        kept.clear()
        with Largest() as seen:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                made = loss()
            gradients(made, mask, hidden, weight)
        return seen.elements

    assert (
        largest(lambda: chunked_cross_entropy(hidden, weight, labels, layer(), scale=0.1, chunk_tokens=chunk))
        == chunk * entries
    )
    assert max(kept) == entries * 4  # the output matrix itself; and per token its hidden state, label and partition sum
    assert sum(kept) == entries * 4 + tokens * (4 + 1 + 1)
    # The measurement sees what there is to see: the usual way makes, and keeps, all of it.
    assert largest(lambda: whole(hidden, weight, labels, 0.1)) == tokens * entries
    assert max(kept) == tokens * entries


def test_weight_gradients_of_many_chunks_are_summed_in_float32() -> None:
    hidden, weight, labels, mask = sample(512, 1, 16, 32, torch.bfloat16, seed=3)
    exact = gradients(whole(hidden.double(), weight.double(), labels, 0.1), mask.double(), weight)[0]

    def error(chunk: int) -> float:
        loss = chunked_cross_entropy(hidden, weight, labels, layer(), scale=0.1, chunk_tokens=chunk)
        return relative(gradients(loss, mask, weight)[0].double(), exact.double())

    assert error(4) < 1.5 * error(512)  # 128 sums in bf16 would make it tenfold


def test_accumulation_into_main_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's fused accumulation, its CUDA kernel replaced by what it computes."""
    kernel = SimpleNamespace(wgrad_gemm_accum_fp32=lambda x, g, out: out.add_(g.float().t() @ x.float()))
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", kernel, raising=False)
    hidden, weight, labels, mask = sample(10, 2, 8, 12, torch.float32, seed=4)
    hidden_gradient, weight_gradient = gradients(whole(hidden, weight, labels, 0.1), mask, hidden, weight)
    before = torch.randn_like(weight)
    weight.main_grad, weight.grad_added_to_main_grad, weight.zero_out_wgrad = before.clone(), False, True
    loss = chunked_cross_entropy(hidden, weight, labels, layer(fusion=True), scale=0.1, chunk_tokens=3)
    found, placeholder = gradients(loss, mask, hidden, weight)
    torch.testing.assert_close(found, hidden_gradient, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(weight.main_grad, before + weight_gradient, rtol=1e-5, atol=1e-6)
    assert weight.grad_added_to_main_grad
    assert not placeholder.any()  # zeros: with tied embeddings the embedding's own gradient is added to it


def test_what_would_keep_all_gradients_of_logits_is_refused() -> None:
    with pytest.raises(ModelError, match="defer_embedding_wgrad_compute keeps the gradients of all logits"):
        ChunkedLossGPTModel(SimpleNamespace(defer_embedding_wgrad_compute=True), loss_chunk_tokens=4)
