"""The published lists against the numbers that were published, and a table in which no published number stands as ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.evaluation.test_harness import RECORDED, RUN
from training.evaluation import harness, table
from training.evaluation.errors import EvaluationError
from training.evaluation.suite import load_suite, read_suite, single_task, suites


def test_lists_are_whole() -> None:
    assert suites() == ["granite_4_1_base", "granite_4_1_instruct", "smoke"]
    base, instruct = load_suite("granite_4_1_base"), load_suite("granite_4_1_instruct")
    assert (len(base.benchmarks), len(instruct.benchmarks)) == (19, 28)
    assert not base.chat_template
    assert instruct.chat_template
    # The published averages are those of their rows: a number copied wrongly would move them.
    for size, average in {"3b": 65.94, "8b": 62.21, "30b": 70.76}.items():
        rows = [base.benchmarks[n].percent[size] for n in ("humaneval", "humaneval_plus", "mbpp", "mbpp_plus")]
        assert sum(rows) / 4 == pytest.approx(average, abs=0.011)
    for size, average in {"3b": 67.05, "8b": 80.21, "30b": 82.66}.items():
        rows = [instruct.benchmarks[n].percent[size] for n in ("humaneval", "humaneval_plus", "mbpp", "mbpp_plus")]
        assert sum(rows) / 4 == pytest.approx(average, abs=0.011)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nrun: {a: {task: t, metric: m, shots: 1, comparable: differs}}", "`why` is missing"),
        ("name: x\nbenchmarks: {a: {title: A, setting: s, percent: {3b: 1.0, 8b: 1.0, 30b: 1.0}}}\nrun: {}", "neither"),
        (
            "name: x\nbenchmarks: {a: {title: A, setting: s, percent: {3b: 1.0}}}\nrun: {}\nnot_run: {a: b}",
            "no value for 8b, 30b",
        ),
        ("name: y\nrun: {}", "must be that of the file"),
        ("name: x\nrun: {}\nshots: 3", "shots"),
        ("name: [", "no YAML"),
    ],
)
def test_a_wrong_list_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(EvaluationError, match=message) as caught:
        read_suite(path)
    assert str(path) in str(caught.value)


def test_published_numbers_are_never_ours() -> None:
    suite = load_suite("granite_4_1_base")
    result = harness.parse(RECORDED, RUN, None)
    rows = table.rows(suite, {"mmlu": result, "drop": result | {"limit": 10}})
    by_name = {row.benchmark: row for row in rows}
    assert list(by_name) == list(suite.benchmarks)
    for name, row in by_name.items():
        assert row.published_percent == suite.benchmarks[name].percent
        if name not in ("mmlu", "drop"):
            assert row.ours_percent is None
            assert row.note.startswith("not measured")
    mmlu = by_name["mmlu"]
    assert mmlu.ours_percent == pytest.approx(100 * 11 / 24)
    assert mmlu.comparable == "close"
    # A part of the documents is no result to compare.
    assert by_name["drop"].comparable == "none"
    assert "only 10 documents" in by_name["drop"].note
    assert by_name["ruler_32k"].comparable == "none"
    cells = table._cells(by_name["gsm8k"])
    assert cells[1] == "-"
    assert cells[3:6] == ["72.93", "73.54", "83.78"]


def test_a_task_of_lm_eval_shows_all_its_metrics() -> None:
    suite = single_task("quarry_smoke_choice")
    result = harness.parse(RECORDED, suite.run["quarry_smoke_choice"], None)
    (row,) = table.rows(suite, {"quarry_smoke_choice": result})
    assert row.ours_percent is None
    assert "acc,none 0.4583" in row.note
    assert row.published_percent is None


def test_markdown_keeps_its_columns() -> None:
    text = table.markdown_table(["a", "b"], [["x|y", "two\nlines"]])
    assert text == "| a | b |\n| --- | --- |\n| x\\|y | two lines |"
