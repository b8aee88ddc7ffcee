"""Held-out sets are the same whatever the sources' order and size, and few documents are in memory for them."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import heldout
from data_prep.indexed import Writer


def sources(folder, documents):
    for name, own in documents.items():
        with Writer(folder / "tokenized" / f"{name}.heldout", 1000) as writer:
            for tokens in own:
                writer.add(np.array(tokens))


DOCUMENTS = st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=12), max_size=40)


@settings(deadline=None, max_examples=50)
@given(a=DOCUMENTS, b=DOCUMENTS, enough=st.integers(1, 200))
def test_the_first_by_hash_until_there_are_enough(tmp_path_factory, a, b, enough):
    folder = tmp_path_factory.mktemp("heldout")
    sources(folder, {"a": a, "b": b})
    texts = {hashlib.sha256(np.array(t, dtype=np.uint16).tobytes()).digest(): t for t in [*a, *b]}
    everything = [texts[key] for key in sorted(texts)]
    found, seen = heldout._documents(folder, ["a", "b"], enough)
    assert seen == len(a) + len(b)
    assert [t.tolist() for t in found] == everything[: len(found)]
    share = max(1, enough // heldout.CUTS[0])
    # enough, and not one more than that
    kept = [min(len(t), share) for t in found]
    assert len(found) == len(everything) or sum(kept) >= enough
    assert not found or sum(kept[:-1]) < enough
    assert [t.tolist() for t in heldout._documents(folder, ["b", "a"], enough)[0]] == everything[: len(found)]


def test_memory_does_not_grow_with_what_is_held_out(tmp_path, monkeypatch):
    most = 0
    push = heldout.heapq.heappush

    def counting(heap, item):
        nonlocal most
        push(heap, item)
        most = max(most, len(heap))

    monkeypatch.setattr(heldout.heapq, "heappush", counting)
    sources(tmp_path, {"a": [[n % 1000, n // 1000, 1, 2, 3] for n in range(5000)]})
    assert len(heldout._documents(tmp_path, ["a"], 200)[0]) == pytest.approx(40)
    assert most <= 41
