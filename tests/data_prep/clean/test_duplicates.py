"""Which of several copies goes: all exact ones, near ones as often as the banding says, and always the worse-placed copy."""

import math
import random
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from datatrove.pipeline.dedup.minhash import MinhashDedupSignature
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.clean import minhash
from data_prep.clean.duplicates import EXACT, NEAR, Numbering, choose, equal_pairs, final_places
from data_prep.clean.shards import Shard
from data_prep.clean.words import splitter
from recipes.cleaning import NearDuplicates
from tests.data_prep.clean import planted
from tests.data_prep.clean.planted import kept, kept_ids, removed

# --- exact -----------------------------------------------------------------------------------------------------------------------

POOL = [f"text number {i} with a few words more" for i in range(8)]
LINES = st.lists(st.tuples(st.sampled_from(POOL), st.booleans()), max_size=16)


# Each example is a whole cleaning, 6 s of CPU.
@settings(max_examples=4, deadline=None)
@given(st.fixed_dictionaries({name: st.lists(LINES, min_size=1, max_size=2) for name in ("web_a", "web_b", "best")}))
def test_all_exact_duplicates_go_and_the_best_copy_stays(drawn):
    # White space is varied: it does not make a text another one.
    texts = {
        name: [[f"  {text.replace(' ', chr(10))}" if odd else text for text, odd in lines] for lines in files]
        for name, files in drawn.items()
    }
    texts = {name: [["the source's own text " + name], *files] for name, files in texts.items()}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        _, records = planted.cleaned(folder, texts, near_duplicates=None)
        # `best` is web_hq, which ranks before web; then the sources in the recipe's order, files by name, lines.
        seen, expected = set(), set()
        for name in ("best", *(name for name in texts if name != "best")):
            for number, lines in enumerate(texts[name]):
                for i, text in enumerate(lines):
                    plain = " ".join(text.split())
                    if plain not in seen:
                        expected.add(f"{name}/{number}/{i}")
                    seen.add(plain)
        assert kept_ids(folder, records) == expected
        total = sum(len(lines) for files in texts.values() for lines in files)
        assert sum(len(entries) for entries in removed(folder, records).values()) == total - len(expected)


def test_white_space_can_be_made_to_count(tmp_path):
    texts = {"web_a": ["one two three", "one  two three", "one two three"]}
    _, records = planted.cleaned(tmp_path, texts, near_duplicates=None, exact_duplicates={"ignore_whitespace": False})
    assert kept_ids(tmp_path, records) == {"web_a/0/0", "web_a/0/1"}


def test_a_removed_document_says_which_line_it_is_a_copy_of(tmp_path):
    rng = random.Random(1)
    shared, extra = planted.sentence(rng, 80), planted.sentence(rng, 80)
    texts = {
        "best": [extra, extra, shared],  # the second line goes, so that the third is the second line of what stays
        "web_a": [planted.sentence(rng, 80), shared, shared.rsplit(" ", 1)[0] + " otherwise"],
    }
    _, records = planted.cleaned(tmp_path, texts)
    gone = {entry["id"]: entry for entries in removed(tmp_path, records).values() for entry in entries}
    assert {i: e["step"] for i, e in gone.items()} == {
        "best/0/1": "exact_duplicates",
        "web_a/0/1": "exact_duplicates",
        "web_a/0/2": "near_duplicates",
    }
    assert gone["best/0/1"]["copy_of"] == "best/00000.jsonl:1"
    assert gone["web_a/0/1"]["copy_of"] == gone["web_a/0/2"]["copy_of"] == "best/00000.jsonl:2"
    assert kept(tmp_path, records)["best"][1]["id"] == "best/0/2"
    assert gone["web_a/0/1"]["reason"] == "of best"


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=30))
def test_equal_pairs_against_a_dictionary(hashes):
    first, expected = {}, []
    for number, value in enumerate(hashes):
        if value in first:
            expected.append((number, first[value]))
        first.setdefault(value, number)
    found = equal_pairs(np.array(hashes, dtype=np.uint64).reshape(-1, 2), np.arange(len(hashes)))
    assert sorted(map(tuple, found.tolist())) == expected


# --- near ------------------------------------------------------------------------------------------------------------------------

PAIRS = 80
CHANCE = 1e-9
"""Of a false alarm per similarity, were the seeds drawn anew; they are fixed, so the test gives one answer."""


def ngrams(text, n):
    words = text.split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def jaccard(a, b, n=5):
    x, y = ngrams(a, n), ngrams(b, n)
    return len(x & y) / len(x | y)


def with_similarity(rng, text, target, n=5):
    """A copy whose last words are new ones, as many as bring the similarity of the sets of n-grams next to `target`."""
    words = text.split()
    grams = len(words) - n + 1
    changed = round(grams * (1 - target) / (1 + target))  # s = (g - c) / (g + c) where c n-grams are new
    fresh = [
        f"{rng.choice(planted.WORDS)}q{rng.randrange(10**6)}".translate(str.maketrans("0123456789", "zyxwvutsrq"))
        for _ in range(changed)
    ]
    return " ".join(words[: len(words) - changed] + fresh)


def poisson_binomial(chances):
    """P(exactly k of these independent events happen), k = 0 .. n."""
    mass = [1.0]
    for p in chances:
        mass = [a * (1 - p) + b * p for a, b in zip([*mass, 0.0], [0.0, *mass], strict=True)]
    return mass


def bounds(chances):
    """Smallest and largest number of events with less than CHANCE beyond either."""
    mass = poisson_binomial(chances)
    low = next(k for k in range(len(mass)) if sum(mass[: k + 1]) >= CHANCE)
    high = next(k for k in reversed(range(len(mass))) if sum(mass[k:]) >= CHANCE)
    return low, high


def test_near_duplicates_are_found_as_often_as_the_banding_says(tmp_path):
    config = NearDuplicates.model_validate(planted.near())
    assert (config.ngram_words, config.buckets, config.hashes_per_bucket) == (5, 14, 8)
    assert config.threshold == pytest.approx((1 / 14) ** (1 / 8))
    rng = random.Random(11)
    texts, chances = {"best": [], "web_a": []}, {}
    for target in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95):
        chances[target] = []
        for number in range(PAIRS):
            original = planted.sentence(rng, 120)
            copy = with_similarity(rng, original, target)
            # Half of the pairs across sources, half within one.
            texts["best"].append(original)
            texts["best" if number % 2 else "web_a"].append(copy)
            similarity = jaccard(original, copy)
            assert similarity == pytest.approx(target, abs=0.02)
            chances[target].append(1 - (1 - similarity**8) ** 14)
            assert chances[target][-1] == pytest.approx(config.detection_probability(similarity))
    _, records = planted.cleaned(tmp_path, texts)
    gone = {entry["text"] for entries in removed(tmp_path, records).values() for entry in entries}
    originals, copies = texts["best"], iter(texts["web_a"])
    at = 0
    for target, expected in chances.items():
        found = 0
        for number in range(PAIRS):
            original, at = originals[at], at + 1
            if number % 2:
                copy, at = originals[at], at + 1
            else:
                copy = next(copies)
            assert original not in gone, "of a pair the second copy goes"
            found += copy in gone
        low, high = bounds(expected)
        assert low <= found <= high, f"similarity {target}: {found} of {PAIRS} found, expected {low} to {high}"
    # What the bounds say at the ends: 0.95 always, 0.3 hardly ever.
    assert bounds(chances[0.95])[0] >= PAIRS - 2
    assert bounds(chances[0.3])[1] <= 6


def test_a_chain_of_similar_documents_is_one_cluster(tmp_path):
    rng = random.Random(3)
    words = planted.sentence(rng, 400).split()
    fresh = iter(planted.sentence(random.Random(4), 400).split())
    chain = [words]
    for step in range(1, 6):  # each differs from the one before in other words
        chain.append([next(fresh) + "q" if i in range(60 * step, 60 * step + 16) else word for i, word in enumerate(chain[-1])])
    chain = [" ".join(link) for link in chain]
    assert all(jaccard(a, b) > 0.88 for a, b in pairwise(chain))
    assert jaccard(chain[0], chain[-1]) < 0.65
    _, records = planted.cleaned(tmp_path, {"web_a": [*chain[::-1][:5], "something else"], "best": chain[:1]})
    gone = [entry for entries in removed(tmp_path, records).values() for entry in entries]
    assert len(gone) == 5
    assert {entry["copy_of"] for entry in gone} == {"best/00000.jsonl:1"}


def test_an_exempt_category_neither_loses_nor_takes_near_duplicates(tmp_path):
    rng = random.Random(4)
    text = planted.sentence(rng, 200)
    texts = {
        "math_a": [text, with_similarity(rng, text, 0.97), text],
        "web_a": [with_similarity(rng, text, 0.96), planted.sentence(rng, 50)],
    }
    _, records = planted.cleaned(tmp_path, texts, near_duplicates=planted.near(exempt={"math": "a reason"}))
    assert kept_ids(tmp_path, records) == {"math_a/0/0", "math_a/0/1", "web_a/0/0", "web_a/0/1"}
    _, records = planted.cleaned(tmp_path, texts)
    assert kept_ids(tmp_path, records) == {"math_a/0/0", "web_a/0/1"}


def test_numbers_may_count_or_not(tmp_path):
    rng = random.Random(6)
    words = planted.sentence(rng, 120).split()
    texts = {"web_a": [" ".join(w if i % 9 else str(rng.randrange(1000)) for i, w in enumerate(words)) for _ in range(3)]}
    _, records = planted.cleaned(tmp_path, texts)
    assert kept_ids(tmp_path, records) == {"web_a/0/0"}
    _, records = planted.cleaned(tmp_path, texts, near_duplicates=planted.near(normalise_numbers=False))
    assert len(kept_ids(tmp_path, records)) == 3


def test_documents_without_an_ngram_are_left_alone(tmp_path):
    _, records = planted.cleaned(tmp_path, {"web_a": ["one two", "three four", "one two three four"], "web_b": ["five"]})
    assert len(kept_ids(tmp_path, records)) == 4


def test_signatures_are_datatroves(tmp_path):
    config = NearDuplicates.model_validate(planted.near())
    ours = minhash.Signatures(config, tmp_path)
    theirs = MinhashDedupSignature(str(tmp_path), minhash.datatrove_config(config), language=splitter())
    rng = np.random.default_rng(0)
    for count in (1, 5, 1024, 1025, 5000):
        shingles = rng.integers(0, 2**64, count, dtype=np.uint64).reshape(-1, 1)
        shingles[0] = 2**64 - 1
        assert ours.get_signature(shingles.reshape(-1)) == theirs.get_signature(shingles)


# --- the arithmetic of what stays -----------------------------------------------------------------------------------------------

EDGES = st.lists(st.tuples(st.integers(0, 25), st.integers(0, 25)), max_size=40)


def naive_roots(pairs):
    root = {}

    def find(x):
        while root.setdefault(x, x) != x:
            x = root[x]
        return x

    for a, b in pairs:
        a, b = sorted((find(a), find(b)))
        root[b] = a
    return {x: find(x) for x in root}


@given(EDGES)
def test_clusters_against_union_find(pairs):
    nodes, roots = minhash.clusters(np.array(pairs, dtype=np.int64).reshape(-1, 2))
    assert dict(zip(nodes.tolist(), roots.tolist(), strict=True)) == naive_roots(pairs)


def test_clusters_of_a_long_chain():
    rng = np.random.default_rng(1)
    order = rng.permutation(20_000)
    nodes, roots = minhash.clusters(np.stack([order[:-1], order[1:]], axis=1))
    assert len(nodes) == 20_000
    assert not roots.any()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=26), EDGES)
def test_choose_against_the_rule(values, pairs):
    pairs = [(a, b) for a, b in pairs if a < len(values) and b < len(values)]
    first = {}
    exact = [(i, first[v]) for i, v in enumerate(values) if first.setdefault(v, i) != i]
    rows = choose(np.array(exact, dtype=np.int64).reshape(-1, 2), np.array(pairs, dtype=np.int64).reshape(-1, 2))
    gone_exactly = dict(exact)
    roots = naive_roots(pairs)
    best = {}
    for node in sorted(roots):
        if node not in gone_exactly:
            best.setdefault(roots[node], node)
    near = {node: best[root] for node, root in roots.items() if node not in gone_exactly and best[root] != node}
    expected = {i: (EXACT, near.get(stays, stays)) for i, stays in gone_exactly.items()} | {
        i: (NEAR, s) for i, s in near.items()
    }
    assert {row[0]: (row[1], row[2]) for row in rows.tolist()} == expected
    assert rows[:, 0].tolist() == sorted(expected)
    assert not set(expected) & {stays for _, stays in expected.values()}, "the copy that is named stays"


def test_final_places_count_what_stays_before_in_the_shard():
    shards = tuple(Shard(i, "s", i, "text", (), (), 0) for i in range(2))
    numbering = Numbering.of(shards, [3, 4])  # documents 0-2 and 3-6
    rows = np.array([[1, EXACT, 0], [3, NEAR, 2], [5, EXACT, 4], [6, NEAR, 4]])
    assert final_places(numbering, rows).tolist() == [[0, 1], [0, 2], [1, 1], [1, 1]]
    assert [part.tolist() for part in numbering.place(np.array([0, 3, 6]))] == [[0, 1, 1], [0, 0, 3]]


@pytest.mark.parametrize(
    ("similarity", "buckets", "hashes"), [(0.5, 14, 8), (0.8, 14, 8), (0.75, 20, 5), (1.0, 3, 2), (0.0, 3, 2)]
)
def test_the_formula(similarity, buckets, hashes):
    config = NearDuplicates.model_validate(planted.near(buckets=buckets, hashes_per_bucket=hashes))
    assert math.isclose(config.detection_probability(similarity), 1 - (1 - similarity**hashes) ** buckets)
