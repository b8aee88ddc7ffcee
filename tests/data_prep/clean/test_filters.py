"""Each filter of the published configuration: its typical victims, with the reason, and what it must let pass."""

import sys
import types

import pytest
from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import get_filter_result

from data_prep.clean import filters
from data_prep.clean.filtering import removed_lines
from recipes.cleaning import Filters
from recipes.compose import compose

PROSE = (
    "The harbour was quiet when the first boats came back from the night's work. Their crews had seen nothing but fog, and the "
    "lamps along the quay were still burning. An old man, who had spent most of his life repairing nets, counted them as they "
    "arrived and wrote the numbers into a small book.\n"
    "Nobody asked him why he did that. Some thought it was a habit that he could not give up, others that he waited for one "
    "boat in particular. When the last of them was tied to its post, he closed the book and walked slowly up the hill to the "
    "house with the green door.\n"
    "In the afternoon the wind turned, and with it came the smell of rain. Children ran down to the water to look at the "
    "catch before it was sold, and to be told stories that their parents would not have believed.\n"
)
CODE = '''"""Words of a text."""

import re


def words(text, pattern=re.compile(r"[a-z]+")):
    """All words of `text` in lower case, in order."""
    found = []
    for match in pattern.finditer(text.lower()):
        found.append(match.group())
    return found
'''
GERMAN = (
    "Der Hafen war still, als die ersten Boote von der Arbeit der Nacht zurückkamen. Die Mannschaften hatten nichts als Nebel "
    "gesehen, und die Lampen am Kai brannten noch. Ein alter Mann zählte sie und schrieb die Zahlen in ein kleines Buch."
)


@pytest.fixture(scope="module")
def published():
    return compose([]).data.cleaning.filters


def only(published, category, name, **changed):
    """The filter `name` of a category of the published configuration, alone."""
    config = getattr(published[category], name).model_copy(update=changed)
    ((found, step),) = filters.build(Filters(**{name: config}), None)
    assert found == name
    return step


def verdict(step, text):
    document = Document(text=text, id="")
    return get_filter_result(step.filter(document))


VICTIMS = [
    ("web", "text", "Too short.", "too_short"),
    ("web", "text", PROSE * 8000, "too_long"),
    ("web", "text", PROSE + "\ufffd" * 40, "broken_characters"),
    ("web", "text", PROSE + "\x01\x02\ue000" * 20, "broken_characters"),
    ("web", "language", GERMAN, "language_de"),
    ("multilingual", "language", "Гавань была тиха, когда первые лодки вернулись с ночной работы.", "language_ru"),
    ("web", "gopher_repetition", "A paragraph that comes again and again.\n\n" * 30, "dup_para_frac"),
    ("web", "gopher_repetition", "\n".join(f"{w}\nhome" for w in PROSE.split()[:30]), "dup_line_frac"),
    ("web", "gopher_repetition", "buy now " * 100 + PROSE, "top_2_gram"),
    ("web", "gopher_repetition", PROSE + PROSE.replace("\n", " "), "duplicated_5_n_grams"),
    ("web", "gopher_quality", "The harbour was quiet and that is all there is to say of it.", "gopher_short_doc"),
    ("web", "gopher_quality", "a be to of it is on by " * 20, "gopher_below_avg_threshold"),
    (
        "web",
        "gopher_quality",
        PROSE + "Donaudampfschifffahrtsgesellschaftskapitänsmützenfabrik " * 60,
        "gopher_above_avg_threshold",
    ),
    ("web", "gopher_quality", PROSE.replace(" ", " # ", 60), "gopher_too_many_hashes"),
    ("web", "gopher_quality", PROSE.replace(" ", " ... ", 60), "gopher_too_many_ellipsis"),
    (
        "web",
        "gopher_quality",
        "\n".join("- " + PROSE.replace("\n", " ")[i : i + 60] for i in range(0, 600, 60)),
        "gopher_too_many_bullets",
    ),
    (
        "web",
        "gopher_quality",
        "\n".join(PROSE[i : i + 60].strip() + "..." for i in range(0, 900, 60)),
        "gopher_too_many_end_ellipsis",
    ),
    ("web", "gopher_quality", PROSE + "12 345 67 89 2001 " * 20, "gopher_below_alpha_threshold"),
    (
        "web",
        "gopher_quality",
        "harbour boats lamps quay crews fog night work nets numbers book " * 10,
        "gopher_enough_stop_words",
    ),
    ("web", "c4", PROSE + "Lorem ipsum dolor sit amet.\n", "lorem_ipsum"),
    ("web", "c4", PROSE + "if (x) { return y; }\n", "curly_bracket"),
    ("web", "c4", "Only one sentence stands here. And a second one.", "too_few_sentences"),
    ("web", "fineweb", "\n".join(PROSE.replace(".", "").split(",")), "line_punct_ratio"),
    ("web", "fineweb", "\n".join(f"{word}." for word in PROSE.split()), "short_line_ratio"),
    ("web", "fineweb", PROSE + PROSE.splitlines()[0] + "\n", "char_dup_ratio"),
    ("web", "gneissweb", PROSE.replace(". ", ", and ").replace(".", ","), "unreadable"),
    ("code", "code", CODE + "x = '" + "ab " * 400 + "'\n", "long_line"),
    ("code", "code", "\n".join("value = " + "first + second - " * 12 for _ in range(9)), "long_mean_line"),
    ("code", "code", CODE[:200] + "\n" + "{}[]();=+-*/ <> &| \n" * 60, "few_alphanumeric"),
    ("code", "code", "data = [\n" + "    1024, 2048, 4096, 8192, 16384, 32768,\n" * 40 + "]\n", "few_alphabetic"),
    ("code", "code", "# This file was generated by protoc. DO NOT EDIT.\n" + CODE, "autogenerated"),
    ("code", "code", "// @auto-generated\n" + CODE, "autogenerated"),
    (
        "code",
        "code",
        "icon = (\n" + '    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk' + "A" * 70 + '"\n' + ")\n",
        "encoded_data",
    ),
    ("code", "code", "raw = [\n" + "    " + "0xde, 0xad, 0xbe, 0xef, " * 4 + "\n" + "]\n", "encoded_data"),
    ("code", "code", '<?xml version="1.0"?>\n<project>\n  <name>words</name>\n</project>\n', "xml"),
]


@pytest.mark.parametrize(("category", "name", "text", "reason"), VICTIMS, ids=[f"{n}-{r}" for _, n, _, r in VICTIMS])
def test_victims(published, category, name, text, reason):
    assert verdict(only(published, category, name), text) == (False, reason)


@pytest.mark.parametrize(
    ("category", "text"),
    [("web", PROSE), ("web_hq", PROSE), ("technical", PROSE), ("code", CODE), ("repositories", CODE), ("multilingual", GERMAN)],
)
def test_survivors(published, category, text):
    for _, step in filters.build(published[category], None):
        assert verdict(step, text)[0], step


def test_the_order_is_that_of_the_fields(published):
    assert [name for name, _ in filters.build(published["web"], None)] == [
        "text",
        "language",
        "gopher_quality",
        "gopher_repetition",
        "c4",
        "fineweb",
        "gneissweb",
    ]


def test_c4_takes_lines_out_of_documents_that_stay(published):
    step = only(published, "web", "c4")
    document = Document(
        text=PROSE + "Please enable Javascript in your browser.\nshort one\nWe use cookies on all our pages.\n", id=""
    )
    before = document.text
    assert step.filter(document) is True
    assert document.text == PROSE.strip()
    assert removed_lines(before, document.text).splitlines() == before.splitlines()[-3:]


@pytest.mark.parametrize(
    ("before", "after", "gone"),
    [
        ("a\nb\nc", "a\nc", "b"),
        ("  a [1]\nb\n\nc", "a\nc", "b\n"),
        ("a\nb", "a\nb", ""),
        ("x\na\nx\na\nx", "a\na", "x\nx\nx"),
    ],
)
def test_removed_lines(before, after, gone):
    assert removed_lines(before, after) == gone


def test_readability_by_hand():
    # 4 + 5 words, of at most three letters: It, was / He, it, was; two sentences.
    assert filters.readability("It was quiet outside. He thought that it was.") == pytest.approx((9 + 5) / 2)
    # Of up to two words: no sentence of its own.
    assert filters.readability("Good. Morning there. They had seen nothing.") == pytest.approx((7 + 1) / 1)


UNREADABLE = PROSE.replace(". ", ", and ").replace(".", ",")


def gneissweb(published, tokenizer=None, **changed):
    config = published["web"].gneissweb.model_copy(update=changed)
    ((_, step),) = filters.build(Filters(gneissweb=config), tokenizer)
    return step


def test_tokens_per_character_save_an_unreadable_document(published, trained):
    tokenizer = (str(trained.path), "sentencepiece")
    ratio = len(trained.encode(UNREADABLE)) / len(UNREADABLE)
    interval = type(published["web"].gneissweb.tokens_per_character)
    near = interval(at_least=ratio * 0.99, at_most=ratio * 1.01)
    far = interval(at_least=ratio * 1.01, at_most=ratio * 1.02)
    assert verdict(gneissweb(published, tokenizer, tokens_per_character_in_category=near), UNREADABLE)[0]
    found = verdict(gneissweb(published, tokenizer, tokens_per_character_in_category=far), UNREADABLE)
    assert found == (False, "unreadable_and_extreme_tokenized")
    assert verdict(gneissweb(published, tokenizer, tokens_per_character_in_category=far), PROSE)[0]


@pytest.fixture
def fasttext(monkeypatch):
    """A fastText whose models are in their names: the label that comes first in the text wins, with the score 0.9."""

    class Model:
        def __init__(self, path):
            self.labels = path.split("/")[-1].removesuffix(".bin").split("-")

        def predict(self, text, k):
            assert "\n" not in text
            best = min(self.labels, key=lambda label: (text.find(label) < 0, text.find(label)))
            rest = [label for label in self.labels if label != best]
            return [f"__label__{x}" for x in (best, *rest)], [0.9, *(0.1 / len(rest) for _ in rest)]

    package, module = types.ModuleType("fasttext"), types.ModuleType("fasttext.FastText")
    module._FastText = Model
    monkeypatch.setitem(sys.modules, "fasttext", package)
    monkeypatch.setitem(sys.modules, "fasttext.FastText", module)
    filters._model.cache_clear()
    yield
    filters._model.cache_clear()


def classifier(label, min_score=0.5):
    return {"path": "/models/harbour-forest.bin", "label": label, "min_score": min_score}


@pytest.mark.parametrize(
    ("quality", "categories", "text", "expected"),
    [
        (["harbour"], [], PROSE, None),
        (["forest"], [], PROSE, "low_quality"),
        (["forest", "harbour"], [], PROSE, None),  # one is enough
        ([], ["harbour"], UNREADABLE[:700], "unreadable"),  # in a category: below 70 is readable, this is above
        ([], ["harbour"], PROSE.replace(". ", ", ", 2), None),
        ([], ["forest"], PROSE.replace(". ", ", ", 2), "unreadable"),  # in none: below 30
    ],
)
def test_the_ensemble(published, fasttext, quality, categories, text, expected):
    model = type(published["web"].gneissweb)
    config = model.model_validate(
        published["web"].gneissweb.model_dump()
        | {
            "quality": {name: classifier(name) for name in quality},
            "categories": {name: classifier(name) for name in categories},
        }
    )
    ((_, step),) = filters.build(Filters(gneissweb=config), None)
    assert verdict(step, text) == ((True, None) if expected is None else (False, expected))
