"""FP8 casts emulated on CPU, to try the gate itself: nothing here says what FP8 does on a GPU.

The matrix products of the layers (not the output layer, as with Transformer Engine) see inputs and weights through a round trip to E4M3 and
gradients through one to E5M2, with one scale per tensor taken from the tensor itself: what tensorwise (current) scaling and the hybrid
format do. Products and sums stay in the wide format, where a tensor core has its own rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.utils import unwrap_model

from recipes.ab_options import EmulatedFp8

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2


def round_trip(x: torch.Tensor, dtype: torch.dtype, scale_error: float = 1.0) -> torch.Tensor:
    """`x` [...] of any float type as it comes back from the 8-bit `dtype`, scaled so that its largest value is the format's.

    `scale_error` is a factor on that scale; what lies beyond the format's range saturates, as in Transformer Engine's casts.
    """
    largest = torch.finfo(dtype).max
    amax = x.detach().abs().max()
    scale = torch.where(amax > 0, largest / amax, torch.ones_like(amax)).float() * scale_error
    return ((x.float() * scale).clamp(-largest, largest).to(dtype).float() / scale).to(x.dtype)


class _Forward(torch.autograd.Function):
    """E4M3 on the way forward, the gradient as it comes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale_error: float) -> torch.Tensor:
        return round_trip(x, FORWARD, scale_error)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class _Backward(torch.autograd.Function):
    """The value as it is on the way forward, E5M2 for the gradient that both products of the backward pass see."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, scale_error: float) -> torch.Tensor:
        ctx.scale_error = scale_error
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return round_trip(gradient, BACKWARD, ctx.scale_error), None


def around(provide: Callable[..., Any], settings: EmulatedFp8) -> Callable[..., Any]:
    """What Megatron's get_model calls, with the casts in every linear layer of the model's blocks."""

    def provide_emulated(*args: Any, **kwargs: Any) -> Any:
        model = provide(*args, **kwargs)
        count = 0
        for module in unwrap_model(model).decoder.modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                module._forward_impl = _emulated(module._forward_impl, settings.scale_error)
                count += 1
        if not count:
            raise RuntimeError("no linear layer of Megatron's own was found to emulate FP8 in")
        return model

    return provide_emulated


def _emulated(product: Callable[..., torch.Tensor], scale_error: float) -> Callable[..., torch.Tensor]:
    def call(*, input: torch.Tensor, weight: torch.Tensor, **rest: Any) -> torch.Tensor:
        y = product(input=_Forward.apply(input, scale_error), weight=_Forward.apply(weight, scale_error), **rest)
        return _Backward.apply(y, scale_error)

    return call
