"""Whole repositories as documents: the files of a source, grouped by repository, in the order of their imports, one document each.

    <destination>.work/plan.json               what the work was begun with; other inputs begin anew
    <destination>.work/split/<group>/<bucket>  files of the repositories of a bucket, as one group of input files has them
    <destination>.work/parts/<bucket>.jsonl    the documents of a bucket, with a record beside it
    <destination>, <destination stem>.json     all of them, and last the record; the work folder goes

A repository's files may lie anywhere in the input, which may be larger than memory: they are dealt to buckets by a hash of the
repository's name, then each bucket is sorted by itself. Memory holds what the files of one bucket are called and refer to, and the text
of one document. Buckets are ranges of the hash and repositories come in its order, so that neither their number nor that of the
processes shows in the result. Every step is left alone when its output is there, so a killed run goes on where it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, Literal

from pydantic import Field

from data_prep import dependency_order
from data_prep.errors import DataError
from data_prep.files import FileRecord, Strict, atomic_write, digest_of, record_file, verify_file, write_json
from data_prep.optional import need
from data_prep.progress import Progress, Silent
from data_prep.records import Record
from data_prep.text_files import MAX_BAD_FREE, MAX_BAD_PERCENT, BadLine, is_packed, is_parquet, keys_of, read_documents
from recipes.schema import Source

VERSION = 1
"""Raise it when the same files would give other documents."""
MAX_DOCUMENT_BYTES = 16 << 20
"""A longer repository is split at a boundary of files. 16 MiB are some five million tokens, ten times the longest sequence; readers
refuse lines of JSON that are much longer, and a process holds such a text several times over."""
BUCKET_BYTES = 256 << 20
MAX_BUCKETS = 256
"""Text of one bucket, roughly; a billion bytes of code are about 200,000 files, whose names and references take 100 MB. Every process
has as many files open as there are buckets."""
UNPACKED = 5
"""Bytes of text per byte of a packed file of code, roughly; only decides how many buckets there are."""

Count = Annotated[int, Field(ge=0)]


class ConcatenatedRecord(Record):
    """What a concatenation left."""

    format: Literal["quarry.concatenated/1"] = "quarry.concatenated/1"
    source: str
    repositories: Count
    documents: Count
    """More than repositories where long ones were split."""
    source_files: Count
    """Files of repositories that are in the documents."""
    repeated_files: Count
    """Files left out because their repository had the path already."""
    references: Count
    """From a file to another of its repository, as far as they were understood."""
    references_cut: Count
    """Of these, not kept because they close a cycle."""
    text_bytes: Count
    quarantined_lines: Count
    """Input lines that are no file of a repository; each is in the quarantine file with its reason."""
    quarantine: FileRecord | None
    file: FileRecord


def record_path(destination: Path) -> Path:
    return destination.with_suffix(".json")


def quarantine_path(destination: Path) -> Path:
    return destination.with_suffix(".quarantine.jsonl")


def concatenate(
    files: Sequence[Path],
    source: Source,
    destination: Path,
    *,
    name: str,
    identity: object,
    text_key: str | None = None,
    workers: int = 1,
    progress: Progress | None = None,
    max_bad_percent: float = MAX_BAD_PERCENT,
    max_bad_free: int = MAX_BAD_FREE,
) -> ConcatenatedRecord:
    """Write the repositories of `files` to `destination` (.jsonl), one {"id", "text"} a line; returns at once when that is done.

    `files`: JSON lines (plain, gz, zst) or Parquet, whose lines have source.repository_key, source.path_key and `text_key` (None:
    source.text_key); of a path that a repository has twice the first counts. `identity`: equal for equal files, as JSON (digests).
    `name`: the source's, for messages. DataError when more than `max_bad_free` lines and `max_bad_percent` of them are bad; they are in
    the quarantine file then too.
    """
    progress = progress or Silent()
    text_key = text_key or source.text_key
    content = digest_of(
        {
            "version": [VERSION, dependency_order.VERSION, MAX_DOCUMENT_BYTES],
            "files": identity,
            "keys": [source.repository_key, source.path_key, text_key],
        }
    )
    inputs = digest_of({"content": content, "limit": [max_bad_percent, max_bad_free]})
    before = ConcatenatedRecord.read_if_valid(record_path(destination))
    if before is not None and before.inputs == inputs and _intact(destination, before):
        if _work(destination).exists():  # killed after the record was written
            shutil.rmtree(_work(destination))
        return before
    record_path(destination).unlink(missing_ok=True)
    keys = _Keys(source.repository_key, source.path_key, text_key)
    plan = _begin(destination, files, content, workers)
    work = _work(destination)
    with progress.step(f"files of {name} by repository", sum(path.stat().st_size for path in files)) as done:
        tasks = [
            _SplitTask(work, group, [Path(f) for f in members], keys, plan.buckets) for group, members in enumerate(plan.groups)
        ]
        split = _run(_split, tasks, workers, lambda counts: done(counts["bytes"]))
    bad = sum(counts["bad"] for counts in split)
    quarantine = _write_quarantine(destination, plan, bad)
    if damaged := sum(counts.get("damaged", 0) for counts in split):
        raise DataError(
            f"data.sources.{name}: {damaged} of {len(files)} files cannot be read to their end, and nobody knows what is missing; they are "
            f"listed in {quarantine_path(destination)}; restore them, or leave them out of data.sources.{name}.paths"
        )
    _refuse(name, destination, sum(counts["lines"] for counts in split), bad, max_bad_percent, max_bad_free)
    with progress.step(f"repositories of {name}", sum(counts["text_bytes"] for counts in split)) as done:
        tasks = [_JoinTask(work, bucket, len(plan.groups)) for bucket in range(plan.buckets)]
        joined = _run(_join, tasks, workers, lambda counts: done(counts["text_bytes"]))
    with atomic_write(destination) as out:
        for bucket in range(plan.buckets):
            with open(_part(work, bucket), "rb") as f:
                shutil.copyfileobj(f, out, 1 << 20)
    total: Counter[str] = Counter()
    for counts in joined:
        total.update(counts)
    record = ConcatenatedRecord(
        inputs=inputs,
        source=name,
        repositories=total["repositories"],
        documents=total["documents"],
        source_files=total["source_files"],
        repeated_files=total["repeated_files"],
        references=total["references"],
        references_cut=total["references_cut"],
        text_bytes=total["text_bytes"],
        quarantined_lines=bad,
        quarantine=quarantine,
        file=record_file(destination),
    )
    record.write(record_path(destination))
    shutil.rmtree(work)
    return record


def _intact(destination: Path, record: ConcatenatedRecord) -> bool:
    try:
        verify_file(destination, record.file, remedy="")
        if record.quarantine is not None:
            verify_file(quarantine_path(destination), record.quarantine, remedy="")
    except DataError:
        return False
    return True


def _refuse(name: str, destination: Path, lines: int, bad: int, max_percent: float, max_free: int) -> None:
    if bad > max_free and bad > lines * max_percent / 100:
        with open(quarantine_path(destination), "rb") as f:
            first = json.loads(f.readline())
        raise DataError(
            f"data.sources.{name}: {bad} of {lines} lines are no file of a repository, more than {max_percent:g} %; the first: "
            f"{first['file']}, line {first['line']}: {first['reason']}; all are in {quarantine_path(destination)}. Repair the files, or "
            f"set data.sources.{name}.repository_key, path_key and text_key to the keys that they have"
        )


# --- the work --------------------------------------------------------------------------------------------------------------------


class _Plan(Strict):
    """How the work is divided; decided once, so that a run that goes on divides it the same way."""

    content: str
    """Digest of what goes into the documents."""
    buckets: Annotated[int, Field(gt=0)]
    groups: list[list[str]]
    """Input files of each group, in the order of the input."""


def _work(destination: Path) -> Path:
    return destination.with_name(destination.name + ".work")


def _begin(destination: Path, files: Sequence[Path], content: str, workers: int) -> _Plan:
    """The plan of the run that was killed, where it had the same inputs; otherwise a new one and an empty folder."""
    work = _work(destination)
    with contextlib.suppress(FileNotFoundError, ValueError):
        plan = _Plan.model_validate_json((work / "plan.json").read_bytes())
        if plan.content == content:
            return plan
    shutil.rmtree(work, ignore_errors=True)
    size = sum(path.stat().st_size * (UNPACKED if is_packed(path) or is_parquet(path) else 1) for path in files)
    buckets = min(MAX_BUCKETS, 1 << (size // BUCKET_BYTES).bit_length())
    count = max(1, min(workers, len(files)))
    bounds = [len(files) * i // count for i in range(count + 1)]
    plan = _Plan(content=content, buckets=buckets, groups=[[str(f) for f in files[a:b]] for a, b in itertools.pairwise(bounds)])
    write_json(work / "plan.json", plan.model_dump(mode="json"))
    return plan


def _run(
    function: Callable[[Any], dict[str, int]], tasks: Sequence[Any], workers: int, done: Callable[[dict[str, int]], None]
) -> list[dict[str, int]]:
    """Results in the order of the tasks; `done` sees each as it comes."""
    results: list[dict[str, int]] = [{}] * len(tasks)
    if min(workers, len(tasks)) <= 1:
        for number, task in enumerate(tasks):
            results[number] = function(task)
            done(results[number])
        return results
    # spawn: the caller may have threads, which fork does not survive
    with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(function, task): number for number, task in enumerate(tasks)}
        for future in as_completed(running):
            results[running[future]] = future.result()
            done(future.result())
    return results


def _write_quarantine(destination: Path, plan: _Plan, bad: int) -> FileRecord | None:
    path = quarantine_path(destination)
    if not bad:
        path.unlink(missing_ok=True)
        return None
    with atomic_write(path) as out:
        for group in range(len(plan.groups)):
            with open(_group(_work(destination), group) / "quarantine.jsonl", "rb") as f:
                shutil.copyfileobj(f, out)
    return record_file(path)


# --- first pass: files to buckets --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Keys:
    repository: str
    path: str
    text: str


@dataclass(frozen=True)
class _SplitTask:
    work: Path
    group: int
    files: list[Path]
    keys: _Keys
    buckets: int


def _group(work: Path, group: int) -> Path:
    return work / "split" / f"{group:05}"


def _bucket_of(repository: str, buckets: int) -> int:
    """By the leading bits of the hash that repositories are sorted by."""
    return int.from_bytes(_hash(repository)[:8], "big") * buckets >> 64


def _hash(repository: str) -> bytes:
    return hashlib.sha256(repository.encode()).digest()


def _split(task: _SplitTask) -> dict[str, int]:
    """Write the files of one group into its buckets: a line of JSON with repository, path and size, then the text and a line end."""
    folder = _group(task.work, task.group)
    finished = folder / "counts.json"  # written last
    if finished.is_file():
        return json.loads(finished.read_bytes())
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    dumps = need("orjson").dumps
    counts = dict.fromkeys(("bytes", "lines", "bad", "damaged", "text_bytes"), 0)
    with contextlib.ExitStack() as stack:
        buckets = [stack.enter_context(open(folder / f"{bucket:03}", "wb")) for bucket in range(task.buckets)]
        quarantine = stack.enter_context(open(folder / "quarantine.jsonl", "wb"))
        for path in task.files:
            for found in _read(path, task.keys):
                counts["lines"] += 1
                if isinstance(found, BadLine):
                    counts["bad"] += 1
                    counts["damaged"] += found.damaged
                    entry = {"file": found.file, "line": found.line, "reason": found.reason}
                    quarantine.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
                    continue
                repository, name, text = found
                content = text.encode()
                out = buckets[_bucket_of(repository, task.buckets)]
                out.write(dumps([repository, name, len(content)]) + b"\n" + content + b"\n")
                counts["text_bytes"] += len(content)
            counts["bytes"] += path.stat().st_size
        for file in (*buckets, quarantine):
            file.flush()
            os.fsync(file.fileno())
    write_json(finished, counts)
    return counts


def _read(path: Path, keys: _Keys) -> Iterator[tuple[str, str, str] | BadLine]:
    """(repository, path, text) of the lines of a file; empty files are left out, there is nothing to read in them."""
    number = 0  # where bad lines were, and one more for each good one: right but for blank lines in between
    for found in read_documents(path, keys.text, columns=(keys.repository, keys.path)):
        if isinstance(found, BadLine):
            number = found.line
            if not found.empty:
                yield found
            continue
        number += 1
        values = found.record or {}
        missing = next((key for key in (keys.repository, keys.path) if not _is_name(values.get(key))), None)
        if missing is not None:
            yield BadLine(str(path), number, f"no '{missing}' that is text; keys: {keys_of(values)}")
            continue
        inside = values[keys.path].replace("\\", "/").lstrip("/")
        yield values[keys.repository], inside, found.text


def _is_name(value: object) -> bool:
    """Text that can be written: not empty, no lone surrogate (JSON can spell one)."""
    return isinstance(value, str) and value.strip("/\\") != "" and not any("\ud800" <= c <= "\udfff" for c in value)


# --- second pass: buckets to documents ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _JoinTask:
    work: Path
    bucket: int
    groups: int


@dataclass(frozen=True)
class _File:
    """A file of a repository, without its text."""

    group: int
    offset: int
    size: int
    references: dependency_order.References


def _part(work: Path, bucket: int) -> Path:
    return work / "parts" / f"{bucket:03}.jsonl"


def _join(task: _JoinTask) -> dict[str, int]:
    """Write the documents of one bucket, repositories in the order of their hash."""
    part = _part(task.work, task.bucket)
    finished = part.with_suffix(".json")  # written last
    if finished.is_file():
        return json.loads(finished.read_bytes())
    dumps = need("orjson").dumps
    counts = dict.fromkeys(
        ("repositories", "documents", "source_files", "repeated_files", "references", "references_cut", "text_bytes"), 0
    )
    with contextlib.ExitStack() as stack:
        splits = [
            stack.enter_context(open(_group(task.work, group) / f"{task.bucket:03}", "rb")) for group in range(task.groups)
        ]
        repositories = _index(splits, counts)
        out = stack.enter_context(atomic_write(part))
        for repository in sorted(repositories, key=_hash):
            files = repositories[repository]
            order = dependency_order.dependency_order({path: file.references for path, file in files.items()})
            counts["repositories"] += 1
            counts["source_files"] += len(files)
            counts["references"] += order.references
            counts["references_cut"] += order.cut
            documents = _documents([(path, files[path]) for path in order.paths])
            for number, members in enumerate(documents, 1):
                text = _document(repository, members, splits, f", part {number} of {len(documents)}" * (len(documents) > 1))
                identifier = repository if len(documents) == 1 else f"{repository}#{number}"
                out.write(dumps({"id": identifier, "text": text}) + b"\n")
                counts["documents"] += 1
                counts["text_bytes"] += len(text.encode())
    write_json(finished, counts)
    return counts


def _index(splits: Sequence[IO[bytes]], counts: dict[str, int]) -> dict[str, dict[str, _File]]:
    """Repository -> path -> file of a bucket; texts are read for what they refer to, and left where they are."""
    found: dict[str, dict[str, _File]] = {}
    for group, split in enumerate(splits):
        while header := split.readline():
            repository, path, size = json.loads(header)
            offset = split.tell()
            files = found.setdefault(repository, {})
            if path in files:
                counts["repeated_files"] += 1
                split.seek(size + 1, os.SEEK_CUR)
                continue
            references = dependency_order.references(path, split.read(size).decode())
            files[path] = _File(group, offset, size, references)
            split.seek(1, os.SEEK_CUR)
    return found


def _documents(files: list[tuple[str, _File]]) -> list[list[tuple[str, _File]]]:
    """The files of a repository in documents of at most MAX_DOCUMENT_BYTES, each of at least one file."""
    documents: list[list[tuple[str, _File]]] = []
    size = 0
    for path, file in files:
        if not documents or size + file.size > MAX_DOCUMENT_BYTES:
            documents.append([])
            size = 0
        documents[-1].append((path, file))
        size += file.size
    return documents


def _document(repository: str, files: list[tuple[str, _File]], splits: Sequence[IO[bytes]], part: str) -> str:
    """As the built-in corpus has them (data_prep/corpus/code.py): each file under a line with its path."""
    blocks = []
    for path, file in files:
        splits[file.group].seek(file.offset)
        blocks.append(f"# file: {path}\n{splits[file.group].read(file.size).decode().rstrip()}\n")
    return f"# repository: {repository}{part}\n\n" + "\n".join(blocks)
