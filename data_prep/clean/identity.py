"""What a source's filtered text is made from, by digest: equal digests, equal bytes."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_prep.clean import decontamination
from data_prep.clean.shards import SourceText
from data_prep.files import digest_of, file_sha256
from recipes.cleaning import Cleaning, NearDuplicates
from recipes.schema import Recipe

VERSION = 1
"""Of what cleaning writes; raise it when the same input and recipe would give other bytes."""


def common_identity(recipe: Recipe, cleaning: Cleaning) -> dict[str, Any]:
    """What acts on every source alone: decontamination, packages."""
    benchmarks = {}
    if cleaning.decontamination is not None:
        for name, benchmark in cleaning.decontamination.benchmarks.items():
            files = decontamination.benchmark_files(name, benchmark)
            benchmarks[name] = [[path.name, file_sha256(path)] for path in files]
    return {
        "version": VERSION,
        "packages": {name: version(name) for name in ("datatrove", "py3langid")},
        "benchmarks": benchmarks,
    }


def filtered_digest(recipe: Recipe, cleaning: Cleaning, name: str, text: SourceText, common: dict[str, Any]) -> str:
    """Of one source: its text and all that acts on it alone, `common` included."""
    source = recipe.data.sources[name]
    filters = cleaning.filters[source.category]
    tokenizer = None
    models = {}
    if filters.gneissweb is not None:
        given = given_tokenizer(recipe)
        if given is not None:
            from data_prep.tokenizer import load_tokenizer

            tokenizer = load_tokenizer(Path(given[0]), given[1]).digest
        for part in (filters.gneissweb.quality, filters.gneissweb.categories):
            models |= {classifier.path: file_sha256(Path(classifier.path)) for classifier in part.values()}
    masking, near = cleaning.masking, cleaning.near_duplicates
    return digest_of(
        {
            **common,
            "text": [text.digest, text.text_key, list(text.carry)],
            "source": name,
            "filters": filters.model_dump(mode="json"),
            "decontamination": cleaning.decontamination.model_dump(mode="json") if cleaning.decontamination else None,
            "masking": masking.model_dump(mode="json", exclude={"exempt"})
            if masking and source.category not in masking.exempt
            else None,
            "exact": cleaning.exact_duplicates.model_dump(mode="json") if cleaning.exact_duplicates else None,
            "near": _signature_identity(near) if near is not None and source.category not in near.exempt else None,
            "tokenizer": tokenizer,
            "models": models,
        }
    )


def _signature_identity(near: NearDuplicates) -> dict[str, Any]:
    return near.model_dump(mode="json", exclude={"exempt"})


def given_tokenizer(recipe: Recipe) -> tuple[str, str] | None:
    """Path and kind of the tokenizer that the recipe names; None for one that is trained, which comes after cleaning."""
    spec = recipe.data.tokenizer
    return None if spec.path is None else (str(Path(spec.path).absolute()), spec.kind)
