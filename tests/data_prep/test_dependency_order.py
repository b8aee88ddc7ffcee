"""Files behind what they import, in every language that is known, whatever the cycles."""

import graphlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.dependency_order import MAX_REFERENCES, dependency_order, references


def ordered(texts):
    order = dependency_order({path: references(path, text) for path, text in texts.items()})
    assert sorted(order.paths) == sorted(texts)
    return order


def behind(texts, *chain):
    """Asserts that the files of `chain` come in this order, though their names alone would not put them so."""
    assert [path for path in ordered(texts).paths if path in chain] == list(chain)


def test_python():
    behind(
        {
            "p/__init__.py": "from .a import x\n",
            "p/a.py": "from p import c\nimport p.d.e as f\n",
            "p/b.py": "from . import a, c\n",
            "p/c.py": "import os\n",
            "p/d/__init__.py": "",
            "p/d/e.py": "from ..c import y\nfrom .. import b\n",
        },
        "p/c.py",
        "p/d/e.py",
        "p/a.py",
        "p/__init__.py",
    )


@pytest.mark.parametrize(
    "text",
    [
        "from pkg.z import name",
        "from pkg import (  # several\n    other,\n    z,  # the one\n)",
        "import os, pkg.z as short",
        "def f():\n    from .z import name\n",
        "from . import z",
        "from .z import *",
        "from pkg import a, \\\n    z",
    ],
)
def test_python_spellings(text):
    for top in ("", "src/", "deep/down/"):
        behind({f"{top}pkg/__init__.py": "", f"{top}pkg/a.py": text, f"{top}pkg/z.py": ""}, f"{top}pkg/z.py", f"{top}pkg/a.py")


def test_python_scripts_import_their_neighbours_and_no_namesake_elsewhere():
    behind({"tools/a.py": "import z", "tools/z.py": ""}, "tools/z.py", "tools/a.py")
    behind({"a.py": "import json", "vendor/json.py": ""}, "a.py", "vendor/json.py")
    # of two packages with the same name the nearest
    texts = {f"{v}/pkg/{f}.py": "" for v in ("new", "old") for f in ("__init__", "z")}
    behind(texts | {"new/a.py": "from pkg import z"}, "new/pkg/z.py", "new/a.py", "old/pkg/z.py")


@pytest.mark.parametrize(
    ("reference", "target"),
    [
        ("import { b } from './z'", "src/z.ts"),
        ("import './z.js'", "src/z.ts"),
        ('export * from "./z"', "src/z/index.tsx"),
        ("const z = require('../lib/z')", "lib/z.js"),
        ("const z = await import('@/z')", "src/z.vue"),
        ("import type { Z } from './z'", "src/z.d.ts"),
        ("import z from './z.json'", "src/z.json"),
        ("import {\n  a,\n  b,\n} from './z'", "src/z.mjs"),
    ],
)
def test_javascript_and_typescript(reference, target):
    behind({"lib/a.js": "", "src/a.ts": reference, target: ""}, target, "src/a.ts")


def test_packages_of_others_are_no_reference():
    assert references("a.ts", "import React from 'react'\nimport x from '@scope/x'") == ()


@pytest.mark.parametrize(
    ("reference", "target"),
    [
        ('#include "z.h"', "src/z.h"),
        ("#  include <lib/z.h>", "include/lib/z.h"),
        ('#include "../include/z.hpp"', "include/z.hpp"),
        ('#import "Z.h"', "src/Z.h"),
    ],
)
def test_c(reference, target):
    behind({"src/a.c": f"// first\n{reference}\nint main;", target: ""}, target, "src/a.c")


def test_a_c_header_of_the_same_name_further_away_is_not_taken():
    behind({"one/a.c": '#include "z.h"', "one/z.h": "", "all/z.h": ""}, "all/z.h", "one/z.h", "one/a.c")
    behind({"one/a.c": '#include "y/z.h"', "two/z.h": ""}, "one/a.c", "two/z.h")


@pytest.mark.parametrize(
    ("reference", "target"),
    [
        ("import com.x.Z;", "src/main/java/com/x/Z.java"),
        ("import static com.x.Z.helper;", "src/main/java/com/x/Z.java"),
        ("import com.x.*;", "src/main/java/com/x/Z.java"),
        ("import com.x.Z", "app/com/x/Z.kt"),
        ("import com.x._", "app/com/x/Z.scala"),
    ],
)
def test_java_and_its_relatives(reference, target):
    behind({"app/A.java": f"package a;\n\n{reference}\n", target: ""}, target, "app/A.java")


def test_go():
    texts = {
        "go.mod": "module example.com/own\n\ngo 1.22\n",
        "a/a.go": 'package a\n\nimport (\n\t"fmt"\n\tz "example.com/own/z"\n)\n',
        "z/one.go": "package z",
        "z/two.go": 'package z\nimport "example.com/own/inner"\n',
        "z/z_test.go": "package z",
        "inner/inner.go": "package inner",
    }
    behind(texts, "z/one.go", "inner/inner.go", "z/two.go", "a/a.go", "z/z_test.go")
    del texts["go.mod"]
    texts["a/a.go"] = 'package a\nimport "github.com/me/own/z"\n'
    behind(texts, "z/one.go", "a/a.go")


def test_rust():
    behind(
        {
            "src/lib.rs": "pub mod a;\nmod z;\n",
            "src/a.rs": "use crate::z::{self, inner::Deep, Thing as Other};\nmod part;\n",
            "src/a/part.rs": "use super::super::y::f;\n",
            "src/y.rs": "",
            "src/z/mod.rs": "pub(crate) mod inner;",
            "src/z/inner.rs": "use self::what::X;",
        },
        "src/y.rs",
        "src/a/part.rs",
        "src/z/inner.rs",
        "src/z/mod.rs",
        "src/a.rs",
        "src/lib.rs",
    )


def test_documentation_comes_first():
    texts = {"a.py": "", "docs/guide.md": "", "LICENSE": "", "README.md": "", "sub/README.rst": "", "CMakeLists.txt": ""}
    assert ordered(texts).paths == ["README.md", "sub/README.rst", "LICENSE", "docs/guide.md", "CMakeLists.txt", "a.py"]


@settings(deadline=None)
@given(edges=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=60))
def test_any_graph(edges):
    texts = {f"m{n:02}.py": "" for n in range(13)}
    for a, b in edges:
        texts[f"m{a:02}.py"] += f"import m{b:02}\n"
    order = ordered(texts)
    wanted = {(f"m{a:02}.py", f"m{b:02}.py") for a, b in edges if a != b}
    violated = sum(order.paths.index(a) < order.paths.index(b) for a, b in wanted)
    # every reference holds but those that were cut
    assert (violated, len(wanted)) == (order.cut, order.references)
    sorter = graphlib.TopologicalSorter({a: {b for x, b in wanted if x == a} for a in texts})
    try:
        sorter.prepare()
    except graphlib.CycleError:
        assert order.cut > 0
    else:
        assert order.cut == 0
    # names alone decide what nothing else does
    assert ordered(dict(reversed(texts.items()))) == order


def test_a_deep_chain_and_a_generated_file_do_no_harm():
    count = 5000
    texts = {f"m{n:05}.py": f"import m{n + 1:05}" for n in range(count)}
    assert ordered(texts).paths == sorted(texts, reverse=True)
    assert len(references("a.py", "\n".join(f"import m{n}" for n in range(3 * MAX_REFERENCES)))) == MAX_REFERENCES


def test_unknown_files_and_broken_code_refer_to_nothing_or_what_matches():
    assert references("a.xyz", "import b") == ()
    assert references("a.py", "import (((\nimport b") == ("b",)
    assert references("a.rs", "use crate::{{{;") == ()
