"""The built-in corpus: the same everywhere, clean, no document twice, builders that the recipes name exist."""

import hashlib
import subprocess
import sys

import pytest

from data_prep import corpus
from data_prep.corpus import material, prose, reasoning
from data_prep.corpus.material import Document
from data_prep.errors import DataError
from recipes.compose import compose

CAP = 250_000


@pytest.fixture(scope="module")
def built():
    return {builder: list(corpus.build(builder, CAP)) for builder in corpus.BUILDERS}


def digest(documents):
    return hashlib.sha256("\0".join(f"{d.id}\0{d.text}" for d in documents).encode()).hexdigest()


def test_another_process_with_another_hash_seed_builds_the_same(built):
    script = (
        "from data_prep import corpus; from tests.data_prep.test_corpus import CAP, digest\n"
        "for b in corpus.BUILDERS: print(b, digest(corpus.build(b, CAP)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "12345", "PATH": ""}
    )
    assert dict(line.split() for line in done.stdout.splitlines()) == {b: digest(documents) for b, documents in built.items()}


def test_every_builder_gives_clean_documents_up_to_its_cap(built):
    for builder, documents in built.items():
        assert len(documents) >= 2, builder
        assert len({d.id for d in documents}) == len(documents), builder
        size = sum(len(d.text.encode()) for d in documents)
        assert 150_000 < size <= CAP, builder
        for d in documents:
            assert material.clean(d.text.encode()) == d.text, (builder, d.id)
            assert str(sys.prefix) not in d.text, (builder, d.id)


def test_no_document_twice(built):
    owner = {}
    for builder, documents in built.items():
        for d in documents:
            assert owner.setdefault(d.text, builder) == builder, d.id
    assert len(owner) == sum(map(len, built.values()))


def test_files_have_one_owner():
    lists = (material.PACKAGE_CODE, material.PACKAGE_DOCS, material.BOOKS, material.CODE_QUESTIONS, material.REPOSITORIES)
    names = [name for names in lists for name in names]
    assert len(names) == len(set(names))
    owned = [{name for name, _ in material.stdlib_files(builder)} for builder in material.STDLIB_SHARES]
    assert not set.intersection(*owned)
    assert sum(map(len, owned)) == len(set.union(*owned)) > 300


def test_recipes_name_builders_that_exist():
    sources = compose(["curriculum=smoke"]).data.sources
    assert {s.builder for s in sources.values() if s.kind == "builtin"} <= set(corpus.BUILDERS)
    assert len({s.category for s in sources.values()}) >= 8


def test_unknown_builders_and_missing_packages_are_refused(monkeypatch):
    with pytest.raises(DataError, match="no builder 'poems'.*books, code_qa"):
        list(corpus.build("poems"))
    with pytest.raises(DataError, match="reads the distribution 'no-such-thing', which is not installed here.*make setup"):
        material.distribution("no-such-thing")


def test_build_drops_repeats_and_stops_at_the_cap(monkeypatch):
    texts = ["aaaa", "bbbb", "aaaa", "cccc", "dddd"]
    monkeypatch.setitem(corpus.BUILDERS, "fake", lambda: (Document(str(i), t) for i, t in enumerate(texts)))
    assert [d.id for d in corpus.build("fake")] == ["0", "1", "3", "4"]
    assert [d.id for d in corpus.build("fake", 12)] == ["0", "1", "3"]
    assert [d.id for d in corpus.build("fake", 1)] == ["0"]


def test_repositories_are_in_the_order_of_their_imports(built):
    parts = [d.text for d in built["repositories"] if d.id.startswith("urllib3/")] or [d.text for d in built["repositories"]]
    files = [line.removeprefix("# file: ") for text in parts for line in text.split("\n") if line.startswith("# file: ")]
    assert len(files) > 5
    assert files != sorted(files)


def test_worked_answers_end_at_the_generators_answer(built):
    for text in (d.text for d in built["math_worked"] if d.id.startswith("products/")):
        question, *_, answer = text.strip().split("\n")
        left, right = (int(part) for part in question.removeprefix("Problem: What is ").removesuffix("?").split(" * "))
        assert answer == f"Answer: {left * right}"
    with pytest.raises(DataError, match="worked steps end at 3"):
        reasoning._worked("1 + 1", ["1 + 1 = 3"], 3, {"answer": "2"})


def test_generators_leave_the_real_package_importable():
    def seen() -> dict[str, object]:
        return {name: module for name, module in sys.modules.items() if name.split(".")[0] in ("reasoning_gym", "cellpylib")}

    before = seen()  # other tests of this process may have imported the real one
    list(corpus.build("math_worked", 2000))
    assert seen() == before


def test_catalogues_are_in_many_languages(built):
    languages = {d.id.split("/locale/")[1].split("/")[0] for d in built["message_catalogues"]}
    assert len(languages) > 40
    assert any(any("\u4e00" <= c <= "\u9fff" for c in d.text) for d in built["message_catalogues"])


def test_long_readmes_are_cut_at_headings():
    text = "Title\n=====\n" + "word " * 100 + "\n\n## One\n" + "word " * 2000 + "\n\n## Two\n" + "word " * 100
    sections = list(prose._sections(text))
    assert [s.split("\n")[0] for s in sections] == ["Title", "## Two"]


@pytest.mark.parametrize("raw", [b"\xff\xfe", b"a\0b", "a\ufffdb".encode(), b"a\x1b[0m"])
def test_what_is_no_clean_text_is_left_out(raw):
    assert material.clean(raw) is None
