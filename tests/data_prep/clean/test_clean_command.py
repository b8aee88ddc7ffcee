"""`quarry clean`: help, what it prints, refusals; and the smoke recipe's cleaning of the built-in corpus."""

import argparse
import json
from functools import cache

import pytest

from data_prep.errors import DataError
from launchers import clean_command
from recipes.compose import compose
from recipes.schema import RecipeError


def quarry(*arguments):
    parser = argparse.ArgumentParser(prog="quarry")
    subparsers = parser.add_subparsers()
    clean_command.add_parser(subparsers)
    return clean_command.run(parser.parse_args(["clean", *arguments]))


SOURCES = ["domain_licences", "multilingual_messages"]


@cache
def names():
    return list(compose(["curriculum=smoke"]).data.sources)


def small(root):
    """The smoke recipe with two of its sources; cleaning does not look at the phases that would need the others."""
    return [
        "curriculum=smoke",
        f"data.root={root}",
        *(f"~data.sources.{name}" for name in names() if name not in SOURCES),
        "data.sources.multilingual_messages.max_bytes=100000",
    ]


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        quarry("--help")
    out = capsys.readouterr().out
    assert "quarry clean curriculum=smoke" in out
    assert "data.cleaning.filters.web.c4=null" in out


def test_it_cleans_prints_the_funnel_and_does_nothing_twice(tmp_path, capsys):
    root = tmp_path / "data"
    assert quarry(*small(root)) == 0
    out = capsys.readouterr().out
    for word in ("domain_licences", "multilingual_messages", "near", "bytes", "all", str(root / "clean" / "funnel.md")):
        assert word in out
    report = json.loads((root / "clean" / "funnel.json").read_text())
    assert set(report["sources"]) == set(SOURCES)
    # Licences are copies of few texts by nature.
    near = report["sources"]["domain_licences"]["steps"]["near_duplicates"]
    assert near["removed"]["documents"] > 20
    assert quarry(*small(root), "--workers", "1") == 0
    assert "filters of" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tokenizer", "no/tokenizer"), "--tokenizer: no/tokenizer does not exist; name a folder with tokenizer.json"),
        (("--workers", "0"), "--workers is 0; give a number above 0"),
        (("--slurm", "--tasks-at-once", "-1"), "--tasks-at-once is -1; give"),
    ],
)
def test_options_are_refused_before_anything_is_read(words, message, monkeypatch):
    monkeypatch.setattr("recipes.compose.compose", lambda *_: pytest.fail("composed"))
    with pytest.raises(DataError, match=message):
        quarry("curriculum=smoke", *words)


def test_refusals(tmp_path):
    with pytest.raises(DataError, match="data.cleaning is null"):
        quarry(*small(tmp_path), "data.cleaning=null")
    with pytest.raises(RecipeError, match=r"data.cleaning.filters.web.c5: .*c4"):
        quarry(*small(tmp_path), "data.cleaning.filters.web.c5=null")
    with pytest.raises(RecipeError, match=r"data.cleaning.filters.web.c5"):
        quarry(*small(tmp_path), "+data.cleaning.filters.web.c5=null")
    with pytest.raises(RecipeError, match="min_item_words is 20, more than ngram_words"):
        quarry(*small(tmp_path), "data.cleaning.decontamination.min_item_words=20")
    with pytest.raises(DataError, match="gsm8k.paths: nothing matches"):
        quarry(*small(tmp_path), "data/cleaning=granite_4_1", "data.cleaning.decontamination.benchmarks.mmlu=null",
               "data.cleaning.decontamination.benchmarks.mmlu_pro=null", "data.cleaning.decontamination.benchmarks.bbh=null",
               "data.cleaning.decontamination.benchmarks.agieval=null", "data.cleaning.decontamination.benchmarks.drop=null")  # fmt: skip


@pytest.mark.parametrize(
    "overrides", [["curriculum=smoke"], [], ["data/cleaning=smoke"], ["curriculum=smoke", "data/cleaning=granite_4_1"]]
)
def test_published_cleanings_cover_every_category(overrides):
    data = compose(overrides).data
    categories = {source.category for source in data.sources.values()}
    assert categories == set(data.cleaning.filters)
    assert sorted(data.cleaning.priority) == sorted(categories)
    assert set(data.cleaning.near_duplicates.exempt) <= categories
    assert {f"{name}" for name in data.cleaning.masking.exempt} <= categories


def test_a_full_run_uses_every_filter_somewhere():
    filters = compose([]).data.cleaning.filters
    used = {name for category in filters.values() for name, config in category if config is not None}
    assert used == set(type(filters["web"]).model_fields)
    assert compose(["data.cleaning=null"]).data.cleaning is None
