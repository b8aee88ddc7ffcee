"""Best fit decreasing against the definition, and what a packing must never do: lose, repeat or overfill."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.sft_packing import pack, padded

CASES = st.tuples(st.integers(1, 6), st.integers(1, 12)).flatmap(
    lambda pair: st.tuples(
        st.just(pair[0]), st.just(pair[0] * pair[1]), st.lists(st.integers(1, pair[0] * pair[1]), max_size=40)
    )
)


def by_the_definition(units, capacity):
    """Fill of each sequence of best fit decreasing, sequences looked at one by one."""
    fills = []
    for length in sorted(units, reverse=True):
        fitting = [i for i, fill in enumerate(fills) if fill + length <= capacity]
        if fitting:
            fills[max(fitting, key=lambda i: fills[i])] += length
        else:
            fills.append(length)
    return sorted(fills)


@settings(deadline=None, max_examples=300)
@given(CASES)
def test_every_sample_once_none_overfull_as_tight_as_the_definition(case):
    multiple, capacity, lengths = case
    packing = pack(np.array(lengths, dtype=np.int64), capacity, multiple)
    assert sorted(packing.samples.tolist()) == list(range(len(lengths)))
    taken = padded(np.array(lengths, dtype=np.int64), multiple)
    fills = [int(taken[packing.samples[a:b]].sum()) for a, b in zip(packing.bounds, packing.bounds[1:], strict=False)]
    assert all(0 < fill <= capacity for fill in fills)
    assert sorted(fills) == by_the_definition(taken.tolist(), capacity)
    again = pack(np.array(lengths, dtype=np.int64), capacity, multiple)
    assert np.array_equal(again.samples, packing.samples)
    assert np.array_equal(again.bounds, packing.bounds)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="no multiple of 3"):
        pack(np.array([1]), 10, 3)
    for lengths in ([0], [11]):
        with pytest.raises(ValueError, match="for sequences of 10"):
            pack(np.array(lengths), 10)
    assert len(pack(np.array([], dtype=np.int64), 10)) == 0


def test_a_realistic_set_is_packed_tightly():
    """Lengths as of chat data: their mean is an eighth of the sequence, a few nearly fill one."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(7, 1, 20_000).astype(np.int64) + 1, 16_384)
    packing = pack(lengths, 16_384, 8)
    assert lengths.sum() / (len(packing) * 16_384) > 0.99
