"""The report: self-contained, complete on any stage of a run, and harmless whatever a run's files say."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launchers import charts, cli
from launchers.charts import LABEL_HEIGHT, MAX_POINTS, Band, Chart, Line
from launchers.progress import RunProgress
from launchers.report import render
from launchers.runs import RunFolder
from recipes.schema import Recipe

HOSTILE = "<script>alert('owned')</script>\"'&{{data}}"


class Page(HTMLParser):
    """What a browser would make of the page: elements, attributes, scripts, text."""

    VOID = frozenset({"meta", "br", "link", "img", "hr"})

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == [], f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        else:
            self.text += data


def page_of(folder: Path) -> str:
    progress = RunProgress(RunFolder(folder))
    progress.refresh()
    return render(progress)


def check_harmless(page: str) -> Page:
    parsed = Page(page)
    data, code = parsed.scripts
    assert len(parsed.scripts) == 2
    assert data[0]["type"] == "application/json"
    json.loads(data[1])
    policy = next(a["content"] for t, a in parsed.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(code[1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    for tag, attributes in parsed.tags:
        assert tag not in ("img", "link", "iframe", "object", "base")
        assert not {"src", "href"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\(|@import", page)
    return parsed


def test_finished_run(harness: Any) -> None:
    assert harness.launch() == 0
    page = (harness.run_dir / "report.html").read_text()
    parsed = check_harmless(page)
    for title in (
        "Training loss",
        "Held-out loss",
        "Learning rate",
        "Sequence length",
        "RoPE base",
        "Mixture",
        "Planned and drawn",
    ):
        assert title in parsed.text
    for words in (
        "Throughput",
        "Stages",
        "What it writes",
        "def f(x):",
        "0.5 a + 0.5 b",
        harness.recipe.digest(),
        "web_a",
        "finished",
    ):
        assert words in parsed.text, words
    assert "<script>alert('prompt')</script>" in parsed.text  # shown, not run
    heldout = re.search(r"after stage</th>(.*?)</tr>", page)
    assert heldout is not None
    assert re.findall(r"<th>(\w+)</th>", heldout[1]) == ["a", "b", "c", "change"]  # an export measures nothing of its own
    data = json.loads(parsed.scripts[0][1])
    assert data["step"] == [1, 2, 3, 4] * 3
    assert data["tokens"][-1] == 384
    assert [p["name"] for p in data["phases"]] == ["a", "b", "c"]


def test_run_at_every_stage_of_its_life(harness: Any) -> None:
    harness.run_dir.mkdir(parents=True)
    harness.recipe.write(harness.run_dir / "recipe.json")
    assert "Training loss" not in check_harmless(page_of(harness.run_dir)).text  # nothing is shown rather than an empty chart
    harness.faults(b={"exit": 1, "at_step": 2})
    assert harness.launch() == 1
    parsed = check_harmless((harness.run_dir / "report.html").read_text())
    assert "failed" in parsed.text
    assert json.loads(parsed.scripts[0][1])["step"] == [1, 2, 3, 4, 1, 2]


def test_hostile_text_is_shown_and_not_run(harness: Any) -> None:
    value = harness.dict(name="x", extra={"note": HOSTILE})
    value["phase"]["a"] = {
        **value["phase"]["a"],
        "title": HOSTILE,
        "mixture": {"name": "m", "shares_percent": {HOSTILE: 100.0}},
    }
    value["data"]["sources"][HOSTILE] = {**value["data"]["sources"]["web_a"], "category": HOSTILE}
    value["model"] = {**value["model"], "name": HOSTILE}
    recipe = Recipe.model_validate(value)
    folder = harness.root / "hostile"
    stage = folder / "stages" / "a"
    (folder / "stages" / "hf" / "hf").mkdir(parents=True)
    stage.mkdir()
    recipe.write(folder / "recipe.json")
    base = {"time": "2026-01-01T00:00:00+00:00", "attempt": 1}
    journal = [
        {**base, "event": "launch", "host": HOSTILE, "stages": [], "pid": 1, "process_started": 1.0},
        {**base, "event": "intent", "stage": "b"},
        {**base, "event": "outcome", "stage": "b", "exit_code": 1, "reason": HOSTILE},
    ]
    (folder / "journal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in journal))
    ledger = {"a": {HOSTILE: {"samples": 1, "tokens": 5}}, HOSTILE: {HOSTILE: {"samples": 1, "tokens": 5}}}
    handoff = {"heldout": {HOSTILE: 3.0}, "ledger": ledger, "versions": {HOSTILE: HOSTILE}, "data_digest": HOSTILE}
    (stage / "handoff.json").write_text(json.dumps(handoff))
    (stage / "metrics.jsonl").write_text(
        json.dumps({"step": HOSTILE, "total_tokens": 5, "stage_tokens": 5, "loss": 2.0}) + "\n"
    )
    (stage / "heldout.jsonl").write_text(
        json.dumps({"when": "end", "step": 4, "total_tokens": 5, "losses": {HOSTILE: 3.0}}) + "\n"
    )
    (folder / "stages" / "hf" / "hf" / "sample.json").write_text(json.dumps([{"prompt": HOSTILE, "completion": HOSTILE}]))
    page = page_of(folder)
    parsed = check_harmless(page)
    assert HOSTILE in parsed.text
    assert "<script>alert" not in page


def test_nan_and_missing_values_are_left_out(harness: Any) -> None:
    harness.run_dir.mkdir(parents=True)
    harness.recipe.write(harness.run_dir / "recipe.json")
    folder = harness.run_dir / "stages" / "a"
    folder.mkdir(parents=True)
    rows = [
        {"step": 1, "stage_tokens": 32, "total_tokens": 32, "loss": 3.0, "lr": 1e-3, "tokens_per_second": 10.0},
        {"step": 2, "stage_tokens": 64, "total_tokens": 64, "loss": math.nan, "lr": None, "tokens_per_second": math.inf},
        {"step": 3, "stage_tokens": 96, "total_tokens": 96},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = json.loads(check_harmless(page_of(harness.run_dir)).scripts[0][1])
    assert data["loss"] == [3.0, None, None]


def test_command_writes_where_it_is_told(harness: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harness.run_dir.mkdir(parents=True)
    harness.recipe.write(harness.run_dir / "recipe.json")
    assert cli.main(["report", str(harness.run_dir), "--output", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    check_harmless((tmp_path / "page.html").read_text())
    assert cli.main(["report", "nothing", "--runs-root", str(tmp_path)]) == 2


def test_report_of_a_long_run_is_quick_and_small(harness: Any) -> None:
    value = harness.dict()
    value["phase"]["a"] = {**value["phase"]["a"], "steps": 50_000, "tokens": 50_000 * 32}
    harness.run_dir.mkdir(parents=True)
    Recipe.model_validate(value).write(harness.run_dir / "recipe.json")
    folder = harness.run_dir / "stages" / "a"
    folder.mkdir(parents=True)
    row = {"loss": 3.0, "lr": 1e-3, "tokens_per_second": 10.0, "seconds": 3.2}
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({**row, "step": i, "stage_tokens": 32 * i, "total_tokens": 32 * i}) + "\n" for i in range(1, 50_001))
    )
    progress = RunProgress(RunFolder(harness.run_dir))
    progress.refresh()
    begun = time.process_time()
    page = render(progress)
    assert time.process_time() - begun < 3
    assert len(page) < 500_000


@given(st.lists(st.floats(-50, 500), min_size=1, max_size=13))
def test_labels_never_overlap_and_stay_inside(heights: list[float]) -> None:
    placed = charts.spread([(y, str(i), "") for i, y in enumerate(heights)], 20, 320)
    ys = [y for y, _, _ in placed]
    assert all(b - a >= LABEL_HEIGHT - 1e-9 for a, b in itertools.pairwise(ys))
    assert max(ys) <= 320
    assert sorted(name for _, name, _ in placed) == sorted(str(i) for i in range(len(heights)))


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(-1e3, 1e3)), min_size=1, max_size=4000))
def test_thinning_keeps_order_and_extremes(points: list[tuple[float, float]]) -> None:
    points = sorted(points)
    kept = charts.thin(points, MAX_POINTS)
    assert len(kept) <= max(MAX_POINTS, 2)
    assert list(kept) == sorted(kept)
    assert {min(y for _, y in kept), max(y for _, y in kept)} == {min(y for _, y in points), max(y for _, y in points)}


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=200), st.integers(1, 50))
def test_running_mean_against_its_definition(values: list[float], width: int) -> None:
    points = [(float(i), v) for i, v in enumerate(values)]
    for i, (x, mean) in enumerate(charts.smooth(points, width)):
        window = values[max(0, i - width // 2) : i + width // 2 + 1]
        assert x == i
        assert mean == pytest.approx(sum(window) / len(window), abs=1e-8)


def test_axes_map_ends_to_ends() -> None:
    bands = [Band(1, "a", 0, 100), Band(2, "b", 100, 400)]
    chart = Chart("t", 300, bands, 1.0, 1000.0, log=True)
    assert chart.x(0) == charts.LEFT
    assert chart.x(400) == charts.WIDTH - charts.RIGHT
    assert chart.y(1.0) == 300 - charts.BOTTOM
    assert chart.y(1000.0) == pytest.approx(charts.TOP)
    assert chart.y(math.sqrt(1000)) == pytest.approx((300 - charts.BOTTOM + charts.TOP) / 2)
    chart.add(Line([(0, 0.0), (50, math.nan), (100, 10.0)], "curve"))  # what has no logarithm is left out
    assert 'points="' + f"{chart.x(100):.1f},{chart.y(10):.1f}" + '"' in chart.svg()
