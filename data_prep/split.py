"""Each tokenized source parted into training and held-out documents, by a hash of their tokens; both are views of the one .bin.

A document is held out by its content alone, so the same one is held out of every source and whatever else changes.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import DataError
from data_prep.files import digest_of, record_file, replace_symlink, verify_file
from data_prep.indexed import Index, Reader, bin_path, idx_path, optimal_dtype
from data_prep.progress import Done
from data_prep.records import InputFile, TokenizedRecord
from data_prep.tokenizer import Tokenizer

VERSION = 2
"""Of this module's output; raise it when the same tokens would be parted otherwise."""
LOWEST_KEPT = 1024
"""Documents with the smallest hashes: the next to be held out when chance held out too little."""
HELDOUT_MAX_SHARE = 0.2
"""A small source gives up to a fifth of its tokens to reach the held-out minimum (or one document, if that is more)."""
PART_BYTES = 64 << 20
"""Of the .bin read as one piece of work."""
PART_DOCUMENTS = 1 << 17
PROCESSES_FROM_BYTES = 256 << 20
"""Below this, starting processes (0.3 s each) costs more than they save."""


def split_inputs(tokenizer: Tokenizer, heldout_percent: float, min_heldout_tokens: int, content: Any) -> str:
    """Digest of what the two parts of a source are made from; `content` describes the source's text."""
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


def split_heldout(
    name: str,
    prefix: Path,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    heldout_percent: float,
    min_heldout_tokens: int,
    inputs: str,
    files: list[InputFile],
    text_bytes: int = 0,
    empty_documents: int = 0,
    quarantined_lines: int = 0,
    workers: int = 1,
    on_bytes: Done | None = None,
) -> TokenizedRecord:
    """Write <folder>/<name>.idx and <name>.heldout.idx, views of <prefix>.bin (linked as <name>.bin), and last <name>.json.

    Every document is one sequence that ends with the end-of-document id. Where `heldout_percent` of the hashes leaves fewer than
    `min_heldout_tokens`, the documents with the next smallest hashes are held out too. Links inside the data root (`folder`'s parent)
    are relative. `on_bytes` is told the bytes read. DataError when the pair does not fit the tokenizer.
    """
    index = _checked_index(name, prefix, tokenizer)
    limit = int(heldout_percent / 100 * 2**64)
    with ThreadPoolExecutor(1) as pool:  # digests of the whole file meanwhile: hashing leaves Python's lock alone
        linked = pool.submit(record_file, bin_path(prefix))
        keys, highest = content_keys(prefix, index, tokenizer, name, workers, on_bytes)
        held_tokens = int(index.lengths[keys < np.uint64(limit)].sum(dtype=np.int64))
        if held_tokens < min_heldout_tokens:
            limit = _limit_for(keys, index.lengths, min_heldout_tokens) or limit
        is_held = keys < np.uint64(limit)
        record_json = folder / f"{name}.json"
        record_json.unlink(missing_ok=True)  # the record of before describes other files from here on
        for stem, chosen in ((folder / name, ~is_held), (folder / f"{name}.heldout", is_held)):
            replace_symlink(bin_path(stem), link_target(bin_path(stem), bin_path(prefix), folder.parent))
            index.select(np.flatnonzero(chosen)).write(idx_path(stem))
        bin_record = linked.result()
    kept_tokens, held_tokens = (int(index.lengths[chosen].sum(dtype=np.int64)) for chosen in (~is_held, is_held))
    record = TokenizedRecord(
        inputs=inputs,
        source=name,
        tokenizer_sha256=tokenizer.digest,
        dtype=index.dtype.name,
        documents=int((~is_held).sum()),
        tokens=kept_tokens,
        max_token_id=highest,
        bin=bin_record,
        idx=record_file(idx_path(folder / name)),
        heldout_documents=int(is_held.sum()),
        heldout_tokens=held_tokens,
        heldout_bin=bin_record,
        heldout_idx=record_file(idx_path(folder / f"{name}.heldout")),
        text_bytes=text_bytes,
        empty_documents=empty_documents,
        quarantined_lines=quarantined_lines,
        files=files,
    )
    record.write(record_json)
    return record


def _remedy(name: str) -> str:
    return f"tokenize data.sources.{name} with the recipe's tokenizer, one sequence per document, end-of-document appended"


def _checked_index(name: str, prefix: Path, tokenizer: Tokenizer) -> Index:
    _same_tokenizer(name, prefix.with_name(f"{prefix.name}.json"), tokenizer)
    index = Reader(prefix).index
    expected = optimal_dtype(tokenizer.vocab_size)
    if index.dtype != expected:
        raise DataError(
            f"{idx_path(prefix)}: dtype {index.dtype}, a vocabulary of {tokenizer.vocab_size} is stored as {expected}; {_remedy(name)}"
        )
    if index.documents != len(index.lengths):
        raise DataError(f"{idx_path(prefix)}: {len(index.lengths)} sequences in {index.documents} documents; {_remedy(name)}")
    if index.documents == 0:
        raise DataError(f"{idx_path(prefix)}: no documents; remove the source or give it data")
    return index


def _same_tokenizer(name: str, record: Path, tokenizer: Tokenizer) -> None:
    """Where a record of `quarry tokenize` lies beside the pair: ids of another tokenizer may all be below the vocabulary, too."""
    try:
        values = json.loads(record.read_bytes())
    except (FileNotFoundError, ValueError):
        return
    theirs = values.get("tokenizer_sha256", tokenizer.digest) if isinstance(values, dict) else tokenizer.digest
    if theirs != tokenizer.digest:
        raise DataError(
            f"{record}: made with another tokenizer (SHA-256 {theirs}; that of {tokenizer.path} is {tokenizer.digest}); {_remedy(name)}"
        )


def link_target(link: Path, target: Path, root: Path) -> str:
    """What a link has to say: relative when the file that it ends at lies below `root`, so that the root can be moved."""
    resolved = target.resolve()
    if resolved.is_relative_to(root.resolve()):
        return os.path.relpath(resolved, link.parent.resolve())
    return str(resolved)


# --- keys ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """Documents [begin, end) of a pair, for one piece of work."""

    prefix: str
    begin: int
    end: int
    eod_id: int


def content_keys(
    prefix: Path, index: Index, tokenizer: Tokenizer, name: str, workers: int, on_bytes: Done | None = None
) -> tuple[np.ndarray, int]:
    """(key of each document, uint64 [documents], from the SHA-256 of its tokens as they lie in the .bin; the largest token id).

    DataError when a document does not end with the end-of-document id or holds an id outside of the vocabulary.
    """
    keys, highest = np.empty(index.documents, dtype=np.uint64), -1
    work = list(_parts(prefix, index, tokenizer.eod_id))
    several = workers > 1 and index.tokens * index.dtype.itemsize >= PROCESSES_FROM_BYTES and len(work) > 1
    if several:
        with ProcessPoolExecutor(min(workers, len(work)), mp_context=multiprocessing.get_context("spawn")) as pool:
            results = zip(work, pool.map(_keys_of, work), strict=True)
            for part, (found, largest, bad) in results:
                highest = max(highest, _take(part, found, largest, bad, keys, prefix, tokenizer, name, index, on_bytes))
    else:
        for part in work:
            highest = max(highest, _take(part, *_keys_of(part), keys, prefix, tokenizer, name, index, on_bytes))
    return keys, highest


def _take(
    part: _Part,
    found: np.ndarray,
    largest: int,
    bad: int | None,
    keys: np.ndarray,
    prefix: Path,
    tokenizer: Tokenizer,
    name: str,
    index: Index,
    on_bytes: Done | None,
) -> int:
    if bad is not None:
        raise DataError(f"{bin_path(prefix)}: document {bad} does not end with id {tokenizer.eod_id}; {_remedy(name)}")
    if largest >= tokenizer.vocab_size:
        raise DataError(
            f"{bin_path(prefix)}: token id {largest}, the vocabulary has {tokenizer.vocab_size} entries; {_remedy(name)}"
        )
    keys[part.begin : part.end] = found
    if on_bytes is not None:
        on_bytes(int(index.lengths[part.begin : part.end].sum(dtype=np.int64)) * index.dtype.itemsize)
    return largest


def _parts(prefix: Path, index: Index, eod_id: int) -> Iterator[_Part]:
    """Pieces of at most PART_DOCUMENTS documents and about PART_BYTES."""
    for first in range(0, index.documents, PART_DOCUMENTS):
        last = min(first + PART_DOCUMENTS, index.documents)
        ends = np.cumsum(index.lengths[first:last], dtype=np.int64) * index.dtype.itemsize
        begin = 0
        while begin < last - first:
            before = int(ends[begin - 1]) if begin else 0
            end = max(begin + 1, int(np.searchsorted(ends, before + PART_BYTES, side="right")))
            yield _Part(str(prefix), first + begin, first + end, eod_id)
            begin = end


def _keys_of(part: _Part) -> tuple[np.ndarray, int, int | None]:
    """(keys, largest token id, first document that does not end as it should) of a part; runs in a worker process."""
    index = Index.map(idx_path(Path(part.prefix)))
    lengths = np.array(index.lengths[part.begin : part.end], dtype=np.int64)
    starts = np.array(index.offsets[part.begin : part.end], dtype=np.int64)
    keys = np.empty(len(lengths), dtype=np.uint64)
    size = index.dtype.itemsize
    if not lengths.all():
        return keys, -1, part.begin + int(np.argmin(lengths))
    tokens = np.memmap(bin_path(Path(part.prefix)), dtype=index.dtype, mode="r")
    unended = np.flatnonzero(tokens[starts // size + lengths - 1] != part.eod_id)
    if len(unended):
        return keys, -1, part.begin + int(unended[0])
    raw, sha256, digests = memoryview(tokens).cast("B"), hashlib.sha256, []
    for start, end in zip(starts.tolist(), (starts + lengths * size).tolist(), strict=True):
        digests.append(sha256(raw[start:end]).digest()[:8])
    keys[:] = np.frombuffer(b"".join(digests), ">u8")
    in_order = bool((starts[1:] == starts[:-1] + lengths[:-1] * size).all())
    if in_order:
        highest = int(tokens[starts[0] // size : starts[-1] // size + lengths[-1]].max())
    else:
        highest = max(
            int(tokens[s // size : s // size + n].max()) for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)
        )
    return keys, highest, None


def _limit_for(keys: np.ndarray, lengths: np.ndarray, min_tokens: int) -> int | None:
    """The limit below which keys hold `min_tokens`, or None where that is more than HELDOUT_MAX_SHARE of the source."""
    lowest = np.argsort(keys, kind="stable")[:LOWEST_KEPT] if len(keys) <= LOWEST_KEPT else _lowest(keys)
    total, held = int(lengths.sum(dtype=np.int64)), 0
    for number, document in enumerate(lowest.tolist(), 1):
        held += int(lengths[document])
        if number >= len(keys) or (number > 1 and held > total * HELDOUT_MAX_SHARE):
            return None
        if held >= min_tokens:
            return int(keys[document]) + 1
    return None


def _lowest(keys: np.ndarray) -> np.ndarray:
    some = np.argpartition(keys, LOWEST_KEPT)[:LOWEST_KEPT]
    return some[np.argsort(keys[some], kind="stable")]


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
