"""The constants in use are the fit of the published rows, and the fit can be trusted."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from benchmarks import planner
from benchmarks.planner import DATA, PRIOR, Row, error, fit, left_out, read_rows, summary
from recipes.throughput import CONSTANTS, Constants, step_time


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [row for row in read_rows() if row.fitted]


def test_the_constants_in_use_are_the_fit_of_the_rows(rows: list[Row]) -> None:
    # To four digits they are equal here; another processor may round a hundredth of a percent differently.
    assert asdict(fit(rows)) == pytest.approx(asdict(CONSTANTS), rel=1e-3)


def test_the_errors_are_as_documented(rows: list[Row]) -> None:
    errors = [abs(error(row, CONSTANTS)) for row in rows]
    assert sum(errors) / len(errors) < 0.03
    assert max(errors) < 0.10
    documented = (DATA.parents[1] / "benchmarks.md").read_text()
    assert f"| {len(rows)} rows, fitted | {summary(errors)} |" in documented
    for name, value in asdict(CONSTANTS).items():
        assert f"| {name} | {value:.3f} |" in documented


def test_a_fit_finds_the_constants_that_made_the_rows(rows: list[Row]) -> None:
    made = {name: value * (0.9 if i % 2 else 1.05) for i, (name, value) in enumerate(asdict(CONSTANTS).items())}
    truth = Constants(**made)
    known = [replace(r, tokens_per_second_per_gpu=step_time(r.job, truth).tokens_per_second_per_gpu) for r in rows]
    found = fit(known)  # begins elsewhere; what the rows determine comes back
    assert found.matmul_bf16 == pytest.approx(truth.matmul_bf16, rel=0.05)
    assert found.attention_blackwell == pytest.approx(truth.attention_blackwell, rel=0.05)
    assert max(abs(error(row, found)) for row in known) < 0.03


def test_left_out_rows_are_not_seen(rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(planner, "fit", lambda chosen: seen.append({r.group for r in chosen}) or CONSTANTS)
    some = rows[:8]
    errors = left_out(some, lambda row: row.group)
    assert set(errors) == {row.id for row in some}
    groups = list(dict.fromkeys(row.group for row in some))
    assert seen == [set(groups) - {group} for group in groups]


def test_rows_name_their_source_and_published_figures_are_read_as_they_stand(rows: list[Row]) -> None:
    by_id = {row.id: row for row in read_rows()}
    assert all(row.source for row in by_id.values())
    assert by_id["8b-fp8-8-2511"].tokens_per_second_per_gpu == 14451
    # 1,671 TFLOP/s with attention's whole square: 12 x layers x hidden x length beside 6 x weights.
    whole = 6 * (32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336) + 4096 * 128256) + 12 * 32 * 4096 * 8192
    assert by_id["8b-fp8-8k-b200"].tokens_per_second_per_gpu == pytest.approx(1671e12 / whole)
    assert not by_id["8b-mxfp8-8-b200-2511"].fitted


def test_an_unknown_way_of_counting_is_refused(tmp_path: Path) -> None:
    raw = yaml.safe_load(DATA.read_text())
    raw["rows"] = [row | {"counting": "guess"} for row in raw["rows"] if row["id"] == "8b-fp8-8k-b200"]
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ValueError, match="counting is 'guess'"):
        read_rows(tmp_path / "rows.yaml")


def test_summary_and_prior() -> None:
    assert summary([0.1, -0.2, 0.03]) == "mean 11.0%, median 10.0%, largest 20.0%"
    assert all(0 < value < 1 for value in asdict(PRIOR).values())
