"""Collects unique real text from what is installed on this machine, as one JSON-lines file to measure with.

Documentation (HTML turned into text), help texts, manual pages, text files and Python source. The same files and the same size give the
same bytes. Nothing is downloaded; more text comes with documentation packages of the system, see `--help`.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import json
import os
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from data_prep.files import atomic_write, write_json
from data_prep.progress import Progress, Shown, Silent

MIN_CHARS, MAX_CHARS = 200, 400_000
"""Of a document: shorter ones are stubs, longer ones are mostly generated indexes."""
FILES_PER_ROUND = 512
"""Files read at a time: memory stays bounded and a kind of text ends soon after its share is reached."""
PACKAGES = (
    "python3-doc linux-doc debian-handbook rust-doc openjdk-17-doc erlang-doc libboost-doc python-scipy-doc python-pandas-doc "
    "postgresql-doc perl-doc apache2-doc cmake-doc manpages-{de,fr,es,ru,ja,it,nl,cs,pl,zh,tr,pt-br} "
    "libreoffice-help-{en-us,de,es,fr,ja,pt,cs,it,ko,nl,zh-cn}"
)
EPILOG = f"""example:
  python -m benchmarks.corpus --output /tmp/bench/corpus.jsonl --size-mb 300

A bare machine has too little text. On Debian these packages give several gigabytes:
  apt-get install --no-install-recommends {PACKAGES}
"""
HIDDEN = re.compile(r"<(script|style|head|nav|svg|button)\b.*?</\1\s*>|<!--.*?-->", re.DOTALL | re.IGNORECASE)
BREAKS = re.compile(r"</?(?:p|div|li|tr|h[1-6]|pre|br|dt|dd|table|ul|ol|section|title)\b[^>]*>", re.IGNORECASE)
TAGS = re.compile(r"<[^>]+>")
BLANK = re.compile(r"[ \t]*\n(?:[ \t\r]*\n)+")
HTML_LANGUAGE = re.compile(r"<html[^>]*?\blang=[\"']?([A-Za-z]{2})", re.IGNORECASE)


@dataclass(frozen=True)
class Kind:
    """Files that give one kind of text."""

    name: str
    share_percent: float
    """Of the corpus; a kind that has less leaves its part to the others."""
    roots: tuple[Path, ...]
    suffixes: tuple[str, ...]
    skip: re.Pattern[str] | None = None
    """Paths left out."""


@dataclass(frozen=True)
class Document:
    id: str
    kind: str
    language: str
    """Two letters, or `python`."""
    text: bytes
    """UTF-8."""


def kinds() -> tuple[Kind, ...]:
    """What to look for. Shares are chosen so that code, English prose and other languages are all well represented."""
    doc = Path("/usr/share/doc")
    api = re.compile(r"rust-doc|openjdk|/search|genindex|/changelogs?\b")
    python = tuple(Path(sysconfig.get_path(name)) for name in ("purelib", "stdlib"))
    return (
        Kind("html", 30, (doc, Path("/usr/share/gtk-doc"), Path("/usr/share/javascript")), (".html", ".htm"), api),
        Kind("help", 22, (Path("/usr/share/libreoffice/help"),), (".html",)),
        Kind("python", 18, python, (".py",), re.compile(r"/tests?/|_pb2\.py$")),
        Kind("man", 16, (Path("/usr/share/man"),), (".gz",)),
        Kind("api", 10, tuple(sorted(doc.glob("rust-doc*")) + sorted(doc.glob("openjdk-*"))), (".html",)),
        Kind("text", 4, (doc,), (".txt", ".txt.gz", ".rst", ".rst.gz", ".md", ".gz"), re.compile(r"changelog|/copyright")),
    )


def files_of(kind: Kind) -> list[Path]:
    """Files of a kind, in an order that mixes packages and depends on nothing but the paths."""
    found = set()
    for root in kind.roots:
        for folder, _, names in os.walk(root):
            for name in names:
                path = os.path.join(folder, name)
                if name.endswith(kind.suffixes) and not (kind.skip and kind.skip.search(path)) and not os.path.islink(path):
                    found.add(path)
    return [Path(path) for path in sorted(found, key=lambda path: hashlib.sha256(path.encode()).digest())]


def html_text(page: str) -> str:
    """The visible text of a page, blocks on lines of their own."""
    page = HIDDEN.sub(" ", page)
    page = BREAKS.sub("\n", page)
    text = html.unescape(TAGS.sub("", page)).replace("\r", "")
    return BLANK.sub("\n\n", text).strip() + "\n"


def language_of(kind: str, path: Path, content: str) -> str:
    """Language of a document by where it lies or what its page says; English where nothing is said."""
    if kind == "python":
        return "python"
    if kind == "help":
        return path.relative_to("/usr/share/libreoffice/help").parts[0][:2].lower()
    if kind == "man":
        first = path.relative_to("/usr/share/man").parts[0]
        return "en" if re.match(r"man\d", first) else first[:2]
    named = HTML_LANGUAGE.search(content[:2000])
    return named.group(1).lower() if named else "en"


def read_document(kind: str, path: Path) -> Document | None:
    """The document in a file; None for what is no UTF-8 text, a stub, or too long."""
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
        content = raw.decode("utf-8")
    except (
        OSError,
        EOFError,
        UnicodeDecodeError,
    ):  # a broken link, a damaged file, another encoding: there is more text than needed
        return None
    text = html_text(content) if kind in ("html", "help", "api") else content
    if not MIN_CHARS <= len(text) <= MAX_CHARS or "\0" in text:
        return None
    return Document(str(path), kind, language_of(kind, path, content), text.encode())


def _read_all(kind: str, paths: list[Path]) -> list[Document | None]:
    return [read_document(kind, path) for path in paths]


def documents(kind: Kind, pool: ProcessPoolExecutor, workers: int) -> Iterator[Document]:
    """The documents of a kind, read by `workers` processes, in the order of its files."""
    paths = files_of(kind)
    for start in range(0, len(paths), FILES_PER_ROUND):
        part = paths[start : start + FILES_PER_ROUND]
        step = -(-len(part) // workers)
        slices = [part[i : i + step] for i in range(0, len(part), step)]
        for read in pool.map(_read_all, [kind.name] * len(slices), slices):
            yield from (document for document in read if document is not None)


def collect(size_bytes: int, workers: int, progress: Progress) -> list[Document]:
    """Unique documents of `size_bytes` of text (UTF-8) in all, or what there is; in the order of their digests."""
    unique: dict[bytes, Document] = {}
    total = 0
    # spawn: the caller may have threads (a progress bar has), which fork does not survive
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        streams = {kind.name: documents(kind, pool, workers) for kind in kinds()}
        shares = {kind.name: kind.share_percent for kind in kinds()}
        while streams and total < size_bytes:
            missing, weight = size_bytes - total, sum(shares[name] for name in streams)
            for name in list(streams):
                wanted = min(size_bytes - total, max(1, int(missing * shares[name] / weight)))
                with progress.step(f"collect {name}", wanted) as done:
                    taken = 0
                    for document in streams[name]:
                        key = hashlib.sha256(b" ".join(document.text.split())).digest()
                        if key not in unique:
                            unique[key] = document
                            taken += len(document.text)
                            done(len(document.text))
                            if taken >= wanted:
                                break
                    else:
                        del streams[name]
                total += taken
    return [unique[key] for key in sorted(unique)]


def write(found: list[Document], output: Path) -> dict[str, object]:
    """Write the lines and, beside them, what they are (returned too); every other line, by its digest, has ASCII escapes."""
    digest, escaped = hashlib.sha256(), 0
    sizes: Counter[str] = Counter()
    with atomic_write(output) as f:
        for document in found:
            text = document.text.decode()
            ascii_only = hashlib.sha256(document.text).digest()[0] % 2 == 0
            value = {"text": text, "id": document.id, "source": document.kind, "language": document.language}
            line = json.dumps(value, ensure_ascii=ascii_only).encode() + b"\n"
            f.write(line)
            digest.update(line)
            escaped += ascii_only
            for name in ("all", f"source {document.kind}", f"language {document.language}"):
                sizes[name] += len(document.text)
    description = {
        "documents": len(found),
        "text_bytes": dict(sorted(sizes.items())),
        "lines_with_ascii_escapes": escaped,
        "file_bytes": output.stat().st_size,
        "sha256": digest.hexdigest(),
    }
    write_json(output.with_suffix(".json"), description)
    return description


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.corpus",
        description="Collect unique real text from this machine into a JSON-lines file with text, id, source and language.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="the .jsonl to write; a .json beside it says what is in it")
    parser.add_argument("--size-mb", type=float, default=300.0, help="text (UTF-8) in MB of 10^6 bytes (default: 300)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    options = parser.parse_args(argv)
    wanted = int(options.size_mb * 1e6)
    found = collect(wanted, options.workers, Silent() if options.quiet else Shown())
    description = write(found, options.output)
    size = sum(len(document.text) for document in found)
    print(f"{options.output}: {len(found):,} documents, {size / 1e6:.1f} MB of text, sha256 {description['sha256']}")
    if size < wanted:
        print(
            f"only {size / 1e6:.1f} of {wanted / 1e6:.1f} MB were found; install documentation packages, see --help",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
