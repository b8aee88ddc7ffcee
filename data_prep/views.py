"""Builds the views of a phase: an .idx per source that points into the source's one .bin, a link to it, and last the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_prep.errors import DataError
from data_prep.files import digest_of, record_file, replace_symlink
from data_prep.indexed import Index, bin_path, idx_path
from data_prep.manifest import MixtureManifest, TokenizerRecord, ViewSource, mixture_path
from data_prep.plan import Draw, phase_inputs
from data_prep.records import TokenizedRecord
from recipes.schema import Recipe


def source_lengths(data_root: Path, source: str) -> np.ndarray:
    """Document lengths in tokens of a tokenized source, int32 [N]."""
    return Index.read(idx_path(data_root / "tokenized" / source)).lengths


def view_inputs(recipe: Recipe, phase: str, records: Mapping[str, TokenizedRecord], tokenizer: TokenizerRecord) -> str:
    """Digest of everything that the views of `phase` are made from."""
    digests = {name: digest_of({"bin": r.bin.sha256, "idx": r.idx.sha256}) for name, r in records.items()}
    return digest_of({"plan": phase_inputs(recipe, phase, digests), "tokenizer": tokenizer.model_dump(mode="json")})


def current_view(data_root: Path, phase: str, inputs: str, seen: dict[Path, str]) -> bool:
    """Whether the views of `phase` were made from `inputs` and their files are intact."""
    try:
        manifest = MixtureManifest.read(mixture_path(data_root, phase))
        if manifest.inputs != inputs:
            return False
        manifest.verify(data_root, seen=seen)
    except DataError:
        return False
    return True


def build_view(
    data_root: Path,
    recipe: Recipe,
    phase: str,
    draws: Mapping[str, Draw],
    records: Mapping[str, TokenizedRecord],
    tokenizer: TokenizerRecord,
) -> MixtureManifest:
    """Write views/<phase>/ for the planned draws; files of sources that are no longer drawn are removed."""
    folder = data_root / "views" / phase
    path = mixture_path(data_root, phase)
    path.unlink(missing_ok=True)  # from here to the end there is no valid view
    folder.mkdir(parents=True, exist_ok=True)
    sources: dict[str, ViewSource] = {}
    for name in sorted(draws):
        draw, record = draws[name], records[name]
        prefix = folder / name
        Index.read(idx_path(data_root / "tokenized" / name)).select(draw.documents).write(idx_path(prefix))
        replace_symlink(bin_path(prefix), f"../../tokenized/{name}.bin")
        sources[name] = ViewSource(
            category=draw.category,
            prefix=f"views/{phase}/{name}",
            share_percent=draw.share_percent,
            weight=draw.weight,
            documents=len(draw.documents),
            tokens_available=draw.tokens,
            tokens_planned=draw.tokens_planned,
            epochs=draw.epochs,
            max_token_id=record.max_token_id,
            dtype=record.dtype,
            bin=record.bin,
            idx=record_file(idx_path(prefix)),
        )
    wanted = {f"{name}{suffix}" for name in sources for suffix in (".bin", ".idx")}
    for stale in folder.iterdir():
        if stale.suffix in (".bin", ".idx") and stale.name not in wanted:
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
            "max_epochs": recipe.data.max_epochs,
        },
        inputs=view_inputs(recipe, phase, records, tokenizer),
        tokenizer=tokenizer,
        sources=sources,
    )
    manifest.write(path)
    return manifest
