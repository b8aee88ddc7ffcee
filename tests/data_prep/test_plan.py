"""The planner's promises: enough tokens, stable and seeded, and refusals that say what to do, all at once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import plan as planner
from data_prep.deal import documents_of
from data_prep.errors import DataError
from data_prep.plan import phase_inputs, plan
from tests.data_prep import helpers


def drawn(folder, lengths=None, **changes):
    lengths = lengths or dict.fromkeys(helpers.CATEGORY, np.full(200, 50))
    return plan(helpers.recipe(folder, **changes), lambda source: lengths[source])


def documents(draw, count=200, seed=1, lengths=None):
    return documents_of(draw, draw.source, np.full(count, 50) if lengths is None else lengths, seed).tolist()


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 3), steps=st.integers(5, 60), shortest=st.sampled_from([0, 40, 60]))
def test_a_later_phase_changes_nothing_before_it(tmp_path_factory, seed, steps, shortest):
    folder = tmp_path_factory.mktemp("plan")
    before = drawn(folder, seed=seed, max_epochs=50.0)
    changed = {name: helpers.phase(name) for name in helpers.SHARES} | {
        "third": helpers.phase("third", steps=steps, shares={"code": 100.0}, min_document_tokens=shortest)
    }
    after = drawn(folder, seed=seed, phases=changed, max_epochs=50.0)
    for name in ("first", "second"):
        assert {s: documents(d, seed=seed) for s, d in before[name].items()} == {
            s: documents(d, seed=seed) for s, d in after[name].items()
        }


def test_no_document_in_two_phases_before_the_source_is_used_up(tmp_path):
    phases = drawn(tmp_path)
    for source in helpers.CATEGORY:
        taken = [d for draws in phases.values() if source in draws for d in documents(draws[source])]
        assert len(taken) == len(set(taken))
        assert [draws[source].epochs for draws in phases.values() if source in draws][-1] < 1


def test_over_the_epoch_cap_is_refused_once_per_source(tmp_path):
    lengths = dict.fromkeys(helpers.CATEGORY, np.full(200, 50)) | {"math_a": np.full(10, 30)}
    assert drawn(tmp_path, lengths, max_epochs=6.0)["third"]["math_a"].epochs > 5
    with pytest.raises(
        DataError, match=r"phase 'third': source 'math_a' needs 1,313 tokens and has 300 in all; .* data.max_epochs=5"
    ) as error:
        drawn(tmp_path, lengths)
    assert str(error.value).count("source '") == 1


def test_a_source_that_rounds_to_no_sample_is_refused(tmp_path):
    phases = {"first": helpers.phase("first", shares={"web": 98.0, "code": 2.0})}
    with pytest.raises(DataError, match=r"phase 'first': source 'code_a' gets 0.8 of 40 samples.*at least 2.5 %"):
        drawn(tmp_path, phases=phases)


def test_a_source_that_the_blend_leaves_out_is_refused_whatever_its_share(tmp_path, monkeypatch):
    monkeypatch.setattr(planner, "samples_given", lambda shares, samples: dict.fromkeys(shares, samples) | {"code_a": 0})
    phases = {"first": helpers.phase("first", shares={"web": 90.0, "code": 10.0})}
    with pytest.raises(DataError, match=r"source 'code_a' gets 4 of 40 samples, so it may be left out"):
        drawn(tmp_path, phases=phases)


def test_a_category_without_source_is_refused(tmp_path):
    phases = {"first": helpers.phase("first", shares={"web": 90.0, "poems": 10.0})}
    with pytest.raises(DataError, match=r"10 % from category 'poems', which has no source \(categories: code, math, web\)"):
        drawn(tmp_path, phases=phases)


def test_shares_that_do_not_fill_the_phase_are_refused(tmp_path):
    phases = {"first": helpers.phase("first", shares={"web": 90.0, "code": 9.0})}
    with pytest.raises(DataError, match="sums to 99 %"):
        drawn(tmp_path, phases=phases)


def test_a_hopeless_shortage_is_refused_quickly(tmp_path):
    lengths = dict.fromkeys(helpers.CATEGORY, np.full(200, 50)) | {"math_a": np.array([1])}
    with pytest.raises(DataError, match="far over data.max_epochs"):
        drawn(tmp_path, lengths)
    with pytest.raises(DataError, match=r"source 'math_a' has no tokens, 289 are needed"):
        drawn(tmp_path, lengths | {"math_a": np.zeros(0, dtype=np.int32)})


def test_all_problems_are_said_at_once_one_a_line(tmp_path):
    phases = {
        "first": helpers.phase("first", shares={"web": 98.0, "code": 2.0}),
        "second": helpers.phase("second", shares={"poems": 100.0}),
        "third": helpers.phase("third"),
    }
    lengths = dict.fromkeys(helpers.CATEGORY, np.full(200, 50)) | {"math_a": np.array([1])}
    with pytest.raises(DataError) as error:
        drawn(tmp_path, lengths, phases=phases)
    lines = str(error.value).split("\n")
    assert [line.split(":")[0] for line in lines] == ["phase 'first'", "phase 'second'", "phase 'third'"]


def test_a_view_larger_than_megatron_can_number_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(planner, "MAX_VIEW_DOCUMENTS", 5)
    with pytest.raises(DataError, match=r"source 'code_a' gives \d+ documents, .* \(at most 5\); split the source"):
        drawn(tmp_path)


def test_a_category_at_zero_percent_needs_no_source(tmp_path):
    phases = {"first": helpers.phase("first", shares={"web": 100.0, "poems": 0.0})}
    assert set(drawn(tmp_path, phases=phases)["first"]) == {"web_a", "web_b"}


# --- long documents ----------------------------------------------------------------------------------------------------------------

MIXED = np.array([10] * 400 + [100] * 40, dtype=np.int32)


def long_phase(**changes):
    phase = helpers.phase("first", shares={"web": 50.0, "code": 50.0}, min_document_tokens=100) | changes
    return {"first": phase}


def test_long_documents_come_first_and_short_ones_fill_up(tmp_path):
    lengths = dict.fromkeys(helpers.CATEGORY, MIXED)
    draws = drawn(tmp_path, lengths, phases=long_phase())["first"]
    # 320 needed of each web source: all from the 4,000 tokens in long documents
    assert draws["web_a"].long_tokens == draws["web_a"].tokens >= draws["web_a"].tokens_needed
    lengths["web_a"] = np.array([10] * 400 + [100] * 2, dtype=np.int32)
    draw = drawn(tmp_path, lengths, phases=long_phase())["first"]["web_a"]
    assert (draw.long_source_tokens, draw.long_tokens, draw.long_epochs) == (200, 200, 1.0)
    assert draw.tokens - draw.long_tokens >= draw.tokens_needed - 200
    assert draw.epochs < 1


def test_required_long_documents_repeat_instead(tmp_path):
    lengths = dict.fromkeys(helpers.CATEGORY, MIXED) | {"web_a": np.array([10] * 400 + [100] * 2, dtype=np.int32)}
    draw = drawn(tmp_path, lengths, phases=long_phase(require_long_in=["web"]))["first"]["web_a"]
    assert draw.only_long
    assert draw.long_tokens == draw.tokens
    assert 1 < draw.long_epochs < 4
    assert set(documents_of(draw, "web_a", lengths["web_a"], 1)) == {400, 401}


def test_required_long_documents_over_the_cap_are_refused(tmp_path):
    lengths = dict.fromkeys(helpers.CATEGORY, MIXED) | {"web_a": np.array([10] * 400 + [100] * 2, dtype=np.int32)}
    with pytest.raises(
        DataError,
        match=r"needs 353 tokens in documents of at least 100 and has 200 in such; they are read 2.00 times .*max_epochs=2",
    ):
        drawn(tmp_path, lengths, phases=long_phase(require_long_in=["web"]), max_epochs=1.5)
    lengths["web_a"] = np.full(400, 10)
    with pytest.raises(
        DataError, match=r"source 'web_a' has no document of at least 100 tokens.*take 'web' out of require_long_in"
    ):
        drawn(tmp_path, lengths, phases=long_phase(require_long_in=["web"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"require_long_in": ["math"]},
            r"require_long_in names math, of which the phase takes nothing \(its categories: code, web\)",
        ),
        ({"require_long_in": ["web"], "min_document_tokens": 0}, "set phase.first.min_document_tokens"),
    ],
)
def test_settings_for_long_documents_that_mean_nothing_are_refused(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        drawn(tmp_path, phases=long_phase(**changes))


# --- at scale ------------------------------------------------------------------------------------------------------------------------


def same_lengths(source):
    return np.full(5000 + 100 * len(source), 50, dtype=np.int32)


def test_processes_give_the_same_plan(tmp_path, monkeypatch):
    alone = plan(helpers.recipe(tmp_path), same_lengths)
    monkeypatch.setattr(planner, "PARALLEL_DOCUMENTS", 0)
    assert plan(helpers.recipe(tmp_path), same_lengths, workers=2) == alone


def test_a_raised_cap_and_later_phases_do_not_touch_what_views_depend_on(tmp_path):
    digests = dict.fromkeys(helpers.CATEGORY, "0" * 64)
    base = phase_inputs(helpers.recipe(tmp_path), "second", digests)
    assert phase_inputs(helpers.recipe(tmp_path, max_epochs=9.0), "second", digests) == base
    phases = {name: helpers.phase(name) for name in helpers.SHARES}
    later = phases | {"third": helpers.phase("third", steps=20)}
    assert phase_inputs(helpers.recipe(tmp_path, phases=later), "second", digests) == base
    earlier = phases | {"first": helpers.phase("first", steps=20)}
    assert phase_inputs(helpers.recipe(tmp_path, phases=earlier), "second", digests) != base
    long = phases | {"second": helpers.phase("second", min_document_tokens=20) | {"require_long_in": ["web"]}}
    assert phase_inputs(helpers.recipe(tmp_path, phases=long), "second", digests) != base
