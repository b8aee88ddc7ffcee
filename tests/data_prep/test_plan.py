"""The planner's promises: enough tokens, no repetition before a source is used up, stable and seeded, refusals that say what to do."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.plan import Dealer, plan, samples_asked, seeded_order, weights
from tests.data_prep import helpers

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40).map(lambda values: np.array(values, dtype=np.int32))
NEEDS = st.lists(st.tuples(st.integers(1, 400), st.sampled_from([0, 10, 40])), min_size=1, max_size=8)


@settings(deadline=None)
@given(lengths=LENGTHS, needs=NEEDS, seed=st.integers(0, 5))
def test_dealing(lengths, needs, seed):
    dealer = Dealer("s", lengths, seed)
    dealt = [dealer.deal(tokens, shortest) for tokens, shortest in needs]
    for (tokens, _), documents in zip(needs, dealt, strict=True):
        held = int(lengths[documents].sum())
        assert tokens <= held
        # no more than the document that reaches it
        assert held - int(lengths[documents[-1]]) < tokens
    order = np.concatenate(dealt).tolist()
    # every document once per epoch, before any comes again
    for start in range(0, len(order), len(lengths)):
        epoch = order[start : start + len(lengths)]
        assert len(set(epoch)) == len(epoch)
    counts = Counter(order)
    assert max(counts.values()) - min(counts.get(i, 0) for i in range(len(lengths))) <= 1
    assert dealer.epochs == pytest.approx(lengths[order].sum() / lengths.sum())
    again = Dealer("s", lengths, seed)
    assert [again.deal(*need).tolist() for need in needs] == [d.tolist() for d in dealt]


@settings(deadline=None)
@given(lengths=LENGTHS, needs=NEEDS)
def test_long_documents_come_first_where_there_are_any(lengths, needs):
    dealer = Dealer("s", lengths, 0)
    for tokens, shortest in needs:
        documents = dealer.deal(tokens, shortest)
        left = dealer._left
        is_short = lengths[documents] < shortest
        if is_short.any() and len(documents) < len(lengths):
            last_epoch = documents[-min(len(documents), len(lengths) - len(left)) :]
            assert not (lengths[left] >= shortest).any() or not (lengths[last_epoch] < shortest).any()


@settings(deadline=None)
@given(count=st.integers(0, 200), more=st.integers(0, 50), seed=st.integers(0, 3))
def test_the_order_is_a_permutation_that_a_growing_source_keeps(count, more, seed):
    order = seeded_order(count, seed, "s", 0).tolist()
    assert sorted(order) == list(range(count))
    assert [d for d in seeded_order(count + more, seed, "s", 0).tolist() if d < count] == order


def test_the_order_depends_on_seed_source_and_epoch():
    orders = [tuple(seeded_order(50, *key)) for key in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1))]
    assert len(set(orders)) == 4


@settings(deadline=None)
@given(samples=st.integers(1, 5000), parts=st.lists(st.integers(1, 1000), min_size=1, max_size=12))
def test_a_view_is_asked_for_at_least_its_share_and_the_surplus(samples, parts):
    for part in parts:
        weight = part / sum(parts)
        assert samples_asked(samples, weight) >= samples * weight * 1.005 - 1e-6
        assert samples_asked(samples, weight) <= samples * weight * 1.005 + 3


def drawn(folder, lengths=None, **changes):
    lengths = lengths or dict.fromkeys(helpers.CATEGORY, np.full(200, 50))
    return plan(helpers.recipe(folder, **changes), lambda source: lengths[source])


def test_weights_split_a_category_by_source_weight(tmp_path):
    recipe = helpers.recipe(tmp_path)
    sources = {n: s.model_copy(update={"weight": 3.0 if n == "web_a" else 1.0}) for n, s in recipe.data.sources.items()}
    found = weights(recipe.data.model_copy(update={"sources": sources}), "first", recipe.phase["first"])
    assert found == pytest.approx({"web_a": 0.375, "web_b": 0.125, "code_a": 0.3, "math_a": 0.2})
    assert sum(found.values()) == pytest.approx(1)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 3), steps=st.integers(5, 60))
def test_a_later_phase_changes_nothing_before_it(tmp_path_factory, seed, steps):
    folder = tmp_path_factory.mktemp("plan")
    before = drawn(folder, seed=seed, max_epochs=50.0)
    changed = {name: helpers.phase(name) for name in helpers.SHARES} | {
        "third": helpers.phase("third", steps=steps, shares={"code": 100.0})
    }
    after = drawn(folder, seed=seed, phases=changed, max_epochs=50.0)
    for name in ("first", "second"):
        assert {s: d.documents.tolist() for s, d in before[name].items()} == {
            s: d.documents.tolist() for s, d in after[name].items()
        }


def test_no_document_in_two_phases_before_the_source_is_used_up(tmp_path):
    phases = drawn(tmp_path)
    for source in helpers.CATEGORY:
        taken = [d for draws in phases.values() if source in draws for d in draws[source].documents.tolist()]
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


def test_a_category_at_zero_percent_needs_no_source(tmp_path):
    phases = {"first": helpers.phase("first", shares={"web": 100.0, "poems": 0.0})}
    assert set(drawn(tmp_path, phases=phases)["first"]) == {"web_a", "web_b"}
