"""Finished shards joined into one .bin/.idx pair, in order, each shard's tokens kept once on disk; a kill at any point loses nothing.

The first shard's .bin is renamed to merged.bin, later ones are appended (copied inside the kernel) and then removed. So a shard whose
.bin is gone is in merged.bin, and whatever merged.bin has beyond those is half an append: cut off and appended again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_prep.blocks import Piece, xxh3
from data_prep.indexed import index_writer
from data_prep.shards import stem, xxh3_of
from data_prep.tokens_record import PieceRecord, ShardRecord

READ_BYTES = 4 << 20
COPY_BYTES = 1 << 30


class Merge:
    """The shards of one job on their way into merged.bin."""

    def __init__(self, folder: str, settings: str, plan: list[list[Piece]], prefix_bin: Path) -> None:
        """`prefix_bin` is where merged.bin goes in the end; a run killed right after that finds it there again."""
        self.folder, self.settings, self.plan = folder, settings, plan
        self.merged = Path(folder) / "merged.bin"
        self.records: dict[int, ShardRecord] = {}
        self.count = 0
        """Shards that are in merged.bin."""
        self._bytes = 0
        self._digest = xxh3()
        self._prefix_bin = prefix_bin

    def resume(self, unchanged: Callable[[PieceRecord, Piece], bool]) -> None:
        """Find the shards that an earlier run finished with the same settings and input; what does not fit any more is removed."""
        found = [self._read(number, unchanged) for number in range(len(self.plan))]
        in_bin = 0
        while in_bin < len(found) and found[in_bin] is not None and not stem(self.folder, in_bin).with_suffix(".bin").exists():
            in_bin += 1
        if in_bin and in_bin == len(found) and not self.merged.exists() and self._prefix_bin.exists():
            os.replace(self._prefix_bin, self.merged)  # killed between the last rename and the record
        if in_bin and self.merged.exists():
            with open(self.merged, "rb") as f:
                for number in range(in_bin):
                    record = found[number]
                    assert record is not None
                    if self._read_digest(f, record.bytes) != record.xxh3:
                        break
                    self.records[number] = record
                    self.count, self._bytes = number + 1, self._bytes + record.bytes
            if self.count < in_bin:
                self._digest = self._digest_of_merged()
        for number, record in enumerate(found):
            if number in self.records:
                continue
            path = stem(self.folder, number).with_suffix(".bin")
            if record is not None and path.exists() and path.stat().st_size == record.bytes and file_xxh3(path) == record.xxh3:
                self.records[number] = record
            else:
                for suffix in (".json", ".bin", ".lengths", ".bad.jsonl"):
                    stem(self.folder, number).with_suffix(suffix).unlink(missing_ok=True)
        if self.count == 0:
            self.merged.unlink(missing_ok=True)
            self._digest = xxh3()

    def _read(self, number: int, unchanged: Callable[[PieceRecord, Piece], bool]) -> ShardRecord | None:
        if not stem(self.folder, number).with_suffix(".json").exists():
            return None
        try:
            record = ShardRecord.from_json(stem(self.folder, number).with_suffix(".json").read_bytes())
            lengths = stem(self.folder, number).with_suffix(".lengths").read_bytes()
            bad = stem(self.folder, number).with_suffix(".bad.jsonl").read_bytes()
        except (FileNotFoundError, ValueError):
            return None
        if record.settings != self.settings or len(record.pieces) != len(self.plan[number]):
            return None
        if xxh3_of(lengths) != record.lengths_xxh3 or xxh3_of(bad) != record.bad_xxh3:
            return None
        same = all(unchanged(was, now) for was, now in zip(record.pieces, self.plan[number], strict=True))
        return record if same else None

    def _read_digest(self, f: IO[bytes], size: int) -> str:
        """XXH3 of the next `size` bytes of merged.bin; they go into the digest of the whole too."""
        digest = xxh3()
        while size and (data := f.read(min(READ_BYTES, size))):
            digest.update(data)
            self._digest.update(data)
            size -= len(data)
        return digest.hexdigest()

    def _digest_of_merged(self) -> Any:
        digest = xxh3()
        with open(self.merged, "rb") as f:
            left = self._bytes
            while left and (data := f.read(min(READ_BYTES, left))):
                digest.update(data)
                left -= len(data)
        return digest

    def add(self, number: int, record: ShardRecord) -> None:
        """A shard was finished; join all that are next in order."""
        self.records[number] = record
        self.join()

    def join(self) -> None:
        while self.count in self.records:
            self._append(self.count)

    def _append(self, number: int) -> None:
        record, source = self.records[number], stem(self.folder, number).with_suffix(".bin")
        if number == 0 and len(self.plan) == 1:
            os.replace(source, self.merged)
        else:
            with open(source, "rb") as f:
                while data := f.read(READ_BYTES):
                    self._digest.update(data)
            if number == 0:
                os.replace(source, self.merged)
            else:
                with open(source, "rb") as f, open(self.merged, "r+b") as out:
                    out.truncate(self._bytes)
                    out.seek(self._bytes)
                    copied = 0
                    try:
                        while size := os.sendfile(out.fileno(), f.fileno(), copied, COPY_BYTES):
                            copied += size
                    except OSError as error:
                        error.filename = str(self.merged)
                        raise
                    assert copied == record.bytes, f"{source} changed while it was copied"
                    # On disk before the shard's own file goes.
                    os.fsync(out.fileno())
                source.unlink()
        self.count, self._bytes = number + 1, self._bytes + record.bytes

    def sync(self) -> None:
        """See merged.bin onto the disk."""
        with open(self.merged, "rb") as f:
            os.fsync(f.fileno())

    @property
    def bytes(self) -> int:
        """Of merged.bin."""
        return self._bytes

    @property
    def xxh3(self) -> str:
        """Of merged.bin with all shards."""
        return self.records[0].xxh3 if len(self.plan) == 1 else self._digest.hexdigest()

    def write_index(self, path: Path, dtype: str) -> None:
        """The .idx of merged.bin, shard by shard."""
        size, sequence, offset = np.dtype(dtype).itemsize, 0, 0
        with index_writer(path, np.dtype(dtype), sum(record.documents for record in self.records.values())) as index:
            for number in range(len(self.plan)):
                lengths = np.fromfile(stem(self.folder, number).with_suffix(".lengths"), "<i4")
                ends = np.cumsum(lengths, dtype=np.int64) * size + offset
                index.put(sequence, lengths, ends - lengths.astype(np.int64) * size)
                sequence, offset = sequence + len(lengths), offset + self.records[number].bytes

    def write_quarantine(self, out: IO[bytes], names: list[str]) -> dict[str, Any] | None:
        """Write {file, line, reason} of every bad line, in order; returns the first that is no empty document."""
        first = None
        lines_before = [0] * len(names)
        for number in range(len(self.plan)):
            pieces = self.records[number].pieces
            base = []
            for piece in pieces:
                base.append(lines_before[piece.file])
                lines_before[piece.file] += piece.lines
            with open(stem(self.folder, number).with_suffix(".bad.jsonl"), "rb") as f:
                for raw in f:
                    bad = json.loads(raw)
                    entry = {
                        "file": names[pieces[bad["piece"]].file],
                        "line": base[bad["piece"]] + bad["line"],
                        "reason": bad["reason"],
                    }
                    # A lone surrogate (in the name of a key) is written as its escape.
                    out.write(json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
                    if first is None and bad["kind"] != "empty document":
                        first = entry
        return first

    def remove_folder(self) -> None:
        shutil.rmtree(self.folder)


def file_xxh3(path: Path) -> str:
    digest = xxh3()
    with open(path, "rb") as f:
        while data := f.read(READ_BYTES):
            digest.update(data)
    return digest.hexdigest()
