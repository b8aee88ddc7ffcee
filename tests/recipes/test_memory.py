"""The account of a rank's memory by itself: every parameter has one owner, and each setting moves what it should."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from recipes import memory


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(1, 5000), st.booleans()), min_size=1, max_size=8),
    st.one_of(st.none(), st.integers(1, 9000)),
    st.integers(1, 40),
)
def test_every_parameter_has_one_owner_per_element(sizes: list[tuple[int, bool]], bucket: int | None, ranks: int) -> None:
    weights = [memory.Weight(numel, shared_embedding=shared) for numel, shared in sizes]
    made = memory.buckets(weights, bucket, ranks)
    assert all(b.size % ranks == 0 and b.size % 128 == 0 for b in made)
    assert sum(len(b.ranges) for b in made) == len(weights)
    owned = [memory.owned_elements(made, ranks, rank) for rank in range(ranks)]
    assert sum(owned) == sum(w.numel for w in weights)
    assert memory.most_owned_elements(made, ranks) == max(owned)
