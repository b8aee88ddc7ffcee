"""Source code as documents: single modules, questions about functions, and whole packages in the order of their imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import material
from data_prep.corpus.material import Document
from data_prep.dependency_order import dependency_order, references

MAX_REPOSITORY_CHARS = 96_000
"""Longer packages are split at file boundaries, so that a short long-context phase can draw several."""
MIN_QUESTION_LINES, MAX_QUESTION_LINES = 3, 40


def _modules(files: list[tuple[str, Path]], prefix: str) -> Iterator[Document]:
    for name, path in files:
        text = material.read_source(path)
        if text is not None:
            yield Document(f"{prefix}/{name}", text)


def stdlib_code() -> Iterator[Document]:
    """Modules of the standard library (those not dealt to docstrings or questions)."""
    yield from _modules(material.stdlib_files("stdlib_code"), "python")


def package_code() -> Iterator[Document]:
    """Modules of installed packages, the packages interleaved by hash."""
    files = [(f"{name}:{file}", path) for name in material.PACKAGE_CODE for file, path in material.distribution_files(name)]
    yield from _modules(sorted(files, key=lambda item: material.order_key(item[0])), "package")


def code_qa() -> Iterator[Document]:
    """Instructions about functions: a description answered by its code, and code answered by its description."""
    files = [(f"python/{file}", path) for file, path in material.stdlib_files("code_qa")]
    for name in material.CODE_QUESTIONS:
        files += [(f"{name}/{file}", path) for file, path in material.distribution_files(name)]
    for name, path in sorted(files, key=lambda item: material.order_key(item[0])):
        text = material.read_source(path)
        tree = material.parse(text) if text else None
        if tree is None:
            continue
        lines = text.split("\n")
        for node in _functions(tree):
            pair = _question(node, lines, path.stem)
            if pair is not None:
                yield Document(f"{name}:{node.name}:{node.lineno}", pair)


def _functions(tree: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef]:
    """Functions of a module and methods of its classes (not functions inside functions)."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node)


def _question(node: ast.FunctionDef, lines: list[str], module: str) -> str | None:
    """One instruction and its answer from a documented function, or None where it is too short, too long or undocumented."""
    doc = ast.get_docstring(node)
    summary = " ".join(doc.split("\n\n")[0].split()) if doc else ""
    first, body = node.body[0], node.body[1:]
    if len(summary) < 30 or not body or not MIN_QUESTION_LINES <= node.end_lineno - body[0].lineno + 1 <= MAX_QUESTION_LINES:
        return None
    head, rest = lines[node.lineno - 1 : first.lineno - 1], lines[first.end_lineno : node.end_lineno]
    indent = len(head[0]) - len(head[0].lstrip())
    code = "\n".join(line[indent:] for line in head + rest)
    arguments = ast.unparse(node.args)
    if material.order_key(code)[0] % 2:
        return (
            f"### Instruction\nWrite the Python function `{node.name}({arguments})` of a module `{module}`. {summary}\n\n"
            f"### Response\n```python\n{code}\n```\n"
        )
    return f"### Instruction\nSay in one sentence what this Python function does.\n\n```python\n{code}\n```\n\n### Response\n{summary}\n"


def repositories() -> Iterator[Document]:
    """Whole packages, files after those that they import, each under a line with its path; long ones in several parts."""
    for name in sorted(material.REPOSITORIES, key=material.order_key):
        texts = {}
        for file, path in sorted(material.distribution_files(name)):
            text = material.read_source(path)
            if text is not None:
                texts[file] = text
        parts: list[list[str]] = [[]]
        for file in dependency_order({file: references(file, text) for file, text in texts.items()}).paths:
            block = f"# file: {file}\n{texts[file].rstrip()}\n"
            if parts[-1] and sum(map(len, parts[-1])) + len(block) > MAX_REPOSITORY_CHARS:
                parts.append([])
            parts[-1].append(block)
        for index, part in enumerate(parts):
            heading = f"# repository: {name}" + (f", part {index + 1} of {len(parts)}" if len(parts) > 1 else "")
            yield Document(f"{name}/{index}", f"{heading}\n\n" + "\n".join(part))
