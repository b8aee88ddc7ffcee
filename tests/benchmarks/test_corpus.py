"""The corpus to measure with: text out of HTML, unique documents, the same bytes each time."""

import hashlib
import json
import re
from dataclasses import replace

import pytest

from benchmarks import corpus
from data_prep.progress import Silent

PAGE = """<!DOCTYPE html><html lang="de-AT"><head><title>Hidden</title></head><body>
<script>var hidden = "<p>";</script><!-- hidden <p> --><nav>hidden</nav>
<h1>Eins &amp; zwei</h1><p>Ein   <b>fettes</b> Wort.<br>Neue Zeile</p>


<p>Ende &lt;tag&gt;</p></body></html>"""


def test_html_becomes_its_visible_text():
    assert corpus.html_text(PAGE) == "Eins & zwei\n\nEin   fettes Wort.\nNeue Zeile\n\nEnde <tag>\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine whose documentation is two kinds of files, one text of them in both."""
    html, python = tmp_path / "html", tmp_path / "python"
    for folder in (html, python):
        folder.mkdir()
    for n in range(40):
        (html / f"{n}.html").write_text(PAGE.replace("Ende", f"Ende {n} " + "é" * 300))
        (python / f"{n}.py").write_text(f"# {n}\n" + "x = 1\n" * 100)
    (python / "copy.py").write_text(f"# 0\n\n{'x  =  1 ' * 100}")
    (python / "latin1.py").write_bytes(b"# \xe9\n" * 100)
    (python / "short.py").write_text("x = 1\n")
    (python / "tests").mkdir()
    (python / "tests" / "left_out.py").write_text("left out\n" * 100)
    kinds = (
        corpus.Kind("html", 50, (html,), (".html",)),
        corpus.Kind("python", 50, (python,), (".py",), re.compile(r"/tests?/")),
    )
    monkeypatch.setattr(corpus, "kinds", lambda: kinds)
    return tmp_path


def test_documents_are_unique_and_files_repeatable(machine):
    found = corpus.collect(10_000_000, 1, Silent())
    assert len(found) == 80
    first, second = (corpus.write(found, machine / name) for name in ("a.jsonl", "b.jsonl"))
    assert first == second
    assert hashlib.sha256((machine / "a.jsonl").read_bytes()).hexdigest() == first["sha256"]
    lines = (machine / "a.jsonl").read_text().splitlines()
    values = [json.loads(line) for line in lines]
    assert {(v["source"], v["language"]) for v in values} == {("html", "de"), ("python", "python")}
    assert sum(len(v["text"].encode()) for v in values) == first["text_bytes"]["all"]
    escaped = sum(line == json.dumps(value) for line, value in zip(lines, values, strict=True) if value["source"] == "html")
    assert 8 < escaped < 32  # half of 40
    assert json.loads((machine / "a.json").read_text()) == first


def test_a_size_is_met_and_what_one_kind_lacks_another_gives(machine, monkeypatch):
    def sizes(found):
        return {kind: sum(len(d.text) for d in found if d.kind == kind) for kind in ("html", "python")}

    every = sizes(corpus.collect(10_000_000, 1, Silent()))
    even = sizes(corpus.collect(20_000, 1, Silent()))
    assert 10_000 <= even["html"] < 10_700
    assert abs(even["python"] - 10_000) < 700
    html, python = corpus.kinds()
    monkeypatch.setattr(corpus, "kinds", lambda: (replace(html, share_percent=5), replace(python, share_percent=95)))
    assert every["python"] < 0.95 * 40_000
    uneven = sizes(corpus.collect(40_000, 1, Silent()))
    assert uneven["python"] == every["python"]
    assert 40_000 <= sum(uneven.values()) < 40_700


def test_too_little_text_is_said(machine, capsys):
    assert corpus.main(["--output", str(machine / "c.jsonl"), "--size-mb", "1", "--workers", "1", "--quiet"]) == 1
    assert "install documentation packages" in capsys.readouterr().err
