"""Items of benchmarks in documents: found where they are, named, and nowhere else."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.clean.decontamination import Decontaminator, Index, build_index
from data_prep.clean.words import plain_words, word_hashes
from data_prep.errors import DataError
from recipes.cleaning import Decontamination
from tests.data_prep.clean import planted
from tests.data_prep.clean.planted import kept_ids, removed


def write_benchmark(path, entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def config(path, n=13, least=8, keys=("question", "answer"), id_key="id", **more):
    benchmark = {"paths": [path], "keys": list(keys), "id_key": id_key}
    return {"ngram_words": n, "min_item_words": least, "benchmarks": {"quiz": benchmark} | more}


QUESTION = "A farmer has 17 sheep and buys 25 more; how many legs do all of his sheep have together?"
SHORT = "What is the capital of the smallest canton?"  # 8 words
ITEMS = [
    {"id": "sheep", "question": QUESTION, "answer": ["They have 168 legs.", "168"]},
    {"id": "canton", "question": SHORT, "answer": "Appenzell"},
    {"id": "tiny", "question": "Why?", "answer": "Because."},
]
FILLER = "some words that no benchmark ever put into this very order of its own"


@pytest.mark.parametrize(
    ("text", "item"),
    [
        (f"{FILLER}. {QUESTION} {FILLER}", "sheep"),
        (f"{FILLER} {QUESTION.upper().replace(' ', chr(10))}", "sheep"),  # case and white space do not count
        (f"{FILLER} " + " ".join(QUESTION.split()[2:15]) + " differently", "sheep"),  # thirteen words of it
        (f"{FILLER} " + " ".join(QUESTION.split()[2:14]) + " differently", None),  # twelve
        (f"{FILLER} {QUESTION.replace('17', '18').replace('25', '26')}", None),  # numbers count
        (f"{FILLER} {SHORT} {FILLER}", "canton"),  # a short text as a whole
        (f"{FILLER} {SHORT.replace('smallest', 'largest')} {FILLER}", None),
        (f"{FILLER} Why? Because. They have 168 legs.", None),  # too short to be looked for
        (FILLER, None),
        ("Why?", None),
    ],
)
def test_hits(tmp_path, text, item):
    index = build_index(Decontamination.model_validate(config(write_benchmark(tmp_path / "quiz.jsonl", ITEMS))))
    assert index.too_short == {"quiz": 5}
    index.write(tmp_path / "index.npz")
    finder = Decontaminator(Index.read(tmp_path / "index.npz"))
    hit = finder.find([text], [word_hashes(text).exact])[0]
    assert (hit and (hit.benchmark, hit.item)) == (item and ("quiz", item))
    if hit:
        assert hit.words.encode() in b" ".join(plain_words(text))


def test_a_run_over_two_documents_is_none(tmp_path):
    index = build_index(Decontamination.model_validate(config(write_benchmark(tmp_path / "quiz.jsonl", ITEMS))))
    words = QUESTION.split()
    texts = [" ".join(words[:10]), " ".join(words[10:]), SHORT[:20], SHORT[20:], f"{FILLER} {QUESTION}"]
    hits = Decontaminator(index).find(texts, [word_hashes(text).exact for text in texts])
    assert [hit is not None for hit in hits] == [False, False, False, False, True]


LETTERS = st.lists(st.sampled_from("abc"), max_size=12)


@settings(max_examples=150)
@given(st.lists(LETTERS.filter(len), max_size=4), st.lists(LETTERS, max_size=6), st.integers(2, 5), st.integers(1, 5))
def test_against_a_search_by_words(tmp_path_factory, items, documents, n, least):
    least = min(n, least)
    path = tmp_path_factory.mktemp("benchmark") / "quiz.jsonl"
    texts = [" ".join(document) for document in documents]
    if items:
        entries = [{"id": str(i), "question": " ".join(item)} for i, item in enumerate(items)]
        index = build_index(Decontamination.model_validate(config(write_benchmark(path, entries), n, least)))
    else:
        index = build_index(Decontamination.model_validate({"ngram_words": n, "min_item_words": least, "benchmarks": {}}))
    hits = Decontaminator(index).find(texts, [word_hashes(text).exact for text in texts])

    def runs(words, length):
        return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]

    for document, hit in zip(documents, hits, strict=True):
        found = {
            str(i)
            for i, item in enumerate(items)
            if len(item) >= least and set(runs(item, min(n, len(item)))) & set(runs(document, min(n, len(item))))
        }
        assert (hit is not None) == bool(found)
        assert hit is None or hit.item in found


def test_the_item_is_reported_with_the_document(tmp_path):
    path = write_benchmark(tmp_path / "benchmarks" / "quiz.jsonl", ITEMS)
    texts = {"web_a": [f"{FILLER} one", f"{QUESTION} {FILLER}"], "best": [f"{FILLER} two", f"{SHORT} {FILLER}"]}
    _, records = planted.cleaned(tmp_path, texts, decontamination=config(path), near_duplicates=None)
    assert kept_ids(tmp_path, records) == {"web_a/0/0", "best/0/0"}
    gone = {entry["id"]: entry for entries in removed(tmp_path, records).values() for entry in entries}
    assert gone["web_a/0/1"]["reason"] == "quiz"
    assert gone["web_a/0/1"]["detail"].startswith("sheep: a farmer has 17 sheep")
    assert gone["best/0/1"]["detail"].startswith("canton: ")
    assert records["web_a"].steps["decontamination"].reasons == {"quiz": 1}


def test_files_without_ids_are_named_by_line(tmp_path):
    path = write_benchmark(tmp_path / "quiz.jsonl", [{"question": "short"}, {"question": QUESTION}])
    index = build_index(Decontamination.model_validate(config(path, id_key=None)))
    hit = Decontaminator(index).find([QUESTION], [word_hashes(QUESTION).exact])[0]
    assert hit.item == "quiz.jsonl:2"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"id": 1, "prompt": "x"}\n', "line 1: no text under question, answer (found: id, prompt); correct data.cleaning"),
        ('{"question": "x"}\nnot json\n', "line 2: not JSON"),
        ('["x"]\n', "line 1: no text under question, answer (found: a JSON list)"),
        ("", "no item; fill it, or remove it from data.cleaning.decontamination.benchmarks.quiz.paths"),
    ],
)
def test_a_benchmark_that_cannot_be_read_is_refused(tmp_path, content, says):
    path = tmp_path / "quiz.jsonl"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        build_index(Decontamination.model_validate(config(str(path))))
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


def test_the_packaged_benchmark_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packaged = planted.compose(["curriculum=smoke"]).data.cleaning.decontamination
    index = build_index(packaged)
    assert len(index.names) >= 8
    assert {benchmark for benchmark, _ in index.names} == {"smoke"}
    assert len(index.runs) > 20
