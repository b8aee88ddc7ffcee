"""The numbers that say whether reinforcement learning is well, and the rule that stops it when it is not.

All are over one step (one round of rollouts). Tokens are those that enter the loss; samples are all.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from recipes.posttrain import StopRule

SUMS = ("tokens", "gap", "entropy", "clipped_low", "clipped_high", "divergence", "loss", "loss_tokens")


class Tally:
    """Sums over the tokens of a step, filled micro batch by micro batch on the ranks that compute the loss.

    `vectors` and `from_vectors` are for one reduction over all ranks: sums add, maxima take the larger.
    """

    def __init__(self) -> None:
        self.sums = dict.fromkeys(SUMS, 0.0)
        self.max_gap = 0.0

    def add_gap(self, rollout_BT: torch.Tensor, training_BT: torch.Tensor, mask_BT: torch.Tensor) -> None:
        """|log-probability of rollout - of training| in nats, where `mask_BT` is set."""
        mask = mask_BT.bool()
        gap = (rollout_BT.detach() - training_BT.detach()).abs()[mask].double()
        # NaN would be dropped by max() on a later comparison: it counts as infinite.
        gap = torch.nan_to_num(gap, nan=math.inf)
        self.sums["gap"] += gap.sum().item()
        self.sums["tokens"] += int(mask.sum())
        if gap.numel():
            self.max_gap = max(self.max_gap, gap.max().item())

    def add(self, name: str, values_BT: torch.Tensor, mask_BT: torch.Tensor) -> None:
        self.sums[name] += values_BT.detach()[mask_BT.bool()].double().sum().item()

    def vectors(self) -> tuple[list[float], list[float]]:
        return [self.sums[name] for name in SUMS], [self.max_gap]

    @classmethod
    def from_vectors(cls, sums: Sequence[float], maxima: Sequence[float]) -> Tally:
        tally = cls()
        tally.sums = dict(zip(SUMS, sums, strict=True))
        (tally.max_gap,) = maxima
        return tally


@dataclass(frozen=True)
class Health:
    mean_gap_nats: float
    max_gap_nats: float
    entropy_nats: float
    """Mean over response tokens of the policy's entropy at that position."""
    clipped_low_share: float
    clipped_high_share: float
    divergence_nats: float
    """Mean k3 divergence from the reference; 0 without one."""
    reward: float
    """Mean of the samples whose score did not fail."""
    reward_per_domain: dict[str, float]
    response_tokens: float
    """Mean length."""
    max_response_tokens: int
    truncated_share: float
    no_signal_share: float
    """Of the groups whose rewards are all equal, before dynamic sampling leaves them out."""
    failed_reward_share: float
    """Of the samples: their score failed, they teach nothing."""

    @classmethod
    def of(
        cls,
        tally: Tally,
        *,
        rewards: Sequence[float | None],
        domains: Sequence[str],
        lengths: Sequence[int],
        truncated: Sequence[bool],
        has_signal: Sequence[bool],
    ) -> Health:
        """`rewards` (None: the score failed, not of all), `domains`, `lengths` and `truncated` are per sample, `has_signal` per group."""
        per_domain: dict[str, list[float]] = defaultdict(list)
        for domain, reward in zip(domains, rewards, strict=True):
            if reward is not None:
                per_domain[domain].append(reward)
        scored = [reward for reward in rewards if reward is not None]
        tokens, loss_tokens = max(tally.sums["tokens"], 1), max(tally.sums["loss_tokens"], 1)
        return cls(
            mean_gap_nats=tally.sums["gap"] / tokens,
            max_gap_nats=tally.max_gap,
            entropy_nats=tally.sums["entropy"] / loss_tokens,
            clipped_low_share=tally.sums["clipped_low"] / loss_tokens,
            clipped_high_share=tally.sums["clipped_high"] / loss_tokens,
            divergence_nats=tally.sums["divergence"] / loss_tokens,
            reward=sum(scored) / len(scored),
            reward_per_domain={domain: sum(values) / len(values) for domain, values in sorted(per_domain.items())},
            response_tokens=sum(lengths) / len(lengths),
            max_response_tokens=max(lengths),
            truncated_share=sum(truncated) / len(truncated),
            no_signal_share=1 - sum(has_signal) / len(has_signal),
            failed_reward_share=1 - len(scored) / len(rewards),
        )


def reason_to_stop(health: Health, rule: StopRule, *, loss: float, grad_norm: float | None) -> str | None:
    """Why training must not go on after this step, with the remedy; None when all is well."""
    for name, value in (("loss", loss), ("gradient norm", 0.0 if grad_norm is None else grad_norm)):
        if not math.isfinite(value):
            return f"the {name} is {value}: look at the rewards and the learning rate before going on from the last checkpoint"
    for name, value, limit in (
        ("mean", health.mean_gap_nats, rule.max_mean_gap_nats),
        ("maximum", health.max_gap_nats, rule.max_gap_nats),
    ):
        if limit is not None and not value <= limit:
            return (
                f"rollout and training disagree: the {name} gap of their log-probabilities is {value:.3g} nats per token, over {limit:g} "
                f"(stop.max_{'mean_' if name == 'mean' else ''}gap_nats). The engine samples from another model than the one that learns: "
                "stale weights, another softmax scale, RoPE base, temperature or precision; find out which, then go on from the last "
                "checkpoint"
            )
    return None
