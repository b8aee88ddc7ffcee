"""Tokenizes each source once: JSON lines to a .bin/.idx pair, held-out documents to another, bad lines to a quarantine file.

Which documents are held out is decided by a hash of their text, so the same text is held out of every source, whatever else changes.
"""

from __future__ import annotations

import gzip
import hashlib
import heapq
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_prep.errors import DataError
from data_prep.files import atomic_write, digest_of, record_file, replace_symlink, verify_file
from data_prep.indexed import Index, Reader, Writer, bin_path, idx_path, iter_documents
from data_prep.records import InputFile, TokenizedRecord
from data_prep.text_files import BadLine, Text
from data_prep.tokenizer import Tokenizer

VERSION = 1
"""Of this module's output; raise it when the same input would give other bytes."""
BATCH_BYTES = 1 << 20
"""Text encoded in one call: enough for all threads, little memory."""
QUARANTINE_MAX_PERCENT = 1.0
"""More bad lines than this (and more than QUARANTINE_FREE_LINES) mean a wrong file or text_key, not a few bad lines."""
QUARANTINE_FREE_LINES = 10
LOWEST_KEPT = 1024
HELDOUT_MAX_SHARE = 0.2
"""A small source gives up to a fifth of its tokens to reach the held-out minimum (or one document, if that is more)."""


def read_lines(path: Path, text_key: str, shown: str | None = None) -> Iterator[Text | BadLine]:
    """Documents of a JSON-lines file (plain or .gz), strictly parsed; a line that is not one comes as BadLine. Blank lines are skipped."""
    shown = shown or str(path)
    if path.suffix == ".zst":
        raise DataError(f"{path}: zst is not read yet; unpack it, or pack it as .gz")
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as f:
        try:
            for number, raw in enumerate(f, 1):
                if raw.strip():
                    parsed = parse_line(raw, text_key)
                    if isinstance(parsed, str) and parsed:
                        yield Text(parsed)
                    elif isinstance(parsed, str):
                        yield BadLine(shown, number, "empty document", empty=True)
                    else:
                        yield BadLine(shown, number, parsed.reason)
        except (EOFError, gzip.BadGzipFile) as error:
            raise DataError(f"{path}: the gzip stream is damaged or truncated ({error}); fetch the file again") from None


@dataclass(frozen=True)
class _Reason:
    reason: str


def parse_line(raw: bytes, text_key: str) -> str | _Reason:
    """The text of one JSON line, or why it has none."""
    try:
        line = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return _Reason(f"invalid UTF-8 at byte {error.start}")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return _Reason(f"not JSON: {error}")
    if not isinstance(value, dict):
        return _Reason(f"a JSON {type(value).__name__}, not an object")
    if text_key not in value:
        return _Reason(f"no key '{text_key}'; keys: {', '.join(sorted(value)[:8])}")
    text = value[text_key]
    if not isinstance(text, str):
        return _Reason(f"'{text_key}' is a {type(text).__name__}, not a string")
    if "\0" in text:
        return _Reason("the text holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return _Reason(f"lone surrogate at character {error.start}")
    return text


def content_key(text: str) -> int:
    """0 .. 2^64-1 from the text; a document is held out when it is below the held-out share of 2^64."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@dataclass
class _Tally:
    """Counts of one pass over a source."""

    documents: int = 0
    heldout: int = 0
    text_bytes: int = 0
    empty: int = 0
    heldout_tokens: int = 0
    tokens: int = 0
    bad: list[BadLine] = field(default_factory=list)
    lowest: list[tuple[int, int]] = field(default_factory=list)
    """(-key, tokens) of the LOWEST_KEPT smallest content keys, a heap: the next to be held out when chance held out too little."""

    def count(self, key: int, tokens: int, is_held: bool) -> None:
        self.tokens += tokens
        if is_held:
            self.heldout += 1
            self.heldout_tokens += tokens
        if len(self.lowest) < LOWEST_KEPT:
            heapq.heappush(self.lowest, (-key, tokens))
        else:
            heapq.heappushpop(self.lowest, (-key, tokens))

    def limit_for(self, min_tokens: int) -> int | None:
        """The limit that holds out `min_tokens`, or None where that is more than HELDOUT_MAX_SHARE of the source."""
        held = 0
        for number, (key, tokens) in enumerate(sorted(self.lowest, reverse=True), 1):
            held += tokens
            if number >= self.documents or (number > 1 and held > self.tokens * HELDOUT_MAX_SHARE):
                return None
            if held >= min_tokens:
                return -key + 1
        return None


def tokenized_inputs(tokenizer: Tokenizer, heldout_percent: float, min_heldout_tokens: int, content: Any) -> str:
    """Digest of what the tokenized form of a source is made from; `content` describes the source's text."""
    return digest_of(
        {
            "version": VERSION,
            "tokenizer": tokenizer.digest,
            "vocab_size": tokenizer.vocab_size,
            "eod_id": tokenizer.eod_id,
            "heldout_percent": heldout_percent,
            "min_heldout_tokens": min_heldout_tokens,
            "content": content,
        }
    )


def tokenize_texts(
    name: str,
    read: Callable[[], Iterator[Text | BadLine]],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    heldout_percent: float,
    min_heldout_tokens: int,
    inputs: str,
    files: list[InputFile],
    threads: int,
    on_text: Callable[[int], None] = lambda size: None,
) -> TokenizedRecord:
    """Write <folder>/<name>.bin/.idx, <name>.heldout.bin/.idx, maybe <name>.quarantine.jsonl, and last the record <name>.json.

    `read` starts a new pass over the source. Each document is one sequence with the end-of-document id appended. Where
    `heldout_percent` leaves fewer than `min_heldout_tokens`, more are held out, by the same hash. DataError when there is
    no document, or too many bad lines.
    """
    limit = int(heldout_percent / 100 * 2**64)

    def encode(texts: list[str]) -> list[np.ndarray]:
        return [np.append(ids, tokenizer.eod_id) for ids in tokenizer.encode_batch(texts, threads)]

    tally, highest = _pass(name, read, tokenizer.vocab_size, encode, folder, limit, on_text)
    if tally.heldout_tokens < min_heldout_tokens:
        # Chance held out too little (few documents): a second pass holds out the next by the same hash.
        raised = tally.limit_for(min_heldout_tokens)
        if raised is not None:
            again = _written(folder, name, limit)
            tally, highest = _pass(name, read, tokenizer.vocab_size, again, folder, raised, lambda size: None)
    prefix, heldout = folder / name, folder / f"{name}.heldout"
    index, held = Index.read(idx_path(prefix)), Index.read(idx_path(heldout))
    record = TokenizedRecord(
        inputs=inputs,
        source=name,
        tokenizer_sha256=tokenizer.digest,
        dtype=index.dtype.name,
        documents=index.documents,
        tokens=index.tokens,
        max_token_id=highest,
        bin=record_file(bin_path(prefix)),
        idx=record_file(idx_path(prefix)),
        heldout_documents=held.documents,
        heldout_tokens=held.tokens,
        heldout_bin=record_file(bin_path(heldout)),
        heldout_idx=record_file(idx_path(heldout)),
        text_bytes=tally.text_bytes,
        empty_documents=tally.empty,
        quarantined_lines=sum(not b.empty for b in tally.bad),
        files=files,
    )
    record.write(folder / f"{name}.json")
    return record


def _written(folder: Path, name: str, limit: int) -> Callable[[list[str]], list[np.ndarray]]:
    """Gives documents of the pass before, in its order, instead of encoding them a second time."""
    kept, held = (iter_documents(Reader(folder / stem)) for stem in (name, f"{name}.heldout"))
    return lambda texts: [next(held if content_key(text) < limit else kept) for text in texts]


def _pass(
    name: str,
    read: Callable[[], Iterator[Text | BadLine]],
    vocab_size: int,
    encode: Callable[[list[str]], list[np.ndarray]],
    folder: Path,
    limit: int,
    on_text: Callable[[int], None],
) -> tuple[_Tally, int]:
    """One pass over the source; returns its counts and the largest token id."""
    (folder / f"{name}.json").unlink(missing_ok=True)  # the record of before describes other files from here on
    tally = _Tally()
    with ExitStack() as stack:
        quarantine = stack.enter_context(atomic_write(folder / f"{name}.quarantine.jsonl"))
        held = stack.enter_context(Writer(folder / f"{name}.heldout", vocab_size))
        kept = stack.enter_context(Writer(folder / name, vocab_size))
        for batch in _batches(read(), tally, quarantine):
            size = 0
            for text, tokens in zip(batch, encode(batch), strict=True):
                key = content_key(text)
                is_held = key < limit
                (held if is_held else kept).add(tokens)
                tally.count(key, len(tokens), is_held)
                size += len(text.encode())
            tally.documents += len(batch)
            tally.text_bytes += size
            on_text(size)
        _refuse_if_bad(name, tally)
    if not tally.bad:
        (folder / f"{name}.quarantine.jsonl").unlink()
    return tally, max(kept.max_token_id, held.max_token_id)


def _batches(documents: Iterator[Text | BadLine], tally: _Tally, quarantine: IO[bytes]) -> Iterator[list[str]]:
    batch, size = [], 0
    for document in documents:
        if isinstance(document, BadLine):
            tally.bad.append(document)
            tally.empty += document.empty
            entry = {"file": document.file, "line": document.line, "reason": document.reason}
            quarantine.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            continue
        batch.append(document.text)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _refuse_if_bad(name: str, tally: _Tally) -> None:
    bad = [b for b in tally.bad if not b.empty]
    lines = tally.documents + len(tally.bad)
    if len(bad) > QUARANTINE_FREE_LINES and len(bad) > lines * QUARANTINE_MAX_PERCENT / 100:
        raise DataError(
            f"source '{name}': {len(bad)} of {lines} lines are bad, more than {QUARANTINE_MAX_PERCENT:g} %; the first: {bad[0].file}, line "
            f"{bad[0].line}: {bad[0].reason}; repair the files, or set data.sources.{name}.text_key to the key that holds the text"
        )
    if tally.documents == 0:
        first = f"; the first bad line: {bad[0].file}, line {bad[0].line}: {bad[0].reason}" if bad else ""
        raise DataError(f"source '{name}' has no documents{first}; check data.sources.{name}.paths, or remove the source")


def adopt_indexed(
    name: str,
    prefix: Path,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    heldout_percent: float,
    min_heldout_tokens: int,
    inputs: str,
    files: list[InputFile],
) -> TokenizedRecord:
    """Take over a tokenized .bin/.idx pair by link: the source's .idx and held-out .idx are views of it, nothing is copied.

    Held out is by a hash of the document's token bytes. DataError when the pair does not fit the tokenizer.
    """
    reader = Reader(prefix)
    index = reader.index
    remedy = f"tokenize data.sources.{name} with the recipe's tokenizer, one sequence per document, end-of-document appended"
    expected = Writer(prefix, tokenizer.vocab_size).dtype
    if index.dtype != expected:
        raise DataError(
            f"{idx_path(prefix)}: dtype {index.dtype}, a vocabulary of {tokenizer.vocab_size} is stored as {expected}; {remedy}"
        )
    if index.documents != len(index.lengths):
        raise DataError(f"{idx_path(prefix)}: {len(index.lengths)} sequences in {index.documents} documents; {remedy}")
    if index.documents == 0:
        raise DataError(f"{idx_path(prefix)}: no documents; remove the source or give it data")
    keys, highest = np.empty(index.documents, dtype=np.uint64), -1
    for number in range(index.documents):
        tokens = reader[number]
        if tokens.size == 0 or tokens[-1] != tokenizer.eod_id:
            raise DataError(f"{bin_path(prefix)}: document {number} does not end with id {tokenizer.eod_id}; {remedy}")
        highest = max(highest, int(tokens.max()))
        keys[number] = int.from_bytes(hashlib.sha256(tokens.tobytes()).digest()[:8], "big")
    if highest >= tokenizer.vocab_size:
        raise DataError(f"{bin_path(prefix)}: token id {highest}, the vocabulary has {tokenizer.vocab_size} entries; {remedy}")
    limit = int(heldout_percent / 100 * 2**64)
    tally = _Tally(documents=index.documents)
    for key, length in zip(keys.tolist(), index.lengths.tolist(), strict=True):
        tally.count(key, length, key < limit)
    if tally.heldout_tokens < min_heldout_tokens:
        limit = tally.limit_for(min_heldout_tokens) or limit
    is_held = keys < np.uint64(limit)
    (folder / f"{name}.json").unlink(missing_ok=True)
    for stem, chosen in ((folder / name, ~is_held), (folder / f"{name}.heldout", is_held)):
        replace_symlink(bin_path(stem), str(bin_path(prefix).resolve()))
        index.select(np.flatnonzero(chosen)).write(idx_path(stem))
    kept, held = Index.read(idx_path(folder / name)), Index.read(idx_path(folder / f"{name}.heldout"))
    linked = record_file(bin_path(prefix))
    record = TokenizedRecord(
        inputs=inputs,
        source=name,
        tokenizer_sha256=tokenizer.digest,
        dtype=index.dtype.name,
        documents=kept.documents,
        tokens=kept.tokens,
        max_token_id=highest,
        bin=linked,
        idx=record_file(idx_path(folder / name)),
        heldout_documents=held.documents,
        heldout_tokens=held.tokens,
        heldout_bin=linked,
        heldout_idx=record_file(idx_path(folder / f"{name}.heldout")),
        text_bytes=0,
        empty_documents=0,
        quarantined_lines=0,
        files=files,
    )
    record.write(folder / f"{name}.json")
    return record


def is_current(record: TokenizedRecord | None, folder: Path, inputs: str, seen: dict[Path, str]) -> bool:
    """Whether the record was made from `inputs` and its files are still what it says (altered files are made again)."""
    if record is None or record.inputs != inputs:
        return False
    prefix, heldout = folder / record.source, folder / f"{record.source}.heldout"
    pairs = (
        (bin_path(prefix), record.bin),
        (idx_path(prefix), record.idx),
        (bin_path(heldout), record.heldout_bin),
        (idx_path(heldout), record.heldout_idx),
    )
    try:
        for path, expected in pairs:
            verify_file(path, expected, remedy="", seen=seen)
    except DataError:
        return False
    return True
