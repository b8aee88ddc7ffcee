"""In which order the files of a repository are read: documentation first, then every file behind those that it imports.

Two steps, so that texts need not be in memory together: `references` takes from one file what it asks for, in its language's terms;
`dependency_order` finds out which files of the repository those are, and sorts. What cannot be resolved (libraries, generated files)
is no reference. Languages: Python, JavaScript and TypeScript, C and C++, Java, Kotlin and Scala, Go, Rust; other files keep the order
of their names. Text is matched, not parsed, so that code of any version and broken code count too.

The order is depth first: a file stands close behind what it imports, and a cycle is cut where it closes. (graphlib sorts by levels,
which tears related files apart, and knows no cycles.) Everything is sorted by name before, so the result depends on nothing else.
"""

from __future__ import annotations

import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

References = tuple[str, ...]

VERSION = 1
"""Raise it when the same files would come in another order."""
MAX_REFERENCES = 1000
"""Per file; generated files list more, and their place does not matter."""
DOCUMENTATION = (".md", ".rst", ".adoc", ".org", ".rdoc")
DOCUMENTATION_NAMES = (
    "readme",
    "license",
    "licence",
    "copying",
    "notice",
    "authors",
    "contributing",
    "changelog",
    "changes",
    "install",
)
JS_SUFFIXES = (".ts", ".tsx", ".d.ts", ".js", ".jsx", ".mjs", ".cjs", ".mts", ".cts", ".vue", ".svelte")
C_SUFFIXES = (".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".hh", ".hxx", ".inl", ".cu", ".cuh", ".m", ".mm")
JVM_SUFFIXES = (".java", ".kt", ".scala")
PYTHON_ROOTS = ("src", "lib", "python")
"""Folders that hold packages without being one."""


def references(path: str, text: str) -> References:
    """What a file asks for, in its language's terms, each once, in the order of the text; () for languages that are not known."""
    suffix = posixpath.splitext(path)[1].lower()
    finder = FINDERS.get(suffix) or (_go_module if posixpath.basename(path) == "go.mod" else None)
    return tuple(dict.fromkeys(finder(text)))[:MAX_REFERENCES] if finder else ()


@dataclass(frozen=True)
class Order:
    """The files of a repository in reading order."""

    paths: list[str]
    references: int
    """From a file to another one of the repository."""
    cut: int
    """Of these, not kept because they close a cycle."""


def dependency_order(files: Mapping[str, References]) -> Order:
    """Sort the files of a repository; `files`: path inside it (with '/') -> `references` of its text."""
    resolver = _Resolver(files)
    paths: list[str] = []
    is_open: set[str] = set()
    done: set[str] = set()
    wanted = cut = 0
    for root in sorted(files, key=_reading_rank):
        stack: list[tuple[str, Iterator[str]]] = []
        following: str | None = root if root not in done else None
        while following or stack:
            if following:
                found = resolver.of(following)
                wanted += len(found)
                is_open.add(following)
                stack.append((following, iter(found)))
            file, pending = stack[-1]
            following = None
            for candidate in pending:
                if candidate in is_open:
                    cut += 1
                elif candidate not in done:
                    following = candidate
                    break
            if following is None:
                stack.pop()
                is_open.remove(file)
                done.add(file)
                paths.append(file)
    return Order(paths, wanted, cut)


def _reading_rank(path: str) -> tuple[int, int, str]:
    """Readme, other documentation, all else; in each the files nearest to the top come first for documentation, else by name."""
    name = posixpath.basename(path).lower()
    stem, suffix = posixpath.splitext(name)
    depth = path.count("/")
    if stem == "readme":
        return 0, depth, path
    if suffix in DOCUMENTATION or stem in DOCUMENTATION_NAMES:
        return 1, depth, path
    return 2, 0, path


# --- what a file asks for --------------------------------------------------------------------------------------------------------

PYTHON = re.compile(
    r"^[ \t]*(?:from[ \t]+([.\w]+)[ \t]+import[ \t]+(\([^)]*\)|(?:\\\n|[^\n;])+)|import[ \t]+([\w., \t]+))", re.MULTILINE
)
JS = re.compile(r"\b(?:from|import|require)\s*\(?\s*(['\"])([^'\"\n]+)\1")
C = re.compile(r"^[ \t]*#[ \t]*(?:include|import)[ \t]*([<\"])([^>\"\n]+)[>\"]", re.MULTILINE)
JVM = re.compile(r"^[ \t]*import[ \t]+(?:static[ \t]+)?(\w+(?:\.\w+)*(?:\.\*)?)", re.MULTILINE)
GO = re.compile(r"^import[ \t]*(?:\(([^)]*)\)|(?:[\w.]+[ \t]+)?\"([^\"\n]+)\")", re.MULTILINE)
GO_MODULE = re.compile(r"^module[ \t]+(\S+)", re.MULTILINE)
RUST = re.compile(
    r"^[ \t]*(?:pub(?:\([^)]*\))?[ \t]+)?(?:mod[ \t]+(\w+)[ \t]*;|use[ \t]+((?:crate|super|self)::[^;]+);)", re.MULTILINE
)


def _python(text: str) -> Iterator[str]:
    """`a.b` for import a.b; `a.b:c` for from a.b import c (c may be a module or a name in a.b)."""
    for origin, names, plain in PYTHON.findall(text):
        if plain:
            yield from (name for part in plain.split(",") if (name := part.split(" as ")[0].strip()))
            continue
        for line in names.strip("()").split("\n"):
            for part in line.split("#")[0].replace("\\", "").strip(" \t()").split(","):
                if name := part.split(" as ")[0].strip():
                    yield f"{origin}:{name}"


def _js(text: str) -> Iterator[str]:
    return (name for _, name in JS.findall(text) if name.startswith((".", "@/", "~/", "/")))


def _c(text: str) -> Iterator[str]:
    return (f"{quote}{name.strip()}" for quote, name in C.findall(text))


def _jvm(text: str) -> Iterator[str]:
    return iter(JVM.findall(text))


def _go(text: str) -> Iterator[str]:
    for block, single in GO.findall(text):
        if single:
            yield single
        yield from re.findall(r'"([^"\n]+)"', block)


def _go_module(text: str) -> Iterator[str]:
    return iter(GO_MODULE.findall(text)[:1])


def _rust(text: str) -> Iterator[str]:
    """`mod name`, or a path that begins with crate, super or self; braces are written out."""
    for module, use in RUST.findall(text):
        if module:
            yield f"mod {module}"
        else:
            yield from (re.sub(r"\s+as\s+\w+$", "", path.strip()) for path in _without_braces(use))


def _without_braces(path: str) -> list[str]:
    """a::{b, c::{d, e}} -> a::b, a::c::d, a::c::e"""
    start = path.find("{")
    if start < 0:
        return [path]
    prefix, depth, parts, begin = path[:start].strip(), 0, [], start + 1
    for i in range(start, len(path)):
        depth += {"{": 1, "}": -1}.get(path[i], 0)
        if depth == 0 or (depth == 1 and path[i] == ","):
            parts.append(path[begin:i])
            begin = i + 1
        if depth == 0:
            break
    return [prefix + tail for part in parts if part.strip() for tail in _without_braces(part.strip())]


FINDERS: dict[str, Callable[[str], Iterator[str]]] = {
    ".py": _python,
    ".pyi": _python,
    **dict.fromkeys(JS_SUFFIXES, _js),
    **dict.fromkeys(C_SUFFIXES, _c),
    **dict.fromkeys(JVM_SUFFIXES, _jvm),
    ".go": _go,
    ".rs": _rust,
}


# --- which files those are -----------------------------------------------------------------------------------------------------------


class _Resolver:
    """Finds the files of one repository that a reference means."""

    def __init__(self, files: Mapping[str, References]) -> None:
        self.files = files
        self.by_name: dict[str, list[str]] = defaultdict(list)
        self.by_folder: dict[str, list[str]] = defaultdict(list)
        self.python_modules: dict[str, list[str]] = defaultdict(list)
        self.go_modules: list[tuple[str, str]] = []
        """(module name, its folder), the longest name first."""
        for path in sorted(files):
            folder, name = posixpath.split(path)
            self.by_name[name].append(path)
            self.by_folder[folder].append(path)
            if name.endswith((".py", ".pyi")):
                for module in self._module_names(path):
                    self.python_modules[module].append(path)
            if name == "go.mod" and files[path]:
                self.go_modules.append((files[path][0], folder))
        self.folders_by_name: dict[str, list[str]] = defaultdict(list)
        for folder in sorted(self.by_folder):
            self.folders_by_name[posixpath.basename(folder)].append(folder)
        self.go_modules.sort(key=lambda module: (-len(module[0]), module))

    def of(self, path: str) -> list[str]:
        """The files that `path` refers to, sorted."""
        suffix = posixpath.splitext(path)[1].lower()
        resolve = RESOLVERS.get(suffix)
        found: set[str] = set()
        if resolve:
            for reference in self.files[path]:
                found.update(resolve(self, path, reference))
        if path.endswith("_test.go"):
            found.update(file for file in self._go_package(posixpath.dirname(path)))
        found.discard(path)
        return sorted(found)

    def _first(self, candidates: Sequence[str]) -> list[str]:
        return next(([path] for path in candidates if path in self.files), [])

    def _nearest(self, path: str, candidates: Sequence[str]) -> list[str]:
        """The candidate that shares most folders with `path`; of equals the shortest path, then by name."""
        if not candidates:
            return []
        own = path.split("/")[:-1]

        def rank(candidate: str) -> tuple[int, int, str]:
            shared = 0
            for a, b in zip(own, candidate.split("/")[:-1], strict=False):
                if a != b:
                    break
                shared += 1
            return -shared, candidate.count("/"), candidate

        return [min(candidates, key=rank)]

    # Python

    def _module_names(self, path: str) -> Iterator[str]:
        """Dotted names that a file may be imported by: from the top of the repository, of src and the like, of its package.

        Where a package begins is not always to be seen (corpora drop empty __init__.py), so every ending of two names counts.
        """
        parts = posixpath.splitext(path)[0].split("/")
        is_package = parts[-1] == "__init__"
        if is_package:
            parts = parts[:-1]
        for start in range(len(parts)):
            if start == 0 or len(parts) - start >= 2 or is_package or (start == 1 and parts[0] in PYTHON_ROOTS):
                yield ".".join(parts[start:])

    def python(self, path: str, reference: str) -> list[str]:
        origin, _, name = reference.partition(":")
        # The name is a module of its own, or something in the module before it.
        return self._python_module(path, origin, name) or self._python_module(path, origin, "")

    def _python_module(self, path: str, origin: str, name: str) -> list[str]:
        dots = len(origin) - len(origin.lstrip("."))
        folder = posixpath.dirname(path)
        tail = [*filter(None, origin.lstrip(".").split(".")), *filter(None, [name])]
        if dots:
            base = folder.split("/") if folder else []
            return self._python_file("/".join([*base[: len(base) - dots + 1], *tail])) if dots - 1 <= len(base) else []
        found = self._nearest(path, self.python_modules.get(".".join(tail), []))
        # A script finds its neighbours by their bare name.
        return found or self._python_file(posixpath.join(folder, *tail))

    def _python_file(self, stem: str) -> list[str]:
        return self._first([f"{stem}.py", posixpath.join(stem, "__init__.py"), f"{stem}.pyi"])

    # JavaScript and TypeScript

    def js(self, path: str, reference: str) -> list[str]:
        if reference.startswith(("@/", "~/", "/")):
            bases = [posixpath.join(top, reference.lstrip("@~/")) for top in ("src", "")]
        else:
            bases = [posixpath.normpath(posixpath.join(posixpath.dirname(path), reference))]
        candidates = []
        for base in bases:
            stem, suffix = posixpath.splitext(base)
            # TypeScript names the file that will be compiled: ./a.js is a.ts.
            compiled = [stem + JS_SUFFIXES[0], stem + JS_SUFFIXES[1]] if suffix in (".js", ".jsx", ".mjs") else []
            candidates += [base, *compiled, *(base + s for s in JS_SUFFIXES), *(f"{base}/index{s}" for s in JS_SUFFIXES)]
        return self._first(candidates)

    # C and C++

    def c(self, path: str, reference: str) -> list[str]:
        quote, name = reference[0], posixpath.normpath(reference[1:])
        beside = posixpath.normpath(posixpath.join(posixpath.dirname(path), reference[1:]))
        if quote == '"' and beside in self.files:
            return [beside]
        name = re.sub(r"^(\.\./)+", "", name)
        same = self.by_name.get(posixpath.basename(name), [])
        return self._nearest(path, [file for file in same if file == name or file.endswith("/" + name)])

    # Java, Kotlin, Scala

    def jvm(self, path: str, reference: str) -> list[str]:
        parts = reference.split(".")
        if parts[-1] in ("*", "_"):
            package = "/".join(parts[:-1])
            folders = [f for f in self.folders_by_name.get(parts[-2], []) if f == package or f.endswith("/" + package)]
            return [file for folder in folders for file in self.by_folder[folder] if file.endswith(JVM_SUFFIXES)]
        # a.b.C, or a member of it: a.b.C.member
        for end in (len(parts), len(parts) - 1):
            same = [file for suffix in JVM_SUFFIXES for file in self.by_name.get(parts[end - 1] + suffix, [])]
            stem = "/".join(parts[:end])
            if end > 1 and (found := [f for f in same if (s := posixpath.splitext(f)[0]) == stem or s.endswith("/" + stem)]):
                return self._nearest(path, found)
        return []

    # Go

    def go(self, path: str, reference: str) -> list[str]:
        for module, folder in self.go_modules:
            if reference == module or reference.startswith(module + "/"):
                return self._go_package(posixpath.normpath(posixpath.join(folder, reference[len(module) + 1 :])))
        if self.go_modules:
            return []
        # Before modules, a repository was imported as host/owner/name/folder.
        return self._go_package("/".join(reference.split("/")[3:])) if reference.count("/") >= 2 else []

    def _go_package(self, folder: str) -> list[str]:
        folder = "" if folder == "." else folder
        return [file for file in self.by_folder.get(folder, []) if file.endswith(".go") and not file.endswith("_test.go")]

    # Rust

    def rust(self, path: str, reference: str) -> list[str]:
        folder, name = posixpath.split(path)
        own = folder if name in ("mod.rs", "lib.rs", "main.rs") else posixpath.splitext(path)[0]
        if reference.startswith("mod "):
            return self._rust_module(own, [reference[4:]])
        first, *parts = reference.split("::")
        if first == "crate":
            base = self._crate(folder)
        elif first == "self":
            base = own
        else:
            base = posixpath.dirname(own)
            while parts and parts[0] == "super":
                base, parts = posixpath.dirname(base), parts[1:]
        return [] if base is None else self._rust_module(base, parts)

    def _crate(self, folder: str) -> str | None:
        """The folder of the crate's first file."""
        while True:
            if any(posixpath.join(folder, name) in self.files for name in ("lib.rs", "main.rs")):
                return folder
            if not folder:
                return None
            folder = posixpath.dirname(folder)

    def _rust_module(self, base: str, parts: list[str]) -> list[str]:
        """The module at the longest prefix of `parts`; the rest names something inside it."""
        for end in range(len(parts), 0, -1):
            stem = posixpath.join(base, *parts[:end])
            if found := self._first([f"{stem}.rs", f"{stem}/mod.rs"]):
                return found
        return []


RESOLVERS: dict[str, Callable[[_Resolver, str, str], list[str]]] = {
    ".py": _Resolver.python,
    ".pyi": _Resolver.python,
    **dict.fromkeys(JS_SUFFIXES, _Resolver.js),
    **dict.fromkeys(C_SUFFIXES, _Resolver.c),
    **dict.fromkeys(JVM_SUFFIXES, _Resolver.jvm),
    ".go": _Resolver.go,
    ".rs": _Resolver.rust,
}
