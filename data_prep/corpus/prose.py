"""Documentation, reference books, licences and translated text as documents."""

from __future__ import annotations

import email
import gettext
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from data_prep.corpus import material
from data_prep.corpus.material import Document
from data_prep.errors import DataError

CATALOGUE_MESSAGES = 24
"""Messages per document of a catalogue: about a page."""
MIN_BOOK_CHARS, MAX_BOOK_CHARS = 8_000, 96_000
MIN_PROSE_CHARS = 300
MAX_LICENCE_CHARS = 40_000
"""Longer files repeat the licences of everything that a package bundles."""
LICENCE_FILE = re.compile(r"(^|/)(LICEN[CS]E|COPYING|NOTICE)[^/]*$", re.IGNORECASE)


def readmes() -> Iterator[Document]:
    """The long descriptions (usually the README) of the distributions, cut at their second-level headings when long."""
    for name in sorted(material.DISTRIBUTIONS, key=material.order_key):
        # Parsed here: what `metadata` returns depends on whether the importlib_metadata backport was imported in this process.
        raw = email.message_from_string(material.distribution(name).read_text("METADATA") or "").get_payload()
        text = material.clean(raw.encode("utf-8", "surrogateescape")) if isinstance(raw, str) else None
        if text is None:
            continue
        for index, section in enumerate(_sections(text)):
            yield Document(f"{name}/{index}", section)


def _sections(text: str, target_chars: int = 6000) -> Iterator[str]:
    """Pieces of about `target_chars`, cut before headings (Markdown `## x`, or a line underlined with - or =)."""
    starts = [m.start() for m in re.finditer(r"^(?:##? .+|[^\n]+\n[-=]{4,})$", text, re.MULTILINE)]
    piece_start = 0
    for start in [*starts, len(text)]:
        if start - piece_start >= target_chars or start == len(text):
            piece = text[piece_start:start].strip()
            if len(piece) >= MIN_PROSE_CHARS:
                yield piece + "\n"
            piece_start = start


def stdlib_docstrings() -> Iterator[Document]:
    """The language reference that ships with Python (pydoc's topics), then reference pages of the standard library's modules."""
    from pydoc_data.topics import topics

    for name in sorted(topics, key=material.order_key):
        text = material.clean(topics[name].encode())
        if text is not None and len(text) >= MIN_PROSE_CHARS:
            yield Document(f"topic/{name}", text.strip() + "\n")
    yield from _pages((name, path) for name, path in material.stdlib_files("stdlib_docstrings"))


def package_docs() -> Iterator[Document]:
    """Reference pages made from the docstrings of packages, one page per module, the packages interleaved by hash."""
    files = [item for name in material.PACKAGE_DOCS for item in material.distribution_files(name)]
    yield from _pages(sorted(files, key=lambda item: material.order_key(item[0])))


def _page(file: str, path: Path, underline: str = "=") -> str | None:
    text = material.read_source(path, material.MAX_DOCUMENTED_BYTES)
    tree = material.parse(text) if text else None
    if tree is None:
        return None
    module = material.module_name(file)
    entries = list(material.docstrings(tree, module))
    if not entries:
        return None
    blocks = [f"{module}\n{underline * len(module)}\n"]
    for heading, doc in entries:
        blocks.append(f"{doc}\n" if heading == module else f"{heading}\n\n{doc}\n")
    page = "\n".join(blocks)
    return page if len(page) >= MIN_PROSE_CHARS else None


def _pages(files: Iterable[tuple[str, Path]]) -> Iterator[Document]:
    for file, path in files:
        page = _page(file, path)
        if page is not None:
            yield Document(f"page/{file}", page)


def books() -> Iterator[Document]:
    """Books: the reference of one subject (subpackage) of a scientific package, a chapter per module; long ones in volumes."""
    for name in material.BOOKS:
        subjects: dict[str, list[tuple[str, Path]]] = {}
        for file, path in sorted(material.distribution_files(name)):
            subject = "/".join(PurePosixPath(file).parent.parts[:2])
            subjects.setdefault(subject, []).append((file, path))
        for subject in sorted(subjects, key=material.order_key):
            chapters = [page for file, path in subjects[subject] if (page := _page(file, path, "-"))]
            volumes: list[list[str]] = [[]]
            for number, chapter in enumerate(chapters, 1):
                block = f"Chapter {number}. {chapter}\n"
                if volumes[-1] and sum(map(len, volumes[-1])) + len(block) > MAX_BOOK_CHARS:
                    volumes.append([])
                volumes[-1].append(block)
            title = subject.replace("/", ".")
            for index, volume in enumerate(volumes, 1):
                body = "\n".join(volume)
                if len(body) >= MIN_BOOK_CHARS:
                    of = f", volume {index} of {len(volumes)}" if len(volumes) > 1 else ""
                    yield Document(f"{subject}/{index}", f"The book of {title}{of}\n\n{body}")


def licences() -> Iterator[Document]:
    """Licence and notice texts of the distributions, each wording once (legal language is the smoke curriculum's domain)."""
    seen: set[str] = set()
    for name in sorted(material.DISTRIBUTIONS, key=material.order_key):
        for file, path in material.installed_files(name).items():
            if file.endswith(".py") or not LICENCE_FILE.search(file):
                continue
            text = material.clean(path.read_bytes())
            if text is None or not MIN_PROSE_CHARS <= len(text) <= MAX_LICENCE_CHARS:
                continue
            wording = "".join(re.sub(r"copyright.*", "", text.lower()).split())
            if wording not in seen:
                seen.add(wording)
                yield Document(f"{name}/{file}", text.strip() + "\n")


def message_catalogues() -> Iterator[Document]:
    """Translated messages of gettext catalogues: pages of one language, every second one with the English beside it."""
    pages = []
    for name in material.CATALOGUES:
        catalogues = [(file, path) for file, path in material.installed_files(name).items() if file.endswith(".mo")]
        if not catalogues:
            raise DataError(
                f"the installed distribution '{name}' has no message catalogues; install its wheel: run `make setup`"
            )
        for file, path in catalogues:
            language = PurePosixPath(file).parts[-3]
            if language.startswith("en"):
                continue
            with open(path, "rb") as f:
                messages = gettext.GNUTranslations(f)._catalog
            pairs = [
                (_source(key), value)
                for key, value in messages.items()
                if _source(key) and value.strip() and _source(key) != value
            ]
            pairs.sort()
            for index in range(0, len(pairs), CATALOGUE_MESSAGES):
                page = pairs[index : index + CATALOGUE_MESSAGES]
                identity = f"{file}/{index}"
                both = material.order_key(identity)[0] % 2
                body = "\n\n".join(f"en: {source}\n{language}: {text}" if both else text for source, text in page)
                if len(body) >= MIN_PROSE_CHARS:
                    pages.append(Document(identity, body + "\n"))
    yield from sorted(pages, key=lambda page: material.order_key(page.id))


def _source(key: str | tuple[str, int]) -> str:
    """The English message of a catalogue's key (plural forms are keyed by message and number; a context stands before \\x04)."""
    message = key if isinstance(key, str) else key[0]
    return message.rpartition("\x04")[2]
