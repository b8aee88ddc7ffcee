"""What a rollout engine is asked for and gives: one small interface for all of them. Imports no Megatron."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Request:
    """One response that is wanted; `position` and `number` address its random numbers (training.rl.sampling)."""

    prompt_ids: tuple[int, ...]
    position: int
    number: int


@dataclass(frozen=True)
class Completion:
    ids: np.ndarray
    """int32 [tokens], with the end-of-text token where the response ended by itself."""
    logprobs: np.ndarray
    """float32 [tokens], nats, of the tempered distribution that was sampled from."""
    truncated: bool


class RolloutEngine(Protocol):
    """What the trainer asks of an engine. Both methods are collective over the ranks of the job."""

    def update_weights(self, step: int) -> None:
        """From now on sample from the weights after `step` optimizer steps."""
        ...

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request of this model replica, in order, the same on each of its ranks."""
        ...
