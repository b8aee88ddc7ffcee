"""Rewards of reinforcement learning: samples in, scores in [0, 1] out, whatever the model wrote and whichever service is down."""

from __future__ import annotations

from training.rewards.base import Message, Options, Reward, RewardError, Sample, Score
from training.rewards.plan import DomainPlan, Part, RewardPlan
from training.rewards.scoring import Rewards
from training.rewards.statistics import FailureGuard, TooManyFailures

__all__ = [
    "DomainPlan",
    "FailureGuard",
    "Message",
    "Options",
    "Part",
    "Reward",
    "RewardError",
    "RewardPlan",
    "Rewards",
    "Sample",
    "Score",
    "TooManyFailures",
]
