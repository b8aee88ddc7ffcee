"""The mixture's arithmetic: shares to samples, exactly as Megatron's blend does it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import shares
from data_prep.errors import DataError
from data_prep.shares import normalized, samples_asked, samples_given, weights
from tests.data_prep import helpers
from training import cpu_backend

PARTS = st.lists(st.integers(1, 1000), min_size=1, max_size=12)


def mixture(parts):
    return {f"s{i:02}": part / sum(parts) for i, part in enumerate(parts)}


@settings(deadline=None)
@given(samples=st.integers(1, 5000), parts=PARTS)
def test_a_view_is_asked_for_at_least_its_share_and_the_surplus(samples, parts):
    for weight in mixture(parts).values():
        assert samples_asked(samples, weight) >= samples * weight * 1.005 - 1e-6
        assert samples_asked(samples, weight) <= samples * weight * 1.005 + 3


@settings(deadline=None, max_examples=30)
@given(samples=st.integers(1, 800), parts=PARTS)
def test_samples_given_are_those_of_megatrons_blend(samples, parts):
    cpu_backend.install()  # before Megatron is imported: test files share a process
    from megatron.core.datasets import helpers_cpp

    drawn = mixture(parts)
    index, number = np.zeros(samples, dtype=np.int16), np.zeros(samples, dtype=np.int64)
    helpers_cpp.build_blending_indices(index, number, np.array(list(normalized(drawn).values())), len(drawn), samples, False)
    assert list(samples_given(drawn, samples).values()) == np.bincount(index, minlength=len(drawn)).tolist()


@settings(deadline=None, max_examples=30)
@given(samples=st.integers(1, 800), parts=PARTS)
def test_no_source_gets_more_than_one_sample_above_its_share_or_than_it_was_asked_for(samples, parts):
    drawn = mixture(parts)
    given_ = samples_given(drawn, samples)
    assert sum(given_.values()) == samples
    for source, weight in drawn.items():
        assert given_[source] <= samples * weight + 1 + 1e-6
        assert given_[source] <= samples_asked(samples, weight)


def test_long_phases_are_not_repeated_sample_by_sample():
    assert samples_given({"a": 0.5, "b": 0.5}, shares.SIMULATED_SAMPLES + 1) is None


def test_weights_split_a_category_by_source_weight(tmp_path):
    recipe = helpers.recipe(tmp_path)
    sources = {n: s.model_copy(update={"weight": 3.0 if n == "web_a" else 1.0}) for n, s in recipe.data.sources.items()}
    found = weights(recipe.data.model_copy(update={"sources": sources}), "first", recipe.phase["first"])
    assert found == pytest.approx({"web_a": 0.375, "web_b": 0.125, "code_a": 0.3, "math_a": 0.2})
    assert sum(found.values()) == pytest.approx(1)


def test_all_missing_categories_and_the_wrong_sum_are_named_at_once(tmp_path):
    phases = {"first": helpers.phase("first", shares={"web": 50.0, "poems": 10.0, "songs": 20.0})}
    recipe = helpers.recipe(tmp_path, phases=phases)
    with pytest.raises(DataError) as error:
        weights(recipe.data, "first", recipe.phase["first"])
    first, second, third = str(error.value).split("\n")
    assert first.endswith("sums to 80 %; make phase.first.mixture sum to 100")
    assert "10 % from category 'poems', which has no source (categories: code, math, web)" in second
    assert "phase.first.mixture.shares_percent.songs=0" in third


def test_more_sources_than_megatron_can_number_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shares, "MAX_BLENDED_SOURCES", 3)
    recipe = helpers.recipe(tmp_path)
    with pytest.raises(DataError, match=r"phase 'first' draws from 4 sources, Megatron blends at most 3"):
        weights(recipe.data, "first", recipe.phase["first"])
