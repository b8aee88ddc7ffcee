"""Who may import whom (DESIGN, section 2), and that the command line stays light: both decay silently without a test."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("recipes", "data_prep", "model", "training", "launchers")

MAY_IMPORT = {
    "recipes": set(),
    "data_prep": {"recipes"},
    "model": {"recipes"},
    "training": {"recipes", "data_prep", "model"},
    "launchers": {"recipes", "data_prep"},
}
HEAVY = {"torch", "megatron", "transformer_engine"}
# Package -> heavy modules that it may not import anywhere, and those that it may not import when it is itself imported.
NEVER = {
    "recipes": HEAVY,
    "launchers": HEAVY,
    "data_prep": {"megatron", "transformer_engine"},
    "model": set(),
    "training": set(),
}
NOT_AT_MODULE_LEVEL = {"data_prep": {"torch"}}

LIMIT_SECONDS = 2.0
"""Of CPU, on a core of its own: there the slowest, `quarry plan`, takes 1.4 to 1.7."""
LOOP_SECONDS = 0.25
"""What `slowdown` times, on such a core."""


def imports(tree: ast.AST, *, module_level: bool) -> Iterator[tuple[int, str]]:
    """(line, first part of the module) of every import; with `module_level` only those that run when the module is imported."""
    nodes = list(ast.iter_child_nodes(tree))
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; name the package"
            yield node.lineno, (node.module or "").split(".")[0]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            if name in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value).split(".")[0]
        if module_level and (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _is_type_checking(node)):
            continue
        nodes += ast.iter_child_nodes(node)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"no modules in {package}"
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_direction_of_imports(package: str) -> None:
    forbidden = (set(PACKAGES) - {package} - MAY_IMPORT[package]) | NEVER[package]
    wrong = []
    for path in files(package):
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        wrong += [
            f"{path.relative_to(ROOT)}:{line} imports {name}"
            for line, name in imports(tree, module_level=False)
            if name in forbidden
        ]
        at_level = NOT_AT_MODULE_LEVEL.get(package, set())
        wrong += [
            f"{path.relative_to(ROOT)}:{n} imports {m} at module level"
            for n, m in imports(tree, module_level=True)
            if m in at_level
        ]
    assert not wrong, "\n".join(wrong)


def test_the_check_sees_imports() -> None:
    source = (
        "import a.b\nfrom c.d import e\ndef f():\n    import g\nif TYPE_CHECKING:\n    import h\nimportlib.import_module('i.j')"
    )
    tree = ast.parse(source)
    assert {name for _, name in imports(tree, module_level=False)} == {"a", "c", "g", "h", "i"}
    assert {name for _, name in imports(tree, module_level=True)} == {"a", "c", "i"}


def run_light(arguments: list[str]) -> tuple[float, str]:
    """CPU seconds of a quarry command in a fresh interpreter, which fails if anything heavy was imported on the way."""
    code = (
        "import sys\nfrom launchers.cli import main\n"
        "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as end:\n    code = end.code\n"
        f"heavy = sorted({HEAVY | {'nemo_run', 'transformers'}!r} & set(sys.modules))\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    # An empty folder: `launch --dryrun` looks at the runs below the current one, and a developer's own may be of an older recipe.
    with tempfile.TemporaryDirectory() as folder:
        begun = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=folder, timeout=60)
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = ended.ru_utime - begun.ru_utime + ended.ru_stime - begun.ru_stime
    assert done.returncode == 0, done.stderr
    return seconds, done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["launch", "--help"],
        ["plan"],
        ["plan", "curriculum=smoke"],
        ["launch", "curriculum=smoke", "cluster=local", "--dryrun"],
    ],
    ids=" ".join,
)
def test_light_commands_answer_quickly_without_torch(arguments: list[str]) -> None:
    # CPU seconds, the best of six, as on a quiet core: the machine may be busy with other tests, which says nothing about the command.
    times = []
    for _ in range(6):
        before = slowdown()
        seconds, output = run_light(arguments)
        assert output.strip()
        times.append(2 * seconds / (before + slowdown()))
        if times[-1] < LIMIT_SECONDS:
            return
    pytest.fail(f"quarry {' '.join(arguments)} takes {min(times):.1f} s of CPU on a quiet core, the limit is {LIMIT_SECONDS} s")


def slowdown() -> float:
    """How much longer than on a quiet core the same work takes now, at least 1: threads that share a core slow each other down."""
    begun = time.process_time()
    sum(number * number for number in range(2_000_000))
    return max(1.0, (time.process_time() - begun) / LOOP_SECONDS)
