"""Megatron's indexed data sets (.bin/.idx) with numpy alone: written byte for byte as Megatron's builder does, read without torch.

Format (megatron/core/datasets/indexed_dataset.py, 0.19.2), little-endian: `MMIDIDX\\0\\0`, uint64 version 1, uint8 dtype code, uint64
sequence count S, uint64 document count D+1, int32[S] lengths in tokens, int64[S] offsets in bytes, int64[D+1] document bounds. The
.bin is the tokens and nothing else. A *view* is an .idx whose offsets select documents of another .bin, in any order, repeats allowed.

Quarry writes one sequence per document, so that the bounds are 0..S.
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
from data_prep.files import atomic_write

MAGIC = b"MMIDIDX\x00\x00"
HEADER_BYTES = 34
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
        return int((self.offsets + self.lengths.astype(np.int64) * self.dtype.itemsize).max(initial=0))

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
        """Read and check an .idx; DataError names the file and what is wrong with it."""
        remedy = "make it again with `quarry prep`"
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            raise DataError(f"{path}: no such index; {remedy}") from None
        if len(raw) < HEADER_BYTES or raw[:9] != MAGIC:
            raise DataError(
                f"{path}: {len(raw)} bytes that begin with {raw[:9]!r}, not with {MAGIC!r}: no Megatron index; {remedy}"
            )
        version, code, sequences, bounds = struct.unpack("<QBQQ", raw[9:HEADER_BYTES])
        if version != 1 or code not in DTYPE_CODES:
            raise DataError(f"{path}: version {version}, dtype code {code}; expected version 1 and a code of 1 to 8; {remedy}")
        expected = HEADER_BYTES + 12 * sequences + 8 * bounds
        if len(raw) != expected:
            raise DataError(
                f"{path}: {len(raw)} bytes, its header promises {expected} ({sequences} sequences): truncated; {remedy}"
            )
        lengths = np.frombuffer(raw, "<i4", sequences, HEADER_BYTES)
        offsets = np.frombuffer(raw, "<i8", sequences, HEADER_BYTES + 4 * sequences)
        ends = np.frombuffer(raw, "<i8", bounds, HEADER_BYTES + 12 * sequences)
        index = cls(np.dtype(DTYPE_CODES[code]), lengths, offsets, ends)
        index._check(path, remedy)
        return index

    def _check(self, path: Path, remedy: str) -> None:
        if (
            len(self.bounds) == 0
            or self.bounds[0] != 0
            or self.bounds[-1] != len(self.lengths)
            or (np.diff(self.bounds) < 0).any()
        ):
            raise DataError(f"{path}: document bounds do not run from 0 to {len(self.lengths)} sequences; {remedy}")
        if (self.lengths < 0).any():
            raise DataError(f"{path}: sequence {int(np.argmax(self.lengths < 0))} has a negative length; {remedy}")
        if (self.offsets < 0).any() or (self.offsets % self.dtype.itemsize).any():
            raise DataError(f"{path}: an offset is negative or no multiple of {self.dtype.itemsize} bytes; {remedy}")


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


def iter_documents(reader: Reader) -> Iterator[np.ndarray]:
    """Its documents in order."""
    return (reader[number] for number in range(len(reader)))
