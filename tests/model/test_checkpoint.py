"""Reader and writer of torch_dist checkpoints against torch's own, for any chunking; damage is found and named."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from model.checkpoint import Checkpoint, Writer, is_checkpoint, latest
from model.errors import ModelError


def write(folder: Path, tensor: torch.Tensor, rows: int, columns: int) -> None:
    """`tensor` [R, C] as chunks of at most rows x columns, beside an object."""
    with Writer(folder) as writer:
        for r in range(0, tensor.size(0), rows):
            for c in range(0, tensor.size(1), columns):
                piece = tensor[r : r + rows, c : c + columns]
                writer.add_chunk("t", piece, shape=tuple(tensor.shape), offsets=(r, c))
        writer.add_object("o", b"bytes")


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_box_of_any_chunking_is_read(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
    tensor = torch.randn(height, width).mul(100).to(dtype)
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    rows, columns = data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c"
        write(path, tensor, data.draw(st.integers(1, height)), data.draw(st.integers(1, width)))
        checkpoint = Checkpoint(path)
        assert torch.equal(checkpoint.read("t", (top, left), (rows, columns)), tensor[top : top + rows, left : left + columns])
        assert torch.equal(checkpoint.read("t"), tensor)
        assert checkpoint.tensors["t"].dtype == dtype
        assert checkpoint.read_bytes(checkpoint.objects["o"]) == b"bytes"
        # torch reads the same from what was written here.
        state = {"t": torch.zeros(height, width, dtype=dtype)}
        dcp.load(state, storage_reader=dcp.FileSystemReader(path), no_dist=True)
        assert torch.equal(state["t"], tensor)


def test_what_torch_writes_is_read(tmp_path: Path) -> None:
    state = {"a": torch.randn(3, 4), "b": torch.arange(5)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    checkpoint = Checkpoint(tmp_path)
    assert all(torch.equal(checkpoint.read(k), v) for k, v in state.items())


def test_a_view_is_saved_without_the_rest_of_its_storage(tmp_path: Path) -> None:
    big = torch.randn(1000, 1000)
    with Writer(tmp_path / "c") as writer:
        writer.add_chunk("t", big[:2, :2])
    assert sum(p.stat().st_size for p in (tmp_path / "c").iterdir()) < 10_000
    assert torch.equal(Checkpoint(tmp_path / "c").read("t"), big[:2, :2])


def test_sums_are_those_of_the_files(tmp_path: Path) -> None:
    import hashlib

    write(tmp_path / "c", torch.randn(4, 4), 2, 2)
    sums = json.loads((tmp_path / "c" / "integrity.json").read_text())
    assert sums["algorithm"] == "sha256"
    assert sums["files"] == {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / "c").iterdir() if p.name != "integrity.json"
    }


def test_files_are_cut_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.checkpoint.MAX_FILE_BYTES", 3000)
    tensor = torch.randn(8, 100)
    write(tmp_path / "c", tensor, 1, 100)
    assert len(list((tmp_path / "c").glob("*.distcp"))) > 2
    assert torch.equal(Checkpoint(tmp_path / "c").read("t"), tensor)


def test_nothing_appears_before_the_end_and_nothing_stays_after_a_failure(tmp_path: Path) -> None:
    with Writer(tmp_path / "c") as writer:
        writer.add_chunk("t", torch.ones(2))
        assert not (tmp_path / "c").exists()
    assert is_checkpoint(tmp_path / "c")

    def write_two_dtypes() -> None:
        with Writer(tmp_path / "d") as writer:
            writer.add_chunk("t", torch.ones(1), shape=(2,), offsets=(0,))
            writer.add_chunk("t", torch.ones(1).double(), shape=(2,), offsets=(1,))

    with pytest.raises(ValueError, match="disagree"):
        write_two_dtypes()
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    with pytest.raises(ModelError, match="exists"):
        Writer(tmp_path / "c")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    write(tmp_path / "c", torch.arange(12.0).view(3, 4), 1, 4)
    return tmp_path / "c"


def test_missing_short_and_altered_files_are_named(saved: Path) -> None:
    file = saved / "__0_0.distcp"
    content = file.read_bytes()
    file.write_bytes(content[:-900])
    with pytest.raises(ModelError, match=r"__0_0\.distcp is too short"):
        Checkpoint(saved).read("t", (2, 0), (1, 4))
    file.write_bytes(content[:20] + bytes(200) + content[220:])
    with pytest.raises(ModelError, match=r"the chunk of 't' is damaged"):
        Checkpoint(saved).read("t")
    file.unlink()
    with pytest.raises(ModelError, match=r"__0_0\.distcp is missing"):
        Checkpoint(saved).read("t")


def test_an_incomplete_tensor_is_named(tmp_path: Path) -> None:
    with Writer(tmp_path / "c") as writer:
        writer.add_chunk("t", torch.ones(1, 4), shape=(3, 4), offsets=(0, 0))
    with pytest.raises(ModelError, match=r"'t' has 4 of 12 elements"):
        Checkpoint(tmp_path / "c").read("t")
    assert torch.equal(Checkpoint(tmp_path / "c").read("t", (0, 1), (1, 2)), torch.ones(1, 2))


@pytest.mark.parametrize(("name", "content", "message"), [
    (".metadata", b"garbage", "damaged or not a checkpoint's index"),
    (".metadata", b"", "damaged or not a checkpoint's index"),
    ("metadata.json", b'{"sharded_backend": "zarr"}', "sharded_backend is 'zarr'"),
])  # fmt: skip
def test_a_folder_that_is_no_torch_dist_checkpoint_is_refused(saved: Path, name: str, content: bytes, message: str) -> None:
    (saved / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        Checkpoint(saved)


def test_an_index_that_points_outside_is_refused(saved: Path) -> None:
    shutil.copy(saved / "__0_0.distcp", saved.parent / "secret")
    index = (saved / ".metadata").read_bytes()
    name, outside = b"__0_0.distcp", b"../secret\0\0\0"
    outside = b"../////secret"[: len(name)]
    assert index.count(name) == 1  # pickle writes the string once
    (saved / ".metadata").write_bytes(index.replace(name, outside))
    with pytest.raises(ModelError, match="points outside"):
        Checkpoint(saved)


def test_an_opaque_object_is_copied_and_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    stream = io.BytesIO()
    torch.save(Trap(), stream)
    with Writer(tmp_path / "c") as writer:
        writer.add_object("o", stream.getvalue())
        writer.add_chunk("t", torch.ones(1))
    checkpoint = Checkpoint(tmp_path / "c")
    assert checkpoint.read_bytes(checkpoint.objects["o"]) == stream.getvalue()
    assert not (tmp_path / "ran").exists()


def test_a_tensor_that_is_a_pickle_is_not_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    stream = io.BytesIO()
    torch.save(Trap(), stream)
    with Writer(tmp_path / "c") as writer:
        writer.add_chunk("t", torch.ones(1))
        growing = writer._tensors["t"]
        growing.chunks.clear()
        writer._add("t", growing, (0,), (1,), stream.getvalue())
    with pytest.raises(ModelError, match="the chunk of 't' is damaged"):
        Checkpoint(tmp_path / "c").read("t")
    assert not (tmp_path / "ran").exists()


def test_latest_follows_the_tracker(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    with pytest.raises(ModelError, match=r"no latest_checkpointed_iteration\.txt"):
        latest(folder)
    shutil.copytree(saved, folder / "iter_0000012")
    (folder / "latest_checkpointed_iteration.txt").write_text("12\n")
    assert latest(folder) == folder / "iter_0000012"
    assert latest(folder / "iter_0000012") == folder / "iter_0000012"
    (folder / "latest_checkpointed_iteration.txt").write_text("13")
    with pytest.raises(ModelError, match="names step 13"):
        latest(folder)
