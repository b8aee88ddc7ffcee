"""The whole cleaning: the same bytes whatever the workers and interruptions, nothing done twice, nothing lost, counts that add up."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import files
from data_prep.clean import clean, executors, shards
from data_prep.errors import DataError
from data_prep.files import write_json
from data_prep.plain_files import with_digest
from data_prep.progress import Silent
from data_prep.verify import verify
from tests.data_prep.clean import planted
from tests.data_prep.clean.planted import CODE, GERMAN, PROSE, kept, kept_ids, mixed, published, removed
from tests.data_prep.helpers import times, tree
from tests.data_prep.verifying import flip


def test_equal_bytes_for_one_worker_and_two(tmp_path, monkeypatch):
    monkeypatch.setattr(executors, "POOL_MIN_BYTES", 0)
    found = {}
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        _, records = planted.cleaned(folder, mixed(), workers, **published())
        found[workers] = tree(folder / "data")
        assert records["web_a"].steps["language"].reasons == {"language_de": 1}
    assert found[1] == found[2]
    assert any(name.endswith(".jsonl") for name in found[1])
    assert not any(".work" in name for name in found[1])


def test_a_large_file_is_cleaned_in_ranges_with_the_same_result(tmp_path, monkeypatch):
    found, bad = {}, {}
    for size in (shards.SHARD_BYTES, 700):
        monkeypatch.setattr(shards, "SHARD_BYTES", size)
        folder = tmp_path / str(size)
        texts = {"web_a": [planted.sentence(random.Random(i), 20) for i in range(30)] + ["same"] * 3, "web_b": ["x"]}
        planted.write(folder, texts)
        raw = folder / "raw" / "web_a_0.jsonl"
        lines = raw.read_bytes().splitlines(keepends=True)
        raw.write_bytes(b"".join([*lines[:7], b"\n", b"{broken\n", *lines[7:20], b'{"text": 5}\n', *lines[20:]]))
        records = planted.run(folder, planted.recipe(folder, texts))
        assert (len(records["web_a"].files) == 1) == (size > 700)
        found[size] = kept(folder, records)
        bad[size] = [json.loads(x) for x in (folder / "data/clean/web_a/quarantine/web_a.jsonl").read_text().splitlines()]
        assert [(entry["line"], entry["reason"][:8]) for entry in bad[size]] == [(9, "not JSON"), (23, "'text' i")]
        assert records["web_a"].quarantined_lines == 2
    assert (
        found[700] == found[shards.SHARD_BYTES] if shards.SHARD_BYTES in found else len({str(f) for f in found.values()}) == 1
    )


def test_packed_files_and_parquet_and_other_keys(tmp_path):
    folder = tmp_path
    texts = {"web_a": ["first text"], "code_a": ["x = 1", "y = 2"]}
    planted.write(folder, texts)
    planted.pack(folder / "raw" / "web_a_0.jsonl")
    table = pyarrow.table({"content": ["x = 1", "y = 2"], "repo_name": ["r", "s"], "path": ["a.py", "b.py"], "stars": [1, 2]})
    pyarrow.parquet.write_table(table, folder / "raw" / "code.parquet")
    sources = {
        "web_a": {"category": "web", "kind": "files", "paths": [str(folder / "raw" / "web_a*.gz")]},
        "code_a": {
            "category": "code",
            "kind": "files",
            "paths": [str(folder / "raw" / "*.parquet")],
            "text_key": "content",
            "concatenate": "repositories",
        },
    }
    made = planted.helpers.recipe(folder, sources=sources, cleaning=planted.cleaning())
    records = planted.run(folder, made)
    assert kept(folder, records) == {
        "web_a": [{"id": "web_a/0/0", "text": "first text"}],
        "code_a": [
            {"id": "code_a/00000/0", "text": "x = 1", "repo_name": "r", "path": "a.py"},
            {"id": "code_a/00000/1", "text": "y = 2", "repo_name": "s", "path": "b.py"},
        ],
    }


# --- nothing twice, nothing half ---------------------------------------------------------------------------------------------------


def test_a_second_run_writes_nothing(tmp_path):
    made, records = planted.cleaned(tmp_path, mixed(), **published())
    before = times(tmp_path / "data")
    assert planted.run(tmp_path, made) == records
    assert times(tmp_path / "data") == before


def fresh(folder, texts, **changed):
    """Tree of a cleaning that starts from nothing."""
    planted.cleaned(folder, texts, **changed)
    return tree(folder / "data")


def shard_times(folder, source):
    return {str(p): p.stat().st_mtime_ns for p in (folder / "data" / "clean" / source / "filtered").iterdir()}


def test_a_changed_filter_redoes_its_category(tmp_path):
    planted.cleaned(tmp_path / "a", mixed(), **published())
    before = {name: shard_times(tmp_path / "a", name) for name in ("web_a", "code_a")}
    changed = published()
    changed["filters"]["web"]["language"]["keep"] = ["en", "de"]
    _, records = planted.cleaned(tmp_path / "a", mixed(), **changed)
    assert "language_de" not in records["web_a"].steps["language"].reasons
    assert shard_times(tmp_path / "a", "code_a") == before["code_a"]
    assert shard_times(tmp_path / "a", "web_a") != before["web_a"]
    assert tree(tmp_path / "a" / "data") == fresh(tmp_path / "b", mixed(), **changed)


def test_a_changed_source_redoes_itself_and_the_deduplication(tmp_path):
    planted.cleaned(tmp_path / "a", mixed(), **published())
    before = shard_times(tmp_path / "a", "web_b")
    texts = mixed()
    shared = texts["web_b"][1]
    texts["web_a"] = [[text for text in lines if text != shared] for lines in texts["web_a"]]
    _, records = planted.cleaned(tmp_path / "a", texts, **published())
    assert "web_b/0/1" in kept_ids(tmp_path / "a", records)
    assert shard_times(tmp_path / "a", "web_b") == before
    assert tree(tmp_path / "a" / "data") == fresh(tmp_path / "b", texts, **published())


@pytest.mark.parametrize("step", ["exact_duplicates", "near_duplicates", "masking"])
def test_a_step_switched_off_and_on_again(tmp_path, step):
    first = fresh(tmp_path / "a", mixed(), **published())
    assert fresh(tmp_path / "a", mixed(), **published(**{step: None})) == fresh(
        tmp_path / "b", mixed(), **published(**{step: None})
    )
    assert fresh(tmp_path / "a", mixed(), **published()) == first


def test_priority_decides_and_a_change_of_it_is_noticed(tmp_path):
    texts = {"web_a": ["the same text", "one"], "best": ["the same text", "two"]}
    _, records = planted.cleaned(tmp_path, texts)
    assert kept_ids(tmp_path, records) == {"best/0/0", "best/0/1", "web_a/0/1"}
    order = planted.cleaning()["priority"]
    _, records = planted.cleaned(tmp_path, texts, priority=["web", *(category for category in order if category != "web")])
    assert kept_ids(tmp_path, records) == {"web_a/0/0", "web_a/0/1", "best/0/1"}


def test_fewer_files_leave_none_of_the_old_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 50)
    planted.cleaned(tmp_path / "a", {"web_a": [["one one"], ["two two"], ["three three"]]})
    (tmp_path / "a" / "raw" / "web_a_2.jsonl").unlink()
    texts = {"web_a": [["one one"], ["two two"]]}
    planted.cleaned(tmp_path / "a", texts)
    assert tree(tmp_path / "a" / "data") == fresh(tmp_path / "b", texts)


@pytest.mark.parametrize("what", ["00000.jsonl", "record.json", "filtered/00000.json", "filtered/00000.kept.jsonl.zst"])
def test_what_is_damaged_or_missing_is_made_again(tmp_path, what):
    made, _ = planted.cleaned(tmp_path, mixed(), **published())
    before = tree(tmp_path / "data")
    for damage in (lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-9])):
        damage(tmp_path / "data" / "clean" / "web_a" / what)
        if "filtered" in what:  # found when it is needed: not while the result is whole
            (tmp_path / "data" / "clean" / "record.json").unlink()
        planted.run(tmp_path, made)
        assert tree(tmp_path / "data") == before


def test_one_altered_byte_in_what_later_runs_take_over(tmp_path):
    """Found by verify, and made again before another cleaning compares it."""
    made, _ = planted.cleaned(tmp_path, mixed(), **published())
    before, root = tree(tmp_path / "data"), tmp_path / "data"
    counts = root / "clean" / "web_a" / "tokens.json"
    write_json(counts, with_digest({"kept": 12}))
    assert verify(root) == []
    write_json(counts, {**json.loads(counts.read_text()), "kept": 13})
    assert [f.file for f in verify(root)] == ["clean/web_a/tokens.json"]
    counts.unlink()
    for suffix in ("kept.jsonl.zst", "exact", "minhash", "removed.jsonl.zst"):
        path = root / "clean" / "web_a" / "filtered" / f"00000.{suffix}"
        flip(path, path.stat().st_size // 2)
        assert [f.file for f in verify(root)] == [str(path.relative_to(root))]
        (root / "clean" / "record.json").unlink()
        planted.run(tmp_path, made)
        assert verify(root) == []
        assert tree(root) == before


class Stop(BaseException):
    """Not an error: nothing may handle it."""


def test_interrupted_anywhere_it_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    texts = mixed()
    expected = fresh(tmp_path / "whole", texts, **published())
    planted.write(tmp_path / "cut", texts)
    made = planted.recipe(tmp_path / "cut", texts, **published())
    replace, left = os.replace, [0]

    def stopping(source, target):
        if left[0] == 0:
            raise Stop
        left[0] -= 1
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", stopping)
    stops = 0
    for allowed in [0, 1, 2, 3, 5, 4, 6, 3, 2, 5, 7, 3, 2, 1, 4, 1000]:
        left[0] = allowed
        try:
            planted.run(tmp_path / "cut", made)
        except Stop:
            stops += 1
    assert stops >= 8
    assert tree(tmp_path / "cut" / "data") == expected


KILLED = """
    import os, signal, sys
    from pathlib import Path

    if __name__ == "__main__":  # the workers import this file too
        from data_prep import files
        from data_prep.clean import executors
        from tests.data_prep.clean import planted
        from tests.data_prep.clean.planted import mixed, published

        executors.POOL_MIN_BYTES = 0
        folder, after = Path(sys.argv[1]), int(sys.argv[2])
        made = planted.recipe(folder, mixed(), **published())
        replace, left = os.replace, after

        def killing(source, target):
            global left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            replace(source, target)

        files.os.replace = killing
        planted.run(folder, made, workers=int(sys.argv[3]))
"""


def test_killed_it_goes_on_to_the_same_bytes(tmp_path):
    texts = mixed()
    expected = fresh(tmp_path / "whole", texts, **published())
    planted.write(tmp_path / "cut", texts)
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    # With two workers the first call of this process is behind the filters, which the pool did.
    for after, workers in ((4, 1), (1, 2)):
        done = subprocess.run(
            [sys.executable, str(script), str(tmp_path / "cut"), str(after), str(workers)],
            cwd=Path(__file__).parents[3],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
            capture_output=True,
            check=False,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    files.remove_leftovers(tmp_path / "cut" / "data")  # as every preparation does first
    planted.run(tmp_path / "cut", planted.recipe(tmp_path / "cut", texts, **published()))
    assert tree(tmp_path / "cut" / "data") == expected


def test_work_that_a_kill_behind_the_last_record_left_goes(tmp_path):
    texts = mixed()
    expected = fresh(tmp_path, texts, **published())
    left = tmp_path / "data" / "clean" / ".work" / "0123456789abcdef"
    left.mkdir(parents=True)
    (left / "file").write_text("x")
    planted.run(tmp_path, planted.recipe(tmp_path, texts, **published()))
    assert tree(tmp_path / "data") == expected


# --- counts ------------------------------------------------------------------------------------------------------------------------

TEXT = st.sampled_from(
    [PROSE, PROSE + "Please enable Javascript now.\n", PROSE + "Mail to jane@uni-x.de!\n", GERMAN, CODE, "short", " ", "buy now " * 90,
     PROSE[:300], PROSE + "{", "ü" * 300, PROSE.replace("old", "very old")]
)  # fmt: skip


# Each example is a whole cleaning, 9 s of CPU: few, and full.
@settings(max_examples=4, deadline=None)
@given(
    st.fixed_dictionaries(
        {n: st.lists(TEXT, min_size=m, max_size=12) for n, m in {"web_a": 8, "web_b": 0, "code_a": 4}.items()}
    )
)
def test_counts_add_up_and_nothing_vanishes(drawn):
    always = {
        "web_a": PROSE.replace("boats", "ships"),
        "web_b": PROSE.replace("fog", "mist").upper().capitalize(),
        "code_a": CODE + "#",
    }
    texts = {
        name: [*lines, f"{always[name]}\n{planted.sentence(random.Random(len(name) + ord(name[-1])), 90)}."]
        for name, lines in drawn.items()
    }
    config = published()
    config["filters"]["web"] |= {"gopher_quality": None, "gneissweb": None, "language": None, "gopher_repetition": None}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        _, records = planted.cleaned(folder, texts, **config)
        stay, gone = kept(folder, records), removed(folder, records)
        for name, lines in texts.items():
            record = records[name]
            assert record.documents_in == len(lines)
            assert record.bytes_in == sum(len(line.encode()) for line in lines)
            steps = record.steps.values()
            assert record.documents_in == record.documents + sum(s.removed_documents for s in steps)
            assert record.bytes_in == record.bytes + sum(s.removed_bytes + s.shrunk_bytes for s in steps)
            assert record.documents == len(stay[name]) == sum(file.documents for file in record.files)
            assert record.bytes == sum(len(entry["text"].encode()) for entry in stay[name])
            whole = [entry for entry in gone[name] if not entry.get("kept")]
            for step, count in record.steps.items():
                assert count.removed_documents == sum(entry["step"] == step for entry in whole)
                assert count.removed_bytes == sum(len(entry["text"].encode()) for entry in whole if entry["step"] == step)
                assert sum(count.reasons.values()) >= count.removed_documents + count.changed_documents
                assert len(count.examples) <= 3
            ids = [entry["id"] for entry in [*stay[name], *whole]]
            assert sorted(ids) == sorted(f"{name}/0/{i}" for i in range(len(lines)))
            unchanged = {f"{name}/0/{i}": line for i, line in enumerate(lines)}
            assert all(entry["text"] == unchanged[entry["id"]] for entry in whole if entry["step"] in ("text", "code", "c4"))


class Heard(Silent):
    def __init__(self):
        self.messages = []

    def message(self, text):
        self.messages.append(text)


def test_bad_lines_are_set_aside_with_their_place(tmp_path):
    texts = {"web_a": ["good one", "good two"]}
    planted.write(tmp_path, texts)
    path = tmp_path / "raw" / "web_a_0.jsonl"
    path.write_bytes(path.read_bytes() + b'{"text": "a\\ud800"}\nno json\n{"other": 1}\n{"text": ""}\n\xff\xfe\n')
    made = planted.recipe(tmp_path, texts)
    heard = Heard()
    records = clean(made, tmp_path / "data", planted.inputs(tmp_path, made), heard, 1)
    assert heard.messages == [f"web_a: 4 lines are no documents; see {tmp_path}/data/clean/web_a/quarantine/web_a.jsonl"]
    assert (records["web_a"].quarantined_lines, records["web_a"].empty_documents, records["web_a"].documents) == (4, 1, 2)
    entries = [json.loads(x) for x in (tmp_path / "data/clean/web_a/quarantine/web_a.jsonl").read_text().splitlines()]
    assert len(entries) == 5
    path.write_text('{"text": "good one"}\n')
    planted.run(tmp_path, made)
    assert not (tmp_path / "data/clean/web_a/quarantine/web_a.jsonl").exists()


def test_lone_surrogates_outside_of_the_text_stop_nothing(tmp_path):
    texts = {"web_a": ["good one"]}
    planted.write(tmp_path, texts)
    path = tmp_path / "raw" / "web_a_0.jsonl"
    path.write_bytes(path.read_bytes() + b'{"\\ud800key": 1}\n{"text": "good two", "id": "\\ud800"}\n')
    records = planted.run(tmp_path, planted.recipe(tmp_path, texts))
    assert (records["web_a"].quarantined_lines, records["web_a"].documents) == (1, 2)
    quarantine = (tmp_path / "data/clean/web_a/quarantine/web_a.jsonl").read_text()
    assert json.loads(quarantine)["reason"] == "no key 'text'; keys: \\ud800key"
    assert "web_a/00000/1" in kept_ids(tmp_path, records)


# --- mistakes ----------------------------------------------------------------------------------------------------------------------


def refusal(folder, texts, **changed):
    with pytest.raises(DataError) as caught:
        planted.cleaned(folder, texts, **changed)
    return str(caught.value)


TEXTS = {"web_a": ["some text"], "best": ["other text"]}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"filters": {"web": {}, "web_hg": {}}}, "data.cleaning.filters has no entry for category 'web_hq' (source 'best')"),
        ({"filters": {"web": {}, "web_hg": {}}}, "+data.cleaning.filters.web_hq={}; did you mean web_hg?"),
        ({"priority": ["web"]}, "data.cleaning.priority does not name category 'web_hq' (source 'best')"),
        ({"priority": ["web", "web_hq", "web"]}, "data.cleaning.priority names 'web' twice"),
        (
            {"near_duplicates": planted.near(exempt={"maths": "x"})},
            "near_duplicates.exempt names 'maths', which is no category; did you mean math?",
        ),
        (
            {
                "decontamination": {
                    "ngram_words": 13,
                    "min_item_words": 8,
                    "benchmarks": {"quiz": {"paths": ["no/*.jsonl"], "keys": ["q"]}},
                }
            },
            "data.cleaning.decontamination.benchmarks.quiz.paths: nothing matches 'no/*.jsonl'",
        ),
        (
            {
                "decontamination": {
                    "ngram_words": 13,
                    "min_item_words": 8,
                    "benchmarks": {"quiz": {"paths": ["no/*.jsonl"], "keys": ["q"]}},
                }
            },
            "or leave the benchmark out: data.cleaning.decontamination.benchmarks.quiz=null",
        ),
    ],
)
def test_mistakes_are_refused_before_anything_is_done(tmp_path, changed, says):
    assert says in refusal(tmp_path, TEXTS, **changed)
    assert not (tmp_path / "data").exists()


def with_filters(**filters):
    base = planted.cleaning()["filters"]
    return {"filters": base | {"web": filters}}


def gneissweb(path):
    return published()["filters"]["web"]["gneissweb"] | {
        "quality": {"dclm": {"path": str(path), "label": "hq", "min_score": 0.5}}
    }


def test_an_unknown_language_and_missing_classifiers(tmp_path):
    language = {"keep": ["en", "klingon"], "min_probability": 0.5, "max_characters": 100}
    message = refusal(tmp_path, TEXTS, **with_filters(language=language))
    assert "data.cleaning.filters.web.language.keep: py3langid knows no language 'klingon'; it knows" in message
    message = refusal(tmp_path, TEXTS, **with_filters(gneissweb=gneissweb(tmp_path / "dclm.bin")))
    assert "data.cleaning.filters.web.gneissweb.quality.dclm.path: no file" in message
    assert "'~data.cleaning.filters.web.gneissweb.quality.dclm'" in message
    (tmp_path / "dclm.bin").write_bytes(b"model")
    message = refusal(tmp_path, TEXTS, **with_filters(gneissweb=gneissweb(tmp_path / "dclm.bin")))
    assert "classifiers need the package fasttext, which is not installed; pip install fasttext-numpy2-wheel" in message


def test_a_tokenizer_that_is_not_there(tmp_path):
    planted.write(tmp_path, TEXTS)
    made = planted.recipe(tmp_path, TEXTS, **published())
    tokenizer = made.data.tokenizer.model_copy(update={"path": str(tmp_path / "tokenizer.model")})
    made = made.model_copy(update={"data": made.data.model_copy(update={"tokenizer": tokenizer})})
    with pytest.raises(DataError, match="data.tokenizer.path: no .*data.cleaning.filters.web.gneissweb=null"):
        planted.run(tmp_path, made)


def test_a_source_that_cleaning_empties(tmp_path):
    text = {"min_characters": 1000, "max_characters": None, "max_broken_share": None}
    message = refusal(tmp_path, TEXTS, **with_filters(text=text))
    assert "source 'web_a': cleaning removed all of its 1 documents (text: 1); widen these steps of data.cleaning" in message


def test_mostly_bad_lines_are_a_wrong_key(tmp_path):
    texts = {"web_a": ["a text"]}
    planted.write(tmp_path, texts)
    (tmp_path / "raw" / "web_a_0.jsonl").write_text('{"content": "x"}\n' * 30 + '{"text": "y"}\n')
    with pytest.raises(
        DataError, match="30 of 31 lines are bad, more than 1 %; the first: .*web_a_0.jsonl, line 1: no key 'text'"
    ) as caught:
        planted.run(tmp_path, planted.recipe(tmp_path, texts))
    assert "data.sources.web_a.text_key" in str(caught.value)


def test_a_recipe_without_cleaning_and_sources_left_out(tmp_path):
    planted.write(tmp_path, TEXTS)
    made = planted.recipe(tmp_path, TEXTS)
    found = planted.inputs(tmp_path, made)
    with pytest.raises(DataError, match="best is in the recipe or in the inputs only"):
        clean(made, tmp_path / "data", {"web_a": found["web_a"]}, Silent(), 1)
    bare = made.model_copy(update={"data": made.data.model_copy(update={"cleaning": None})})
    with pytest.raises(DataError, match="data.cleaning is null"):
        clean(bare, tmp_path / "data", found, Silent(), 1)


def test_a_damaged_gzip_is_refused(tmp_path):
    """One bad line may be missing; of a file that breaks off nobody knows how much is."""
    texts = {"web_a": ["a text", "b text"]}
    planted.write(tmp_path, texts)
    path = tmp_path / "raw" / "web_a_0.jsonl"
    packed, whole = path.with_name("web_a_1.jsonl.gz"), gzip.compress(b'{"text": "c text"}\n' + path.read_bytes())
    packed.write_bytes(whole[:-12])
    sources = {"web_a": {"category": "web", "kind": "files", "paths": [str(tmp_path / "raw" / "web_a*")]}}
    made = planted.helpers.recipe(tmp_path, sources=sources, cleaning=planted.cleaning())
    with pytest.raises(
        DataError, match=r"'web_a': 1 of 2 files cannot be read to their end.*web_a_1.jsonl.gz, line .*gzip.*restore them"
    ):
        planted.run(tmp_path, made)
    packed.write_bytes(whole)
    assert planted.run(tmp_path, made)["web_a"].documents == 3
