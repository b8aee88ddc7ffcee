"""Reads and writes Megatron's torch_dist checkpoints without Megatron, a process group or a GPU, one tensor at a time.

A torch_dist checkpoint is a folder in torch's distributed checkpoint format: `.metadata` (an index of tensors, each made of chunks,
and of opaque objects), `*.distcp` (the chunks, each a torch.save), and Megatron's `metadata.json` and `integrity.json` (SHA-256 of
every file). A tensor's shape in the index is global: which ranks wrote it, in which layout, does not matter here.

`.metadata` is a pickle by design of the format. It is read with an unpickler that knows the classes of the index and nothing else;
chunks are read with torch's weights-only loader; opaque objects are only copied, never unpickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch.distributed.checkpoint import filesystem, metadata

from model.errors import ModelError

METADATA = ".metadata"
INTEGRITY = "integrity.json"
TRACKER = "latest_checkpointed_iteration.txt"
MAX_FILE_BYTES = 8 << 30
"""A new .distcp file is begun when one has grown beyond this; one file per rank of some GB is what training writes too."""

_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_INDEX_CLASSES = {
    (_METADATA_MODULE, "Metadata"),
    (_METADATA_MODULE, "TensorStorageMetadata"),
    (_METADATA_MODULE, "BytesStorageMetadata"),
    (_METADATA_MODULE, "ChunkStorageMetadata"),
    (_METADATA_MODULE, "TensorProperties"),
    (_METADATA_MODULE, "MetadataIndex"),
    (_METADATA_MODULE, "StorageMeta"),
    (_METADATA_MODULE, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
}


class _IndexUnpickler(pickle.Unpickler):
    """Makes objects of the index and refuses any other class, so that a checkpoint cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _INDEX_CLASSES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place in a checkpoint's index")


@dataclass(frozen=True)
class Place:
    """Where bytes lie: `length` bytes at `offset` of `file` (a name inside the checkpoint folder)."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: its first element, its shape, and where its torch.save lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Place


@dataclass(frozen=True)
class Tensor:
    """Global shape and dtype of a saved tensor, and the chunks that make it up."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


def is_checkpoint(folder: Path) -> bool:
    return (folder / METADATA).is_file() and (folder / "metadata.json").is_file()


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def latest(folder: Path) -> Path:
    """The newest checkpoint of a folder that holds iter_* and the tracker file, or `folder` itself if it is a checkpoint.

    Raises ModelError if there is none, or the tracker names one that is not there.
    """
    if is_checkpoint(folder):
        return folder
    tracker = folder / TRACKER
    if not tracker.is_file():
        raise ModelError(
            f"{folder}: no checkpoint here ({METADATA} and metadata.json) and no {TRACKER}; give a folder that has one"
        )
    step = tracker.read_text().strip()
    found = folder / (f"iter_{int(step):07d}" if step.isdecimal() else step)
    if not is_checkpoint(found):
        raise ModelError(
            f"{tracker} names step {step}, but {found} is no complete torch_dist checkpoint; name an iter_* folder that is"
        )
    return found


class Checkpoint:
    """One torch_dist checkpoint, open for reading. Raises ModelError for anything that is not one."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        if not is_checkpoint(self.folder):
            raise ModelError(
                f"{self.folder}: no torch_dist checkpoint ({METADATA} and metadata.json); only that format is read"
            )
        backend = json.loads((self.folder / "metadata.json").read_bytes()).get("sharded_backend")
        if backend != "torch_dist":
            raise ModelError(f"{self.folder}/metadata.json: sharded_backend is {backend!r}, only 'torch_dist' is read; save with "
                             "--ckpt-format torch_dist")  # fmt: skip
        with open(self.folder / METADATA, "rb") as f:
            try:
                index: metadata.Metadata = _IndexUnpickler(f).load()
            except (pickle.UnpicklingError, EOFError, AttributeError, IndexError) as error:
                raise ModelError(f"{self.folder / METADATA} is damaged or not a checkpoint's index: {error}") from error
        self.index = index
        places = {(i.fqn, i.offset): self._place(info) for i, info in index.storage_data.items()}
        self.tensors: dict[str, Tensor] = {}
        self.objects: dict[str, Place] = {}
        for key, entry in index.state_dict_metadata.items():
            try:
                if isinstance(entry, metadata.TensorStorageMetadata):
                    chunks = tuple(Chunk(tuple(c.offsets), tuple(c.sizes), places[key, c.offsets]) for c in entry.chunks)
                    self.tensors[key] = Tensor(tuple(entry.size), entry.properties.dtype, chunks)
                else:
                    self.objects[key] = places[key, None]
            except KeyError as error:
                raise ModelError(
                    f"{self.folder / METADATA}: '{key}' has no data at {error}; the save was not finished"
                ) from error

    def _place(self, info: Any) -> Place:
        if getattr(info, "transform_descriptors", None):
            raise ModelError(f"{self.folder}: stored with {info.transform_descriptors}; only plain storage is read")
        if Path(info.relative_path).name != info.relative_path:
            raise ModelError(f"{self.folder / METADATA} points outside of the checkpoint: {info.relative_path!r}")
        return Place(info.relative_path, info.offset, info.length)

    def read_bytes(self, place: Place) -> bytes:
        try:
            with open(self.folder / place.file, "rb") as f:
                f.seek(place.offset)
                data = f.read(place.length)
        except FileNotFoundError:
            raise ModelError(f"{self.folder / place.file} is missing; copy the checkpoint again, or name another") from None
        if len(data) != place.length:
            raise ModelError(
                f"{self.folder / place.file} is too short: {place.length} bytes at {place.offset} are wanted, {len(data)} are there"
            )
        return data

    def read_chunk(self, key: str, chunk: Chunk) -> torch.Tensor:
        """The tensor that one chunk holds, on the CPU, in the dtype it was saved in."""
        data = io.BytesIO(self.read_bytes(chunk.place))
        try:
            value = torch.load(data, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ModelError(f"{self.folder / chunk.place.file}: the chunk of '{key}' is damaged: {error}") from error
        if tuple(value.shape) != chunk.sizes:
            raise ModelError(
                f"{self.folder}: a chunk of '{key}' has shape {tuple(value.shape)}, its index says {chunk.sizes}; optimizer states must be "
                "saved with --dist-ckpt-optim-fully-reshardable"
            )
        return value

    def read(self, key: str, offsets: tuple[int, ...] | None = None, sizes: tuple[int, ...] | None = None) -> torch.Tensor:
        """The box of `key` that begins at `offsets` (default: all zero) and has shape `sizes` (default: to the end).

        Reads the chunks that the box touches, one after the other. Raises ModelError if they do not fill it.
        """
        tensor = self.tensors.get(key)
        if tensor is None:
            raise ModelError(f"{self.folder}: no tensor '{key}'")
        begin = offsets or (0,) * len(tensor.shape)
        shape = sizes or tuple(n - b for n, b in zip(tensor.shape, begin, strict=True))
        same = next((c for c in tensor.chunks if (c.offsets, c.sizes) == (begin, shape)), None)
        if same is not None:  # the usual case; saves a copy
            return self.read_chunk(key, same)
        out = torch.empty(shape, dtype=tensor.dtype)
        filled = 0
        for chunk in tensor.chunks:
            low = [max(b, o) for b, o in zip(begin, chunk.offsets, strict=True)]
            high = [min(b + n, o + m) for b, n, o, m in zip(begin, shape, chunk.offsets, chunk.sizes, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            value = self.read_chunk(key, chunk)
            source = tuple(slice(first - o, last - o) for first, last, o in zip(low, high, chunk.offsets, strict=True))
            target = tuple(slice(first - b, last - b) for first, last, b in zip(low, high, begin, strict=True))
            out[target] = value[source]
            filled += prod(last - first for first, last in zip(low, high, strict=True))
        if filled != out.numel():
            raise ModelError(
                f"{self.folder}: '{key}' has {filled} of {out.numel()} elements of {shape} at {begin}; the save was not finished"
            )
        return out


class _HashedFile:
    """A file that is written from its beginning to its end, with the SHA-256 of what was written."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115  (closed in close)
        self._hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> str:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest()


@dataclass
class _Growing:
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[metadata.ChunkStorageMetadata] = field(default_factory=list)


class Writer:
    """Writes a torch_dist checkpoint; the folder appears under its name only when `close` has finished (rename).

    As a context manager it closes on success and removes what it wrote on an exception.
    """

    def __init__(self, folder: Path, *, replace: bool = False) -> None:
        """`replace` allows `folder` to exist; it is removed just before the new one takes its name."""
        if folder.exists() and not replace:
            raise ModelError(f"{folder} exists; remove it or name another output")
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir()
        self._sums: dict[str, str] = {}
        self._tensors: dict[str, _Growing] = {}
        self._objects: list[str] = []
        self._storage: dict[metadata.MetadataIndex, Any] = {}
        self._file: _HashedFile | None = None
        self._name = ""
        self._files = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def add_chunk(
        self, key: str, value: torch.Tensor, *, shape: tuple[int, ...] | None = None, offsets: tuple[int, ...] | None = None
    ) -> None:
        """Save `value` as the box at `offsets` of tensor `key` of global `shape`; without these it is the whole tensor."""
        shape = shape or tuple(value.shape)
        offsets = offsets or (0,) * len(shape)
        growing = self._tensors.setdefault(key, _Growing(value.dtype, shape))
        if (growing.dtype, growing.shape) != (value.dtype, shape):
            raise ValueError(f"chunks of '{key}' disagree: {growing.dtype} {growing.shape} and {value.dtype} {shape}")
        # torch.save writes the whole storage of a view, so a view is copied first.
        whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.numel() * value.element_size()
        self._add(
            key, growing, offsets, tuple(value.shape), value if whole else value.clone(memory_format=torch.contiguous_format)
        )

    def copy_chunk(self, key: str, source: Checkpoint, chunk: Chunk) -> None:
        """Save a chunk of `source` as it is, byte for byte."""
        tensor = source.tensors[key]
        growing = self._tensors.setdefault(key, _Growing(tensor.dtype, tensor.shape))
        self._add(key, growing, chunk.offsets, chunk.sizes, source.read_bytes(chunk.place))

    def _add(
        self, key: str, growing: _Growing, offsets: tuple[int, ...], sizes: tuple[int, ...], data: torch.Tensor | bytes
    ) -> None:
        index = metadata.MetadataIndex(key, offsets, len(growing.chunks))
        growing.chunks.append(metadata.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        self._write(index, data)

    def add_object(self, key: str, data: bytes) -> None:
        """Save the bytes of an opaque object."""
        self._objects.append(key)
        self._write(metadata.MetadataIndex(key), data)

    def _write(self, index: metadata.MetadataIndex, data: torch.Tensor | bytes) -> None:
        if self._file is None:
            self._name = f"__0_{self._files}.distcp"
            self._files += 1
            self._file = _HashedFile(self._temporary / self._name)
        offset = self._file.tell()
        if isinstance(data, bytes):
            self._file.write(data)
        else:
            torch.save(data, self._file)
        self._storage[index] = filesystem._StorageInfo(self._name, offset, self._file.tell() - offset)
        if self._file.tell() > MAX_FILE_BYTES:
            self._end_file()

    def add_file(self, name: str, data: bytes) -> None:
        """Add a file that lies beside the tensors."""
        self._write_small(name, data)

    def _end_file(self) -> None:
        if self._file is not None:
            self._sums[self._name] = self._file.close()
            self._file = None

    def _write_small(self, name: str, data: bytes, *, summed: bool = True) -> None:
        file = _HashedFile(self._temporary / name)
        file.write(data)
        digest = file.close()
        if summed:
            self._sums[name] = digest

    def close(self) -> None:
        """Write the index and the sums, then give the folder its name."""
        self._end_file()
        entries: dict[str, Any] = {
            key: metadata.TensorStorageMetadata(metadata.TensorProperties(t.dtype), torch.Size(t.shape), t.chunks)
            for key, t in self._tensors.items()
        }
        entries |= {key: metadata.BytesStorageMetadata() for key in self._objects}
        index = metadata.Metadata(
            entries, storage_data=self._storage, storage_meta=metadata.StorageMeta(), version=filesystem.CURRENT_DCP_VERSION
        )
        self._write_small("metadata.json", json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}).encode())
        self._write_small(METADATA, pickle.dumps(index))
        sums = json.dumps({"algorithm": "sha256", "files": dict(sorted(self._sums.items()))}, indent=2)
        self._write_small(INTEGRITY, sums.encode(), summed=False)
        if self.folder.exists():
            shutil.rmtree(self.folder)
        os.replace(self._temporary, self.folder)
        sync_folder(self.folder.parent)
