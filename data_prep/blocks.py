"""Input files as shards, and a shard as blocks of checked JSON lines in reused memory that gigatoken reads without a copy.

A block's lines are complete and valid, hold the text key exactly once, and are documents one for one: gigatoken drops everything
behind a line that it cannot read and looks at nothing behind the text, so each line is validated before (simdjson, 1.5 GB/s).
"""

from __future__ import annotations

import mmap
import os
import queue
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from data_prep.optional import need
from data_prep.text_files import (
    DAMAGED,
    MAX_LINE_BYTES,
    DamagedFile,
    Reason,
    Text,
    chunks,
    is_packed,
    is_parquet,
    parquet_rows,
    parse_line,
    too_long,
)

BLOCK_BYTES = 4 << 20
"""With two blocks encoded at a time, 4 MiB is as fast as 8 and 16, and memory grows by less between two looks at it."""
LONG_LINE_BYTES = 1 << 20
"""Longer lines are encoded apart (in pieces where that is exact): one thread encodes a line, and its memory grows with it."""
SHARD_BYTES = 1 << 30
"""What is done again after a kill, at most, per process: seconds of work."""
THREADS_PER_PROCESS = 8
"""One process reads, checks and writes about as fast as eight threads encode; more workers are more processes."""
PACKED_WEIGHT = 3
"""Bytes of text per byte of a packed file, roughly; only how much makes a shard depends on it."""
MAX_BAD_LINES = 10_000
"""In a block, so that a file of nothing but bad lines is not held in memory."""
LINE_BITS = 40


def xxh3() -> Any:
    """A running 128-bit XXH3 digest: tells changed from unchanged files at memory speed, where SHA-256 costs as much as writing them."""
    return need("xxhash").xxh3_128()


@dataclass(frozen=True)
class Piece:
    """A file, or the lines of a plain file whose first byte lies in [start, end)."""

    path: str
    file: int
    """Position in the list of inputs."""
    start: int
    end: int
    """Bytes; of a packed or Parquet file 0 and its size."""


def plan_shards(files: list[tuple[str, int]], shard_bytes: int = SHARD_BYTES) -> list[list[Piece]]:
    """Cut (path, bytes) into shards of about `shard_bytes`, in order; depends on nothing else, so every run makes the same ones."""
    shards: list[list[Piece]] = []
    current: list[Piece] = []
    room = shard_bytes
    for number, (path, size) in enumerate(files):
        splits = not (is_packed(Path(path)) or is_parquet(Path(path)))
        start = 0
        while start < size:
            end = min(size, start + max(1, room)) if splits else size
            current.append(Piece(path, number, start, end))
            room -= (end - start) * (1 if splits else PACKED_WEIGHT)
            start = end
            if room <= 0:
                shards.append(current)
                current, room = [], shard_bytes
    if current:
        shards.append(current)
    return shards


class Buffer:
    """Memory that is also a file: filled through `view`, read by gigatoken under `path`."""

    def __init__(self, size: int, fd: int | None = None) -> None:
        """`fd`: of a buffer that another process made."""
        if fd is None:
            fd = os.memfd_create("block")
            os.ftruncate(fd, size)
        self.fd = fd
        self.map = mmap.mmap(self.fd, size)
        self.view = memoryview(self.map)
        self.size = size
        self.path = f"/proc/self/fd/{self.fd}"

    def seal(self, used: int) -> None:
        """Make the file end behind `used` bytes; the view must not be touched beyond them until reopen()."""
        os.ftruncate(self.fd, used)

    def reopen(self) -> None:
        os.ftruncate(self.fd, self.size)

    def close(self) -> None:
        self.view.release()
        self.map.close()
        os.close(self.fd)


@dataclass
class Block:
    """Documents in order: the lines of `buffer`, with `extra` ones between them; a place is piece << LINE_BITS | line (from 1)."""

    buffer: Buffer | None = None
    used: int = 0
    """Bytes of buffer that are lines."""
    places: list[int] = field(default_factory=list)
    """Of the lines in buffer."""
    extra: list[tuple[int, str, int]] = field(default_factory=list)
    """(lines before it, text, place) of documents that are no plain line: long ones, unusual JSON, Parquet rows."""
    bad: list[tuple[int, Reason]] = field(default_factory=list)
    """(place, reason)"""
    extra_bytes: int = 0
    read_bytes: int = 0
    """Of the input files, since the block before."""

    @property
    def documents(self) -> int:
        return len(self.places) + len(self.extra)

    def add(self, text: str, place: int) -> None:
        """A document behind all so far that is no line of buffer."""
        self.extra.append((len(self.places), text, place))
        self.extra_bytes += len(text)

    def is_full(self, tail: int) -> bool:
        return (
            self.used + tail > BLOCK_BYTES - LONG_LINE_BYTES // 2
            or self.extra_bytes > BLOCK_BYTES // 2
            or len(self.bad) > MAX_BAD_LINES
        )

    def lines(self) -> Iterator[bytes]:
        """The lines of buffer; only for the rare block that is read a second time."""
        assert self.buffer is not None
        start = 0
        while start < self.used:
            end = self.buffer.map.find(b"\n", start)
            yield bytes(self.buffer.view[start:end])
            start = end + 1

    def texts(self) -> Iterator[tuple[int, str | bytes]]:
        """All documents in order: (place, text, or the JSON line that holds it)."""
        position = 0
        raw = self.lines() if self.used else iter(())
        for before, text, place in self.extra:
            while position < before:
                yield self.places[position], next(raw)
                position += 1
            yield place, text
        for line, place in zip(raw, self.places[position:], strict=True):
            yield place, line


class Source(Protocol):
    """Bytes of one piece, JSON lines."""

    def read_into(self, buffer: Buffer, offset: int) -> int:
        """Fill buffer from offset; returns bytes, 0 at the end. DamagedFile where the piece breaks off."""
        ...

    def close(self) -> None: ...


class PlainSource:
    """The lines of a plain file whose first byte lies in the piece."""

    def __init__(self, piece: Piece, digest: Any) -> None:
        self.end, self.digest, self.done = piece.end, digest, False
        try:
            self.fd = os.open(piece.path, os.O_RDONLY)
        except OSError as error:
            raise DamagedFile(f"the file cannot be read: {error.strerror}") from None
        self.position = piece.start
        if piece.start:  # the line that crosses the start belongs to the piece before
            self.position -= 1
            self._skip_line()

    def _skip_line(self) -> None:
        while data := os.pread(self.fd, 1 << 16, self.position):
            newline = data.find(b"\n")
            if newline >= 0:
                self.position += newline + 1
                break
            self.position += len(data)
        self.done = self.position >= self.end

    def read_into(self, buffer: Buffer, offset: int) -> int:
        if self.done:
            return 0
        try:
            size = os.preadv(self.fd, [buffer.view[offset:]], self.position)
        except OSError as error:
            raise DamagedFile(f"the file cannot be read further: {error.strerror}") from None
        if self.position + size >= self.end:
            newline = buffer.map.find(b"\n", offset + max(0, self.end - 1 - self.position), offset + size)
            if newline >= 0:
                size, self.done = newline + 1 - offset, True
        self.position += size
        self.digest.update(buffer.view[offset : offset + size])
        return size

    def close(self) -> None:
        os.close(self.fd)


class PackedSource:
    """The unpacked lines of a .gz or .zst file; its digest is of the file as it lies on disk."""

    def __init__(self, piece: Piece, digest: Any) -> None:
        self.read_bytes = 0

        def on_raw(raw: bytes) -> None:
            self.read_bytes += len(raw)
            digest.update(raw)

        self.chunks = chunks(Path(piece.path), on_raw)
        self.rest = memoryview(b"")

    def read_into(self, buffer: Buffer, offset: int) -> int:
        begin = offset
        while offset < buffer.size:
            if not self.rest:
                try:
                    self.rest = memoryview(next(self.chunks, b""))
                except DamagedFile as error:
                    if offset == begin:
                        raise
                    self.chunks = _broken(error)
                    break
                if not self.rest:
                    break
            size = min(len(self.rest), buffer.size - offset)
            buffer.view[offset : offset + size] = self.rest[:size]
            self.rest = self.rest[size:]
            offset += size
        return offset - begin

    def close(self) -> None:
        self.chunks.close()


def _broken(error: DamagedFile) -> Iterator[bytes]:
    """What is left of a stream that broke: its error, after the good bytes were handed out."""
    raise error
    yield b""


class Stopped(Exception):
    """Reading ends early: nobody wants the rest."""


class Free(Protocol):
    """Where a reader takes the next buffer from; None when it shall stop."""

    def get(self) -> Buffer | None: ...


class BlockReader:
    """Reads the pieces of a shard; iterate over blocks(), give each buffer back with release(). One use.

    After the last block `digests` (XXH3 of the bytes of each piece) and `lines` (of each piece, blank ones too) are complete.
    """

    def __init__(
        self, pieces: list[Piece], text_key: str, buffers: list[Buffer], *, as_text: bool = False, free: Free | None = None
    ) -> None:
        """`as_text` gives every document as text, for encoders that take no JSON; `free`: where released buffers come from."""
        self.pieces, self.text_key, self.as_text = pieces, text_key, as_text
        self.digests: list[str] = []
        self.lines: list[int] = []
        self._buffers = buffers
        self._released: queue.SimpleQueue[Buffer | None] = queue.SimpleQueue()
        for buffer in buffers:
            self._released.put(buffer)
        self._free: Free = free or self._released
        self._parser = need("simdjson").Parser()
        self._block = Block()
        self._tail = 0
        self._place = 0

    def release(self, block: Block) -> None:
        if block.buffer is not None:
            block.buffer.reopen()
            self._released.put(block.buffer)
            block.buffer = None

    def stop(self) -> None:
        """Let a thread that waits in blocks() raise Stopped."""
        self._released.put(None)

    def close(self) -> None:
        for buffer in self._buffers:
            buffer.close()

    def _buffer(self) -> Buffer:
        buffer = self._free.get()
        if buffer is None:
            raise Stopped
        return buffer

    def blocks(self) -> Iterator[Block]:
        self._block = Block(buffer=self._buffer())
        for number, piece in enumerate(self.pieces):
            digest = xxh3()
            self._place = number << LINE_BITS
            read = self._read_parquet if is_parquet(Path(piece.path)) else self._read_lines
            yield from read(piece, digest)
            self.digests.append(digest.hexdigest())
            self.lines.append(self._place & ((1 << LINE_BITS) - 1))
        yield self._block

    def _take(self) -> Block:
        """The block so far; what is in the buffer behind its lines moves to the next one's."""
        full = self._block
        self._block = Block(buffer=self._buffer())
        if self._tail:
            assert full.buffer is not None
            assert self._block.buffer is not None
            self._block.buffer.view[: self._tail] = full.buffer.view[full.used : full.used + self._tail]
        return full

    # --- JSON lines --------------------------------------------------------------------------------------------------------------

    def _read_lines(self, piece: Piece, digest: Any) -> Iterator[Block]:
        packed = is_packed(Path(piece.path))
        source: Source | None = None
        counted = 0
        try:
            source = PackedSource(piece, digest) if packed else PlainSource(piece, digest)
            while True:
                block = self._block
                assert block.buffer is not None
                size = source.read_into(block.buffer, block.used + self._tail)
                if isinstance(source, PackedSource):
                    block.read_bytes += source.read_bytes - counted
                    counted = source.read_bytes
                else:
                    block.read_bytes += size
                if size == 0:
                    break
                filled = block.used + self._tail + size
                end = block.buffer.map.rfind(b"\n", block.used + self._tail, filled) + 1
                if end:
                    self._tail = filled - end
                    self._check(end)
                    if self._tail and block.used != end:
                        block.buffer.map.move(block.used, end, self._tail)
                else:
                    self._tail = filled - block.used
                if block.used + self._tail == BLOCK_BYTES and block.used == 0:
                    yield from self._long_line(source)
                elif block.is_full(self._tail):
                    yield self._take()
            yield from self._last_line()
        except DamagedFile as error:
            self._tail = 0  # half a line is no document; the entry stands for it
            self._place += 1
            self._block.bad.append((self._place, Reason(DAMAGED, text=str(error))))
        finally:
            if source is not None:
                source.close()

    def _last_line(self) -> Iterator[Block]:
        """The last line of a file may lack its newline."""
        if self._tail:
            if self._block.used + self._tail == BLOCK_BYTES:
                yield self._take()
            assert self._block.buffer is not None
            self._tail, end = 0, self._block.used + self._tail + 1
            self._block.buffer.map[end - 1 : end] = b"\n"
            self._check(end)

    def _long_line(self, source: Source) -> Iterator[Block]:
        """A line that fills the buffer: collect it, or only its length when it is over MAX_LINE_BYTES."""
        block = self._block
        buffer = block.buffer
        assert buffer is not None
        parts, total, rest = [bytes(buffer.view)], BLOCK_BYTES, 0
        self._tail = 0
        while size := source.read_into(buffer, 0):
            if not isinstance(source, PackedSource):
                block.read_bytes += size
            newline = buffer.map.find(b"\n", 0, size)
            taken = size if newline < 0 else newline
            total += taken
            if total <= MAX_LINE_BYTES:
                parts.append(bytes(buffer.view[:taken]))
            else:
                parts = []
            if newline >= 0:
                rest = size - newline - 1
                buffer.map.move(0, newline + 1, rest)
                break
        self._place += 1
        if total > MAX_LINE_BYTES:
            block.bad.append((self._place, too_long(total)))
        else:
            self._unusual(b"".join(parts))
        del parts
        self._tail = rest
        # Whole lines may stand in the rest: they are found when it is looked through as a block of its own.
        end = buffer.map.rfind(b"\n", 0, rest) + 1
        if end:
            self._tail = rest - end
            self._check(end)
            if self._tail and block.used != end:
                buffer.map.move(block.used, end, self._tail)
        yield self._take()

    def _check(self, end: int) -> None:
        """Take the lines in buffer[used:end] into the block; those that are no plain documents are cut out of the buffer."""
        block = self._block
        buffer = block.buffer
        assert buffer is not None
        find, view, parse, key = buffer.map.find, buffer.view, self._parser.parse, self.text_key
        places, place = block.places, self._place
        position = kept = target = block.used
        while position < end:
            newline = find(b"\n", position)
            place += 1
            good = False
            if newline - position <= LONG_LINE_BYTES and not self.as_text and view[position] != 0xEF:  # not a byte order mark
                try:
                    # Strict JSON, valid UTF-8, no lone surrogate; of a key that stands twice gigatoken takes the first, json the last.
                    good = list(parse(view[position:newline]).keys()).count(key) == 1
                except (ValueError, AttributeError, RuntimeError):
                    good = False
            if good:
                places.append(place)
            else:
                if target != kept:
                    buffer.map.move(target, kept, position - kept)
                target += position - kept
                block.used, self._place, kept = target, place, newline + 1
                self._unusual(bytes(view[position:newline]))
            position = newline + 1
        if target != kept:
            buffer.map.move(target, kept, end - kept)
        block.used, self._place = target + end - kept, place

    def _unusual(self, raw: bytes) -> None:
        """A line that is blank, bad, long, or valid in a way that gigatoken reads differently."""
        block = self._block
        if not raw.strip():
            return
        parsed = parse_line(raw, self.text_key)
        if isinstance(parsed, Text):
            block.add(parsed.text, self._place)
        else:
            block.bad.append((self._place, parsed))

    # --- Parquet -----------------------------------------------------------------------------------------------------------------

    def _read_parquet(self, piece: Piece, digest: Any) -> Iterator[Block]:
        try:
            with open(piece.path, "rb") as f:
                while data := f.read(1 << 20):
                    digest.update(data)
            for rows, _ in parquet_rows(Path(piece.path), self.text_key):
                for row in rows:
                    self._place += 1
                    if isinstance(row, Text):
                        self._block.add(row.text, self._place)
                    else:
                        self._block.bad.append((self._place, row))
                if self._block.is_full(0):
                    yield self._take()
        except (DamagedFile, OSError) as error:
            self._place += 1
            self._block.bad.append((self._place, Reason(DAMAGED, text=str(error))))
        self._block.read_bytes += piece.end
