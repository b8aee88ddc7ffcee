"""Sampling whose whole state is an address: seed, position of the prompt, number of the sample, place in the response.

No generator is carried along. A response is the same whatever was sampled before it, in which batch it is decoded and on how many ranks,
as far as the logits are the same; so a resume needs nothing but the position of the next prompt.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def _key(seed: int, position: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"quarry rollout {seed} {position} {number}".encode()).digest()[:16], "little")


def uniforms(seed: int, position: int, number: int, count: int) -> np.ndarray:
    """float64 [count] in [0, 1): the random numbers of sample `number` of the prompt at `position`, one a token (Philox4x64)."""
    return np.random.Generator(np.random.Philox(key=_key(seed, position, number))).random(count)


def request_seed(seed: int, position: int, number: int) -> int:
    """The same address as one number of 63 bits, for engines that sample by themselves."""
    return _key(seed, position, number) >> 65


def sample_tokens(logits_BV: torch.Tensor, uniforms_B: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row by inverting the cumulative distribution, and its log-probability: (int64 [B], float32 [B], nats).

    The token is the first whose cumulated probability exceeds the row's uniform number, so that equal logits give equal tokens on any
    machine. float64 inside: in float32 the sum over 100,000 entries is off by more than the rarest of them.
    """
    logprobs_BV = torch.log_softmax(logits_BV.double() / temperature, dim=-1)
    cumulated = logprobs_BV.exp().cumsum(-1)
    threshold = uniforms_B.to(cumulated)[:, None] * cumulated[:, -1:]
    tokens = torch.searchsorted(cumulated, threshold, right=True).clamp_(max=logits_BV.size(-1) - 1)
    return tokens[:, 0], logprobs_BV.gather(1, tokens)[:, 0].float()
