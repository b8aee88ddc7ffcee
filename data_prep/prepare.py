"""The whole preparation, idempotent: text, cleaning, tokenizer, tokens, held-out sets, views of every phase.

Each step looks at what its inputs are now and at the record of its last run; equal inputs and intact files are left alone, anything
else is made again. Every file is written under a temporary name and records come last, so a killed run leaves nothing half true.
"""

from __future__ import annotations

from pathlib import Path

from data_prep import corpus, plan, split, tokenizer, views
from data_prep.concatenate import concatenate
from data_prep.errors import DataError
from data_prep.files import exclusive_lock, remove_leftovers
from data_prep.heldout import build_heldout, heldout_inputs, tokens_needed
from data_prep.indexed import bin_path
from data_prep.manifest import HeldoutManifest, TokenizerRecord, heldout_path, is_current
from data_prep.overlap import refuse_overlaps, refuse_same_content
from data_prep.progress import Progress, Silent
from data_prep.records import TokenizedRecord
from data_prep.sources import Content, build_builtin, content_of, source_paths, threads
from data_prep.tokenize_files import tokenize_files
from data_prep.tokenizer_step import make_tokenizer
from recipes.schema import Recipe


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
        if (root / "clean").is_dir():
            from data_prep.clean.submitted import refuse_while_jobs_run

            refuse_while_jobs_run(root)
        remove_leftovers(root)
        seen: dict[Path, str] = {}
        contents = _found(recipe, root, progress, seen)
        contents = _cleaned(recipe, root, contents, progress)
        contents = _concatenated(recipe, root, contents, progress)
        given, description = make_tokenizer(recipe, root, contents, progress)
        records = {name: _tokens(recipe, root, name, contents[name], given, progress, seen) for name in recipe.data.sources}
        _funnel(recipe, root, given, records)
        _heldout(recipe, root, records, description, progress, seen)
        _views(recipe, root, records, description, progress, seen)


def check(recipe: Recipe) -> None:
    """Refusals that need no data, all at once, one a line."""
    data = recipe.data
    problems = []
    for name, source in data.sources.items():
        key = f"data.sources.{name}"
        if not name.replace("_", "").replace("-", "").isalnum():
            problems.append(f"{key}: the name becomes a file name; use letters, digits, '-' and '_'")
        if source.kind == "builtin" and source.builder not in corpus.BUILDERS:
            problems.append(f"{key}.builder is {source.builder!r}; the builders are {', '.join(sorted(corpus.BUILDERS))}")
        if source.concatenate is not None and source.kind != "files":
            problems.append(
                f"{key}.concatenate is {source.concatenate}, the kind {source.kind}; only sources of kind files have repositories to join"
            )
        if source.kind != "builtin" and not source.paths:
            problems.append(
                f"{key}.paths is empty; name files or glob patterns (files), or one prefix without .bin/.idx (indexed)"
            )
    if not data.heldout_percent < 100:
        problems.append(f"data.heldout_percent is {data.heldout_percent:g}: nothing would be left to train on; use e.g. 0.1")
    if data.tokenizer.vocab_size > recipe.model.vocab_size:
        problems.append(
            f"data.tokenizer.vocab_size is {data.tokenizer.vocab_size}, model.vocab_size {recipe.model.vocab_size}; "
            "the tokenizer may not be larger than the model's embedding: lower the one or raise the other"
        )
    for name in recipe.stages:
        if name in recipe.phase:
            try:
                plan.weights(data, name, recipe.phase[name])
            except DataError as error:
                problems.append(str(error))
    if data.cleaning is not None:
        from data_prep.clean import check as check_cleaning

        try:
            check_cleaning(recipe)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))


# --- text -----------------------------------------------------------------------------------------------------------------------


def _found(recipe: Recipe, root: Path, progress: Progress, seen: dict[Path, str]) -> dict[str, Content]:
    """The text of all sources as it is found; DataError where two sources share some of it."""
    sources = recipe.data.sources
    paths = {name: source_paths(name, source) for name, source in sources.items() if source.kind != "builtin"}
    refuse_overlaps(recipe.data, paths)
    build_builtin(recipe, root, progress, seen)
    contents = {name: content_of(root, name, source) for name, source in sources.items()}
    refuse_same_content({name: content.given for name, content in contents.items()})
    return contents


def _cleaned(recipe: Recipe, root: Path, contents: dict[str, Content], progress: Progress) -> dict[str, Content]:
    """The contents after data.cleaning; sources that come tokenized are as they are."""
    if recipe.data.cleaning is None:
        return contents
    from data_prep.clean import clean
    from data_prep.clean.inputs import text_of

    texts = {
        name: text_of(recipe, name, content)
        for name, content in contents.items()
        if recipe.data.sources[name].kind != "indexed"
    }
    cleaned = {
        name: Content(
            paths=tuple(root / file.path for file in record.files),
            text_key="text",
            identity=[file.record.sha256 for file in record.files],
            size_bytes=record.bytes,
            given=contents[name].given,
        )
        for name, record in clean(recipe, root, texts, progress, threads()).items()
    }
    return contents | cleaned


def _concatenated(recipe: Recipe, root: Path, contents: dict[str, Content], progress: Progress) -> dict[str, Content]:
    """The contents with whole repositories as documents, where a source asks for that."""
    joined = {}
    for name, source in recipe.data.sources.items():
        if source.concatenate is None:
            continue
        content, path = contents[name], root / "concatenated" / f"{name}.jsonl"
        record = concatenate(
            content.paths,
            source,
            path,
            name=name,
            identity=content.identity,
            text_key=content.text_key,
            workers=threads(),
            progress=progress,
        )
        joined[name] = Content((path,), "text", record.file.sha256, record.text_bytes, content.given)
    return contents | joined


# --- tokens ----------------------------------------------------------------------------------------------------------------------


def _tokens(
    recipe: Recipe,
    root: Path,
    name: str,
    content: Content,
    given: tokenizer.Tokenizer,
    progress: Progress,
    seen: dict[Path, str],
) -> TokenizedRecord:
    """Tokenize one source if its text, the tokenizer or the held-out share changed: tokens/ has all of it, tokenized/ its two parts."""
    source, folder = recipe.data.sources[name], root / "tokenized"
    before = TokenizedRecord.read_if_valid(folder / f"{name}.json")
    settings = {"heldout_percent": recipe.data.heldout_percent, "min_heldout_tokens": tokens_needed(recipe.data)}
    inputs = split.split_inputs(given, *settings.values(), content.identity)
    if split.is_current(before, folder, inputs, seen):
        return before
    counts = {}
    if source.kind == "indexed":
        prefix = Path(source.paths[0])
    else:
        prefix = root / "tokens" / name
        tokens = tokenize_files(
            content.paths,
            given,
            prefix,
            text_key=content.text_key,
            workers=threads(),
            what=f"source '{name}'",
            progress=progress,
        )
        counts = {
            "text_bytes": tokens.text_bytes,
            "empty_documents": tokens.empty_documents,
            "quarantined_lines": tokens.quarantined_lines,
        }
    with progress.step(f"held-out part of {name}", bin_path(prefix).stat().st_size) as done:
        return split.split_heldout(
            name,
            prefix,
            given,
            folder,
            **settings,
            inputs=inputs,
            files=content.given,
            workers=threads(),
            on_bytes=done,
            **counts,
        )


def _funnel(recipe: Recipe, root: Path, given: tokenizer.Tokenizer, records: dict[str, TokenizedRecord]) -> None:
    """The report of the cleaning, which counts tokens and so comes after them."""
    if recipe.data.cleaning is None:
        return
    from data_prep.clean.funnel import write_funnel

    kept = {
        name: record.tokens + record.heldout_tokens - record.documents - record.heldout_documents  # without end tokens
        for name, record in records.items()
        if recipe.data.sources[name].concatenate is None  # otherwise tokens of headings are among them
    }
    write_funnel(recipe, root, given, threads=threads(), kept_tokens=kept)


# --- held-out sets and views -----------------------------------------------------------------------------------------------------


def _heldout(
    recipe: Recipe,
    root: Path,
    records: dict[str, TokenizedRecord],
    description: TokenizerRecord,
    progress: Progress,
    seen: dict[Path, str],
) -> None:
    if not is_current(HeldoutManifest, heldout_path(root), root, heldout_inputs(recipe.data, records, description), seen):
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
    views.update_views(root, recipe, records, description, workers=threads(), progress=progress, seen=seen)
