"""Dealing, against a plain one-document-at-a-time version: the seeded order, classes of length, epochs, whatever the buckets."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import deal
from data_prep.deal import END, Dealer, Hasher, Need, documents_of

LENGTHS = st.lists(st.integers(0, 60), max_size=60).map(lambda values: np.array([*values, 40], dtype=np.int32))
NOT_EMPTY = LENGTHS.map(lambda lengths: np.maximum(lengths, 1))
NEEDS = st.lists(st.builds(Need, st.integers(1, 900), st.sampled_from([0, 0, 10, 40]), st.booleans()), min_size=1, max_size=8)


def possible(lengths, needs):
    """Without the needs that no document can meet, which the planner refuses."""
    return [need for need in needs if not need.only_long or (lengths >= need.min_document_tokens).any()]


def one_by_one(lengths, needs, seed):
    """What each need gets, (epoch, document) after another: least-read first, then long before short, then by hash."""
    hashes = [Hasher(seed, "s", epoch).block(0, len(lengths)).tolist() for epoch in range(2)]
    read = [0] * len(lengths)

    def hashed(epoch, i):
        while epoch >= len(hashes):
            hashes.append(Hasher(seed, "s", len(hashes)).block(0, len(lengths)).tolist())
        return hashes[epoch][i]

    dealt = []
    for need in needs:
        is_long = lengths >= need.min_document_tokens
        missing, got = need.tokens, []
        while missing > 0:
            candidates = [i for i in range(len(lengths)) if is_long[i] or not need.only_long]
            i = min(candidates, key=lambda i, is_long=is_long: (read[i], not is_long[i], hashed(read[i], i)))
            got.append((read[i], i))
            read[i] += 1
            missing -= int(lengths[i])
        dealt.append(got)
    return dealt


@settings(deadline=None, max_examples=60)
@given(lengths=NOT_EMPTY, needs=NEEDS, seed=st.integers(0, 5), per_bucket=st.sampled_from([1, 4, 16]))
def test_as_one_document_at_a_time(lengths, needs, seed, per_bucket):
    needs = possible(lengths, needs)
    coarse = Dealer("s", lengths, seed, needs).deal_all()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(deal, "DOCUMENTS_PER_BUCKET", per_bucket)
        patched.setattr(deal, "BLOCK_DOCUMENTS", 7)
        assert Dealer("s", lengths, seed, needs).deal_all() == coarse
    read = np.zeros(len(lengths), dtype=np.int64)
    for need, got, wanted in zip(needs, coarse, one_by_one(lengths, needs, seed), strict=True):
        found = []
        for piece in got.pieces:
            documents = documents_of(replace(got, pieces=(piece,)), "s", lengths, seed)
            assert (piece.documents, piece.tokens) == (len(documents), int(lengths[documents].sum()))
            found += [(piece.epoch, i) for i in documents.tolist()]
        assert sorted(found) == sorted(wanted)
        documents = documents_of(got, "s", lengths, seed)
        assert (got.documents, got.tokens) == (len(documents), int(lengths[documents].sum()))
        # to the document that reaches it, and no further
        assert need.tokens <= got.tokens < need.tokens + int(lengths[wanted[-1][1]])
        read += np.bincount(documents, minlength=len(lengths))
        is_long = lengths >= need.min_document_tokens
        assert got.long_tokens == int(lengths[documents][is_long[documents]].sum())
        assert got.epochs == pytest.approx((read * lengths).sum() / lengths.sum())
        assert got.long_epochs == pytest.approx((read * lengths)[is_long].sum() / max(1, lengths[is_long].sum()))


@settings(deadline=None, max_examples=60)
@given(lengths=NOT_EMPTY, needs=NEEDS, seed=st.integers(0, 5))
def test_nothing_twice_before_all_were_dealt(lengths, needs, seed):
    needs = [replace(need, only_long=False) for need in needs]
    counts = Counter()
    for got in Dealer("s", lengths, seed, needs).deal_all():
        counts.update(documents_of(got, "s", lengths, seed).tolist())
        assert max(counts.values()) - min(counts[i] for i in range(len(lengths))) <= 1


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, needs=NEEDS, later=NEEDS)
def test_later_needs_change_nothing_before_them(lengths, needs, later):
    needs, later = possible(lengths, needs), possible(lengths, later)
    before = Dealer("s", lengths, 0, needs).deal_all()
    after = Dealer("s", lengths, 0, needs + later).deal_all()
    assert [documents_of(d, "s", lengths, 0).tolist() for d in before] == [
        documents_of(d, "s", lengths, 0).tolist() for d in after[: len(before)]
    ]


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, more=LENGTHS, tokens=st.lists(st.integers(1, 300), min_size=1, max_size=4), seed=st.integers(0, 3))
def test_a_growing_source_keeps_the_order_of_what_was_there(lengths, more, tokens, seed):
    grown = np.concatenate([lengths, more])
    hashes = Hasher(seed, "s", 0).block(0, len(grown))
    assert (hashes[: len(lengths)] == Hasher(seed, "s", 0).block(0, len(lengths))).all()
    needs = [Need(n) for n in tokens if sum(tokens) <= lengths.sum()]
    dealt_before, dealt_after = set(), set()
    for old, new in zip(Dealer("s", lengths, seed, needs).deal_all(), Dealer("s", grown, seed, needs).deal_all(), strict=True):
        dealt_before |= set(documents_of(old, "s", lengths, seed).tolist())
        dealt_after |= set(documents_of(new, "s", grown, seed).tolist())
        # the new documents come in between; what they push out are the last of the old
        stayed = sorted((d for d in dealt_after if d < len(lengths)), key=hashes.__getitem__)
        assert stayed == sorted(dealt_before, key=hashes.__getitem__)[: len(stayed)]


def test_blocks_of_hashes_are_one_sequence_without_ties():
    hasher = Hasher(1, "web", 2)
    whole = hasher.block(0, 5000)
    assert (np.concatenate([hasher.block(0, 123), hasher.block(123, 4000), hasher.block(4123, 877)]) == whole).all()
    assert len(np.unique(whole)) == 5000
    # spread over the whole range, or a bucket would overflow
    assert np.bincount((whole >> np.uint64(60)).astype(int), minlength=16).min() > 200


def test_the_hash_is_splitmix64():
    # Vigna's splitmix64.c from seed 1234567 gives these; document n is the n-th state after the key.
    hasher = Hasher(0, "s", 0)
    hasher.key = 1234567 + hasher.GAMMA
    assert hasher.block(0, 3).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_the_order_depends_on_seed_source_and_epoch():
    orders = [tuple(Hasher(*key).block(0, 50)) for key in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1))]
    assert len(set(orders)) == 4


def test_empty_documents_stop_nothing():
    lengths = np.array([0, 5, 0, 5, 0], dtype=np.int32)
    deals = Dealer("s", lengths, 0, [Need(25), Need(6)]).deal_all()
    assert [d.tokens for d in deals] == [25, 10]
    assert deals[0].documents >= 2 * len(lengths) + 1
    assert [d.tokens for d in Dealer("s", lengths, 0, [Need(25), Need(5, 3), Need(5, 3, True), Need(1)]).deal_all()] == [
        25,
        5,
        5,
        5,
    ]


def test_memory_does_not_grow_with_the_source():
    import tracemalloc

    class Lengths:
        """Documents that exist only as far as one looks at them."""

        def __init__(self, count):
            self.count = count

        def __len__(self):
            return self.count

        def __getitem__(self, part):
            return np.full(part.stop - part.start, 100, dtype=np.int32)

    peaks = []
    for count in (200_000, 3_200_000):
        tracemalloc.start()
        Dealer("s", Lengths(count), 0, [Need(20 * count), Need(50 * count), Need(60 * count)]).deal_all()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # the table of buckets may grow from 128 to 2048 entries, some kilobytes
    assert peaks[1] < 1.5 * peaks[0]


def test_pieces_cover_the_whole_range_of_hashes():
    lengths = np.full(100, 10)
    (got,) = Dealer("s", lengths, 0, [Need(2000)]).deal_all()
    assert [(p.epoch, p.first_hash, p.last_hash) for p in got.pieces] == [(0, 0, END - 1), (1, 0, END - 1)]
