"""Refuses files that two sources share, or one source has twice: their documents would be weighted twice, and held out of one while
trained on in the other.

Documents that occur in different files are the deduplication's business (data_prep/clean).
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from data_prep.errors import DataError
from data_prep.records import InputFile
from recipes.schema import Data


def refuse_overlaps(data: Data, paths: Mapping[str, Sequence[Path]]) -> None:
    """DataError for a file that is listed twice under whatever name (links of both kinds are followed), and for a builder used twice.

    `paths`: files of each source of kind files or indexed; they exist. Reads no content.
    """
    _refuse(overlaps(data, paths))


def overlaps(data: Data, paths: Mapping[str, Sequence[Path]]) -> list[str]:
    """The problems that `refuse_overlaps` refuses."""

    def inodes() -> Iterator[tuple[Hashable, str, str]]:
        for source, files in paths.items():
            for path in files:
                status = os.stat(path)
                yield (status.st_dev, status.st_ino), source, str(path)

    builders = ((s.builder, name, f"'{s.builder}'") for name, s in data.sources.items() if s.kind == "builtin")
    return [*_twice(builders, "builder"), *_twice(inodes(), "file")]


def refuse_same_content(files: Mapping[str, Sequence[InputFile]]) -> None:
    """DataError for files of equal content in two sources, by the digests that were taken of them."""
    _refuse(same_content(files))


def same_content(files: Mapping[str, Sequence[InputFile]]) -> list[str]:
    """The problems that `refuse_same_content` refuses."""
    # Equal indexes belong to different tokens when all documents have the same lengths; empty files share nothing.
    contents = (
        (file.record.sha256, source, file.path)
        for source, members in files.items()
        for file in members
        if file.record.bytes > 0 and not file.path.endswith(".idx")
    )
    return _twice(contents, "content of", within_one=False)


def _twice(found: Iterable[tuple[Hashable, str, str]], what: str, within_one: bool = True) -> list[str]:
    """One problem per pair of sources (or, `within_one`, per source) that share a key; `found` gives key, source, name."""
    first: dict[Hashable, tuple[str, str]] = {}
    shared: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for key, source, name in found:
        owner, known = first.setdefault(key, (source, name))
        if owner != source or (within_one and known != name):
            shared.setdefault((owner, source), []).append((known, name))
    problems = []
    for (one, other), names in shared.items():
        known, name = names[0]
        shown = f"{what} {known}" + (f" (also {name})" if known != name else "")
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        if one == other:
            problems.append(f"data.sources.{one} has the {shown}{more} twice; name it once in data.sources.{one}.paths")
        else:
            problems.append(
                f"data.sources.{one} and data.sources.{other} share the {shown}{more}; its documents would count twice, and be held out of "
                f"one source while trained on in the other: leave it out of one of them"
            )
    return problems


def _refuse(problems: list[str]) -> None:
    if problems:
        raise DataError("\n".join(problems))
