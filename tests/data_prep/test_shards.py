"""What is written of a block: documents with what stands around each, in whatever pieces they lie in memory."""

import dataclasses
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import shards
from data_prep.encoder_choice import Choice
from data_prep.encoders import Encoded
from data_prep.shards import Job, packed, write_parts

CHOICE = Choice("huggingface", "tokenizer.json", "0" * 64, "as_ids", True)


def job(dtype, prefix=(), suffix=(), eod_id=None):
    choice = dataclasses.replace(CHOICE, prefix=tuple(prefix), suffix=tuple(suffix))
    return Job(choice, "text", 60_000, eod_id, dtype, "folder", "0" * 64, 1, 0)


def encoded(documents):
    ids = np.array([token for document in documents for token in document], dtype=np.uint32)
    return Encoded(ids, np.array([len(document) for document in documents], dtype=np.int64), [], [], 0)


tokens = st.integers(0, 59_999)


@given(
    documents=st.lists(st.one_of(st.lists(tokens, max_size=4), st.lists(tokens, min_size=200, max_size=300)), max_size=6),
    dtype=st.sampled_from(["uint16", "int32"]),
    prefix=st.lists(tokens, max_size=2),
    suffix=st.lists(tokens, max_size=1),
    eod_id=st.one_of(st.none(), tokens),
)
def test_every_document_stands_between_what_is_added(documents, dtype, prefix, suffix, eod_id):
    used = np.full(4096, 7, dtype=dtype)  # what was there before
    block = packed(encoded(documents), job(dtype, prefix, suffix, eod_id), lambda size: used[:size])
    whole = [[*prefix, *document, *suffix, *([] if eod_id is None else [eod_id])] for document in documents]
    written = b"".join(bytes(part) for part in block.parts)
    assert np.frombuffer(written, dtype).tolist() == [token for document in whole for token in document]
    assert block.counts.tolist() == [len(document) for document in whole]
    assert block.tokens == sum(map(len, whole))
    assert block.highest == max((token for document in whole for token in document), default=-1)
    assert block.spare is None or block.spare.base is used


def test_an_id_beyond_the_dtype_is_seen(tmp_path):
    """It is cut to 16 bits, but the largest id says so, and the run is refused by it."""
    assert packed(encoded([[70_000, 1]]), job("uint16", eod_id=0), lambda size: np.empty(size, np.uint16)).highest == 70_000


@pytest.mark.parametrize("short", [False, True])
def test_any_number_of_parts_is_written_whole(tmp_path, monkeypatch, short):
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 1 << 16, size).astype("<u2").data for size in rng.integers(0, 40, 3 * shards.IOV_MAX + 5)]
    real = os.writev
    if short:  # as on a signal
        monkeypatch.setattr(os, "writev", lambda fd, some: real(fd, [b"".join(some)[:777]]))
    with open(tmp_path / "out", "wb") as f:
        f.write(b"before")
        write_parts(f, parts)
        f.write(b"behind")
    assert (tmp_path / "out").read_bytes() == b"before" + b"".join(parts) + b"behind"


def test_a_full_disk_is_an_error():
    with open("/dev/full", "wb") as f, pytest.raises(OSError, match="No space"):
        write_parts(f, [memoryview(b"one"), memoryview(b"two")])
