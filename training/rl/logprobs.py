"""Log-probabilities and entropies of response tokens from logits that tensor parallelism has cut along the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy


def token_logprobs(
    logits_BTV: torch.Tensor, targets_BT: torch.Tensor, mask_BT: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probability, entropy) of the tempered distribution where `mask_BT` is set, 0 elsewhere; float32 [B, T], nats.

    logits_BTV: this rank's part of the vocabulary, V / tensor-parallel ranks. The log-probability is differentiable; the entropy is not.
    Only the masked positions are expanded to float32: prompts and padding cost nothing.
    """
    mask = mask_BT.bool()
    # Indexing copies: Megatron's cross entropy writes into its input.
    selected_NV = logits_BTV[mask].float() / temperature
    entropy_N = _entropy(selected_NV.detach())
    logprobs_N = -vocab_parallel_cross_entropy(selected_NV, targets_BT[mask])
    zeros = torch.zeros(mask_BT.shape, dtype=torch.float32, device=logits_BTV.device)
    return zeros.masked_scatter(mask, logprobs_N), zeros.masked_scatter(mask, entropy_N)


@torch.no_grad()
def _entropy(logits_NV: torch.Tensor) -> torch.Tensor:
    """-sum p log p = log Z - sum p * logit, over all tensor-parallel parts of the vocabulary; [N]."""
    group: Any = mpu.get_tensor_model_parallel_group()
    highest_N = logits_NV.amax(-1)
    torch.distributed.all_reduce(highest_N, op=torch.distributed.ReduceOp.MAX, group=group)
    shifted_NV = logits_NV - highest_N[:, None]
    weights_NV = shifted_NV.exp()
    sums_2N = torch.stack([weights_NV.sum(-1), (weights_NV * shifted_NV).sum(-1)])
    torch.distributed.all_reduce(sums_2N, group=group)
    return sums_2N[0].log() - sums_2N[1] / sums_2N[0]
