"""Text files to one Megatron .bin/.idx pair: resumable shard by shard, the same bytes whatever the workers, kills and block sizes."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from data_prep.blocks import BLOCK_BYTES, SHARD_BYTES, THREADS_PER_PROCESS, Piece, plan_shards, xxh3
from data_prep.encoder_choice import Choice, ControlTokens, choose, make_encoder, tokenizer_sha256, versions
from data_prep.encoders import Encoder
from data_prep.errors import DataError
from data_prep.indexed import bin_path, idx_path, optimal_dtype
from data_prep.merge import Merge, file_xxh3
from data_prep.plain_files import atomic_write, digest_of, exclusive_lock, remove_leftovers
from data_prep.progress import Progress, Silent
from data_prep.reading_process import Early
from data_prep.shards import Job, OnProgress, open_shard, run_in_worker, run_shard, start_worker
from data_prep.text_files import DAMAGED, MAX_BAD_FREE, MAX_BAD_PERCENT, is_packed, is_parquet
from data_prep.tokens_record import PieceRecord, TokenizedInput, TokensRecord, Written

VERSION = 1
"""Of the output; raise it when the same input would give other bytes."""
MEMORY_MB = 700
"""Of each process of up to THREADS_PER_PROCESS workers; a run with two workers then peaks below 800 MB."""
MEMORY_MB_MIN = 500
"""Less does not hold a tokenizer of 100,000 entries and the blocks under way."""
UNCOUNTED_MB = 350
"""A process may grow by this much (the words of the blocks under way) before its memory is looked at again, its reader's included."""
SAMPLE_FROM_BYTES = 1 << 30
"""Jobs of 1 GiB of input or more (10 seconds or more), and the first with a tokenizer, are proven on a sample before they begin."""


class TokenizerLike(Protocol):
    """What tokenizing has to know of a tokenizer; data_prep.tokenizer's and tokenizer_facts' are such."""

    kind: str
    path: Path
    vocab_size: int
    eod_id: int


@dataclass(frozen=True)
class InputStat:
    """An input file as it was found."""

    path: str
    bytes: int
    mtime_ns: int


def record_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".json")


def quarantine_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".quarantine.jsonl")


def tokenize_files(
    paths: Sequence[Path],
    tokenizer: TokenizerLike,
    prefix: Path,
    *,
    text_key: str = "text",
    append_eod: bool = True,
    workers: int = 1,
    control_tokens: ControlTokens = "as_text",
    memory_mb: int = MEMORY_MB,
    max_bad_percent: float = MAX_BAD_PERCENT,
    max_bad_free: int = MAX_BAD_FREE,
    max_damaged_files: int = 0,
    shard_bytes: int = SHARD_BYTES,
    what: str = "",
    progress: Progress | None = None,
    early: Early | None = None,
) -> TokensRecord:
    """Tokenize `paths` (JSON lines, plain, .gz or .zst, and Parquet), in order, into <prefix>.bin/.idx and <prefix>.json.

    Every document is one sequence, followed by the end-of-document id (`append_eod`). Lines that are no document are listed in
    <prefix>.quarantine.jsonl; DataError when there are more than `max_bad_free` and `max_bad_percent` of them, and no output then. So
    is it for more than `max_damaged_files` files that cannot be read to their end, of which nobody knows how much is missing.
    `control_tokens`: a document that spells a control token gets its id (as_ids, what Megatron's preprocess_data.py does, which also
    adds what the tokenizer's post-processor adds), or ordinary tokens (as_text).

    `workers` threads encode, in processes of up to eight, each of up to `memory_mb` MB. A killed run goes on where it was; output that
    is up to date and intact is left alone. `what` names the job in messages; `early` has begun to read, perhaps.
    """
    progress = progress or Silent()
    if not prefix.name:
        raise DataError(f"--output {prefix}: no name to which .bin and .idx could be added; use e.g. {prefix / 'tokens'}")
    if not 0 <= max_bad_percent <= 100:
        raise DataError(f"--max-bad-percent is {max_bad_percent:g}; use a number from 0 to 100")
    if memory_mb < MEMORY_MB_MIN:
        raise DataError(f"a memory budget of {memory_mb} MB per process is too small; give it at least {MEMORY_MB_MIN}")
    inputs = _inputs(paths)
    if append_eod and tokenizer.eod_id is None:
        raise DataError(
            f"{tokenizer.path}: the tokenizer names no end-of-document token; add eos_token to its tokenizer_config.json"
        )
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with _only_writer(prefix, progress):
        file = tokenizer.path / "tokenizer.json" if tokenizer.path.is_dir() else tokenizer.path
        sha256 = tokenizer_sha256(file)
        settings = digest_of(
            {
                "version": VERSION,
                "tokenizer": sha256,
                "vocab_size": tokenizer.vocab_size,
                "eod_id": tokenizer.eod_id if append_eod else None,
                "control_tokens": control_tokens,
                "text_key": text_key,
            }
        )
        digest = digest_of({"settings": settings, "files": [[file.path, file.bytes] for file in inputs]})
        folder = prefix.with_name(prefix.name + ".shards")
        found = _current(prefix, digest, inputs)
        if found is not None:
            if folder.exists():  # killed after the record was written
                Merge(str(folder), settings, [], bin_path(prefix)).remove_folder()
            return found
        run = _Run(
            prefix=prefix,
            name=what or str(prefix),
            inputs=inputs,
            digest=digest,
            progress=progress,
            limit=(max_bad_percent, max_bad_free, max_damaged_files),
            plan=plan_shards([(file.path, file.bytes) for file in inputs], shard_bytes),
            workers=workers,
            early=early or Early(),
        )
        job = Job(
            choice=Choice(tokenizer.kind, str(file), sha256, control_tokens, False),
            text_key=text_key,
            vocab_size=tokenizer.vocab_size,
            eod_id=tokenizer.eod_id if append_eod else None,
            dtype=optimal_dtype(tokenizer.vocab_size).name,
            folder=str(folder),
            settings=settings,
            threads=1,
            memory_bytes=(memory_mb - UNCOUNTED_MB) << 20,
        )
        return run.run(job)


@contextlib.contextmanager
def _only_writer(prefix: Path, progress: Progress) -> Iterator[None]:
    """Another process that writes the same prefix waits. The lock file goes away with the work."""
    path = prefix.with_name(f".{prefix.name}.lock")
    while True:
        with exclusive_lock(path, lambda holder: progress.message(f"waiting for process {holder}, which writes {prefix}")):
            # The one before may have removed the file that was waited for; a lock counts only while its file has its name.
            if path.exists() and path.read_text(encoding="utf-8").strip() == str(os.getpid()):
                try:
                    yield
                finally:
                    path.unlink()
                return


class _Run:
    """One call of tokenize_files that has something to do."""

    def __init__(
        self,
        *,
        prefix: Path,
        name: str,
        inputs: list[InputStat],
        digest: str,
        progress: Progress,
        limit: tuple[float, int, int],
        plan: list[list[Piece]],
        workers: int,
        early: Early,
    ) -> None:
        self.prefix, self.name, self.inputs, self.digest = prefix, name, inputs, digest
        self.progress, self.limit, self.plan, self.early = progress, limit, plan, early
        self.processes = max(1, min(-(-workers // THREADS_PER_PROCESS), len(plan)))
        self.threads = max(1, workers // self.processes)
        self.encoder: Encoder | None = None

    def run(self, job: Job) -> TokensRecord:
        # gigatoken's and tokenizers' threads are counted once, when the first work comes.
        os.environ["RAYON_NUM_THREADS"] = str(self.threads)
        folder = Path(job.folder)
        folder.mkdir(exist_ok=True)
        remove_leftovers(folder)
        record_path(self.prefix).unlink(missing_ok=True)  # it would describe other files from here on
        merge = Merge(job.folder, job.settings, self.plan, bin_path(self.prefix))
        merge.resume(self._unchanged)
        todo = [number for number in range(len(self.plan)) if number not in merge.records]
        total = sum(file.bytes for file in self.inputs)
        job = replace(job, threads=self.threads)
        if len(todo) < len(self.plan):
            self.progress.message(f"{self.name}: {len(self.plan) - len(todo)} of {len(self.plan)} shards are done already")
        choice = choose(job.choice.kind, Path(job.choice.path), job.choice.control_tokens)
        if choice.gigatoken and todo and (choice.seconds or total >= SAMPLE_FROM_BYTES):
            from data_prep.sample_check import prove_on_sample

            self.encoder = make_encoder(choice, job.text_key, self.threads, job.memory_bytes)
            choice = prove_on_sample(choice, self.encoder, [file.path for file in self.inputs], job.text_key)
            if not choice.gigatoken:
                self.encoder = None
        if choice.why_not_slow:
            self.progress.message(f"{self.name}: without gigatoken, {choice.why_not_slow}; this takes many times longer")
        job = replace(job, choice=choice)
        with self.progress.step(f"tokens of {self.name}", total) as done:
            finished = set(range(len(self.plan))) - set(todo)
            done(sum(piece.end - piece.start for number in finished for piece in self.plan[number]))
            merge.join()
            (self._here if self.processes == 1 else self._in_processes)(job, todo, merge, done)
        return self._finish(job, merge)

    def _here(self, job: Job, todo: list[int], merge: Merge, done: OnProgress) -> None:
        def encoder() -> Encoder:
            if self.encoder is None:
                self.encoder = make_encoder(job.choice, job.text_key, self.threads, job.memory_bytes)
            return self.encoder

        for number in todo:
            pieces = self.plan[number]
            reader = self.early.take(pieces, job.text_key, as_text=job.as_text)
            reader = reader or open_shard(job, pieces, is_first=self.encoder is None)
            merge.add(number, run_shard(job, number, reader, encoder, done))

    def _in_processes(self, job: Job, todo: list[int], merge: Merge, done: OnProgress) -> None:
        # Imported here, as elsewhere in this package what only some runs need: a start takes as long as it takes to encode 30 MB.
        import multiprocessing
        from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait

        self.encoder = None  # its memory is the workers' now
        context = multiprocessing.get_context("spawn")
        counts = context.SimpleQueue()
        with ProcessPoolExecutor(
            self.processes, mp_context=context, initializer=start_worker, initargs=(self.threads, counts, os.getpid())
        ) as pool:
            running: dict[Future[Any], int] = {
                pool.submit(run_in_worker, job, number, self.plan[number]): number for number in todo
            }
            try:
                while running:
                    finished, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                    while not counts.empty():
                        done(*counts.get())
                    for future in finished:
                        merge.add(running.pop(future), future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _finish(self, job: Job, merge: Merge) -> TokensRecord:
        records = [merge.records[number] for number in range(len(self.plan))]
        bad: Counter[str] = Counter()
        routed: Counter[str] = Counter()
        for record in records:
            bad.update(record.bad)
            routed.update(record.reference_documents)
        documents = sum(record.documents for record in records)
        empty = bad["empty document"]
        quarantine = quarantine_path(self.prefix)
        with atomic_write(quarantine) as f:
            first = merge.write_quarantine(f, [file.path for file in self.inputs])
        if not bad.total():
            quarantine.unlink()
        self._refuse(documents, bad.total() - empty, empty, bad[DAMAGED], first)
        bin_file, idx_file = bin_path(self.prefix), idx_path(self.prefix)
        idx_file.unlink(missing_ok=True)  # the one of before would describe another .bin for a moment
        merge.sync()
        os.replace(merge.merged, bin_file)
        merge.write_index(idx_file, job.dtype)
        choice = job.choice
        made = versions()
        library = "gigatoken" if choice.gigatoken else "tokenizers" if choice.kind == "huggingface" else "sentencepiece"
        final = TokensRecord(
            inputs=self.digest,
            tokenizer_kind=choice.kind,
            tokenizer_sha256=choice.sha256,
            vocab_size=job.vocab_size,
            eod_id=job.eod_id,
            control_tokens=choice.control_tokens,
            text_key=job.text_key,
            encoder=f"{library} {made[library]}",
            why_not_gigatoken=choice.why_not or None,
            dtype=job.dtype,
            documents=documents,
            tokens=sum(record.tokens for record in records),
            max_token_id=max(record.max_token_id for record in records),
            text_bytes=sum(record.text_bytes for record in records),
            control_tokens_in_text=sum(record.control_tokens for record in records),
            reference_documents=dict(sorted(routed.items())),
            bad=dict(sorted(bad.items())),
            empty_documents=empty,
            quarantined_lines=bad.total() - empty,
            files=[TokenizedInput(**asdict(file)) for file in self.inputs],
            shards=[record.pieces for record in records],
            bin=Written(bytes=merge.bytes, xxh3=merge.xxh3),
            idx=Written(bytes=idx_file.stat().st_size, xxh3=file_xxh3(idx_file)),
        )
        final.write(record_path(self.prefix))
        merge.remove_folder()
        return final

    def _refuse(self, documents: int, bad: int, empty: int, damaged: int, first: dict[str, Any] | None) -> None:
        lines = documents + bad + empty
        percent, free, files = self.limit
        where = f"{first['file']}, line {first['line']}: {first['reason']}" if first else ""
        if damaged > files:
            self._leave_no_output()
            raise DataError(
                f"{self.name}: {damaged} of {len(self.inputs)} files cannot be read to their end, and nobody knows what is missing; they are "
                f"listed as damaged in {quarantine_path(self.prefix)}; restore them, leave them out of the input, or take what can be "
                f"read of them (--max-damaged-files {damaged})"
            )
        if bad > free and bad > lines * percent / 100:
            self._leave_no_output()
            raise DataError(
                f"{self.name}: {bad} of {lines} lines are bad, more than {percent:g} %; the first: {where}; all are listed in "
                f"{quarantine_path(self.prefix)}; repair the files, name the key that holds the text (--text-key, or text_key of the "
                "source), or allow more (--max-bad-percent)"
            )
        if documents == 0:
            self._leave_no_output()
            raise DataError(
                f"{self.name} has no documents{f'; the first bad line: {where}' if first else ''}; check the paths of the input"
            )

    def _leave_no_output(self) -> None:
        """Of an earlier run with other input too: it would be taken for this one's. Finished shards stay, for a higher limit."""
        for path in (idx_path(self.prefix), bin_path(self.prefix)):
            path.unlink(missing_ok=True)

    def _unchanged(self, was: PieceRecord, piece: Piece) -> bool:
        """Whether a piece holds what a finished shard was made of."""
        return (was.file, was.start, was.end) == (piece.file, piece.start, piece.end) and piece_digest(piece) == was.xxh3


def _inputs(paths: Sequence[Path]) -> list[InputStat]:
    if not paths:
        raise DataError("there are no input files; name at least one")
    inputs, seen = [], {}
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such file; check the input paths")
        stat = path.stat()
        other = seen.setdefault((stat.st_dev, stat.st_ino), path)
        if other is not path:
            raise DataError(f"{path} and {other} are the same file; name each input once")
        inputs.append(InputStat(str(path), stat.st_size, stat.st_mtime_ns))
    return inputs


def piece_digest(piece: Piece) -> str:
    """XXH3 of a piece as BlockReader records it."""
    digest = xxh3()
    for data in _piece_bytes(piece):
        digest.update(data)
    return digest.hexdigest()


def _piece_bytes(piece: Piece) -> Iterator[bytes]:
    path = Path(piece.path)
    whole = is_packed(path) or is_parquet(path)
    with open(path, "rb") as f:
        position = piece.start
        if position:
            f.seek(position - 1)
            position += len(f.readline()) - 1
        end = os.fstat(f.fileno()).st_size if whole else piece.end
        while position < end:
            data = f.read(BLOCK_BYTES)
            if not data:
                return
            if position + len(data) >= end:
                newline = data.find(b"\n", max(0, end - 1 - position))
                if newline < 0:
                    data += f.readline()
                else:
                    data = data[: newline + 1]
                yield data
                return
            position += len(data)
            yield data


def is_intact(prefix: Path, record: TokensRecord) -> bool:
    """Whether the .bin/.idx pair is what its record says; reads both."""
    for path, written in ((bin_path(prefix), record.bin), (idx_path(prefix), record.idx)):
        if not path.is_file() or path.stat().st_size != written.bytes or file_xxh3(path) != written.xxh3:
            return False
    return True


def _current(prefix: Path, digest: str, inputs: list[InputStat]) -> TokensRecord | None:
    """The record, when it was made of the same input and its files are intact."""
    if not record_path(prefix).exists():
        return None
    record = TokensRecord.read_if_valid(record_path(prefix))
    if record is None or record.inputs != digest:
        return None
    files = [TokenizedInput(**asdict(file)) for file in inputs]
    changed = {number for number, (was, now) in enumerate(zip(record.files, files, strict=True)) if was != now}
    for shard in record.shards:
        for piece in shard:
            if piece.file in changed:
                now = Piece(inputs[piece.file].path, piece.file, piece.start, piece.end)
                if piece_digest(now) != piece.xxh3:
                    return None
    if not is_intact(prefix, record):
        return None
    if changed:
        record = replace(record, files=files)
        record.write(record_path(prefix))
    return record
