"""Learning rates: against the published values, an independent formula, and as properties."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.schedules import exponential, first_peak_last, learning_rate, learning_rate_function, linear, power, previous_phase
from recipes.schema import Recipe, RecipeError

POWER = {"amplitude": 4.0, "exponent": -0.51, "batch_sequences": 1024, "max_lr": 0.02}
rates = st.floats(0, 1, allow_nan=False)
positive_rates = st.floats(1e-9, 1, allow_nan=False)


@pytest.mark.parametrize(
    ("tokens", "expected"), [(1e9, 0.02), (26e9, 0.02), (100e9, 0.01005), (1e12, 3.11e-3), (10e12, 9.60e-4), (12e12, 8.75e-4)]
)
def test_power_gives_the_values_of_the_fact_sheet(tokens: float, expected: float) -> None:
    assert power(tokens, **POWER) == pytest.approx(expected, rel=5e-3)


def test_power_leaves_its_cap_at_about_26b_tokens() -> None:
    assert power(25.5e9, **POWER) == 0.02
    assert power(27e9, **POWER) < 0.02
    assert power(0, **POWER) == 0.02


def test_exponential_is_lm_engines_form() -> None:
    start, end, horizon = 8.75e-4, 1e-4, 2e12
    ratio = end / start
    a, b = (1 - ratio) * math.e / (math.e - 1), (ratio * math.e - 1) / (math.e - 1)
    for share in (0.0, 0.1, 0.25, 0.5, 0.75, 0.999, 1.0):
        expected = start * (a * math.exp(-share) + b)
        assert exponential(share * horizon, horizon_tokens=horizon, start_lr=start, end_lr=end) == pytest.approx(
            expected, rel=1e-12
        )


def test_exponential_to_zero_at_half_way_is_0_378_not_megatrons_0_414() -> None:
    assert exponential(50, horizon_tokens=100, start_lr=1.0, end_lr=0.0) == pytest.approx(0.3775, abs=1e-4)


@given(st.integers(1, 10**13), positive_rates, rates, st.floats(0, 1))
def test_exponential_and_linear_stay_between_their_ends_and_are_exact_there(
    horizon: int, start: float, end: float, share: float
) -> None:
    for f in (exponential, linear):
        assert f(0, horizon_tokens=horizon, start_lr=start, end_lr=end) == start
        assert f(horizon, horizon_tokens=horizon, start_lr=start, end_lr=end) == end
        value = f(share * horizon, horizon_tokens=horizon, start_lr=start, end_lr=end)
        slack = 1e-12 * max(start, end)
        assert min(start, end) - slack <= value <= max(start, end) + slack


@given(st.floats(1, 1e14), st.floats(1, 1e14))
def test_power_never_rises(first: float, second: float) -> None:
    low, high = sorted((first, second))
    assert power(low, **POWER) >= power(high, **POWER)


@given(st.integers(1, 10**12), st.integers(1, 10**12))
def test_exponential_falls_no_slower_than_linear_at_first(horizon: int, tokens: int) -> None:
    tokens = min(tokens, horizon)
    kwargs = {"horizon_tokens": horizon, "start_lr": 1.0, "end_lr": 0.0}
    assert exponential(tokens, **kwargs) <= linear(tokens, **kwargs) + 1e-12


def test_warmup_is_linear_to_the_value_at_its_end(five_phase: Recipe) -> None:
    f, warmup = learning_rate_function(five_phase, "foundation"), five_phase.phase["foundation"].schedule.warmup_tokens
    assert f(0) == 0
    assert f(warmup // 2) == pytest.approx(0.01)
    assert f(warmup) == pytest.approx(0.02)
    assert first_peak_last(five_phase, "foundation") == pytest.approx((0, 0.02, 9.60e-4), rel=1e-3)


def test_warmup_of_a_low_power_law_aims_at_the_law_not_at_the_cap(smoke: Recipe, changed) -> None:
    recipe = changed(smoke, **{"phase.foundation.schedule.max_lr": 1.0})
    warmup = recipe.phase["foundation"].schedule.warmup_tokens
    law = power(warmup, amplitude=4.0, exponent=-0.51, batch_sequences=16 * 128 / 4096, max_lr=1.0)
    assert law < 1.0
    assert learning_rate(recipe, "foundation", warmup) == pytest.approx(law)
    assert learning_rate(recipe, "foundation", warmup // 4) == pytest.approx(law / 4)


@pytest.mark.parametrize("name", ["five_phase", "smoke"])
def test_the_curriculum_has_no_jump(name: str, request: pytest.FixtureRequest) -> None:
    recipe = request.getfixturevalue(name)
    phases = [s for s in recipe.stages if s in recipe.phase]
    for before, after in itertools.pairwise(phases):
        last = learning_rate(recipe, before, recipe.phase[before].tokens)
        assert learning_rate(recipe, after, 0) == pytest.approx(last, rel=1e-12), after
    assert first_peak_last(recipe, phases[-1])[2] == 0


def test_power_of_phase_two_counts_the_tokens_of_phase_one(five_phase: Recipe) -> None:
    first = five_phase.phase["foundation"].tokens
    assert learning_rate(five_phase, "capability", 10**12) == pytest.approx(power(first + 10**12, **POWER), rel=1e-12)


def test_power_counts_a_batch_in_sequences_of_4096_tokens(five_phase: Recipe, changed) -> None:
    longer = changed(five_phase, **{"phase.capability.seq_length_tokens": 32768, "phase.capability.global_batch_samples": 128})
    assert learning_rate(longer, "capability", 10**11) == learning_rate(five_phase, "capability", 10**11)


def test_published_long_context_restarts_at_1e_4_and_ends_at_zero(granite_4_1: Recipe) -> None:
    assert first_peak_last(granite_4_1, "final_annealing")[2] == 0
    for stage in ("long_32k", "long_128k", "long_512k"):
        assert first_peak_last(granite_4_1, stage) == (1e-4, 1e-4, 0)


def test_a_start_is_found_through_merges_and_several_phases(five_phase: Recipe, changed) -> None:
    assert previous_phase(five_phase, "long_128k") == "long_32k"
    recipe = changed(
        five_phase,
        **{f"phase.{s}.schedule": {"kind": "constant"} for s in ("annealing", "long_32k", "long_128k")},
    )
    last = learning_rate(five_phase, "capability", five_phase.phase["capability"].tokens)
    assert learning_rate(recipe, "long_128k", 12345) == last


def test_a_position_outside_the_phase_is_clamped(smoke: Recipe) -> None:
    f = learning_rate_function(smoke, "annealing")
    assert f(-1) == f(0)
    assert f(10**9) == f(smoke.phase["annealing"].tokens) == smoke.phase["annealing"].schedule.end_lr


def test_what_cannot_be_resolved_names_its_key(five_phase: Recipe, changed) -> None:
    recipe = changed(five_phase, **{"phase.foundation.schedule": {"kind": "constant"}})
    with pytest.raises(RecipeError, match=r"phase.foundation.schedule.start_lr.*first phase"):
        learning_rate(recipe, "foundation", 0)
    recipe = changed(five_phase, **{"phase.annealing.schedule": {"kind": "linear"}})
    with pytest.raises(RecipeError, match=r"phase.annealing.schedule.end_lr"):
        learning_rate(recipe, "annealing", 0)
    with pytest.raises(RecipeError, match="merge and has no learning rate"):
        learning_rate(five_phase, "merge_32k", 0)
