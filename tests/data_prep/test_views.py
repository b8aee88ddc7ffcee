"""Views: what the plan says and nothing else, read by Megatron as it is, at the price of an index each."""

import copy
import hashlib
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import deal, views
from data_prep import plan as planner
from data_prep.columns import open_columns
from data_prep.deal import Hasher, documents_of
from data_prep.errors import DataError
from data_prep.files import record_file
from data_prep.indexed import Index, Reader, Writer, bin_path, idx_path, index_writer
from data_prep.manifest import MixtureManifest, TokenizerRecord, mixture_path
from data_prep.plan import make_plan, plan
from data_prep.progress import Silent
from data_prep.views import build_views, plan_path, source_lengths, update_views
from tests.data_prep import helpers

TOKENIZER = TokenizerRecord(
    kind="sentencepiece", path="tokenizer/tokenizer.model", sha256="0" * 64, vocab_size=60_000, eod_id=0
)


def tokenized(root, name, lengths):
    """A tokenized source whose document i is i repeated; its record as far as views look at it."""
    prefix = root / "tokenized" / name
    with Writer(prefix, TOKENIZER.vocab_size) as writer:
        for number, length in enumerate(lengths):
            writer.add(np.full(length, number))
    return SimpleNamespace(
        bin=record_file(bin_path(prefix)), idx=record_file(idx_path(prefix)), dtype="uint16", max_token_id=len(lengths) - 1
    )


def make(folder, lengths, **changes):
    """Tokenized sources (name -> lengths), planned and built; the recipe, the draws and the root."""
    recipe = helpers.recipe(folder, **changes)
    root = folder / "data"
    records = {name: tokenized(root, name, values) for name, values in lengths.items()}
    drawn = plan(recipe, lambda source: source_lengths(root, source))
    build_views(root, recipe, drawn, records, TOKENIZER)
    return recipe, drawn, root


def numbers(root, phase, source):
    """Document numbers of a view, in its order."""
    reader = Reader(root / "views" / phase / source)
    return [int(reader[i][0]) for i in range(len(reader))]


def content(root):
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


LENGTHS = st.lists(st.integers(1, 40), min_size=30, max_size=120)
SOURCES = st.fixed_dictionaries(dict.fromkeys(helpers.CATEGORY, LENGTHS))
STEPS = st.lists(st.integers(3, 12), min_size=3, max_size=3)


def phases(steps, shortest=0):
    return {
        name: helpers.phase(name, steps=n, min_document_tokens=shortest) for name, n in zip(helpers.SHARES, steps, strict=True)
    }


@settings(deadline=None, max_examples=12)
@given(lengths=SOURCES, steps=STEPS, seed=st.integers(0, 3), shortest=st.sampled_from([0, 20]))
def test_views_are_what_was_planned(tmp_path_factory, lengths, steps, seed, shortest):
    changes = {"phases": phases(steps, shortest), "seed": seed, "max_epochs": 100.0}
    recipe, drawn, root = make(tmp_path_factory.mktemp("a"), lengths, **changes)
    for name, draws in drawn.items():
        manifest = MixtureManifest.read(mixture_path(root, name))
        assert set(manifest.sources) == set(draws)
        for source, draw in draws.items():
            found = numbers(root, name, source)
            assert found == documents_of(draw, source, np.array(lengths[source]), seed).tolist()
            tokens = sum(lengths[source][i] for i in found)
            assert tokens == draw.tokens == manifest.sources[source].tokens_available
            # the share within one document of the plan
            assert 0 <= tokens - draw.tokens_needed < max(lengths[source])
            planned = draw.weight * recipe.phase[name].samples
            assert (draw.tokens_needed - 1) / recipe.phase[name].seq_length_tokens == pytest.approx(planned * 1.005, abs=3)
    for source in lengths:
        read = [number for name in drawn if source in drawn[name] for number in numbers(root, name, source)]
        counts = np.bincount(read, minlength=len(lengths[source]))
        # nothing comes again, in no phase, before everything was read
        assert counts.max() - counts.min() <= 1
    # deterministic
    _, _, again = make(tmp_path_factory.mktemp("b"), lengths, **changes)
    assert content(again) == content(root)


@settings(deadline=None, max_examples=8)
@given(lengths=SOURCES, more=LENGTHS, steps=STEPS)
def test_stable_when_a_source_is_appended_to(tmp_path_factory, lengths, more, steps):
    changes = {"phases": phases(steps), "max_epochs": 100.0}
    _, before, root = make(tmp_path_factory.mktemp("a"), lengths, **changes)
    grown = lengths | {"math_a": lengths["math_a"] + more}
    _, after, new = make(tmp_path_factory.mktemp("b"), grown, **changes)
    for name in before:
        for source in before[name]:
            if source != "math_a":
                assert numbers(root, name, source) == numbers(new, name, source)
    # The order of what was there stays; new documents only push the last ones into the next phase.
    order = Hasher(1, "math_a", 0).block(0, len(grown["math_a"]))
    old = len(lengths["math_a"])
    if before["third"]["math_a"].epochs < 1:
        dealt = {i for name in before if "math_a" in before[name] for i in numbers(root, name, "math_a")}
        stayed = {i for name in after if "math_a" in after[name] for i in numbers(new, name, "math_a") if i < old}
        assert sorted(stayed, key=order.__getitem__) == sorted(dealt, key=order.__getitem__)[: len(stayed)]
        first = {i for i in numbers(new, "first", "math_a") if i < old}
        assert first <= set(numbers(root, "first", "math_a"))


def test_another_seed_gives_other_views(tmp_path):
    lengths = {name: [10] * 100 for name in helpers.CATEGORY}
    _, _, a = make(tmp_path / "a", lengths, seed=1)
    _, _, b = make(tmp_path / "b", lengths, seed=2)
    assert set(numbers(a, "first", "web_a")) != set(numbers(b, "first", "web_a"))


def test_megatron_reads_a_view_of_two_epochs_and_long_documents_first(tmp_path):
    from training import cpu_backend

    cpu_backend.install()  # before Megatron is imported: test files share a process
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    lengths = {name: [10, 30] * 15 for name in helpers.CATEGORY}
    made = {
        "first": helpers.phase("first"),
        "long": helpers.phase("long", shares={"math": 100.0}, min_document_tokens=20) | {"require_long_in": ["math"]},
    }
    _, drawn, root = make(tmp_path, lengths, phases=made, max_epochs=9.0)
    for phase in drawn:
        for source in drawn[phase]:
            ours, theirs = Reader(root / "views" / phase / source), IndexedDataset(str(root / "views" / phase / source))
            assert len(ours) == len(theirs) == drawn[phase][source].documents
            assert all((ours[i] == theirs[i]).all() for i in range(len(ours)))
    assert len(drawn["long"]["math_a"].pieces) > 1
    assert set(numbers(root, "long", "math_a")) == set(range(1, 30, 2))


@pytest.fixture
def small(tmp_path):
    lengths = {name: np.random.default_rng(n).integers(1, 60, 300).tolist() for n, name in enumerate(helpers.CATEGORY)}
    return lengths, make(tmp_path / "alone", lengths)


def test_blocks_and_processes_do_not_show(small, tmp_path, monkeypatch):
    lengths, (recipe, drawn, root) = small
    expected = content(root / "views")
    monkeypatch.setattr(deal, "BLOCK_DOCUMENTS", 13)
    _, _, other = make(tmp_path / "blocks", lengths)
    assert content(other / "views") == expected
    monkeypatch.setattr(views, "PARALLEL_DOCUMENTS", 0)
    records = {name: tokenized(root, name, values) for name, values in lengths.items()}
    done = []
    build_views(root, recipe, drawn, records, TOKENIZER, workers=2, on_bytes=done.append)
    assert content(root / "views") == expected
    assert sum(done) == sum(path.stat().st_size for path in root.rglob("views/*/*.idx"))


def test_five_phases_cost_one_copy_and_their_indexes(tmp_path):
    shares = {"web": 50.0, "code": 30.0, "math": 20.0}
    names = ["one", "two", "three", "four", "five"]
    made = {name: helpers.phase(name, steps=200, length=256, batch=8, shares=shares) for name in names}
    lengths = {name: [180 + i % 50 for i in range(5000)] for name in helpers.CATEGORY}
    _, drawn, root = make(tmp_path, lengths, phases=made)
    assert drawn["five"]["code_a"].epochs > 0.5
    used = sum(os.lstat(path).st_blocks * 512 for path in root.rglob("*") if not path.is_dir())
    tokens = sum(path.stat().st_size for path in root.glob("tokenized/*.bin"))
    indexes = sum(path.stat().st_size for path in root.rglob("*.idx"))
    assert tokens > 2 * 4 * 5000 * 180
    assert used <= 1.02 * (tokens + indexes)
    # and an index is small beside the tokens it points to
    assert indexes < 0.1 * tokens


def update(root, recipe, records):
    update_views(root, recipe, records, TOKENIZER, workers=1, progress=Silent(), seen={})


@pytest.fixture
def updated(tmp_path, monkeypatch):
    """A root that update_views made; the tokenizer itself is not there to be verified."""
    monkeypatch.setattr(TokenizerRecord, "verify", lambda self, root: None)
    root, recipe = tmp_path / "data", helpers.recipe(tmp_path)
    records = {name: tokenized(root, name, [20] * 200) for name in helpers.CATEGORY}
    update(root, recipe, records)
    return root, recipe, records


def test_the_plan_is_written_down_and_its_intervals_choose_the_documents(updated):
    root, recipe, _ = updated
    written = json.loads(plan_path(root).read_text())
    assert written["format"] == "quarry.plan/1"
    assert list(written["phases"]) == sorted(helpers.SHARES)
    assert written["sources"]["web_a"]["tokens"] == 4000
    for phase, entry in written["phases"].items():
        for source, drawn in entry["sources"].items():
            manifest = MixtureManifest.read(mixture_path(root, phase)).sources[source]
            assert (drawn["tokens"], drawn["epochs"], drawn["weight"]) == (
                manifest.tokens_available,
                manifest.epochs,
                manifest.weight,
            )
            (piece,) = drawn["pieces"]
            hashes = Hasher(recipe.seed, source, piece["epoch"]).block(0, 200)
            chosen = (hashes >= int(piece["first_hash"], 16)) & (hashes <= int(piece["last_hash"], 16))
            assert numbers(root, phase, source) == np.flatnonzero(chosen).tolist()


def test_nothing_to_do_plans_and_writes_nothing(updated, monkeypatch):
    root, recipe, records = updated
    before = helpers.times(root)
    monkeypatch.setattr(views, "make_plan", lambda *args, **kwargs: pytest.fail("planned"))
    update(root, recipe, records)
    assert helpers.times(root) == before


def test_a_lowered_cap_is_refused_though_all_views_stand_and_a_raised_one_builds_nothing(updated):
    root, recipe, records = updated
    before = helpers.times(root)
    lowered = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_epochs": 0.1})})
    with pytest.raises(DataError, match=r"data.max_epochs is 0.1"):
        update(root, lowered, records)
    assert helpers.times(root) == before
    raised = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_epochs": 9.0})})
    update(root, raised, records)
    assert {name for name, time in helpers.times(root).items() if before[name] != time} == {str(plan_path(root))}


def test_an_unreadable_plan_is_written_again(updated):
    root, recipe, records = updated
    before = plan_path(root).read_bytes()
    for damaged in (b"{", b"[]", b"{}"):
        plan_path(root).write_bytes(damaged)
        update(root, recipe, records)
        assert plan_path(root).read_bytes() == before


def test_documents_of_several_sequences_are_refused(small, tmp_path):
    _, (recipe, drawn, root) = small
    path = idx_path(root / "tokenized" / "web_a")
    index = Index.read(path)
    replace(index, bounds=np.array([0, len(index.lengths)], dtype=np.int64)).write(path)
    records = dict.fromkeys(helpers.CATEGORY, SimpleNamespace(bin=None, idx=None, dtype="uint16", max_token_id=1))
    with pytest.raises(DataError, match=r"web_a.idx: 1 documents in 300 sequences"):
        build_views(root, recipe, drawn, records, TOKENIZER)
    assert not mixture_path(root, "first").exists()


def test_columns_are_read_from_the_file_as_it_is_asked_for(tmp_path):
    whole = Index(np.dtype(np.uint16), np.arange(1, 101, dtype=np.int32), np.arange(0, 1000, 10), np.arange(101))
    whole.write(tmp_path / "a.idx")
    columns = copy.deepcopy(open_columns(tmp_path / "a.idx"))
    for _ in range(2):
        assert (len(columns.lengths), columns.dtype) == (100, np.uint16)
        assert columns.lengths[3:7].tolist() == [4, 5, 6, 7]
        assert columns.offsets[95:200].tolist() == whole.offsets[95:].tolist()
        assert columns.offsets[50:50].tolist() == []
        columns = copy.deepcopy(columns)  # as processes get it, here with its file open
    columns.lengths[0:1]
    (tmp_path / "a.idx").write_bytes((tmp_path / "a.idx").read_bytes()[:100])
    with pytest.raises(DataError, match="a.idx: ends while it is read"):
        columns.lengths[50:100]


def test_an_index_is_written_in_pieces_or_not_at_all(tmp_path):
    path = tmp_path / "a.idx"
    whole = Index(np.dtype(np.uint16), np.arange(1, 6, dtype=np.int32), np.arange(0, 50, 10), np.arange(6))
    whole.write(tmp_path / "whole.idx")
    with index_writer(path, np.dtype(np.uint16), 5) as writer:
        writer.put(3, whole.lengths[3:], whole.offsets[3:])
        writer.put(0, whole.lengths[:3], whole.offsets[:3])
    assert path.read_bytes() == (tmp_path / "whole.idx").read_bytes()
    path.unlink()
    with pytest.raises(AssertionError, match="1 sequences written, 5 announced"), index_writer(path, whole.dtype, 5) as writer:
        writer.put(0, whole.lengths[:1], whole.offsets[:1])
    with pytest.raises(KeyError), index_writer(path, whole.dtype, 5):
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["whole.idx"]


def test_a_plan_over_unknown_sources_leaves_them_out(tmp_path):
    made = make_plan(helpers.recipe(tmp_path), lambda source: np.full(200, 50), unknown=["web_a"])
    assert not made.problems
    assert set(made.draws["first"]) == {"web_b", "code_a", "math_a"}
    assert set(made.sources) == {"web_b", "code_a", "math_a"}
    assert planner.phases_of(helpers.recipe(tmp_path)) == list(made.draws)
