"""Builds the views of the phases: an .idx per source that points into the source's one .bin, a link to it, and last the manifest.

Each source is gone through once for all phases that are to be built, block by block from its index into the views' files, so
that memory does not grow with the source; sources are spread over processes. A view has its pieces (data_prep/deal.py) one after the
other, and the documents of a piece in the source's order: Megatron shuffles them anyway, and no sort is needed.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.columns import Column, open_columns
from data_prep.deal import Hasher, Piece, blocks
from data_prep.errors import DataError
from data_prep.files import FileRecord, digest_of, record_file, replace_symlink, write_json
from data_prep.indexed import bin_path, idx_path, index_writer
from data_prep.manifest import MixtureManifest, TokenizerRecord, ViewSource, is_current, mixture_path
from data_prep.plain_files import is_whole, with_digest
from data_prep.plan import PARALLEL_DOCUMENTS, Draw, Plan, make_plan, phase_inputs, phases_of
from data_prep.progress import Progress
from data_prep.records import TokenizedRecord
from recipes.schema import Recipe

PLAN_FORMAT = "quarry.plan/1"
LINK_SUFFIXES = (".bin", ".idx")
VIEW_BYTES_PER_DOCUMENT = 20
"""Of an .idx: length, offset, bound."""


def source_lengths(data_root: Path, source: str) -> Column:
    """Document lengths in tokens of a tokenized source, int32 [N]; slices are read from its index when they are taken."""
    return open_columns(idx_path(data_root / "tokenized" / source)).lengths


def plan_path(data_root: Path) -> Path:
    """What the planner decided, for people; training does not read it."""
    return data_root / "plan.json"


def view_inputs(recipe: Recipe, phase: str, records: Mapping[str, TokenizedRecord], tokenizer: TokenizerRecord) -> str:
    """Digest of everything that the views of `phase` are made from."""
    digests = {name: digest_of({"bin": r.bin.sha256, "idx": r.idx.sha256}) for name, r in records.items()}
    return digest_of({"plan": phase_inputs(recipe, phase, digests), "tokenizer": tokenizer.model_dump(mode="json")})


def update_views(
    data_root: Path,
    recipe: Recipe,
    records: Mapping[str, TokenizedRecord],
    tokenizer: TokenizerRecord,
    *,
    workers: int,
    progress: Progress,
    seen: dict[Path, str],
) -> None:
    """Plan the whole curriculum, refuse what cannot be, and build the views that are missing, altered or made from something else.

    DataError with all refusals, one a line, before anything is written. With nothing to do the plan of before stands.
    """
    inputs = {phase: view_inputs(recipe, phase, records, tokenizer) for phase in phases_of(recipe)}
    todo = [
        phase
        for phase in inputs
        if not is_current(MixtureManifest, mixture_path(data_root, phase), data_root, inputs[phase], seen)
    ]
    decided_by = digest_of({"views": inputs, "max_epochs": recipe.data.max_epochs, "sources": sorted(records)})
    if not todo and _planned_with(data_root) == decided_by:
        return
    made = make_plan(recipe, partial(source_lengths, data_root), workers=workers)
    if made.problems:
        raise DataError("\n".join(made.problems))
    if todo:
        plan_path(data_root).unlink(missing_ok=True)
        total = VIEW_BYTES_PER_DOCUMENT * sum(draw.documents for phase in todo for draw in made.draws[phase].values())
        with progress.step(f"views of {len(todo)} phases", total) as done:
            build_views(data_root, recipe, {p: made.draws[p] for p in todo}, records, tokenizer, workers=workers, on_bytes=done)
    write_json(plan_path(data_root), with_digest({"inputs": decided_by, **describe(recipe, made)}))


def _planned_with(data_root: Path) -> str | None:
    """The inputs of the plan that stands; None where there is none that can be read."""
    try:
        values = json.loads(plan_path(data_root).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return values.get("inputs") if isinstance(values, dict) and is_whole(values) else None


def build_views(
    data_root: Path,
    recipe: Recipe,
    drawn: Mapping[str, Mapping[str, Draw]],
    records: Mapping[str, TokenizedRecord],
    tokenizer: TokenizerRecord,
    *,
    workers: int = 1,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> dict[str, MixtureManifest]:
    """Write views/<phase>/ for every phase in `drawn` (phase -> source -> draw); files of sources no longer drawn are removed."""
    for phase in drawn:
        mixture_path(data_root, phase).unlink(missing_ok=True)  # from here to the end there is no valid view
        mixture_path(data_root, phase).parent.mkdir(parents=True, exist_ok=True)
    tasks: dict[str, dict[str, tuple[Piece, ...]]] = {}
    for phase, draws in drawn.items():
        for source, draw in draws.items():
            tasks.setdefault(source, {})[phase] = draw.pieces
    files = _build_all(data_root, recipe.seed, tasks, workers, on_bytes)
    return {
        phase: _finish(data_root, recipe, phase, draws, records, tokenizer, {source: files[source, phase] for source in draws})
        for phase, draws in drawn.items()
    }


def _finish(
    data_root: Path,
    recipe: Recipe,
    phase: str,
    draws: Mapping[str, Draw],
    records: Mapping[str, TokenizedRecord],
    tokenizer: TokenizerRecord,
    files: Mapping[str, FileRecord],
) -> MixtureManifest:
    """Links and, last, the manifest of a phase whose .idx files are written."""
    folder = data_root / "views" / phase
    sources: dict[str, ViewSource] = {}
    for name in sorted(draws):
        draw, record = draws[name], records[name]
        replace_symlink(bin_path(folder / name), f"../../tokenized/{name}.bin")
        sources[name] = ViewSource(
            category=draw.category,
            prefix=f"views/{phase}/{name}",
            share_percent=draw.share_percent,
            weight=draw.weight,
            documents=draw.documents,
            tokens_available=draw.tokens,
            tokens_planned=draw.tokens_planned,
            epochs=draw.epochs,
            max_token_id=record.max_token_id,
            dtype=record.dtype,
            bin=record.bin,
            idx=files[name],
        )
    wanted = {f"{name}{suffix}" for name in sources for suffix in LINK_SUFFIXES}
    for stale in folder.iterdir():
        if stale.suffix in LINK_SUFFIXES and stale.name not in wanted:
            stale.unlink()
    spec = recipe.phase[phase]
    manifest = MixtureManifest.make(
        phase=phase,
        seed=recipe.seed,
        seq_length_tokens=spec.seq_length_tokens,
        samples=spec.samples,
        tokens=spec.tokens,
        recipe={
            "steps": spec.steps,
            "global_batch_samples": spec.global_batch_samples,
            "mixture": spec.mixture.model_dump(mode="json"),
            "min_document_tokens": spec.min_document_tokens,
            "require_long_in": spec.require_long_in,
        },
        inputs=view_inputs(recipe, phase, records, tokenizer),
        tokenizer=tokenizer,
        sources=sources,
    )
    manifest.write(mixture_path(data_root, phase))
    return manifest


# --- the files of one source -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """What one process does: the views of one source."""

    source: str
    seed: int
    idx: Path
    views: dict[Path, tuple[Piece, ...]]
    """.idx to write -> what is in it."""


def _build_all(
    data_root: Path,
    seed: int,
    wanted: Mapping[str, Mapping[str, tuple[Piece, ...]]],
    workers: int,
    on_bytes: Callable[[int], None],
) -> dict[tuple[str, str], FileRecord]:
    """(source, phase) -> record of the .idx, for every source -> phase -> pieces in `wanted`."""
    tasks = [
        _Task(
            source,
            seed,
            idx_path(data_root / "tokenized" / source),
            {idx_path(data_root / "views" / phase / source): pieces for phase, pieces in phases.items()},
        )
        for source, phases in wanted.items()
    ]
    # The largest first, so that no process is left with it at the end.
    tasks.sort(key=lambda task: -task.idx.stat().st_size)
    found: dict[tuple[str, str], FileRecord] = {}

    def took(task: _Task, files: list[FileRecord]) -> None:
        found.update({(task.source, path.parent.name): file for path, file in zip(task.views, files, strict=True)})
        on_bytes(sum(file.bytes for file in files))

    if workers > 1 and sum(len(open_columns(task.idx).lengths) for task in tasks) >= PARALLEL_DOCUMENTS:
        # spawn: the caller may have threads, which fork does not survive
        with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=multiprocessing.get_context("spawn")) as pool:
            running = {pool.submit(_write_views, task): task for task in tasks}
            for future in as_completed(running):
                took(running[future], future.result())
    else:
        for task in tasks:
            took(task, _write_views(task))
    return found


def _write_views(task: _Task) -> list[FileRecord]:
    """Write the .idx files of one source in one pass; their records in the order of task.views."""
    index = open_columns(task.idx)
    hashers = {piece.epoch: Hasher(task.seed, task.source, piece.epoch) for pieces in task.views.values() for piece in pieces}
    with contextlib.ExitStack() as stack:
        outputs = []
        for path, pieces in task.views.items():
            writer = stack.enter_context(index_writer(path, index.dtype, sum(piece.documents for piece in pieces)))
            position = 0
            for piece in pieces:
                outputs.append((piece, writer, [position]))
                position += piece.documents
        for start, stop in blocks(len(index.lengths)):
            lengths, offsets = index.lengths[start:stop], index.offsets[start:stop]
            hashed = {epoch: hasher.block(start, stop - start) for epoch, hasher in hashers.items()}
            for piece, writer, position in outputs:
                chosen = np.flatnonzero(piece.mask(hashed[piece.epoch], lengths))
                writer.put(position[0], lengths[chosen], offsets[chosen])
                position[0] += len(chosen)
    return [record_file(path) for path in task.views]


# --- the plan as data ------------------------------------------------------------------------------------------------------------


def describe(recipe: Recipe, made: Plan) -> dict[str, object]:
    """The plan as JSON: why every view is what it is, down to the intervals of hashes that choose its documents."""
    return {
        "format": PLAN_FORMAT,
        "recipe": recipe.name,
        "seed": recipe.seed,
        "max_epochs": recipe.data.max_epochs,
        "phases": {
            name: {
                "samples": recipe.phase[name].samples,
                "seq_length_tokens": recipe.phase[name].seq_length_tokens,
                "tokens": recipe.phase[name].tokens,
                "sources": {source: _described(draw) for source, draw in draws.items()},
            }
            for name, draws in made.draws.items()
        },
        "sources": {name: asdict(source) for name, source in made.sources.items()},
    }


def _described(draw: Draw) -> dict[str, object]:
    values = asdict(draw)
    del values["phase"], values["source"]
    # 64-bit hashes as hexadecimal text: JSON readers that know only floats would round them.
    pieces: Sequence[dict[str, object]] = values["pieces"]
    for piece in pieces:
        piece |= {key: f"{piece[key]:016x}" for key in ("first_hash", "last_hash")}
    return {**values, "pieces": list(pieces)}
