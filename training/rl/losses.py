"""Advantages, token losses and length rules of GRPO and DAPO, as pure functions on tensors.

Sources: GRPO (arXiv 2402.03300, eq. 3 and 4), DAPO (arXiv 2503.14476, eq. 8 to 13), the k3 estimator
(J. Schulman, "Approximating KL divergence", 2020). Shape suffixes: G groups (prompts), N samples per group, B samples, T positions.

Log-probabilities are natural and belong to the distribution that was sampled from (with its temperature). `mask` is 1 where a position
holds a response token that enters the loss, the end-of-text token included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Deviation = Literal["sample", "population", "none"]


@dataclass(frozen=True)
class Advantages:
    """What the rewards of a batch of groups say about its samples."""

    values_GN: torch.Tensor
    """float64; exactly 0 throughout a group without signal."""
    has_signal_G: torch.Tensor
    """bool; False where all rewards of the group are equal, so that no sample is better than another."""


def group_advantages(
    rewards_GN: torch.Tensor, *, deviation: Deviation, epsilon: float, scored_GN: torch.Tensor | None = None
) -> Advantages:
    """A = (R - mean) / (std + epsilon) within each group (GRPO, section 4.1.2).

    `deviation` chooses std: "sample" divides by N - 1 (TRL, verl and SkyRL do), "population" by N, "none" leaves the division out
    (Dr. GRPO, arXiv 2503.20783). `epsilon` keeps nearly equal rewards from being blown up; 1e-4 in TRL, 1e-6 in verl.
    Where `scored_GN` (bool; None: everywhere) is False a score failed: the sample enters no mean and its advantage is 0; what is left of
    its group counts as a group of that size, and one sample is no group.
    Raises ValueError for rewards that are not finite, or groups of fewer than two samples.
    """
    if rewards_GN.dim() != 2 or rewards_GN.size(1) < 2:
        raise ValueError(f"rewards have shape {tuple(rewards_GN.shape)}: a group needs at least two samples to compare")
    if scored_GN is not None and not scored_GN.all():
        return _of_those_scored(rewards_GN.double(), scored_GN, deviation, epsilon)
    rewards = rewards_GN.double()
    if not torch.isfinite(rewards).all():
        group, sample = (~torch.isfinite(rewards)).nonzero()[0].tolist()
        raise ValueError(
            f"reward of sample {sample} of group {group} is {rewards[group, sample].item()}; a reward must be finite"
        )
    has_signal = rewards.amax(1) != rewards.amin(1)
    centred = rewards - rewards.mean(1, keepdim=True)
    if deviation == "none":
        values = centred
    elif deviation in ("sample", "population"):
        values = centred / (rewards.std(1, correction=int(deviation == "sample"), keepdim=True) + epsilon)
    else:
        raise ValueError(f"deviation is {deviation!r}; use sample, population or none")
    # A mean of equal numbers may differ from them in the last bit: without signal, nothing at all is to be learned.
    return Advantages(torch.where(has_signal[:, None], values, 0.0), has_signal)


def _of_those_scored(rewards_GN: torch.Tensor, scored_GN: torch.Tensor, deviation: Deviation, epsilon: float) -> Advantages:
    values, has_signal = torch.zeros_like(rewards_GN), torch.zeros(len(rewards_GN), dtype=torch.bool)
    for group, scored in enumerate(scored_GN):
        if scored.sum() > 1:
            part = group_advantages(rewards_GN[group, scored][None], deviation=deviation, epsilon=epsilon)
            values[group, scored] = part.values_GN[0]
            has_signal[group] = part.has_signal_G[0]
    return Advantages(values, has_signal)


@dataclass(frozen=True)
class TokenLosses:
    """Per token, before masking; all [B, T]."""

    loss: torch.Tensor
    """float, differentiable in the new log-probabilities."""
    ratio: torch.Tensor
    """pi_new / pi_old, detached."""
    clipped_low: torch.Tensor
    """bool: A < 0 and ratio < 1 - clip_low, so that the token has no gradient."""
    clipped_high: torch.Tensor
    """bool: A > 0 and ratio > 1 + clip_high."""


def dapo_token_losses(
    new_BT: torch.Tensor, old_BT: torch.Tensor, advantages_B: torch.Tensor, *, clip_low: float, clip_high: float
) -> TokenLosses:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) per token (DAPO, eq. 8); no dual clip.

    new_BT, old_BT: log-probabilities of the response tokens under the policy that learns and the one that sampled, float32, nats.
    advantages_B: one per sample, shared by its tokens. Published clips: 0.2 and 0.28. The gradient flows through `new_BT` only.
    """
    log_ratio = new_BT - old_BT.detach()
    ratio, advantages = log_ratio.exp(), advantages_B.detach()[:, None].to(new_BT.dtype)
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    fixed = ratio.detach()
    return TokenLosses(
        loss=loss,
        ratio=fixed,
        clipped_low=(advantages < 0) & (fixed < 1.0 - clip_low),
        clipped_high=(advantages > 0) & (fixed > 1.0 + clip_high),
    )


def k3_divergence(new_BT: torch.Tensor, reference_BT: torch.Tensor) -> torch.Tensor:
    """KL(pi_new || pi_reference) per sampled token by the k3 estimator, r - log r - 1 with r = pi_reference / pi_new; never negative.

    Unbiased in value for tokens sampled from pi_new. [B, T] nats, differentiable in `new_BT` (GRPO, eq. 4).
    """
    log_ratio = reference_BT.detach() - new_BT
    # expm1: near 0, exp(x) - 1 - x loses all digits in float32
    return torch.expm1(log_ratio) - log_ratio


def token_share(values_BT: torch.Tensor, mask_BT: torch.Tensor, global_tokens: float) -> torch.Tensor:
    """This micro batch's share of the token mean over the whole batch: sum(values * mask) / global_tokens (DAPO, token-level loss).

    `global_tokens` is the mask's sum over all micro batches and data-parallel ranks of the optimizer step, so that the shares add up to
    one division by all response tokens. A mean per micro batch would weigh tokens of short responses more. A step whose tokens are all
    filtered out (global_tokens 0) has the share 0.
    """
    if global_tokens < 0:
        raise ValueError(f"global_tokens is {global_tokens}; it counts tokens")
    # where, not a product: what lies outside the mask may be infinite (padding), and inf * 0 is NaN
    total = torch.where(mask_BT.bool(), values_BT, 0.0).sum()
    return total / global_tokens if global_tokens else total * 0.0


def soft_overlong_punishment(lengths_B: torch.Tensor, *, limit_tokens: int, cache_tokens: int) -> torch.Tensor:
    """Added to the reward of a response of `lengths_B` tokens (DAPO, eq. 13): 0 up to limit - cache, then falling linearly to -1 at the
    limit, and -1 beyond. float64 [B]. `cache_tokens` 0 switches it off."""
    if not 0 <= cache_tokens <= limit_tokens:
        raise ValueError(f"cache_tokens is {cache_tokens}; it must lie between 0 and the limit of {limit_tokens} tokens")
    if cache_tokens == 0:
        return torch.zeros(lengths_B.shape, dtype=torch.float64)
    return (((limit_tokens - cache_tokens) - lengths_B.double()) / cache_tokens).clamp(-1.0, 0.0)


def overlong_filter(mask_BT: torch.Tensor, truncated_B: torch.Tensor) -> torch.Tensor:
    """`mask_BT` without the samples that the generation limit cut off: it is unknown whether their answer would have been right.

    Their tokens neither enter the loss nor count in its normalisation; their rewards still enter the group's mean.
    """
    return torch.where(truncated_B.bool()[:, None], torch.zeros_like(mask_BT), mask_BT)


@dataclass(frozen=True)
class Sampling:
    """What dynamic sampling makes of the groups that were rolled out so far."""

    keep: list[int]
    """Indices of the groups that are trained on, in order."""
    more: bool
    """Another round of rollouts is needed."""


def dynamic_sampling(has_signal_G: torch.Tensor, *, wanted_groups: int, rounds: int, max_rounds: int) -> Sampling:
    """Keep the first `wanted_groups` groups with signal (DAPO, eq. 11: 0 < #correct < N); ask for more rounds while there are too few.

    After `max_rounds` rounds the batch is filled up with groups without signal, which teach nothing but keep its size.
    """
    flags = has_signal_G.tolist()
    with_signal = [g for g, signal in enumerate(flags) if signal][:wanted_groups]
    if len(with_signal) < wanted_groups and rounds < max_rounds:
        return Sampling(with_signal, True)
    without = [g for g, signal in enumerate(flags) if not signal][: wanted_groups - len(with_signal)]
    if len(with_signal) + len(without) < wanted_groups:
        raise ValueError(
            f"{len(flags)} groups were rolled out, {wanted_groups} are wanted: a round must bring at least as many"
        )
    return Sampling(sorted(with_signal + without), False)
