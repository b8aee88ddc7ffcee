"""The text of each source: built from what this installation has, or found under the user's paths; what it is, by digest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from data_prep import corpus
from data_prep.errors import DataError
from data_prep.files import atomic_write, digest_of, record_file, verify_file
from data_prep.indexed import bin_path, idx_path
from data_prep.progress import Progress
from data_prep.records import CorpusRecord, InputFile, TokenizedRecord
from data_prep.text_files import BadLine, Text, expand, read_documents
from recipes.schema import Recipe, Source


def threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def corpus_path(root: Path, name: str) -> Path:
    return root / "corpus" / f"{name}.jsonl"


def _corpus_inputs(source: Source) -> str:
    return digest_of(
        {
            "builder": source.builder,
            "max_bytes": source.max_bytes,
            "code": corpus.code_digest(),
            "environment": corpus.environment(),
        }
    )


def build_corpus(root: Path, name: str, source: Source, inputs: str) -> CorpusRecord:
    """Write corpus/<name>.jsonl and its record; runs in a worker process."""
    path = corpus_path(root, name)
    documents = size = 0
    with atomic_write(path) as f:
        for document in corpus.build(source.builder or "", source.max_bytes):
            f.write(json.dumps({"id": document.id, "text": document.text}, ensure_ascii=False).encode() + b"\n")
            documents += 1
            size += len(document.text.encode())
    if documents == 0:
        raise DataError(
            f"builder '{source.builder}' of data.sources.{name} found no documents; run `make setup` to install its material"
        )
    record = CorpusRecord(
        inputs=inputs, source=name, builder=source.builder or "", documents=documents, text_bytes=size, file=record_file(path)
    )
    record.write(root / "corpus" / f"{name}.json")
    return record


def build_builtin(recipe: Recipe, root: Path, progress: Progress, seen: dict[Path, str]) -> None:
    """Build the sources of kind builtin that are missing, changed or altered, on all cores."""
    sources = {name: s for name, s in recipe.data.sources.items() if s.kind == "builtin"}
    inputs = {name: _corpus_inputs(source) for name, source in sources.items()}
    todo = [name for name in sources if not _corpus_current(root, name, inputs[name], seen)]
    if not todo:
        return
    with progress.step(f"corpus ({len(todo)} sources)", None) as done:
        if len(todo) == 1 or threads() == 1:
            for name in todo:
                done(build_corpus(root, name, sources[name], inputs[name]).text_bytes)
        else:
            # spawn: the caller may have threads, which fork does not survive
            with ProcessPoolExecutor(min(threads(), len(todo)), mp_context=get_context("spawn")) as pool:
                running = [pool.submit(build_corpus, root, name, sources[name], inputs[name]) for name in todo]
                for future in as_completed(running):
                    done(future.result().text_bytes)
        _refuse_shared_documents(root, list(sources))


def _corpus_current(root: Path, name: str, inputs: str, seen: dict[Path, str]) -> bool:
    record = CorpusRecord.read_if_valid(root / "corpus" / f"{name}.json")
    if record is None or record.inputs != inputs:
        return False
    try:
        verify_file(corpus_path(root, name), record.file, remedy="", seen=seen)
    except DataError:
        return False
    return True


def _refuse_shared_documents(root: Path, names: list[str]) -> None:
    """A document in two sources would be held out of one and trained on in the other."""
    owner: dict[bytes, str] = {}
    for name in names:
        for document in read_documents(corpus_path(root, name), "text"):
            if isinstance(document, Text):
                other = owner.setdefault(hashlib.sha256(document.text.encode()).digest(), name)
                if other != name:
                    raise DataError(
                        f"sources '{other}' and '{name}' share a document that begins {document.text[:60]!r}; give them different builders"
                    )


def source_paths(name: str, source: Source) -> list[Path]:
    """Files of a source, or the .bin and .idx of an indexed one; DataError for a pattern that matches none."""
    if source.kind == "indexed":
        if len(source.paths) != 1:
            raise DataError(
                f"data.sources.{name}.paths has {len(source.paths)} entries; an indexed source is one prefix without .bin/.idx"
            )
        prefix = Path(source.paths[0])
        found = {str(bin_path(prefix)), str(idx_path(prefix))}
        missing = [path for path in sorted(found) if not Path(path).is_file()]
        if missing:
            raise DataError(f"data.sources.{name}.paths: {missing[0]} does not exist; name the prefix of a .bin/.idx pair")
        return [Path(path) for path in sorted(found)]
    return expand(source.paths, f"data.sources.{name}.paths")


def _input_files(paths: list[Path], before: TokenizedRecord | None) -> list[InputFile]:
    """Digests of the files; those whose size and time are unchanged are not read again."""
    known = {file.path: file for file in before.files} if before else {}

    def described(path: Path) -> InputFile:
        stat, old = path.stat(), known.get(str(path))
        if old is not None and (old.record.bytes, old.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
            return old
        return InputFile(path=str(path), mtime_ns=stat.st_mtime_ns, record=record_file(path))

    with ThreadPoolExecutor(threads()) as pool:  # hashlib releases the interpreter's lock
        return list(pool.map(described, paths))


@dataclass(frozen=True)
class Content:
    """The text of a source at some step of its preparation."""

    paths: tuple[Path, ...]
    """Text files in their order; the .bin and .idx of an indexed source."""
    text_key: str
    identity: object
    """Equal for equal text; JSON."""
    size_bytes: int
    given: list[InputFile]
    """The user's files that it began with (kinds files and indexed)."""

    def documents(self) -> Iterator[Text | BadLine]:
        """A pass over the text, file by file."""
        return _read(self.paths, self.text_key)


def content_of(root: Path, name: str, source: Source) -> Content:
    """What a source holds now. Every byte of the user's files is read once, on all cores; unchanged files are not read again."""
    if source.kind == "builtin":
        made = CorpusRecord.read_if_valid(root / "corpus" / f"{name}.json")
        assert made is not None, "the corpus step left no record"
        return Content((corpus_path(root, name),), "text", made.file.sha256, made.text_bytes, [])
    paths = source_paths(name, source)
    given = _input_files(paths, TokenizedRecord.read_if_valid(root / "tokenized" / f"{name}.json"))
    identity = {"kind": source.kind, "text_key": source.text_key, "files": [[f.path, f.record.sha256] for f in given]}
    return Content(tuple(paths), source.text_key, identity, sum(f.record.bytes for f in given), given)


def documents(root: Path, name: str, source: Source) -> Iterator[Text | BadLine]:
    """A pass over a source's text as it was found, before any cleaning."""
    if source.kind == "builtin":
        return _read((corpus_path(root, name),), "text")
    return _read(source_paths(name, source), source.text_key)


def _read(paths: Iterable[Path], text_key: str) -> Iterator[Text | BadLine]:
    for path in paths:
        yield from read_documents(path, text_key)
