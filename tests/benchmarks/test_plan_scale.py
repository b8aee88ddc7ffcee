"""The simulated corpus is the fraction that it says, and the benchmark measures what is built."""

import json

import numpy as np
import pytest

from benchmarks import plan_scale
from benchmarks.plan_scale import DOCUMENTS, PHASES, SHARES, Size, full_minutes, main, make_source
from data_prep.indexed import Index, idx_path


def test_a_fraction_has_its_part_of_everything(tmp_path):
    for divisor in (100, 10_000):
        size = Size(divisor, 60)
        documents = size.documents()
        assert sum(documents.values()) == pytest.approx(DOCUMENTS / divisor, rel=0.001)
        for category, share in SHARES.items():
            own = sum(count for name, count in documents.items() if size.categories()[name] == category)
            assert own == pytest.approx(DOCUMENTS / divisor * share / 100, rel=0.001)
        recipe = size.recipe(tmp_path)
        for name, tokens, length, _ in PHASES:
            phase = recipe.phase[name]
            assert phase.tokens == phase.samples * length == pytest.approx(tokens / divisor, rel=0.01)


def test_a_source_is_a_whole_index(tmp_path):
    assert make_source(tmp_path, "s007", 30_000) == 34 + 20 * 30_000 + 8
    index = Index.read(idx_path(tmp_path / "tokenized" / "s007"))
    assert index.tokens / 30_000 == pytest.approx(1240, rel=0.05)
    assert (np.diff(index.offsets) == 4 * index.lengths[:-1]).all()


def test_the_full_size_lies_on_the_line_through_the_two_largest():
    assert full_minutes([(10**8, 80.0), (10**7, 35.0), (10**6, 7.0)]) == pytest.approx((30 + 50 * 100) / 60)
    assert full_minutes([(10**8, 60.0)]) == pytest.approx(100)


def test_the_benchmark_reports_plan_and_views(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan_scale.os, "cpu_count", lambda: 1)
    paths = ["--markdown", str(tmp_path / "t.md"), "--json", str(tmp_path / "t.json")]
    assert main(["--work", str(tmp_path / "work"), "--divisors", "50000", "--sources", "12", *paths]) == 0
    (result,) = json.loads((tmp_path / "t.json").read_text())
    assert result["documents"] == pytest.approx(200_000, rel=0.001)
    # 15.5T of 12.4T tokens
    assert result["view_documents"] == pytest.approx(1.25 * 200_000, rel=0.15)
    assert 10e6 < result["plan_peak_bytes"] < 1e9
    assert "Extrapolated with 1 process: the full size would take" in (tmp_path / "t.md").read_text()
    assert not list((tmp_path / "work").iterdir())
