"""Fine-tuning, reinforcement learning, curation and evaluation in a report."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest

from launchers import charts
from tests.launchers.posttrain_run import PROVES, lines, make_run
from tests.launchers.test_report import HOSTILE, Page, check_harmless, page_of

ROW = {"suite": "granite", "published_by": "IBM", "ours_setting": "gsm8k, 8-shot", "published_setting": "8-shot", "note": ""}


def section(page: str, title: str) -> Page:
    return Page(next(part for part in re.findall(r"<section>.*?</section>", page, re.DOTALL) if f"<h2>{title}" in part))


def cells(page: Page | str, name: str) -> list[str]:
    """The cells of the table's row that begins with `name`."""
    source = page if isinstance(page, str) else page.text
    row = next(r for r in re.findall(r"<tr>.*?</tr>", source) if re.match(rf'<tr><td class="l">{re.escape(name)}</td>', r))
    return re.findall(r"<td[^>]*>(.*?)</td>", row)


def test_fine_tuning(harness: Any) -> None:
    page = page_of(make_run(harness).path)
    check_harmless(page)
    seen = section(page, "Fine-tuning: sft")
    for words in ("98.76 %", "1,234 samples", "5/5", "training loss", PROVES):
        assert words in seen.text, words
    assert cells(page, "chat")[1:4] == ["5.2500", "1.7500", "-3.5000"]
    assert "20132413" in seen.text  # the curation: samples, accepted, borderline, rejected, unjudged, contradictions
    # The two epochs of 5 sequences, 2 a step, are 2.5 steps each.
    bands = [float(x) for x in re.findall(r'<rect class="band b[01]" x="([\d.]+)"', page.split("Fine-tuning: sft")[1])][:2]
    assert bands[1] == pytest.approx((charts.LEFT + charts.STEPS_WIDTH - charts.RIGHT) / 2, abs=0.1)


def test_reinforcement_learning(harness: Any) -> None:
    page = page_of(make_run(harness).path)
    seen = section(page, "Reinforcement learning: rl")
    for words in ("4/8", "0.100 → 0.400", "stops at (mean) 0.07", "stops at (max) 3", "limit 12", "groups, no signal", "code"):
        assert words in seen.text, words
    assert cells(page, "mean reward")[1:] == ["0.1", "0.4", "0.1", "0.4"]
    assert cells(page, "mean reward, math")[1:3] == ["0.11", "0.41"] or cells(page, "mean reward, code")[1:3] == [
        "0.11",
        "0.41",
    ]
    assert "reward 0.5, truncated" in seen.text
    assert "rl_again" not in seen.text  # it has not begun
    after = section(page, "Held-out text after post-training")
    assert "before sftafter sftchange" in after.text
    assert cells(page, "web")[1:] == ["4.0000", "4.5000", "+0.5000"]


def test_without_a_divergence_or_a_limit_of_the_largest_gap(harness: Any) -> None:
    run = make_run(harness, domains=("math",))
    value = json.loads(run.recipe.read_text())
    value["grpo"]["rl"] |= {"kl_coefficient": 0.0, "stop": {"max_mean_gap_nats": 0.07}}
    run.recipe.write_text(json.dumps(value))
    seen = section(page_of(run.path), "Reinforcement learning: rl")
    assert "divergence from the start k3" not in seen.text
    assert "stops at (max)" not in seen.text
    assert "mean reward, math" not in seen.text  # one domain is all


def test_hostile_text_and_numbers_that_are_none(harness: Any) -> None:
    run = make_run(harness, word=HOSTILE, domains=(HOSTILE, "b"))
    row = json.loads((run.stage("rl") / "metrics.jsonl").read_text().splitlines()[0])
    odd = [{**row, "step": 2, "reward": math.nan, "entropy_nats": math.inf, "reward_per_domain": None}, {"step": 3}]
    lines(run.stage("rl") / "metrics.jsonl", [row, *odd])
    (run.path / "stages" / "hf-eval").mkdir(parents=True)
    results = {
        "format": "quarry.evaluation/1",
        "model": {"given": HOSTILE},
        "benchmarks": [{**ROW, "title": HOSTILE, "suite": HOSTILE}],
    }
    (run.path / "stages" / "hf-eval" / "results.json").write_text(json.dumps(results))
    page = page_of(run.path)
    assert HOSTILE in check_harmless(page).text
    assert "<script>alert" not in page


def results(**changes: Any) -> dict[str, Any]:
    measured = {**ROW, "title": "GSM8K", "ours_percent": 41.5, "ours_stderr_percent": 1.25, "comparable": "close"}
    measured["published_percent"] = {"3b": 72.93, "8b": 84.0, "30b": 90.5}
    absent = {**ROW, "title": "RULER", "ours_percent": None, "comparable": "none", "note": "not measured: needs a judge"}
    needle = {
        "options": {"depths_percent": [0.0, 100.0]},
        "by_length": [{"length_tokens": 128, "ranked_first": 0.5, "ranked_first_stderr": 0.1, "generated": 0.25, "count": 8}],
        "cells": [{"length_tokens": 128, "depth_percent": 0.0, "ranked_first": 0.75}],
        "chance_ranked_first": 0.125,
    }
    heldout = {
        "megatron": {"web": 4.123456},
        "transformers": {"web": 4.123457},
        "agreement": {"agrees": True, "difference_nats": 1e-6, "tolerance_nats": 1e-4},
    }
    model = {"given": "runs/x/stages/hf"}
    return {
        "format": "quarry.evaluation/1",
        "model": model,
        "device": "cpu",
        "dtype": "float32",
        "benchmarks": [measured, absent],
        "needle": needle,
        "heldout": heldout,
    } | changes


@pytest.mark.parametrize("place", ["stages/hf-eval", "stages/hf", "eval"])
def test_evaluation_beside_the_published_numbers(harness: Any, place: str) -> None:
    run = make_run(harness)
    (run.path / place).mkdir(parents=True, exist_ok=True)
    (run.path / place / "results.json").write_text(json.dumps(results()))
    page = page_of(run.path)
    check_harmless(page)
    seen = section(page, "Evaluation: ")
    assert cells(page, "GSM8K")[1:5] == ["41.50 ± 1.25", "72.93", "84.00", "90.50"]
    assert cells(page, "RULER")[1:5] == ["-", "", "", ""]
    assert "not measured: needs a judge" in seen.text
    assert "They agree: at most 1.00e-06 nats" in seen.text
    assert cells(page, "128")[1:] == ["75", "-", "50.0 ± 10.0", "25.0", "8"]
    assert "12.5 %" in seen.text


def test_results_of_something_else_are_left_out(harness: Any) -> None:
    run = make_run(harness)
    for name, content in (("a-eval", "{"), ("b-eval", json.dumps({"format": "other"})), ("c-eval", "[1]")):
        (run.path / "stages" / name).mkdir()
        (run.path / "stages" / name / "results.json").write_text(content)
    assert "Evaluation" not in Page(page_of(run.path)).text


def test_the_real_published_numbers_fit_the_table(harness: Any) -> None:
    """Rows as `quarry eval` makes them of the published list, before anything is measured."""
    from training.evaluation.suite import load_suite
    from training.evaluation.table import as_dicts, rows

    suite = load_suite("granite_4_1_base")
    run = make_run(harness)
    (run.path / "results.json").write_text(json.dumps(results(benchmarks=as_dicts(rows(suite, {})))))
    page = page_of(run.path)
    shown = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>.*?</tr>", page.split("Benchmarks: ")[1])]
    published = [list(benchmark.percent.values()) for benchmark in suite.benchmarks.values()]
    assert [[float(cell) for cell in row[2:5]] for row in shown[1 : len(published) + 1]] == published
    assert {row[1] for row in shown[1 : len(published) + 1]} == {"-"}
