"""The .bin/.idx pair: what is written is read, what is broken is refused, nothing half written is left."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.indexed import Index, Reader, Writer, bin_path, idx_path, optimal_dtype


def write(prefix, documents, vocab=1000):
    with Writer(prefix, vocab) as writer:
        for tokens in documents:
            writer.add(np.array(tokens, dtype=np.int64))
    return writer


@settings(deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 999), max_size=20), max_size=20),
    vocab=st.sampled_from([1000, 65499, 65500, 100352]),
)
def test_round_trip(tmp_path_factory, documents, vocab):
    prefix = tmp_path_factory.mktemp("pair") / "a"
    writer = write(prefix, documents, vocab)
    reader = Reader(prefix)
    assert [reader[i].tolist() for i in range(len(reader))] == documents
    assert reader.index.dtype == optimal_dtype(vocab)
    assert reader.index.tokens == sum(map(len, documents))
    assert writer.max_token_id == max((t for d in documents for t in d), default=-1)


def test_threshold_of_uint16_is_megatrons():
    assert optimal_dtype(65_499) == np.uint16
    assert optimal_dtype(65_500) == np.int32


def test_a_view_selects_in_any_order_with_repeats(tmp_path):
    write(tmp_path / "a", [[1], [2, 3], [4, 5, 6]])
    Index.read(idx_path(tmp_path / "a")).select(np.array([2, 0, 2])).write(idx_path(tmp_path / "view"))
    bin_path(tmp_path / "view").symlink_to("a.bin")
    view = Reader(tmp_path / "view")
    assert [view[i].tolist() for i in range(3)] == [[4, 5, 6], [1], [4, 5, 6]]


def test_an_exception_leaves_nothing(tmp_path):
    def interrupted():
        yield [1, 2]
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write(tmp_path / "a", interrupted())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("token", [-1, 10])
def test_an_id_outside_of_the_vocabulary_is_refused(tmp_path, token):
    with pytest.raises(DataError, match=f"document 1 has token id {token}, the vocabulary has 10"):
        write(tmp_path / "a", [[0, 9], [3, token]], 10)
    assert list(tmp_path.iterdir()) == []


def test_broken_indexes_are_refused_by_name(tmp_path):
    write(tmp_path / "a", [[1, 2], [3]])
    path = idx_path(tmp_path / "a")
    good = path.read_bytes()
    for content, message in (
        (good[:-1], "truncated"),
        (b"X" + good[1:], "no Megatron index"),
        (good[:9] + b"\x02" + good[10:], "version 2"),
        (good[:34] + b"\xff\xff\xff\xff" + good[38:], "negative length"),
        (good[:42] + b"\x01" + good[43:], "no multiple of 2 bytes"),
        (good[:-8] + b"\x07" + good[-7:], "bounds"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message) as error:
            Index.read(path)
        assert str(path) in str(error.value)
    path.write_bytes(good)
    bin_path(tmp_path / "a").write_bytes(b"\0" * 4)
    with pytest.raises(DataError, match="4 bytes, its index reaches to byte 6"):
        Reader(tmp_path / "a")
