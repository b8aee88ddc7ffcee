"""What is read of tokens does not depend on the blocks in which it is read."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.files import file_sha256
from data_prep.indexed import Index, bin_path, idx_path
from tests.data_prep.verifying import pair


@settings(deadline=None, max_examples=60)
@given(
    documents=st.lists(st.lists(st.integers(0, 99), max_size=40), min_size=1, max_size=40),
    block=st.sampled_from([16, 64, 1 << 20]),
    dtype=st.sampled_from([1000, 70_000]),
)
def test_fingerprints_and_ends_do_not_depend_on_blocks(tmp_path_factory, documents, block, dtype):
    """Blocks of a few tokens: every document lies across some border."""
    from data_prep import verify_reading

    prefix = pair(tmp_path_factory.mktemp("blocks"), [[*d, 100] for d in documents], vocab=dtype)
    index = Index.read(idx_path(prefix))
    look = verify_reading.Look(index.dtype, 101, 100, wants_heads=True)
    look.add(index)
    reading = verify_reading.Reading(bin_path(prefix), {"sha256": ""}, look)
    whole, verify_reading.BLOCK_BYTES = verify_reading.BLOCK_BYTES, block
    try:
        verify_reading.read_all([reading], 1, lambda size: None)
    finally:
        verify_reading.BLOCK_BYTES = whole
    assert (look.max_token_id, look.over, look.unended, look.first_unended) == (100, 0, 0, None)
    assert reading.digests["sha256"] == file_sha256(bin_path(prefix))
    heads = look.heads_of(index)
    for a in range(len(documents)):
        for b in range(a):
            alike = len(documents[a]) == len(documents[b]) and documents[a][:15] == documents[b][:15]
            if len(documents[a]) < 16 or documents[a][:16] != documents[b][:16]:
                assert (heads[a] == heads[b]) == (alike and documents[a][:16] == documents[b][:16])


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    block=st.sampled_from([16, 64, 1 << 20]),
    wrong=st.sets(st.integers(0, 29)),
    overlap=st.booleans(),
)
def test_every_wrong_end_is_counted_once(tmp_path_factory, lengths, block, wrong, overlap):
    from data_prep import verify_reading

    ends = [9 if number in wrong else 100 for number in range(len(lengths))]
    texts = [[5] * (length - 1) + [end] if length else [] for length, end in zip(lengths, ends, strict=True)]
    prefix = pair(tmp_path_factory.mktemp("ends"), texts)
    look = verify_reading.Look(np.dtype(np.uint16), 101, 100)
    index = Index.read(idx_path(prefix))
    look.add(index)
    expected = sum(length > 0 and number in wrong for number, length in enumerate(lengths))
    if overlap and lengths[0]:  # one more document that covers all: it ends where the last one does
        whole = Index(index.dtype, np.array([sum(lengths)], np.int32), np.array([0]), np.arange(2))
        look.starts, look.lengths = np.zeros(0, np.int64), np.zeros(0, np.int32)
        look.add(Index(index.dtype, index.lengths[1:], index.offsets[1:], np.arange(len(lengths))))
        look.add(whole)
        last = max(number for number, length in enumerate(lengths) if length)
        expected += (last in wrong) - (0 in wrong)
    before, verify_reading.BLOCK_BYTES = verify_reading.BLOCK_BYTES, block
    try:
        verify_reading.read_all([verify_reading.Reading(bin_path(prefix), look=look)], 1, lambda size: None)
    finally:
        verify_reading.BLOCK_BYTES = before
    assert look.unended == expected
