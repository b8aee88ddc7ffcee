"""Builders of the built-in corpus: real text of many kinds out of what every installation of the locked environment has."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from data_prep import dependency_order
from data_prep.corpus import code, prose, reasoning
from data_prep.corpus.material import Document, environment
from data_prep.errors import DataError

BUILDERS: dict[str, Callable[[], Iterator[Document]]] = {
    "stdlib_code": code.stdlib_code,
    "package_code": code.package_code,
    "code_qa": code.code_qa,
    "repositories": code.repositories,
    "readmes": prose.readmes,
    "stdlib_docstrings": prose.stdlib_docstrings,
    "package_docs": prose.package_docs,
    "books": prose.books,
    "licences": prose.licences,
    "message_catalogues": prose.message_catalogues,
    "math_worked": reasoning.math_worked,
    "cot_worked": reasoning.cot_worked,
    "instruct_qa": reasoning.instruct_qa,
    "synthetic_tasks": reasoning.synthetic_tasks,
}

__all__ = ["BUILDERS", "Document", "build", "code_digest", "environment"]


def build(builder: str, max_bytes: int | None = None) -> Iterator[Document]:
    """Documents of one builder, each text once, until the next would pass `max_bytes` of UTF-8 text.

    The first document is always given. DataError for an unknown builder, with the known ones.
    """
    if builder not in BUILDERS:
        raise DataError(f"no builder '{builder}' for the built-in corpus; builders: {', '.join(sorted(BUILDERS))}")
    total, seen = 0, set()
    for document in BUILDERS[builder]():
        content = document.text.encode()
        digest = hashlib.sha256(content).digest()
        if digest in seen:
            continue
        seen.add(digest)
        if max_bytes is not None and total and total + len(content) > max_bytes:
            return
        total += len(content)
        yield document


@cache
def code_digest() -> str:
    """SHA-256 over this package's own source and that of the order of files: a changed builder rebuilds its corpus."""
    digest = hashlib.sha256()
    for path in [*sorted(Path(__file__).parent.glob("*.py")), Path(dependency_order.__file__)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()
