"""Refusals of a cleaning that need no data: categories without filters, files and packages that are missing."""

from __future__ import annotations

import difflib
from importlib.util import find_spec
from pathlib import Path

from data_prep.clean.decontamination import benchmark_files
from data_prep.errors import DataError
from recipes.cleaning import Classifier, Cleaning, Filters
from recipes.schema import Recipe

FASTTEXT = "fasttext-numpy2-wheel"
"""The distribution of fastText that works with numpy 2; optional, since only classifiers of the user's need it."""


def check(recipe: Recipe) -> None:
    """DataError for what a person has to mend; a recipe without cleaning passes."""
    cleaning = recipe.data.cleaning
    if cleaning is None:
        return
    categories = {source.category: name for name, source in recipe.data.sources.items() if source.kind != "indexed"}
    key = "data.cleaning"
    for category, source in categories.items():
        if category not in cleaning.filters:
            raise DataError(
                f"{key}.filters has no entry for category '{category}' (source '{source}'); name its filters, or none: "
                f"+{key}.filters.{category}={{}}{_nearest(category, cleaning.filters)}"
            )
        if category not in cleaning.priority:
            raise DataError(
                f"{key}.priority does not name category '{category}' (source '{source}'); put it where its copy of a document ranks"
                f"{_nearest(category, cleaning.priority)}"
            )
    if len(set(cleaning.priority)) != len(cleaning.priority):
        twice = next(c for c in cleaning.priority if cleaning.priority.count(c) > 1)
        raise DataError(f"{key}.priority names '{twice}' twice; keep the place where its copies rank")
    for name, step in (("masking", cleaning.masking), ("near_duplicates", cleaning.near_duplicates)):
        for category in step.exempt if step is not None else ():
            if category not in cleaning.filters:
                raise DataError(
                    f"{key}.{name}.exempt names '{category}', which is no category{_nearest(category, cleaning.filters)}"
                )
    for category in categories:
        _check_filters(f"{key}.filters.{category}", cleaning.filters[category])
    path = recipe.data.tokenizer.path
    if path is not None and not Path(path).exists() and any(cleaning.filters[c].gneissweb is not None for c in categories):
        raise DataError(
            f"data.tokenizer.path: no '{path}' (from {Path.cwd()}), and the filter gneissweb counts tokens with it; put the tokenizer "
            f"there, or leave the filter out: {key}.filters.web.gneissweb=null"
        )
    if cleaning.decontamination is not None:
        for name, benchmark in cleaning.decontamination.benchmarks.items():
            benchmark_files(name, benchmark)


def _check_filters(key: str, filters: Filters) -> None:
    if filters.language is not None:
        from data_prep.optional import need

        need("py3langid")
        from data_prep.clean.languages import identifier

        known = identifier().labels
        for code in filters.language.keep:
            if code not in known:
                raise DataError(
                    f"{key}.language.keep: py3langid knows no language '{code}'; it knows {', '.join(sorted(known))}"
                )
    if filters.gneissweb is not None:
        for part in ("quality", "categories"):
            for name, classifier in getattr(filters.gneissweb, part).items():
                _check_classifier(f"{key}.gneissweb.{part}.{name}", classifier)


def _check_classifier(key: str, classifier: Classifier) -> None:
    if not Path(classifier.path).is_file():
        raise DataError(
            f"{key}.path: no file '{classifier.path}' (from {Path.cwd()}); put the fastText model there, or leave the classifier out: '~{key}'"
        )
    if find_spec("fasttext") is None:
        raise DataError(f"{key}: classifiers need the package fasttext, which is not installed; pip install {FASTTEXT}")


def _nearest(wrong: str, known: list[str] | dict[str, object]) -> str:
    close = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def ordered_sources(recipe: Recipe, cleaning: Cleaning) -> list[str]:
    """Names of the sources that have text, best first: by their category's place in `priority`, then as the recipe lists them."""
    names = [name for name, source in recipe.data.sources.items() if source.kind != "indexed"]
    return sorted(names, key=lambda name: cleaning.priority.index(recipe.data.sources[name].category))
