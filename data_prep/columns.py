"""An index's lengths and offsets, read block by block: what is mapped counts as a process's memory once touched, and jobs are killed for
memory that they do not need.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.errors import DataError
from data_prep.indexed import HEADER_BYTES, Index


class Column:
    """One array of a file: has a length, and slices that are read when they are taken. Can be pickled; the file is opened when needed."""

    def __init__(self, path: Path, dtype: np.dtype, count: int, start_bytes: int) -> None:
        self.path, self.dtype, self.count, self.start_bytes = path, dtype, count, start_bytes
        self._file: int | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> np.ndarray:
        """Entries start..stop-1 (no step), as an array of their own."""
        start, stop, step = part.indices(self.count)
        assert step == 1, "a column has no steps"
        wanted = max(0, stop - start) * self.dtype.itemsize
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY)
        raw = os.pread(self._file, wanted, self.start_bytes + start * self.dtype.itemsize)
        if len(raw) != wanted:
            raise DataError(f"{self.path}: ends while it is read; something else writes it: run `quarry prep` again")
        return np.frombuffer(raw, self.dtype)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)


@dataclass(frozen=True)
class Columns:
    """An .idx of one sequence per document."""

    dtype: np.dtype
    """Of the tokens."""
    lengths: Column
    """int32, tokens"""
    offsets: Column
    """int64, bytes"""


def open_lengths(path: Path) -> Column:
    """Lengths of the sequences of an .idx, int32 [S]; DataError as Index.map."""
    return Column(path, np.dtype("<i4"), len(Index.map(path).lengths), HEADER_BYTES)


def open_columns(path: Path) -> Columns:
    """The columns of an .idx; DataError as Index.map, and where documents have several sequences."""
    index = Index.map(path)
    count = len(index.lengths)
    if index.documents != count:
        raise DataError(
            f"{path}: {index.documents} documents in {count} sequences, a view needs one sequence per document; prepare the source again "
            f"with `quarry prep`"
        )
    return Columns(index.dtype, open_lengths(path), Column(path, np.dtype("<i8"), count, HEADER_BYTES + 4 * count))
