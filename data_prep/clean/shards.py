"""The units of work: which files, or byte ranges of files, of which source one task cleans; reading their documents.

Shards follow from the input alone, never from the number of workers, so that the output does not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from data_prep.text_files import CHUNK_BYTES, BadLine, Reason, Text, is_packed, is_parquet, lines, parse_line, read_documents

SHARD_BYTES = 32 << 20
"""Of text: one to two minutes of the web filters on one core, the most that a killed run does again per worker."""
MAX_SHARDS_PER_SOURCE = 128
"""Each bucket of MinHash holds one open file per shard; twenty sources stay below the 4096 that most systems allow."""
PACKED_BYTES_FACTOR = 4
"""Text is about four times its gzip, zstd or Parquet form."""


@dataclass(frozen=True)
class SourceText:
    """The text of a source, as cleaning reads it."""

    files: tuple[Path, ...]
    """JSON lines (plain, .gz, .zst) or Parquet, in their order."""
    text_key: str
    digest: str
    """SHA-256 of all that makes the text what it is; equal for equal text."""
    carry: tuple[str, ...] = ()
    """Further keys of a line that its cleaned line keeps, beside text and id."""


@dataclass(frozen=True)
class Piece:
    """A file, or the lines of it that begin in a byte range."""

    path: Path
    shown: str
    """Name for messages and records: relative to the data root if it is below it."""
    start: int = 0
    stop: int | None = None
    """None: to the end, and the file is read as a whole."""


@dataclass(frozen=True)
class Shard:
    """What one task cleans: pieces of one source."""

    rank: int
    """Over all sources, best first: the smaller rank wins a duplicate."""
    source: str
    number: int
    """Within the source; names its files."""
    text_key: str
    carry: tuple[str, ...]
    pieces: tuple[Piece, ...]
    size_bytes: int = field(compare=False)
    """Of the input files."""

    @property
    def name(self) -> str:
        return f"{self.number:05d}"


def plan_shards(sources: dict[str, SourceText], root: Path) -> list[Shard]:
    """Shards of all sources, in the order of `sources`: whole small files together, large plain JSON-lines files by byte range."""
    shards: list[Shard] = []
    for name, text in sources.items():
        sizes = {path: path.stat().st_size for path in text.files}
        factor = {path: PACKED_BYTES_FACTOR if is_packed(path) or is_parquet(path) else 1 for path in text.files}
        target = max(SHARD_BYTES, -(-sum(sizes[p] * factor[p] for p in text.files) // MAX_SHARDS_PER_SOURCE))
        groups: list[list[Piece]] = []
        open_bytes = 0
        for path in text.files:
            below = path.absolute().is_relative_to(root.absolute())
            shown = str(path.absolute().relative_to(root.absolute())) if below else str(path)
            if factor[path] == 1 and sizes[path] > target:
                groups += [[Piece(path, shown, start, stop)] for start, stop in _ranges(path, sizes[path], target)]
                open_bytes = 0
                continue
            if open_bytes == 0 or open_bytes + sizes[path] * factor[path] > target:
                groups.append([])
                open_bytes = 0
            groups[-1].append(Piece(path, shown))
            open_bytes += max(1, sizes[path] * factor[path])
        for number, pieces in enumerate(groups):
            size = sum((piece.stop or sizes[piece.path]) - piece.start for piece in pieces)
            shards.append(Shard(len(shards), name, number, text.text_key, text.carry, tuple(pieces), size))
    return shards


def _ranges(path: Path, size: int, target: int) -> list[tuple[int, int]]:
    """Byte ranges of about `target` that begin at line starts and cover the file."""
    count = -(-size // target)
    with open(path, "rb") as f:
        starts = sorted({_line_start(f, size * k // count) for k in range(count)} | {size})
    return list(pairwise(starts))


def _line_start(f, at: int) -> int:
    """The first line start at or after byte `at`."""
    if at == 0:
        return 0
    f.seek(at - 1)
    while chunk := f.read(CHUNK_BYTES):
        if (end := chunk.find(b"\n")) >= 0:
            return f.tell() - len(chunk) + end + 1
    return f.tell()


@dataclass
class LineCount:
    """Lines read of a piece with a byte range so far, blank ones too."""

    lines: int = 0


def read_piece(piece: Piece, text_key: str, columns: tuple[str, ...], count: LineCount) -> Iterator[Text | BadLine]:
    """Documents and bad lines of a piece; line numbers of a byte range count from its start (cleaner.Job adds the lines before)."""
    if piece.stop is None:
        yield from read_documents(piece.path, text_key, piece.shown, columns=columns)
        return
    for raw in lines(_bytes_of(piece.path, piece.start, piece.stop)):
        count.lines += 1
        parsed = raw if isinstance(raw, Reason) else parse_line(raw, text_key) if raw.strip() else None
        if isinstance(parsed, Text):
            yield parsed
        elif parsed is not None:
            yield BadLine(piece.shown, count.lines, str(parsed), empty=parsed.kind == "empty document")


def _bytes_of(path: Path, start: int, stop: int) -> Iterator[bytes]:
    with open(path, "rb") as f:
        f.seek(start)
        while start < stop and (data := f.read(min(CHUNK_BYTES, stop - start))):
            start += len(data)
            yield data
