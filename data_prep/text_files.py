"""Documents of text files: JSON lines (plain, .gz, .zst) and Parquet, strictly parsed; what is no document comes with its reason.

Strict means as Python's json module reads it, and valid UTF-8. Nothing here raises for bad content: a file that breaks off gives the
documents before the break and then one BadLine.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from data_prep.errors import DataError
from data_prep.optional import need

CHUNK_BYTES = 1 << 20
"""Read from disk at a time: large enough that calls do not matter."""
PACKED_CHUNK_BYTES = 1 << 14
"""Of a packed file: what was unpacked of the piece that holds the damage is lost with it."""
MAX_LINE_BYTES = 256 << 20
"""A longer line is quarantined unread: parsing it would take over 1 GiB of memory, and no document of that size is one text."""
PARQUET_ROWS = 256
"""Rows taken at a time: some MB of long documents."""
UTF8_BOM = b"\xef\xbb\xbf"
MAX_BAD_PERCENT = 1.0
"""More bad lines than this, and more than MAX_BAD_FREE, mean a wrong file or text key, not a few bad lines: whoever reads a source refuses."""
MAX_BAD_FREE = 10
DAMAGED = "damaged file"
"""Kind of a reason that stands for all that a file held beyond it."""


@dataclass(frozen=True)
class Text:
    """One document as read."""

    text: str
    record: dict[str, Any] | None = field(default=None, compare=False, repr=False)
    """The whole JSON object, or the asked columns of the Parquet row."""


@dataclass(frozen=True)
class BadLine:
    """A line (from 1) or Parquet row (from 1) that is no document; line 0: the file as a whole."""

    file: str
    line: int
    reason: str
    empty: bool = False
    damaged: bool = False
    """It stands for all that the file held beyond it."""


@dataclass(frozen=True)
class Reason:
    """Why a line holds no document; `kind` is what counts are kept by."""

    kind: str
    detail: str = ""
    text: str = ""

    def __str__(self) -> str:
        return self.text or (f"{self.kind}: {self.detail}" if self.detail else self.kind)


EMPTY = Reason("empty document")
NUL = Reason("NUL character", text="the text holds a NUL character")


class DamagedFile(Exception):
    """A file breaks off or cannot be read; what came before it was delivered."""


def read_documents(
    path: Path, text_key: str, shown: str | None = None, *, columns: Sequence[str] = ()
) -> Iterator[Text | BadLine]:
    """Documents of one file, by its suffix, in order; blank lines are skipped, everything else that is no document is a BadLine.

    `shown` is the name for messages. `columns` are further columns of a Parquet file that a caller wants in Text.record.
    """
    shown = shown or str(path)
    if is_parquet(path):
        yield from _read_parquet(path, text_key, shown, columns)
        return
    number = 0
    try:
        for number, raw in enumerate(lines(chunks(path)), 1):
            if isinstance(raw, Reason):
                yield BadLine(shown, number, str(raw))
            elif raw.strip():
                parsed = parse_line(raw, text_key)
                if isinstance(parsed, Text):
                    yield parsed
                else:
                    yield BadLine(shown, number, str(parsed), empty=parsed is EMPTY)
    except DamagedFile as error:
        yield BadLine(shown, number + 1, str(error), damaged=True)


def is_parquet(path: Path) -> bool:
    return path.suffix == ".parquet"


def is_packed(path: Path) -> bool:
    return path.suffix in (".gz", ".zst")


# --- bytes -----------------------------------------------------------------------------------------------------------------------


def chunks(path: Path, on_raw: Callable[[bytes], None] = lambda raw: None) -> Iterator[bytes]:
    """The unpacked content in pieces of about CHUNK_BYTES; DamagedFile where it breaks off. `on_raw` sees the bytes of the file."""

    size = PACKED_CHUNK_BYTES if is_packed(path) else CHUNK_BYTES

    def read() -> bytes:
        data = f.read(size)
        on_raw(data)
        return data

    try:
        with open(path, "rb") as f:
            raw = iter(read, b"")
            if path.suffix == ".gz":
                yield from _inflate(raw)
            elif path.suffix == ".zst":
                yield from _unpack_zst(raw)
            else:
                yield from raw
    except OSError as error:
        raise DamagedFile(f"the file cannot be read: {error.strerror or error}") from None


def _inflate(raw: Iterable[bytes]) -> Iterator[bytes]:
    """Members of a gzip file one after the other; zero bytes behind the last are padding, as for gzip itself."""
    stream, fresh, members = zlib.decompressobj(31), True, 0
    for data in raw:
        while data:
            if fresh:
                data = data.lstrip(b"\0") if members else data
                if not data:
                    break
                stream, fresh = zlib.decompressobj(31), False
            try:
                out = stream.decompress(data, CHUNK_BYTES)
            except zlib.error as error:
                raise DamagedFile(f"the gzip stream is damaged ({error}); what follows is lost") from None
            if out:
                yield out
            if stream.eof:
                data, fresh, members = stream.unused_data, True, members + 1
            else:
                data = stream.unconsumed_tail
    if not fresh:
        # What was held back when the output of a call was full.
        if out := stream.flush():
            yield out
        if not stream.eof:
            raise DamagedFile("the gzip stream is truncated; what follows is lost")


def _unpack_zst(raw: Iterable[bytes]) -> Iterator[bytes]:
    zstandard = need("zstandard")
    context = zstandard.ZstdDecompressor()
    stream, fresh = context.decompressobj(), True
    for data in raw:
        while data:
            if fresh:
                stream, fresh = context.decompressobj(), False
            try:
                out = stream.decompress(data)
            except zstandard.ZstdError as error:
                raise DamagedFile(f"the zstd stream is damaged ({error}); what follows is lost") from None
            if out:
                yield out
            data, fresh = (stream.unused_data, True) if stream.eof else (b"", False)
    if not fresh:
        raise DamagedFile("the zstd stream is truncated; what follows is lost")


def lines(pieces: Iterable[bytes], max_bytes: int = MAX_LINE_BYTES) -> Iterator[bytes | Reason]:
    """Lines without their newline; one longer than `max_bytes` comes as a Reason and is never held in memory as a whole."""
    parts: list[bytes] = []
    size, skipped = 0, 0
    for piece in pieces:
        start = 0
        while (end := piece.find(b"\n", start)) >= 0:
            if skipped or size + end - start > max_bytes:
                yield too_long(skipped + size + end - start, max_bytes)
            elif parts:
                parts.append(piece[start:end])
                yield b"".join(parts)
            else:
                yield piece[start:end]
            parts, size, skipped, start = [], 0, 0, end + 1
        rest = len(piece) - start
        if skipped or size + rest > max_bytes:
            skipped, parts, size = skipped + size + rest, [], 0
        elif rest:
            parts.append(piece[start:])
            size += rest
    if skipped:
        yield too_long(skipped, max_bytes)
    elif parts:
        yield b"".join(parts)


def too_long(size: int, max_bytes: int = MAX_LINE_BYTES) -> Reason:
    return Reason("line too long", f"{size} bytes, at most {max_bytes} are read")


# --- JSON ------------------------------------------------------------------------------------------------------------------------


@cache
def _loads() -> Any:
    return need("orjson").loads


def parse_line(raw: bytes | memoryview, text_key: str) -> Text | Reason:
    """The document of one JSON line, or why it has none.

    orjson decides what it accepts (it accepts less than json and reads the same value); json decides the rest and words the reason.
    """
    try:
        value = _loads()(raw)
    except ValueError:
        value = _parse_slowly(bytes(raw))
        if isinstance(value, Reason):
            return value
    return document_of(value, text_key)


def document_of(value: Any, text_key: str) -> Text | Reason:
    """The document that a parsed JSON line is, or why it is none."""
    if not isinstance(value, dict):
        return Reason("no JSON object", text=f"a JSON {type(value).__name__}, not an object")
    if text_key not in value:
        return Reason("no text key", text=f"no key '{text_key}'; keys: {keys_of(value)}")
    return check_text(value[text_key], text_key, value)


def keys_of(record: dict[str, Any]) -> str:
    """Some keys, for messages: short, and without lone surrogates, which no file can hold (JSON can spell them)."""
    return ", ".join(key[:80] for key in sorted(record)[:8]).encode("utf-8", "backslashreplace").decode()


def check_text(text: Any, text_key: str, record: dict[str, Any] | None = None) -> Text | Reason:
    """Whether a value can be a document's text."""
    if not isinstance(text, str):
        return Reason("text is no string", text=f"'{text_key}' is a {type(text).__name__}, not a string")
    if not text:
        return EMPTY
    if "\0" in text:
        return NUL
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return Reason("lone surrogate", text=f"lone surrogate at character {error.start}")
    return Text(text, record)


def _parse_slowly(raw: bytes) -> Any:
    try:
        line = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return Reason("invalid UTF-8", text=f"invalid UTF-8 at byte {error.start}")
    if raw.startswith(UTF8_BOM):
        return Reason("not JSON", "the line begins with a byte order mark")
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return Reason("not JSON", str(error))


# --- Parquet ---------------------------------------------------------------------------------------------------------------------


def parquet_rows(path: Path, text_key: str, columns: Sequence[str] = ()) -> Iterator[tuple[list[Text | Reason], int]]:
    """Batches of (documents or reasons, one per row; bytes of text); DamagedFile when the file cannot be read (further)."""
    pyarrow, parquet = need("pyarrow"), need("pyarrow.parquet")
    try:
        # pre_buffer off: a row group's text column may be larger than memory.
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=CHUNK_BYTES) as file:
            if text_key not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names[:8])
                raise DamagedFile(f"no column '{text_key}'; columns: {names}")
            wanted = [text_key, *(c for c in columns if c != text_key and c in file.schema_arrow.names)]
            for batch in file.iter_batches(PARQUET_ROWS, columns=wanted):
                column = batch.column(text_key)
                records = batch.drop_columns([text_key]).to_pylist() if len(wanted) > 1 else None
                texts = _column_texts(column, pyarrow)
                found = [
                    text
                    if isinstance(text, Reason)
                    else check_text(text, text_key, records[row] | {text_key: text} if records else None)
                    for row, text in enumerate(texts)
                ]
                yield found, column.nbytes
    except (pyarrow.ArrowException, OSError) as error:
        raise DamagedFile(f"the Parquet file cannot be read ({str(error).splitlines()[0]}); what follows is lost") from None


def _column_texts(column: Any, pyarrow: Any) -> list[Any]:
    types = pyarrow.types
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind)):
        return column.to_pylist()
    try:
        if types.is_string(kind) or types.is_large_string(kind):
            return column.to_pylist()
    except UnicodeDecodeError:  # Arrow does not check what a writer declared to be UTF-8
        column = column.cast(pyarrow.large_binary())
    return [_decoded(value) if isinstance(value, bytes) else value for value in column.to_pylist()]


def _decoded(value: bytes) -> str | Reason:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        return Reason("invalid UTF-8", text=f"invalid UTF-8 at byte {error.start}")


def _read_parquet(path: Path, text_key: str, shown: str, columns: Sequence[str]) -> Iterator[Text | BadLine]:
    number = 0
    try:
        for rows, _ in parquet_rows(path, text_key, columns):
            for row in rows:
                number += 1
                yield row if isinstance(row, Text) else BadLine(shown, number, str(row), empty=row is EMPTY)
    except DamagedFile as error:
        yield BadLine(shown, number + 1, str(error), damaged=True)


def expand(patterns: Iterable[str], what: str) -> list[Path]:
    """Files that the paths or glob patterns match, each once, sorted by path; a file of exactly that name comes before a pattern.

    DataError for a pattern that matches no file, and for a match that is no readable name of a file: left out, it would be missed by nobody.
    """
    import glob

    found: set[str] = set()
    for pattern in patterns:
        matches = [pattern] if os.path.lexists(pattern) else glob.glob(pattern, recursive=True)
        matched = [path for path in matches if not os.path.isdir(path)]
        for path in matched:
            _refuse_name(path, what)
        if not matched:
            folder = "; it is a folder: name the files in it" if matches else "; put the files there or change the path"
            raise DataError(f"{what}: nothing matches '{pattern}' (from {Path.cwd()}){folder}")
        found.update(matched)
    return [Path(path) for path in sorted(found)]


def _refuse_name(path: str, what: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise DataError(f"{what}: {shown}: the name is not UTF-8, and no record can hold it; rename the file") from None
    if os.path.isfile(path):
        return
    if os.path.islink(path) and not os.path.exists(path):
        raise DataError(
            f"{what}: {path} is a link to {os.readlink(path)}, where no file can be reached; mend or remove the link"
        )
    raise DataError(f"{what}: {path} is neither a file nor a folder (a pipe or device?); write its content to a file")
