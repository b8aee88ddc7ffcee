"""Forward step and loss, as Megatron's schedules want them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, get_timers

from training.data import get_batch


def loss_function(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the token losses, their number, and both as the report that Megatron reduces over data and context parallelism.

    loss_mask: [b, s/cp] float32; losses: [b, s/cp], nats per token.
    """
    mask = loss_mask.view(-1).float()
    loss_sum = torch.sum(losses.view(-1).float() * mask)
    args = get_args()
    if args.check_for_nan_in_loss_and_grad:
        # The state machine tells a broken GPU from broken training: it runs the step again and compares (exit codes 16 and 17).
        rerun = get_rerun_state_machine()
        for rejected, name in ((torch.isnan, "NaN"), (torch.isinf, "infinite")):
            rerun.validate_result(
                result=loss_sum,
                rejection_func=rejected,
                message=f"found {name} in the local forward loss",
                tolerance=0.0,
                fatal=True,
            )
    tokens = mask.sum().clone().detach().to(torch.int)
    report = torch.cat([loss_sum.clone().detach().view(1), tokens.view(1)])
    return loss_sum, tokens, {"lm loss": report}


def forward_step(data_iterator: Any, model: Any) -> tuple[torch.Tensor, partial]:
    """One micro batch of pre-training through `model`; the second value maps its output to the loss."""
    return forward_batch(get_batch, data_iterator, model)


def forward_batch(
    draw: Callable[[Any, int | None], dict[str, Any]], data_iterator: Any, model: Any
) -> tuple[torch.Tensor, partial]:
    """A forward step for micro batches that `draw` takes from the iterator for a chunk of the interleaved schedule, as data.get_batch."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = draw(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=batch["packed"])
    return output, partial(loss_function, batch["loss_mask"])
