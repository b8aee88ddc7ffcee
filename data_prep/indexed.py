"""Megatron's indexed data sets (.bin/.idx) with numpy alone: written byte for byte as Megatron's builder does, read without torch.

Format (megatron/core/datasets/indexed_dataset.py, 0.19.2), little-endian: `MMIDIDX\\0\\0`, uint64 version 1, uint8 dtype code, uint64
sequence count S, uint64 document count D+1, int32[S] lengths in tokens, int64[S] offsets in bytes, int64[D+1] document bounds. The
.bin is the tokens and nothing else. A *view* is an .idx whose offsets select documents of another .bin, in any order, repeats allowed.

Quarry writes one sequence per document, so that the bounds are 0..S.

Indexes are mapped, never loaded: that of ten billion documents has 200 GB, and most readers want a part of it.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

import numpy as np

from data_prep.errors import DataError
from data_prep.plain_files import atomic_write

MAGIC = b"MMIDIDX\x00\x00"
HEADER_BYTES = 34
REMEDY = "make it again with `quarry prep`"
PART_ENTRIES = 1 << 20
"""Entries of an index that are looked at in one piece: 8 MB of offsets."""
UINT16_BELOW = 65_500
"""Megatron's threshold: vocabularies below it are stored as uint16, all others as int32."""
DTYPE_CODES: dict[int, type[np.number]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
CODES = {np.dtype(dtype): code for code, dtype in DTYPE_CODES.items()}


def optimal_dtype(vocab_size: int) -> np.dtype:
    """The dtype that Megatron's DType.optimal_dtype chooses for a vocabulary."""
    return np.dtype(np.uint16 if vocab_size < UINT16_BELOW else np.int32)


def bin_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")


@dataclass(frozen=True)
class Index:
    """What an .idx says: lengths int32 [S] in tokens, offsets int64 [S] in bytes into the .bin, bounds int64 [D+1] in sequences."""

    dtype: np.dtype
    lengths: np.ndarray
    offsets: np.ndarray
    bounds: np.ndarray

    @property
    def documents(self) -> int:
        return len(self.bounds) - 1

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def end_bytes(self) -> int:
        """Bytes that the .bin must have at least."""
        ends = (
            (self.offsets[part] + self.lengths[part].astype(np.int64) * self.dtype.itemsize).max(initial=0)
            for part in parts(len(self.lengths))
        )
        return int(max(ends, default=0))

    def select(self, documents: np.ndarray) -> Index:
        """A view of these documents (int64 [N], repeats allowed); only for one sequence per document."""
        return Index(
            self.dtype, self.lengths[documents], self.offsets[documents], np.arange(len(documents) + 1, dtype=np.int64)
        )

    def write(self, path: Path) -> None:
        """Write the .idx atomically."""
        with atomic_write(path) as f:
            f.write(MAGIC + struct.pack("<QBQQ", 1, CODES[self.dtype], len(self.lengths), len(self.bounds)))
            for array, kind in ((self.lengths, "<i4"), (self.offsets, "<i8"), (self.bounds, "<i8")):
                f.write(np.ascontiguousarray(array, dtype=kind).tobytes())

    @classmethod
    def read(cls, path: Path) -> Index:
        """Map and check an .idx; DataError names the file and what is wrong with it."""
        index = cls.map(path)
        index._check(path, REMEDY)
        return index

    @classmethod
    def map(cls, path: Path) -> Index:
        """As `read`, looking only at the header and the size: for files that a digest has already vouched for."""
        try:
            size = path.stat().st_size
            with open(path, "rb") as f:
                header = f.read(HEADER_BYTES)
        except FileNotFoundError:
            raise DataError(f"{path}: no such index; {REMEDY}") from None
        if len(header) < HEADER_BYTES or header[:9] != MAGIC:
            raise DataError(
                f"{path}: {size} bytes that begin with {header[:9]!r}, not with {MAGIC!r}: no Megatron index; {REMEDY}"
            )
        version, code, sequences, bounds = struct.unpack("<QBQQ", header[9:])
        if version != 1 or code not in DTYPE_CODES:
            raise DataError(f"{path}: version {version}, dtype code {code}; expected version 1 and a code of 1 to 8; {REMEDY}")
        expected = HEADER_BYTES + 12 * sequences + 8 * bounds
        if size != expected:
            raise DataError(
                f"{path}: {size} bytes, its header promises {expected} ({sequences} sequences): truncated; {REMEDY}"
            )
        raw = np.memmap(path, dtype=np.uint8, mode="r")
        return cls(
            np.dtype(DTYPE_CODES[code]),
            np.frombuffer(raw, "<i4", sequences, HEADER_BYTES),
            np.frombuffer(raw, "<i8", sequences, HEADER_BYTES + 4 * sequences),
            np.frombuffer(raw, "<i8", bounds, HEADER_BYTES + 12 * sequences),
        )

    def _check(self, path: Path, remedy: str) -> None:
        bounds, lengths, offsets = self.bounds, self.lengths, self.offsets
        if (
            len(bounds) == 0
            or bounds[0] != 0
            or bounds[-1] != len(lengths)
            or any((bounds[p][1:] < bounds[p][:-1]).any() for p in parts(len(bounds), overlap=1))
        ):
            raise DataError(f"{path}: document bounds do not run from 0 to {len(lengths)} sequences; {remedy}")
        for part in parts(len(lengths)):
            if (lengths[part] < 0).any():
                first = part.start + int(np.argmax(lengths[part] < 0))
                raise DataError(f"{path}: sequence {first} has a negative length; {remedy}")
            if (offsets[part] < 0).any() or (offsets[part] % self.dtype.itemsize).any():
                raise DataError(f"{path}: an offset is negative or no multiple of {self.dtype.itemsize} bytes; {remedy}")


def parts(count: int, overlap: int = 0) -> Iterator[slice]:
    """0..count in slices of PART_ENTRIES, each followed by the first `overlap` entries of the next."""
    for start in range(0, count, PART_ENTRIES):
        yield slice(start, min(count, start + PART_ENTRIES + overlap))


class IndexWriter:
    """Writes the .idx of a known number of sequences piece by piece, one sequence per document, in constant memory."""

    def __init__(self, file: IO[bytes], dtype: np.dtype, sequences: int) -> None:
        self._file, self.sequences, self.written = file, sequences, 0
        self._put(0, np.frombuffer(MAGIC + struct.pack("<QBQQ", 1, CODES[dtype], sequences, sequences + 1), np.uint8))

    def put(self, sequence: int, lengths: np.ndarray, offsets: np.ndarray) -> None:
        """Sequences from number `sequence` on: lengths [n] in tokens, offsets [n] in bytes; each once, in any order."""
        self._put(HEADER_BYTES + 4 * sequence, lengths.astype("<i4", copy=False))
        self._put(HEADER_BYTES + 4 * self.sequences + 8 * sequence, offsets.astype("<i8", copy=False))
        self.written += len(lengths)

    def finish(self) -> None:
        assert self.written == self.sequences, f"{self.written} sequences written, {self.sequences} announced"
        for part in parts(self.sequences + 1):
            position = HEADER_BYTES + 12 * self.sequences + 8 * part.start
            self._put(position, np.arange(part.start, part.stop, dtype="<i8"))

    def _put(self, position: int, array: np.ndarray) -> None:
        if array.size:
            self._file.seek(position)
            self._file.write(np.ascontiguousarray(array).data)


@contextlib.contextmanager
def index_writer(path: Path, dtype: np.dtype, sequences: int) -> Iterator[IndexWriter]:
    """An IndexWriter whose file appears when `with` ends without an exception."""
    with atomic_write(path) as f:
        writer = IndexWriter(f, dtype, sequences)
        yield writer
        writer.finish()


class Reader:
    """Documents of a .bin/.idx pair, the .bin mapped; `reader[i]` is document i, an array of tokens [length]."""

    def __init__(self, prefix: Path) -> None:
        self.index = Index.read(idx_path(prefix))
        path = bin_path(prefix)
        if not path.exists():
            raise DataError(f"{path}: no such file beside its index; make it again with `quarry prep`")
        size = path.stat().st_size
        if self.index.end_bytes > size:
            raise DataError(
                f"{path}: {size} bytes, its index reaches to byte {self.index.end_bytes}; make it again with `quarry prep`"
            )
        self._tokens = (
            np.memmap(path, dtype=self.index.dtype, mode="r", shape=size // self.index.dtype.itemsize) if size else None
        )

    def __len__(self) -> int:
        return self.index.documents

    def __getitem__(self, document: int) -> np.ndarray:
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        parts = [self.sequence(i) for i in range(self.index.bounds[document], self.index.bounds[document + 1])]
        return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, self.index.dtype), *parts])

    def sequence(self, number: int) -> np.ndarray:
        start = int(self.index.offsets[number]) // self.index.dtype.itemsize
        length = int(self.index.lengths[number])
        return self._tokens[start : start + length] if length else np.zeros(0, self.index.dtype)


class Writer:
    """Writes a .bin/.idx pair, one sequence per document; nothing exists under the prefix until `with` ends without an exception.

    The .bin is put in place before the .idx, so an .idx always has its .bin.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self.prefix = prefix
        self.vocab_size = vocab_size
        self.dtype = optimal_dtype(vocab_size)
        self.lengths: list[int] = []
        self.max_token_id = -1

    def __enter__(self) -> Self:
        # The .idx of before would describe another .bin for a moment if it stayed.
        idx_path(self.prefix).unlink(missing_ok=True)
        self._stack = contextlib.ExitStack()
        self._file: IO[bytes] = self._stack.enter_context(atomic_write(bin_path(self.prefix)))
        return self

    def add(self, tokens: np.ndarray) -> None:
        """Append one document (integers [length]); DataError for an id outside of the vocabulary."""
        tokens = np.asarray(tokens)
        if tokens.size:
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.vocab_size:
                raise DataError(
                    f"{self.prefix}: document {len(self.lengths)} has token id {low if low < 0 else high}, the vocabulary has "
                    f"{self.vocab_size} entries; tokenize with the tokenizer that the recipe names"
                )
            self.max_token_id = max(self.max_token_id, high)
        self._file.write(tokens.astype(self.dtype, copy=False).tobytes())
        self.lengths.append(tokens.size)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._stack.__exit__(kind, error, trace)
        if kind is None:
            self.index().write(idx_path(self.prefix))

    def index(self) -> Index:
        lengths = np.array(self.lengths, dtype=np.int32)
        offsets = np.zeros(len(lengths), dtype=np.int64)
        np.cumsum(lengths[:-1].astype(np.int64) * self.dtype.itemsize, out=offsets[1:])
        return Index(self.dtype, lengths, offsets, np.arange(len(lengths) + 1, dtype=np.int64))
