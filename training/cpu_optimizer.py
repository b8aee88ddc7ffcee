"""Checkpoints of the distributed optimizer are exact without Transformer Engine because this AdamW keeps FusedAdam's contract.

Megatron-Core 0.19.2's distributed optimizer is right only for an optimizer like Transformer Engine's FusedAdam: the step count lives in
the parameter group, and a parameter's state holds `exp_avg` and `exp_avg_sq` and nothing else. With torch.optim.AdamW (its fallback) a
first load asserts, a dp_reshardable resume is silently wrong, and a fully reshardable one raises KeyError('step').
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adam import adam


class FusedAdam(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) with torch's arithmetic and the state layout of Transformer Engine's FusedAdam.

    The `foreach` implementation is chosen over torch's fused kernel, which is faster but rounds differently in the tail of a
    tensor: with it the result of an update would depend on how the parameters are sharded.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
        capturable: bool = False,
        **unsupported: Any,
    ) -> None:
        if not bias_correction:
            raise ValueError("training.cpu_optimizer: bias_correction=False is not supported; remove it or train on a GPU")
        if unsupported:
            raise ValueError(f"training.cpu_optimizer: options {sorted(unsupported)} need Transformer Engine; remove them")
        self.adam_w_mode = adam_w_mode
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": bias_correction}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient; groups count their own steps, as FusedAdam's do."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            states = [self.state[p] for p in params]
            adam(
                params,
                [p.grad for p in params],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [],
                [torch.tensor(float(group["step"] - 1)) for _ in params],
                foreach=True,
                amsgrad=False,
                maximize=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                decoupled_weight_decay=self.adam_w_mode,
            )
        return loss


def install() -> None:
    """Make Megatron-Core take FusedAdam as its Adam; after `import megatron.core`, before an optimizer is built. Idempotent."""
    import megatron.core.optimizer as optimizer
    from megatron.core.optimizer import distrib_optimizer

    optimizer.Adam = distrib_optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
