"""Sampling by address: the right distribution, and nothing that depends on what came before."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.rl.sampling import request_seed, sample_tokens, uniforms


def test_same_address_same_numbers_whatever_came_before():
    first = uniforms(7, 11, 3, 20)
    uniforms(7, 12, 0, 1000)
    torch.rand(5)
    np.random.default_rng(0).random(5)
    np.testing.assert_array_equal(uniforms(7, 11, 3, 20), first)
    np.testing.assert_array_equal(uniforms(7, 11, 3, 5), first[:5])  # a higher limit does not change what is there
    others = [uniforms(8, 11, 3, 20), uniforms(7, 12, 3, 20), uniforms(7, 11, 4, 20), uniforms(7, 1, 13, 20)]
    assert all((other != first).all() for other in others)


def test_numbers_are_uniform():
    """Over addresses, as they are used: mean, variance and correlation between neighbours within 5 standard errors."""
    x = np.stack([uniforms(1, position, number, 50) for position in range(20) for number in range(20)])
    n = x.size
    assert abs(x.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5
    assert abs(x.var() - 1 / 12) < 5 * (1 / 180 / n) ** 0.5
    assert abs(np.corrcoef(x[:-1].ravel(), x[1:].ravel())[0, 1]) < 5 / n**0.5


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**62), st.integers(0, 10**9), st.integers(0, 4096))
def test_request_seeds_fit_any_server(seed, position, number):
    assert 0 <= request_seed(seed, position, number) < 2**63
    assert request_seed(seed, position, number) != request_seed(seed, position, number + 1)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_tokens_have_the_distribution_of_the_logits(temperature):
    torch.manual_seed(0)
    logits = 2 * torch.randn(11)
    n = 40_000
    tokens, logprobs = sample_tokens(logits.expand(n, -1), torch.rand(n, dtype=torch.float64), temperature)
    expected = torch.softmax(logits.double() / temperature, 0)
    counts = torch.bincount(tokens, minlength=11).double() / n
    assert (counts - expected).abs().max() < 5 * (0.25 / n) ** 0.5
    torch.testing.assert_close(logprobs, expected.log()[tokens].float())


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 1000), st.sampled_from([0.0, 1e-17, 0.5, 1 - 2**-53]))
def test_a_token_without_probability_is_never_drawn(seed, uniform):
    torch.manual_seed(seed)
    logits = torch.randn(1, 9)
    dead = torch.randperm(9)[:5]
    logits[0, dead] = float("-inf")
    token, logprob = sample_tokens(logits, torch.tensor([uniform], dtype=torch.float64), 1.0)
    assert token.item() not in dead.tolist()
    assert torch.isfinite(logprob).all()
