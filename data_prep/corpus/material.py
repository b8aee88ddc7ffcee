"""What the built-in corpus is made of: which files of the locked environment belong to which builder, read the same way everywhere.

No text may reach two sources (a held-out document of one would be trained on in another), so every file has one owner: a distribution
belongs to one builder, and the standard library's modules are dealt out by a hash of their path. Files are taken in the order of a
hash of their name, so that a source capped by `max_bytes` is a fair sample instead of everything that starts with "a".
"""

from __future__ import annotations

import ast
import csv
import hashlib
import importlib.metadata
import platform
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from data_prep.errors import DataError

PACKAGE_CODE = ("Django", "fonttools", "mpmath", "huggingface_hub", "prompt_toolkit", "libcst")
PACKAGE_DOCS = ("matplotlib", "torch", "pydantic", "anyio", "cryptography", "tensorboard")
BOOKS = ("sympy", "numpy")
CODE_QUESTIONS = ("networkx", "setuptools")
REPOSITORIES = (
    "Jinja2", "Markdown", "PyYAML", "Werkzeug", "absl-py", "asgiref", "attrs", "click", "docker", "fiddle", "fsspec", "httpcore",
    "httpx", "hydra-core", "idna", "invoke", "jsonschema", "markdown-it-py", "megatron-core", "nemo_run", "omegaconf", "packaging",
    "paramiko", "prometheus_client", "pyparsing", "python-dateutil", "referencing", "requests", "rich", "sqlparse", "starlette",
    "torchx", "tqdm", "typer", "urllib3", "uvicorn", "wrapt",
)  # fmt: skip
CATALOGUES = ("Django",)
"""Distributions whose gettext catalogues are read (Django ships about a hundred languages, BSD-3-Clause)."""
README_ONLY = (
    "annotated-types", "certifi", "cffi", "charset-normalizer", "cloudpickle", "contourpy", "cycler", "filelock", "graphviz", "grpcio",
    "h11", "importlib_metadata", "kiwisolver", "leptonai", "loguru", "MarkupSafe", "mdurl", "msgpack", "opentelemetry-api", "pillow",
    "protobuf", "psutil", "pycparser", "Pygments", "PyNaCl", "pytz", "ray", "reasoning_gym", "regex", "rpds-py", "safetensors",
    "sentencepiece", "shellingham", "six", "sniffio", "tabulate", "tokenizers", "toml", "transformers",
    "typing_extensions", "typing-inspection", "tzdata", "wcwidth", "zipp",
)  # fmt: skip
"""Read for their description and licence only."""
DISTRIBUTIONS = tuple(
    sorted({*PACKAGE_CODE, *PACKAGE_DOCS, *BOOKS, *CODE_QUESTIONS, *REPOSITORIES, *README_ONLY}, key=str.lower)
)
"""Fixed, all of them in the base install, so that what else a machine has cannot change the corpus."""

STDLIB_SHARES = {"stdlib_code": range(6), "stdlib_docstrings": range(6, 8), "code_qa": range(8, 10)}
"""Tenths of the standard library's modules, by hash of their path."""
STDLIB_LEFT_OUT = {"test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3", "site-packages", "dist-packages",
                   "pydoc_data", "encodings", "lib-dynload", "__phello__", "__pycache__", "venv"}  # fmt: skip
"""Not in every installation, generated, or (pydoc_data) read by name."""

LEFT_OUT_PARTS = {"_vendor", "vendor", "vendored", "thirdparty", "third_party", "tests", "test", "testing", "locale", "migrations",
                  "__pycache__", "node_modules", "static"}  # fmt: skip
LEFT_OUT_FILES = {"version.py", "_version.py", "__config__.py", "_sysconfigdata.py", "conftest.py"}
"""Made at build time, with versions and paths of the machine that built them."""
MIN_CHARS, MAX_FILE_BYTES, MAX_LINE_CHARS, MAX_MEAN_LINE_CHARS = 200, 64_000, 1000, 100
"""A source file outside of these is a stub, a table, minified, or so long that it would be a short phase's whole share of code."""
MAX_DOCUMENTED_BYTES = 250_000
"""Files that are only read for their docstrings."""


@dataclass(frozen=True)
class Document:
    id: str
    text: str


def order_key(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


@cache
def distribution(name: str) -> importlib.metadata.Distribution:
    """An installed distribution of the fixed list; DataError with the remedy when it is missing, since the corpus would change."""
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise DataError(
            f"the built-in corpus reads the distribution '{name}', which is not installed here; without it the corpus would differ "
            "from other machines'. Run `make setup` (it installs requirements.lock), or use sources of kind files"
        ) from None


def environment() -> dict[str, str]:
    """Versions that the built-in corpus depends on: Python's and those of every distribution read."""
    versions = {name: distribution(name).version for name in DISTRIBUTIONS}
    return {"python": platform.python_version(), **versions}


def clean(raw: bytes) -> str | None:
    """UTF-8 text with Unix line ends and no control characters but tab and newline; None for anything that is not clean text."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n")
    if "\ufffd" in text or re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", text):
        return None
    return text


def read_source(path: Path, max_bytes: int = MAX_FILE_BYTES) -> str | None:
    """A Python source file as text, or None when it is a stub, generated, minified or no UTF-8."""
    raw = path.read_bytes()
    if not MIN_CHARS <= len(raw) <= max_bytes:
        return None
    text = clean(raw)
    if text is None:
        return None
    lines = text.split("\n")
    if max(map(len, lines)) > MAX_LINE_CHARS or len(text) / len(lines) > MAX_MEAN_LINE_CHARS:
        return None
    return text


@cache
def installed_files(name: str) -> dict[str, Path]:
    """Name inside the distribution -> path of every file that its RECORD lists, sorted (importlib.metadata's own list takes seconds)."""
    dist = distribution(name)
    record = dist.read_text("RECORD")
    if record is None:
        raise DataError(
            f"the installed distribution '{name}' has no RECORD, so its files are unknown; install it from its wheel: `make setup`"
        )
    names = [row[0] for row in csv.reader(record.splitlines()) if row and not row[0].endswith(".pyc")]
    root = Path(str(dist.locate_file("")))
    return {file: root / file for file in sorted(names) if ".." not in file and not file.startswith("/")}


def distribution_files(name: str, suffix: str = ".py") -> list[tuple[str, Path]]:
    """(name inside the distribution, path) of its own files with this suffix, ordered by hash of the name."""
    found = []
    for file, path in installed_files(name).items():
        if not file.endswith(suffix):
            continue
        parts = file.split("/")
        if parts[0].endswith((".dist-info", ".data")) or LEFT_OUT_PARTS.intersection(parts):
            continue
        if parts[-1] in LEFT_OUT_FILES or parts[-1].startswith("test_"):
            continue
        found.append((file, path))
    if not found:
        raise DataError(
            f"the installed distribution '{name}' lists no {suffix} files (an editable or stripped install); "
            "install it from its wheel: run `make setup`"
        )
    return sorted(found, key=lambda item: order_key(item[0]))


def stdlib_files(builder: str) -> list[tuple[str, Path]]:
    """(path inside the standard library, path) of the modules dealt to `builder`, ordered by hash of the name."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if STDLIB_LEFT_OUT.intersection(relative.parts) or relative.parts[0].startswith(("_sysconfigdata", "config-")):
            continue
        name = relative.as_posix()
        if order_key(f"stdlib/{name}")[0] * 10 // 256 in STDLIB_SHARES[builder]:
            found.append((name, path))
    return sorted(found, key=lambda item: order_key(item[0]))


def module_name(file: str) -> str:
    """`a/b/__init__.py` -> `a.b`"""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def parse(text: str) -> ast.Module | None:
    """The syntax tree, or None for a file that this Python does not accept (templates with a .py name)."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError):
            return None


def docstrings(tree: ast.Module, module: str, min_chars: int = 40) -> Iterator[tuple[str, str]]:
    """(heading, cleaned docstring) of the module and its public classes and functions, in the order of the source."""

    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or child.name.startswith("_"):
                continue
            name = f"{prefix}.{child.name}"
            text = ast.get_docstring(child)
            if text and len(text) >= min_chars:
                arguments = "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
                yield f"{name}{arguments}", text
            if isinstance(child, ast.ClassDef):
                yield from visit(child, name)

    text = ast.get_docstring(tree)
    if text and len(text) >= min_chars:
        yield module, text
    yield from visit(tree, module)
