"""The fertility report against counts made by hand, and its commands."""

import argparse
import json

import pytest

from data_prep.errors import DataError
from data_prep.fertility import WORD, Fit, Labelled, Row, byte_entries, language_of, measure, shares, unknown_id
from data_prep.tokenizer import load_tokenizer, write_hf_tokenizer
from launchers import tokenizer_command
from tests.data_prep import helpers

RARE = "\U0001f9ff\u0d9e"
"""An amulet and a Sinhala letter: neither is in a small vocabulary, so both are bytes."""


@pytest.mark.parametrize(
    ("text", "words"),
    [("", 0), ("  one two,\n three-four ", 3), ("漢字 と kana", 4), ("한국어 말", 2), ("สวัสดี", 6), ("x=f(1)", 1)],
)
def test_words(text, words):
    assert len(WORD.findall(text)) == words


def test_figures_are_counts_divided(trained, byte_level):
    documents = [
        Labelled("a b c\n", "code", "en"),
        Labelled("é é", "code", "fr"),
        Labelled("a b", "web", "en"),
        Labelled(RARE, "web", "si"),
    ]
    report = measure(documents, {"sp": trained, "bl": byte_level}, threads=1)
    assert [(r.category, r.language, r.documents, r.text_bytes, r.characters, r.words) for r in report.rows] == [
        ("code", "en", 1, 6, 6, 3),
        ("code", "fr", 1, 5, 3, 2),
        ("web", "si", 1, 7, 2, 1),
        ("web", "en", 1, 3, 3, 2),
    ]
    for name, tokenizer in (("sp", trained), ("bl", byte_level)):
        for row, document in zip(report.rows, (documents[0], documents[1], documents[3], documents[2]), strict=True):
            tokens = len(tokenizer.encode(document.text))
            assert row.figures(name) == {
                "tokens": tokens,
                "tokens_per_word": tokens / row.words,
                "bytes_per_token": row.text_bytes / tokens,
                "characters_per_token": row.characters / tokens,
                "byte_token_percent": pytest.approx(100.0 if document.text == RARE else 0.0),
                "unknown_percent": 0.0,
            }
        assert report.used[name] == len({number for d in documents for number in tokenizer.encode(d.text)})
    *categories, everything = report.totals()
    assert [(row.category, row.documents, row.text_bytes) for row in categories] == [("code", 2, 11), ("web", 2, 10)]
    assert (everything.documents, everything.words, everything.fits["sp"].tokens) == (
        4,
        8,
        sum(r.fits["sp"].tokens for r in report.rows),
    )


def test_byte_entries_are_those_without_a_whole_character(trained, byte_level, tmp_path):
    assert byte_entries(trained).sum() == 256
    write_hf_tokenizer(trained, tmp_path)
    exported = load_tokenizer(tmp_path)
    assert byte_entries(exported).tolist() == byte_entries(trained).tolist()
    assert unknown_id(exported) == unknown_id(trained) == 0
    flagged = byte_entries(byte_level)
    assert unknown_id(byte_level) is None
    for number in range(byte_level.vocab_size):
        # What the library decodes to U+FFFD is no text.
        assert flagged[number] == ("\ufffd" in byte_level.decode([number]))


def test_nothing_to_divide_by_gives_none():
    assert Row("a", "b", fits={"t": Fit()}).figures("t") == {
        "tokens": 0,
        "tokens_per_word": None,
        "bytes_per_token": None,
        "characters_per_token": None,
        "byte_token_percent": None,
        "unknown_percent": None,
    }


def test_small_languages_are_folded():
    rows = [Row("a", name, text_bytes=size) for name, size in (("en", 900), ("de", 95), ("fr", 3), ("it", 2))] + [
        Row("b", "xx", text_bytes=1)
    ]
    assert [(row.language, row.text_bytes) for row in shares(rows, 0.01)] == [("en", 900), ("de", 95), ("other", 5), ("xx", 1)]
    assert [row.language for row in shares(rows, 0.0)] == ["en", "de", "fr", "it", "xx"]


def test_languages_are_told_apart():
    assert language_of("The quick brown fox jumps over the lazy dog and runs away from the hunter.") == "en"
    assert language_of("Der schnelle braune Fuchs springt über den faulen Hund und läuft davon.") == "de"


@pytest.fixture(scope="module")
def command():
    parser = argparse.ArgumentParser()
    tokenizer_command.add_parser(parser.add_subparsers())

    def run(*words):
        args = parser.parse_args(["tokenizer", *map(str, words)])
        return tokenizer_command.run(args)

    return run


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    for name, language in (("one", "en"), ("two", "xx")):
        lines = [
            json.dumps(
                {"text": f"{name} {n} " + " ".join(helpers.WORDS[n * 10 : n * 10 + 60]), "kind": f"k{n % 2}", "lang": language}
            )
            for n in range(50)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\nnot JSON\n")
    return folder


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_train_and_report_commands(command, files, tmp_path, capsys, kind):
    out = tmp_path / "made"
    assert (
        command("train", "--input", files / "*.jsonl", "--kind", kind, "--vocab-size", 340, "--max-mb", 1, "--output", out) == 0
    )
    left_out = f"left out: 2 lines that are no documents, the first: {files / 'one.jsonl'}, line 51: not JSON"
    shown = capsys.readouterr().out
    assert "340 entries, " in shown
    assert left_out in shown
    made = out / "tokenizer.model" if kind == "sentencepiece" else out
    if kind == "sentencepiece":
        assert load_tokenizer(out / "hf").encode("the same") == load_tokenizer(made).encode("the same")
    report = tmp_path / "report.json"
    words = [
        "--tokenizer",
        made,
        "--input",
        files / "*.jsonl",
        "--category-key",
        "kind",
        "--language-key",
        "lang",
        "--json",
        report,
    ]
    assert command("report", *words) == 0
    shown = capsys.readouterr().out
    assert "tokens/word" in shown
    assert left_out in shown
    values = json.loads(report.read_text())
    assert {(row["category"], row["language"], row["documents"]) for row in values["rows"]} == {
        (category, language, 25) for category in ("k0", "k1") for language in ("en", "xx")
    }
    assert values["tokenizers"]["made"]["vocab_size"] == 340


def test_the_budget_is_spread_by_size(files):
    small, large = files / "one.jsonl", files / "three.jsonl"
    large.write_bytes(small.read_bytes() * 3)
    texts = list(tokenizer_command.training_texts([small, large], "text", 8000, tokenizer_command.LeftOut()))
    sizes = [len(text.encode()) for text in texts]
    second = texts.index(texts[0], 1)  # both begin with the same document
    assert 2000 - max(sizes) < sum(sizes[:second]) <= 2000
    assert 6000 - max(sizes) < sum(sizes[second:]) <= 6000


def test_report_without_labels_names_files_and_finds_languages(command, files, tmp_path, byte_level, capsys):
    report = tmp_path / "report.json"
    text = "Ein Hund ist ein Tier, das bellt und mit dem Schwanz wedelt, wenn es sich freut."
    (files / "tiere.de.jsonl").write_text(json.dumps({"text": text}))
    assert command("report", "--tokenizer", byte_level.path, "--input", files / "tiere.de.jsonl", "--json", report) == 0
    assert {(row["category"], row["language"]) for row in json.loads(report.read_text())["rows"]} == {("tiere", "de")}


def test_wrong_use_is_refused(command, files, byte_level, tmp_path):
    data = files / "one.jsonl"
    with pytest.raises(DataError, match="nothing matches"):
        command(
            "train", "--input", tmp_path / "gone*", "--kind", "huggingface", "--vocab-size", 400, "--output", tmp_path / "x"
        )
    for size in ("0", "nan", "inf"):
        with pytest.raises(DataError, match=f"--max-mb is {size}"):
            command(
                "train",
                "--input",
                data,
                "--kind",
                "huggingface",
                "--vocab-size",
                400,
                "--output",
                tmp_path / "x",
                "--max-mb",
                size,
            )
    with pytest.raises(DataError, match="either --input with files or a recipe"):
        command("report", "--tokenizer", byte_level.path)
    with pytest.raises(DataError, match="--tokenizer is missing"):
        command("report", "--input", data)
    with pytest.raises(DataError, match="no documents were found under the key 'body'"):
        command("report", "--tokenizer", byte_level.path, "--input", data, "--text-key", "body")
    with pytest.raises(DataError, match=r"no text of .* run `quarry prep curriculum=smoke data.root=.*` first"):
        command("report", "curriculum=smoke", f"data.root={tmp_path / 'empty'}")
