"""The whole preparation, idempotent: corpus, tokenizer, tokens, held-out sets, views of every phase.

Each step looks at what its inputs are now and at the record of its last run; equal inputs and intact files are left alone, anything
else is made again. Every file is written under a temporary name and records come last, so a killed run leaves nothing half true.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from data_prep import corpus, plan, tokenize, tokenizer, views
from data_prep.errors import DataError
from data_prep.files import atomic_write, digest_of, exclusive_lock, record_file, remove_leftovers, verify_file, write_bytes
from data_prep.heldout import build_heldout, current_heldout, heldout_inputs, tokens_needed
from data_prep.indexed import bin_path, idx_path
from data_prep.manifest import TokenizerRecord
from data_prep.progress import Progress, Silent
from data_prep.records import CorpusRecord, InputFile, TokenizedRecord, TokenizerFile
from recipes.schema import Recipe, Source


def prepare(recipe: Recipe, *, progress: Progress | None = None) -> None:
    """Make everything below recipe.data.root that the phases of `recipe` read; what is up to date is left alone.

    Only one process prepares a root at a time; another one waits. DataError for anything that a person has to decide.
    """
    progress = progress or Silent()
    root = Path(recipe.data.root)
    check(recipe)
    with exclusive_lock(
        root / ".lock", lambda holder: progress.message(f"waiting for process {holder}, which prepares {root}")
    ):
        remove_leftovers(root)
        seen: dict[Path, str] = {}
        _corpus(recipe, root, progress, seen)
        contents = {name: _content(root, name, source) for name, source in recipe.data.sources.items()}
        given, description = _tokenizer(recipe, root, contents, progress)
        records = {name: _tokens(recipe, root, name, contents[name], given, progress, seen) for name in recipe.data.sources}
        _heldout(recipe, root, records, description, progress, seen)
        _views(recipe, root, records, description, progress, seen)


def threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def check(recipe: Recipe) -> None:
    """Refusals that need no data."""
    data = recipe.data
    for name, source in data.sources.items():
        key = f"data.sources.{name}"
        if not name.replace("_", "").replace("-", "").isalnum():
            raise DataError(f"{key}: the name becomes a file name; use letters, digits, '-' and '_'")
        if source.kind == "builtin" and source.builder not in corpus.BUILDERS:
            raise DataError(f"{key}.builder is {source.builder!r}; the builders are {', '.join(sorted(corpus.BUILDERS))}")
        if source.kind != "builtin" and not source.paths:
            raise DataError(
                f"{key}.paths is empty; name files or glob patterns (files), or one prefix without .bin/.idx (indexed)"
            )
    if data.tokenizer.vocab_size > recipe.model.vocab_size:
        raise DataError(
            f"data.tokenizer.vocab_size is {data.tokenizer.vocab_size}, model.vocab_size {recipe.model.vocab_size}; "
            "the tokenizer may not be larger than the model's embedding: lower the one or raise the other"
        )
    for name in recipe.stages:
        if name in recipe.phase:
            plan.weights(data, name, recipe.phase[name])


# --- corpus ----------------------------------------------------------------------------------------------------------------------


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


def _corpus(recipe: Recipe, root: Path, progress: Progress, seen: dict[Path, str]) -> None:
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
        for document in tokenize.read_lines(corpus_path(root, name), "text"):
            if isinstance(document, tokenize.Text):
                other = owner.setdefault(hashlib.sha256(document.text.encode()).digest(), name)
                if other != name:
                    raise DataError(
                        f"sources '{other}' and '{name}' share a document that begins {document.text[:60]!r}; give them different builders"
                    )


# --- tokenizer -------------------------------------------------------------------------------------------------------------------


def _tokenizer(
    recipe: Recipe, root: Path, contents: dict[str, Content], progress: Progress
) -> tuple[tokenizer.Tokenizer, TokenizerRecord]:
    """Train the tokenizer or take over the given one, into tokenizer/; returns it and what manifests record of it."""
    spec = recipe.data.tokenizer
    folder = root / "tokenizer"
    target = folder / "tokenizer.model" if spec.kind == "sentencepiece" else folder
    record = TokenizerFile.read_if_valid(folder / "record.json")
    if spec.path is None:
        if spec.kind != "sentencepiece":
            raise DataError(
                "data.tokenizer.path is null, and only SentencePiece models are trained here; set the path, or kind=sentencepiece"
            )
        budgets = _training_budgets(recipe)
        inputs = digest_of(
            {
                "version": tokenizer.TRAINING_VERSION,
                "vocab_size": spec.vocab_size,
                "sample": {name: [size, contents[name].identity] for name, size in budgets.items()},
            }
        )
    else:
        given = tokenizer.load_tokenizer(Path(spec.path), spec.kind)
        budgets = None
        inputs = digest_of({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in given.files()})
    if not _tokenizer_current(record, inputs, target):
        taken = None
        with progress.step("tokenizer", None) as done:
            (folder / "record.json").unlink(missing_ok=True)
            if budgets is None:
                for file in given.files():
                    write_bytes(target if spec.kind == "sentencepiece" else folder / file.name, file.read_bytes())
            else:
                texts, taken = _training_sample(recipe, root, budgets)
                tokenizer.train(texts, spec.vocab_size, target)
                done(sum(taken.values()))
        loaded = tokenizer.load_tokenizer(target, spec.kind)
        record = TokenizerFile(
            inputs=inputs,
            kind=spec.kind,
            path=str(target.relative_to(root)),
            sha256=loaded.digest,
            vocab_size=loaded.vocab_size,
            eod_id=loaded.eod_id,
            special_ids=loaded.special_ids,
            trained_on=taken,
        )
        record.write(folder / "record.json")
    loaded = tokenizer.load_tokenizer(target, spec.kind)
    if loaded.vocab_size > spec.vocab_size:
        raise DataError(
            f"{spec.path}: {loaded.vocab_size} entries, data.tokenizer.vocab_size is {spec.vocab_size}; set it to {loaded.vocab_size} "
            "(and model.vocab_size to at least that)"
        )
    return loaded, TokenizerRecord(path=str(target.relative_to(root)), **tokenizer.describe(loaded))


def _tokenizer_current(record: TokenizerFile | None, inputs: str, target: Path) -> bool:
    if record is None or record.inputs != inputs:
        return False
    file = target / "tokenizer.json" if record.kind == "huggingface" else target
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == record.sha256


def _training_budgets(recipe: Recipe) -> dict[str, int]:
    """Source of the first phase -> bytes of its text to train the tokenizer on, in the shares of the phase's mixture."""
    spec = recipe.data.tokenizer
    if spec.train_max_bytes is None:
        raise DataError(
            "data.tokenizer.train_max_bytes is null; say how much text a tokenizer is trained on, for example 4000000"
        )
    first = next((name for name in recipe.stages if name in recipe.phase), None)
    if first is None:
        raise DataError("the recipe has no phase, so there is no data to train a tokenizer on; set data.tokenizer.path")
    shares = plan.weights(recipe.data, first, recipe.phase[first])
    for name in shares:
        if recipe.data.sources[name].kind == "indexed":
            raise DataError(
                f"data.sources.{name} is already tokenized, a tokenizer cannot be trained on it; "
                "set data.tokenizer.path to the tokenizer that it was made with"
            )
    return {name: int(weight * spec.train_max_bytes) for name, weight in shares.items()}


def _training_sample(recipe: Recipe, root: Path, budgets: dict[str, int]) -> tuple[list[str], dict[str, int]]:
    """Text up to the budget of each source, and the bytes taken of each."""
    texts: list[str] = []
    taken: dict[str, int] = {}
    for name, budget in budgets.items():
        part = list(tokenizer.sample(_texts(root, name, recipe.data.sources[name]), budget))
        taken[name] = sum(len(text.encode()) for text in part)
        texts += part
    return texts, taken


def _texts(root: Path, name: str, source: Source) -> Iterator[str]:
    return (d.text for d in _documents(root, name, source) if isinstance(d, tokenize.Text))


# --- tokens ----------------------------------------------------------------------------------------------------------------------


def _documents(root: Path, name: str, source: Source) -> Iterator[tokenize.Text | tokenize.BadLine]:
    """A pass over a source's text, file by file in the order of their names."""
    if source.kind == "builtin":
        yield from tokenize.read_lines(corpus_path(root, name), "text", f"corpus/{name}.jsonl")
    else:
        for path in source_paths(name, source):
            yield from tokenize.read_lines(path, source.text_key)


def source_paths(name: str, source: Source) -> list[Path]:
    """Files of a source, or the .bin and .idx of an indexed one; DataError for a pattern that matches none."""
    found: set[str] = set()
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
    for pattern in source.paths if source.kind == "files" else ():
        matched = glob.glob(pattern, recursive=True)
        if not matched:
            raise DataError(
                f"data.sources.{name}.paths: nothing matches '{pattern}' (from {Path.cwd()}); put the files there or change the path"
            )
        found.update(path for path in matched if os.path.isfile(path))
    return [Path(path) for path in sorted(found)]


def _input_files(paths: list[Path], before: TokenizedRecord | None) -> list[InputFile]:
    """Digests of the files; those whose size and time are unchanged are not read again."""
    known = {file.path: file for file in before.files} if before else {}
    files = []
    for path in paths:
        stat = path.stat()
        old = known.get(str(path))
        if old is None or (old.record.bytes, old.mtime_ns) != (stat.st_size, stat.st_mtime_ns):
            old = InputFile(path=str(path), mtime_ns=stat.st_mtime_ns, record=record_file(path))
        files.append(old)
    return files


@dataclass(frozen=True)
class Content:
    """What a source's text is, by digest."""

    identity: object
    """Equal for equal text."""
    size_bytes: int
    files: list[InputFile]
    """Kinds files and indexed."""


def _content(root: Path, name: str, source: Source) -> Content:
    if source.kind == "builtin":
        made = CorpusRecord.read_if_valid(root / "corpus" / f"{name}.json")
        assert made is not None, "the corpus step left no record"
        return Content(made.file.sha256, made.text_bytes, [])
    files = _input_files(source_paths(name, source), TokenizedRecord.read_if_valid(root / "tokenized" / f"{name}.json"))
    identity = {"kind": source.kind, "text_key": source.text_key, "files": [[f.path, f.record.sha256] for f in files]}
    return Content(identity, sum(f.record.bytes for f in files), files)


def _tokens(
    recipe: Recipe,
    root: Path,
    name: str,
    content: Content,
    given: tokenizer.Tokenizer,
    progress: Progress,
    seen: dict[Path, str],
) -> TokenizedRecord:
    """Tokenize one source if its text, the tokenizer or the held-out share changed."""
    source, folder = recipe.data.sources[name], root / "tokenized"
    before = TokenizedRecord.read_if_valid(folder / f"{name}.json")
    inputs = tokenize.tokenized_inputs(given, recipe.data.heldout_percent, tokens_needed(recipe.data), content.identity)
    if tokenize.is_current(before, folder, inputs, seen):
        return before
    with progress.step(f"tokens of {name}", content.size_bytes) as done:
        if source.kind == "indexed":
            return tokenize.adopt_indexed(
                name,
                Path(source.paths[0]),
                given,
                folder,
                heldout_percent=recipe.data.heldout_percent,
                min_heldout_tokens=tokens_needed(recipe.data),
                inputs=inputs,
                files=content.files,
            )
        return tokenize.tokenize_texts(
            name,
            lambda: _documents(root, name, source),
            given,
            folder,
            heldout_percent=recipe.data.heldout_percent,
            min_heldout_tokens=tokens_needed(recipe.data),
            inputs=inputs,
            files=content.files,
            threads=threads(),
            on_text=done,
        )


# --- held-out sets and views -----------------------------------------------------------------------------------------------------


def _heldout(
    recipe: Recipe,
    root: Path,
    records: dict[str, TokenizedRecord],
    description: TokenizerRecord,
    progress: Progress,
    seen: dict[Path, str],
) -> None:
    if not current_heldout(root, heldout_inputs(recipe.data, records, description), seen):
        with progress.step("held-out sets", None):
            build_heldout(root, recipe.data, records, description)


def _views(
    recipe: Recipe,
    root: Path,
    records: dict[str, TokenizedRecord],
    description: TokenizerRecord,
    progress: Progress,
    seen: dict[Path, str],
) -> None:
    phases = [name for name in recipe.stages if name in recipe.phase]
    todo = [
        name
        for name in phases
        if not views.current_view(root, name, views.view_inputs(recipe, name, records, description), seen)
    ]
    # Planned even when all views stand: data.max_epochs may have been lowered since.
    drawn = plan.plan(recipe, lambda source: views.source_lengths(root, source))
    if todo:
        with progress.step(f"views of {len(todo)} phases", None):
            for name in todo:
                views.build_view(root, recipe, name, drawn[name], records, description)
