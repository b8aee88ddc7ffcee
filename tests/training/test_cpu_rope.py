"""Packed samples rotated at once against Megatron's own function, which takes them one by one: bit for bit, forward and backward."""

import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training import cpu_backend

cpu_backend.install()

from megatron.core.models.common.embeddings import rope_utils  # noqa: E402

from training import cpu_rope  # noqa: E402

LONGEST, HEADS, DIM = 64, 2, 8
OPTIONS = {"rotary_interleaved": False, "mla_rotary_interleaved": False, "mscale": 1.0}


def both(lengths: list[int], ranks: int, rank: int, angles: int = LONGEST) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What both make of the same tokens: (rotated, gradient)."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens, upstream = (torch.randn(sum(lengths) // ranks, HEADS, DIM, generator=generator) for _ in range(2))
    freqs = torch.randn(angles, 1, 1, DIM, generator=generator)
    group = types.SimpleNamespace(size=lambda: ranks, rank=lambda: rank)
    made = []
    for function in (cpu_rope._one_by_one, cpu_rope.rotate):
        given_tokens = tokens.clone().requires_grad_()
        out = function(given_tokens, bounds, freqs, cp_group=group, **OPTIONS)
        out.backward(upstream)
        assert given_tokens.grad is not None
        made.append((out.detach(), given_tokens.grad))
    return made


@settings(max_examples=30, deadline=None)
@given(pieces=st.lists(st.integers(1, 8), min_size=1, max_size=9), ranks=st.sampled_from([1, 2, 4]), data=st.data())
def test_it_is_what_megatron_makes_of_each_sample(pieces: list[int], ranks: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, ranks - 1))
    lengths = [piece * 2 * ranks for piece in pieces] if ranks > 1 else pieces
    # One angle more than tokens where they would be as many, which means something else; see below.
    one, other = both(lengths, ranks, rank, LONGEST + (sum(lengths) == LONGEST))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_angle_for_each_packed_token_stays_megatrons_case(ranks: int) -> None:
    one, other = both([8, 24, 12], ranks, ranks - 1, angles=44)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_megatron_takes_it() -> None:
    assert rope_utils._apply_rotary_pos_emb_thd is cpu_rope.rotate
    assert cpu_rope._one_by_one is not cpu_rope.rotate
