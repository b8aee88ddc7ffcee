"""The dry run: estimates near the truth for every kind of file, hundreds of sources, every problem at once, nothing written."""

import gzip
import json
import random

import pytest

from data_prep.estimate import BYTES_PER_TOKEN, Estimator
from data_prep.indexed import Reader
from data_prep.preview import preview
from launchers.cli import main
from tests.data_prep import helpers


def lines(count, words, seed=0):
    rng = random.Random(seed)
    return [json.dumps({"text": helpers.text(rng, rng.randint(*words))}) for _ in range(count)]


def write(path, rows):
    """JSON lines, plain or packed, or Parquet, by the suffix."""
    content = ("\n".join(rows) + "\n").encode()
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": [json.loads(row)["text"] for row in rows]}), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix == ".zst":
        import zstandard

        path.write_bytes(zstandard.compress(content))
    else:
        path.write_bytes(content)


def one_source(folder, pattern, **changes):
    sources = {"web_a": {"category": "web", "kind": "files", "paths": [str(folder / pattern)]} | changes}
    return helpers.recipe(folder, sources=sources, phases={"first": helpers.phase("first", shares={"web": 100.0})})


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
@pytest.mark.parametrize("files", [1, 7])
def test_estimates_are_near_the_truth(tmp_path, suffix, files):
    # more than is looked at of one file, so that sizes have to be scaled up
    rows = lines(1200, (100, 900))
    for n in range(files):
        write(tmp_path / f"{n}.{suffix}", rows[n::files])
    found = Estimator(one_source(tmp_path, f"*.{suffix}")).lengths("web_a")
    text_bytes = sum(len(json.loads(row)["text"]) for row in rows)
    kept = 0.9  # helpers.recipe holds out 10 %
    assert len(found) * found.stands_for == pytest.approx(1200 * kept, rel=0.1)
    assert found[0 : len(found)].sum() == pytest.approx(text_bytes / BYTES_PER_TOKEN * kept, rel=0.1)
    assert found[10:12].tolist() == found[0 : len(found)][10:12].tolist()


def test_a_source_of_billions_is_estimated_in_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.estimate.MAX_DOCUMENTS", 100)
    write(tmp_path / "a.jsonl", lines(1234, (100, 200)))
    recipe = one_source(tmp_path, "a.jsonl")
    found = Estimator(recipe).lengths("web_a")
    assert (len(found), found.stands_for) == (pytest.approx(93, abs=7), 12)
    coarse = preview(recipe)
    monkeypatch.undo()
    fine = preview(recipe)
    (one,), (other,) = coarse.rows, fine.rows
    assert one.draw.source_tokens == pytest.approx(other.draw.source_tokens, rel=0.02)
    assert one.draw.epochs == pytest.approx(other.draw.epochs, abs=0.03)
    assert one.draw.tokens >= one.draw.tokens_needed


def test_the_tokenizer_that_there_is_counts(tmp_path, trained):
    write(tmp_path / "a.jsonl", lines(500, (20, 300)))
    tokenizer = {"kind": "sentencepiece", "path": str(trained.path), "vocab_size": 1200}
    recipe = one_source(tmp_path, "a.jsonl")
    given = recipe.model_copy(update={"data": recipe.data.model_validate(recipe.data.model_dump() | {"tokenizer": tokenizer})})
    guessed, counted = Estimator(recipe).lengths("web_a"), Estimator(given).lengths("web_a")
    true = sum(len(trained.encode(json.loads(row)["text"])) + 1 for row in (tmp_path / "a.jsonl").read_text().splitlines())
    assert counted[0 : len(counted)].sum() == pytest.approx(0.9 * true, rel=0.05)
    assert guessed[0 : len(guessed)].sum() != pytest.approx(0.9 * true, rel=0.05)


def test_estimates_of_prepared_sources_are_what_was_made(prepared):
    # the same files under another root, whose tokenizer is this one
    root = prepared / "data"
    path = root / "tokenizer" / "tokenizer.model"
    tokenizer = {"kind": "sentencepiece", "path": str(path), "vocab_size": 400}
    recipe = helpers.recipe(prepared, tokenizer=tokenizer, root=str(prepared / "elsewhere"))
    shown = preview(recipe)
    assert shown.estimated == set(helpers.CATEGORY)
    for name in helpers.CATEGORY:
        true = Reader(root / "tokenized" / name).index
        assert shown.sources[name].tokens == pytest.approx(true.tokens, rel=0.12)
        assert shown.sources[name].documents == pytest.approx(true.documents, rel=0.12)
    assert not (prepared / "elsewhere").exists()


def test_repositories_are_counted_whole(tmp_path):
    rows = [
        json.dumps({"text": "x = 1\n" * 50, "repo_name": f"r{n // 10}", "path": f"{n}.py"}, sort_keys=True) for n in range(100)
    ]
    write(tmp_path / "a.jsonl", rows)
    found = Estimator(one_source(tmp_path, "a.jsonl", concatenate="repositories")).lengths("web_a")
    assert len(found) == 9  # ten, less what is held out
    assert found[0:1][0] == pytest.approx(3000 / BYTES_PER_TOKEN, rel=0.01)


def test_all_problems_of_all_sources_at_once_and_what_is_known_is_planned(tmp_path):
    helpers.raw(tmp_path)
    recipe = helpers.recipe(tmp_path)
    sources = {name: source.model_dump() for name, source in recipe.data.sources.items()}
    sources["web_b"]["paths"] = ["/nowhere/*.jsonl"]
    sources["code_a"]["text_key"] = "content"
    sources["math_a"] |= {"kind": "builtin", "builder": "poems"}
    sources["also_web"] = sources["web_a"]
    phases = {"first": helpers.phase("first"), "second": helpers.phase("second", shares={"songs": 100.0})}
    shown = preview(helpers.recipe(tmp_path, sources=sources, phases=phases))
    expected = [
        "data.sources.math_a.builder is 'poems'",
        "phase 'second': mixture 'second' takes 100 % from category 'songs'",
        "data.sources.web_b.paths: nothing matches '/nowhere/*.jsonl'",
        "data.sources.code_a: no document in the sample that was looked at; check data.sources.code_a.text_key ('content')",
        "data.sources.web_a and data.sources.also_web share the file",
    ]
    assert len(shown.problems) == len(expected)
    for problem, beginning in zip(shown.problems, expected, strict=True):
        assert problem.startswith(beginning)
    assert {row.source: row.draw is not None for row in shown.rows} == {
        "also_web": True,
        "code_a": False,
        "math_a": False,
        "web_a": True,
        "web_b": False,
    }


def test_hundreds_of_sources(tmp_path, capsys):
    folder = tmp_path / "raw"
    folder.mkdir()
    rows = lines(20, (200, 300))
    sources = {}
    for n in range(300):
        (folder / f"s{n}.jsonl").write_text("\n".join([json.dumps({"text": f"number {n} is new"}), *rows]))
        sources[f"s{n}"] = {"category": f"c{n % 5}", "kind": "files", "paths": [str(folder / f"s{n}.jsonl")]}
    del sources["s7"]["paths"]
    shares = {f"c{n}": 20.0 for n in range(5)}
    phases = {name: helpers.phase(name, steps=200, shares=shares, batch=8) for name in ("first", "second")}
    shown = preview(helpers.recipe(tmp_path, sources=sources, phases=phases))
    assert len(shown.rows) == 600
    assert len(shown.problems) == 1
    assert sum(row.samples_given for row in shown.rows if row.phase == "second" and row.draw) == pytest.approx(1600, abs=10)


def test_the_tables_come_before_the_refusals(tmp_path, capsys):
    assert main(["prep", "curriculum=smoke", "--dry-run", f"data.root={tmp_path}/data", "data.max_epochs=0.001"]) == 2
    captured = capsys.readouterr()
    for heading in ("share planned", "share by", "available", "tokens drawn", "epochs so far", "long drawn %", "never read %"):
        assert heading in captured.out
    assert "sum, trains 245,760" in captured.out
    assert (
        "long: in documents of at least phase.min_document_tokens (long_32k 128, long_128k 256, long_512k 512)" in captured.out
    )
    assert captured.err.count("phase '") >= 14
