"""One shard of a tokenizing job: read, encode and write at the same time; its files appear whole, its record last.

Three stages run side by side: a process (or thread) reads, checks and digests blocks, threads keep the tokenizer's threads busy (while
one block's last document is finished the next block runs), and the calling thread writes in order. Memory is bounded by the number of
blocks that are read ahead and of those under way.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import queue
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_prep.blocks import BLOCK_BYTES, LINE_BITS, Piece, Stopped, xxh3
from data_prep.encoder_choice import Choice, make_encoder
from data_prep.encoders import Encoded, Encoder
from data_prep.errors import DataError
from data_prep.plain_files import canonical_json, temporary_name
from data_prep.reading_process import BLOCKS_AHEAD, BLOCKS_ONCE, Reader, open_reader
from data_prep.tokens_record import PieceRecord, ShardRecord

CALLS = (2, 4)
"""Fewest and most blocks that are encoded at a time, otherwise one per thread of gigatoken's: before and behind each call Python works."""
WAITING_BLOCKS = 2
"""Encoded ones that wait for an earlier one."""
SPARE_TOKENS = 2 << 20
"""Of an output array that is used again and again; blocks have fewer, but for those with a long document, whose arrays are given back."""
LARGE_CHARS = 16 << 20
"""Blocks with a document of this size are encoded one at a time: each takes ten times its size in memory."""
SWITCH_SECONDS = 5e-4
"""How long a thread may keep the interpreter while others want it. Of a block's 70 ms Python's 5 ms are
too many for a thread that would give the next block to idle cores; worth 1% of a run."""
IOV_MAX = 1024
"""Buffers of one writev (Linux)."""
WRITEBACK_BYTES = 32 << 20
SYNC_FILE_RANGE_WRITE = 2

OnProgress = Callable[[int, int, int], None]
"""Called with (bytes of input, documents, tokens) since the last call."""


@dataclass(frozen=True)
class Job:
    """What all shards of a job have in common; can be handed to another process."""

    choice: Choice
    text_key: str
    vocab_size: int
    eod_id: int | None
    """Appended to every document; None: nothing is."""
    dtype: str
    folder: str
    """Where the files of shards lie."""
    settings: str
    """Digest of all that the output depends on, the input left out."""
    threads: int
    memory_bytes: int

    @property
    def as_text(self) -> bool:
        """Whether blocks have to be read as text, not as lines."""
        return not self.choice.gigatoken or self.choice.normalizer is not None


def xxh3_of(data: Any) -> str:
    digest = xxh3()
    digest.update(data)
    return digest.hexdigest()


def stem(folder: str, number: int) -> Path:
    return Path(folder) / f"{number:06d}"


@contextlib.contextmanager
def _new(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears when it is complete. It need not be on disk then: who finds it compares its digest with the record's."""
    try:
        with open(temporary_name(path), "wb") as f:
            yield f
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)  # a failed write does not say of what
        raise
    os.replace(temporary_name(path), path)


def _start_writeback(f: IO[bytes]) -> None:
    """Let the disk begin with what was written, so that the sync in the end finds little left to do (Linux's sync_file_range)."""
    ctypes.CDLL(None).sync_file_range(f.fileno(), ctypes.c_int64(0), ctypes.c_int64(0), SYNC_FILE_RANGE_WRITE)


def open_shard(job: Job, pieces: list[Piece], *, is_first: bool) -> Reader:
    """What run_shard takes. `is_first`: the tokenizer is yet to be loaded."""
    return open_reader(pieces, job.text_key, BLOCKS_AHEAD, as_text=job.as_text, once=BLOCKS_ONCE if is_first else 0)


def run_shard(
    job: Job, number: int, reader: Reader, get_encoder: Callable[[], Encoder], on_progress: OnProgress
) -> ShardRecord:
    """Tokenize the pieces that `reader` reads into <folder>/<number>.*; closes the reader.

    `get_encoder` is called while the first blocks are being read.
    """
    pipeline = _Pipeline(job, reader)
    target = stem(job.folder, number)
    lengths: list[np.ndarray] = []
    bad: Counter[str] = Counter()
    routed: Counter[str] = Counter()
    bin_digest, bad_digest = xxh3(), xxh3()
    text_bytes = control = size = started = 0
    highest, item_bytes = -1, np.dtype(job.dtype).itemsize
    switch_seconds = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        pipeline.start()
        with _new(target.with_suffix(".bin")) as out, _new(target.with_suffix(".bad.jsonl")) as rejects:
            pipeline.encode_with(get_encoder())
            for done, block in pipeline.results():
                write_parts(out, block.parts)
                for part in block.parts:
                    bin_digest.update(part)
                lengths.append(block.counts)
                tokens = block.tokens
                text_bytes += done.text_bytes
                control += done.control_tokens
                routed.update(done.routed)
                size += tokens * item_bytes
                if size - started >= WRITEBACK_BYTES:
                    _start_writeback(out)
                    started = size
                highest = max(highest, block.highest)
                for place, reason in sorted(done.bad, key=lambda one: one[0]):  # some show when read, some when encoded
                    bad[reason.kind] += 1
                    entry = {
                        "piece": place >> LINE_BITS,
                        "line": place & ((1 << LINE_BITS) - 1),
                        "kind": reason.kind,
                        "reason": str(reason),
                    }
                    line = json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
                    rejects.write(line)
                    bad_digest.update(line)
                on_progress(done.read_bytes, len(block.counts), tokens)
                pipeline.spare(block)
            if highest >= job.vocab_size:
                raise DataError(
                    f"{job.choice.path}: token id {highest}, but the vocabulary has {job.vocab_size} entries; "
                    "the tokenizer's files contradict each other, make them again"
                )
    finally:
        pipeline.close()
        sys.setswitchinterval(switch_seconds)
    all_lengths = np.concatenate(lengths).astype("<i4") if lengths else np.zeros(0, "<i4")
    with _new(target.with_suffix(".lengths")) as f:
        f.write(all_lengths.data)
    record = ShardRecord(
        settings=job.settings,
        pieces=[
            PieceRecord(file=piece.file, start=piece.start, end=piece.end, xxh3=digest, lines=lines)
            for piece, digest, lines in zip(reader.pieces, reader.digests, reader.lines, strict=True)
        ],
        documents=len(all_lengths),
        tokens=size // item_bytes,
        text_bytes=text_bytes,
        max_token_id=highest,
        bytes=size,
        xxh3=bin_digest.hexdigest(),
        lengths_xxh3=xxh3_of(all_lengths.data),
        bad=dict(sorted(bad.items())),
        bad_xxh3=bad_digest.hexdigest(),
        reference_documents=dict(sorted(routed.items())),
        control_tokens=control,
    )
    with _new(target.with_suffix(".json")) as f:
        f.write(canonical_json(record.as_json()))
    return record


@dataclass
class _Done:
    """What is said of a block that was encoded; its tokens go beside it."""

    bad: list[tuple[int, Any]]
    text_bytes: int
    routed: Counter[str]
    control_tokens: int
    read_bytes: int


class _Pipeline:
    """Threads from a reader to packed tokens in order."""

    def __init__(self, job: Job, reader: Reader) -> None:
        self.job, self.reader = job, reader
        self.calls = min(max(job.threads, CALLS[0]), CALLS[1])
        under_way = self.calls + WAITING_BLOCKS
        self._blocks: queue.Queue[Any] = queue.Queue()
        self._results: queue.Queue[Any] = queue.Queue()
        self._spare: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        self._slots = threading.Semaphore(under_way)
        self._ahead = threading.Semaphore(under_way)
        self._large = threading.Semaphore(1)
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        self._run(self._read)

    def encode_with(self, encoder: Encoder) -> None:
        for _ in range(self.calls):
            self._run(lambda: self._encode(encoder))

    def results(self) -> Any:
        """(_Done, Packed) of every block, in order; raises what a thread raised."""
        waiting: dict[int, tuple[_Done, Packed]] = {}
        following, ended = 0, 0
        while ended < self.calls:
            item = self._results.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                ended += 1
                continue
            waiting[item[0]] = item[1:]
            while following in waiting:
                yield waiting.pop(following)
                self._slots.release()
                following += 1

    def spare(self, block: Packed) -> None:
        """Take back the memory of what was written: fresh memory costs the kernel as much as the copy into it."""
        base = None if block.spare is None else block.spare.base
        if isinstance(base, np.ndarray) and len(base) == SPARE_TOKENS:
            self._spare.put(base)

    def _memory(self, size: int) -> np.ndarray:
        """An array of `size` tokens with any content."""
        try:
            base = self._spare.get_nowait()
        except queue.Empty:
            base = np.empty(0, dtype=self.job.dtype)
        if len(base) < size:
            base = np.empty(max(size, SPARE_TOKENS), dtype=self.job.dtype)
        return base[:size]

    def close(self) -> None:
        """End the threads, also when they have not finished."""
        self._stopped.set()
        self._slots.release(self.calls)
        self._ahead.release()
        self._large.release()
        self.reader.stop()
        for _ in range(self.calls):
            self._blocks.put(None)
        for thread in self._threads:
            thread.join()
        self.reader.close()

    def _run(self, work: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                work()
            except Stopped:
                pass  # close() asked for it
            except BaseException as error:
                self._results.put(error)

        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _read(self) -> None:
        for number, block in enumerate(self.reader.blocks()):
            if block.extra_bytes > BLOCK_BYTES:
                self._ahead.acquire()  # texts that lie in no buffer
            if block.extra_bytes > LARGE_CHARS:
                self._large.acquire()
            if self._stopped.is_set():
                return
            self._blocks.put((number, block))
        for _ in range(self.calls):
            self._blocks.put(None)

    def _encode(self, encoder: Encoder) -> None:
        while True:
            self._slots.acquire()  # before a block is taken, so that the blocks under way are those that follow next
            item = self._blocks.get()
            if item is None or self._stopped.is_set():
                break
            number, block = item
            encoded = encoder.encode(block)
            self.reader.release(block)
            large, ahead = block.extra_bytes > LARGE_CHARS, block.extra_bytes > BLOCK_BYTES
            block.extra.clear()
            tokens = packed(encoded, self.job, self._memory)
            done = _Done(encoded.bad, encoded.text_bytes, encoded.routed, encoded.control_tokens, block.read_bytes)
            self._results.put((number, done, tokens))
            del item, block, encoded, tokens, done
            if ahead:
                self._ahead.release()
            if large:
                self._large.release()
        self._results.put(None)


@dataclass
class Packed:
    """What is written of a block."""

    counts: np.ndarray
    """int64 [documents]: tokens of each, added ones too."""
    parts: list[memoryview]
    """The tokens in order, as they lie in memory: in one piece, or a piece per document and addition, which the kernel joins."""
    highest: int
    """Largest token id, -1 where there is none."""
    spare: np.ndarray | None = None
    """Memory to be used again once this is written."""

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())


def packed(encoded: Encoded, job: Job, memory: Callable[[int], np.ndarray]) -> Packed:
    """The documents of a block with what stands before and behind each added, in the dtype of the .bin.

    `memory` gives an array of a size in that dtype.
    """
    out_dtype = np.dtype(job.dtype)
    before = np.array(job.choice.prefix, dtype=job.dtype)
    behind = np.array([*job.choice.suffix, *(() if job.eod_id is None else (job.eod_id,))], dtype=job.dtype)
    added = len(before) + len(behind)
    ids, counts, spare = encoded.ids, encoded.counts, None
    documents = len(counts)
    if documents == 0:
        return Packed(counts, [], -1)
    if ids.dtype.itemsize == out_dtype.itemsize:
        ids = ids.view(out_dtype)  # vocabularies end far below 2^31
    highest = max((int(part.max()) for part in (encoded.ids, before, behind) if part.size), default=-1)
    if added and len(ids) <= 64 * documents:  # short documents: a mask over all tokens is faster than a piece for each
        out = spare = memory(len(ids) + documents * added)
        first = np.cumsum(counts) - counts + np.arange(documents) * added
        own = np.ones(len(out), dtype=bool)
        for offset, token in enumerate(before):
            own[first + offset] = False
            out[first + offset] = token
        for offset, token in enumerate(behind):
            own[first + len(before) + counts + offset] = False
            out[first + len(before) + counts + offset] = token
        out[own] = ids
        return Packed(counts + added, [out.data], highest, spare)
    if ids.dtype != out_dtype:
        spare = memory(len(ids))
        np.copyto(spare, ids, casting="unsafe")  # the largest is looked at before anything counts as done
        ids = spare
    if added == 0:
        return Packed(counts, [ids.data], highest, spare)
    # Joining them here would be one more copy of everything.
    content, start, parts = ids.data, 0, list[memoryview]()
    for end in np.cumsum(counts).tolist():
        if len(before):
            parts.append(before.data)
        parts.append(content[start:end])
        if len(behind):
            parts.append(behind.data)
        start = end
    return Packed(counts + added, parts, highest, spare)


def write_parts(f: IO[bytes], parts: list[memoryview]) -> None:
    """Write buffers one after the other, without joining them first."""
    f.flush()
    for some in itertools.batched(parts, IOV_MAX):
        size = sum(part.nbytes for part in some)
        written = os.writev(f.fileno(), some)
        if written < size:  # a signal came, or the disk is full: the next write says which
            f.write(b"".join(some)[written:])
            f.flush()


# --- several processes -----------------------------------------------------------------------------------------------------------

_encoder: Encoder | None = None
_progress: Any = None


def start_worker(threads: int, progress: Any, parent: int) -> None:
    """Initialize a worker process; `progress` is a queue for (bytes, documents, tokens)."""
    import signal

    global _progress
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    ctypes.CDLL(None).prctl(
        1, signal.SIGKILL
    )  # PR_SET_PDEATHSIG: no worker outlives a killed parent and writes beside the next run
    if os.getppid() != parent:
        os._exit(1)
    _progress = progress


def run_in_worker(job: Job, number: int, pieces: list[Piece]) -> ShardRecord:
    def encoder() -> Encoder:
        global _encoder
        if _encoder is None:
            _encoder = make_encoder(job.choice, job.text_key, job.threads, job.memory_bytes)
        return _encoder

    reader = open_shard(job, pieces, is_first=_encoder is None)
    return run_shard(job, number, reader, encoder, lambda *done: _progress.put(done))
