"""Repositories become documents: every file once, in order, whatever the input's order, the buckets, the processes or a kill."""

import json
import random
import shutil

import pytest

from data_prep import concatenate as module
from data_prep.concatenate import concatenate, quarantine_path, record_path
from data_prep.errors import DataError
from recipes.schema import Source
from tests.data_prep import helpers, kills
from tests.data_prep.test_preview import write as write_rows

SOURCE = Source(category="code", kind="files", paths=["x"], concatenate="repositories")


def rows(repositories=30, seed=0):
    """Lines of many repositories, shuffled; in each c imports b imports a, against the order of their names."""
    rng = random.Random(seed)
    found = []
    for n in range(repositories):
        name = f"owner/repo{n}"
        files = {
            "README.md": f"# repo {n}\n",
            "a.py": "import z\n" + "x = 1\n" * rng.randint(1, 30),
            "b.py": "import c\n",
            "c.py": "print(1)\n",
            "z.py": f"import b\ny = {n}\n",
        }
        found += [{"repo_name": name, "path": path, "text": text, "stars": 1} for path, text in files.items()]
    rng.shuffle(found)
    return found


def write(folder, found, files=3, suffix="jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for n in range(files):
        path = folder / f"{n}.{suffix}"
        own = found[n::files]
        if suffix == "parquet":
            import pyarrow
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(own), path)
        else:
            write_rows(path, [json.dumps(row) for row in own])
        paths.append(path)
    return paths


def run(tmp_path, paths, *, name="out", source=SOURCE, identity="1", **changes):
    destination = tmp_path / "concatenated" / f"{name}.jsonl"
    record = concatenate(paths, source, destination, name=name, identity=identity, **changes)
    return destination, record


def documents(destination):
    return [json.loads(line) for line in destination.read_text().splitlines()]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_every_file_once_in_the_order_of_the_imports(tmp_path, suffix):
    found = rows()
    destination, record = run(tmp_path, write(tmp_path / "raw", found, suffix=suffix))
    made = documents(destination)
    assert sorted(d["id"] for d in made) == sorted({row["repo_name"] for row in found})
    texts = {(row["repo_name"], row["path"]): row["text"] for row in found}
    for document in made:
        name = document["id"]
        expected = f"# repository: {name}\n\n" + "\n".join(
            f"# file: {path}\n{texts[name, path].rstrip()}\n" for path in ("README.md", "c.py", "b.py", "z.py", "a.py")
        )
        assert document["text"] == expected
    assert (record.repositories, record.documents, record.source_files, record.references) == (30, 30, 150, 90)
    assert (record.repeated_files, record.references_cut, record.quarantined_lines, record.quarantine) == (0, 0, 0, None)
    assert record.text_bytes == sum(len(d["text"].encode()) for d in made)
    assert sorted(p.name for p in destination.parent.iterdir()) == ["out.json", "out.jsonl"]


def test_the_built_in_corpus_looks_the_same():
    from data_prep.corpus import build

    first = next(d.text for d in build("repositories", 200_000))
    assert first.startswith("# repository: ")
    assert first.split("\n")[2].startswith("# file: ")


def test_buckets_processes_and_the_order_of_lines_do_not_show(tmp_path, monkeypatch):
    found = rows()
    expected = run(tmp_path, write(tmp_path / "raw", found))[0].read_bytes()
    random.Random(9).shuffle(found)
    other = write(tmp_path / "other", found, files=7)
    assert run(tmp_path, other, name="shuffled")[0].read_bytes() == expected
    assert run(tmp_path, other, name="processes", workers=2)[0].read_bytes() == expected
    monkeypatch.setattr(module, "BUCKET_BYTES", 500)
    destination, _ = run(tmp_path, other, name="buckets")
    assert destination.read_bytes() == expected


def test_memory_holds_one_document_and_not_the_input(tmp_path, monkeypatch):
    import tracemalloc

    monkeypatch.setattr(module, "BUCKET_BYTES", 1 << 18)
    peaks = []
    for count in (20, 200):
        made = [
            {"repo_name": f"r{n}", "path": f"{i}.txt", "text": f"{n} {i} " + "x" * 20_000}
            for n in range(count)
            for i in range(5)
        ]
        paths = write(tmp_path / str(count), made, files=count)
        tracemalloc.start()
        run(tmp_path, paths, name=f"out{count}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 3_000_000  # of 20 MB of text


def test_a_second_run_does_nothing_and_other_inputs_do_it_again(tmp_path):
    paths = write(tmp_path / "raw", rows())
    destination, record = run(tmp_path, paths)
    before = helpers.times(destination.parent)
    assert run(tmp_path, paths)[1] == record
    assert helpers.times(destination.parent) == before
    paths = write(tmp_path / "raw", rows(31))
    assert run(tmp_path, paths, identity="2")[1].repositories == 31
    destination.write_bytes(destination.read_bytes()[:-2])
    assert len(documents(run(tmp_path, paths, identity="2")[0])) == 31


def test_a_path_that_a_repository_has_twice_counts_once(tmp_path):
    found = [{"repo_name": "r", "path": "a.py", "text": text} for text in ("first", "second")]
    found += [{"repo_name": "r", "path": "\\b\\c.py", "text": "third"}, {"repo_name": "s", "path": "a.py", "text": "other"}]
    destination, record = run(tmp_path, write(tmp_path / "raw", found, files=1))
    assert {d["id"]: d["text"] for d in documents(destination)} == {
        "r": "# repository: r\n\n# file: a.py\nfirst\n\n# file: b/c.py\nthird\n",
        "s": "# repository: s\n\n# file: a.py\nother\n",
    }
    assert record.repeated_files == 1


def test_long_repositories_are_split_between_files(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 100)
    found = [{"repo_name": "r", "path": f"{n}.txt", "text": str(n) * size} for n, size in enumerate((40, 60, 1, 500, 2))]
    destination, record = run(tmp_path, write(tmp_path / "raw", found))
    made = documents(destination)
    assert [d["id"] for d in made] == ["r#1", "r#2", "r#3", "r#4"]
    assert [d["text"].count("# file: ") for d in made] == [2, 1, 1, 1]
    assert made[1]["text"].startswith("# repository: r, part 2 of 4\n\n# file: 2.txt\n")
    assert (record.repositories, record.documents) == (1, 4)


def test_bad_lines_are_kept_apart_with_their_reason(tmp_path):
    path = tmp_path / "a.jsonl"
    good = [json.dumps(row) for row in rows(40)]
    bad = [
        '{"repo_name": "r", "path": "p", "text": 5}',
        '{"repo_name": "r", "text": "no path"}',
        '{"repo_name": 3, "path": "p", "text": "x"}',
        '{"repo_name": "r", "path": "\\ud800", "text": "x"}',
        '{"repo_name": "r", "path": "/", "text": "x"}',
        "{",
    ]
    path.write_text("\n".join([*good[:100], *bad, *good[100:], '{"repo_name": "r", "path": "e", "text": ""}']) + "\n")
    destination, record = run(tmp_path, [path])
    assert (record.repositories, record.source_files, record.quarantined_lines) == (40, 200, 6)
    entries = [json.loads(line) for line in quarantine_path(destination).read_text().splitlines()]
    assert [entry["line"] for entry in entries] == list(range(101, 107))
    assert "'text' is a int, not a string" in entries[0]["reason"]
    assert entries[1]["reason"] == "no 'path' that is text; keys: repo_name, text"


def test_a_file_that_breaks_off_is_refused(tmp_path):
    paths = write(tmp_path / "raw", rows(), suffix="jsonl.gz")
    paths[-1].write_bytes(paths[-1].read_bytes()[:-9])
    with pytest.raises(DataError, match=rf"1 of {len(paths)} files cannot be read to their end.*restore them"):
        run(tmp_path, paths)
    assert not record_path(tmp_path / "concatenated" / "out.jsonl").exists()


def test_wrong_keys_are_refused_and_a_higher_limit_goes_on(tmp_path):
    paths = write(tmp_path / "raw", rows())
    wrong = SOURCE.model_copy(update={"repository_key": "repository"})
    with pytest.raises(
        DataError, match=r"150 of 150 lines are no file of a repository.*0.jsonl, line 1: no 'repository'.*repository_key"
    ):
        run(tmp_path, paths, source=wrong)
    assert not record_path(tmp_path / "concatenated" / "out.jsonl").exists()
    _, record = run(tmp_path, paths, source=wrong, max_bad_percent=100.0)
    assert (record.documents, record.quarantined_lines) == (0, 150)


CONCATENATE = """
from pathlib import Path
from tests.data_prep import test_concatenate as t
t.module.BUCKET_BYTES = 2000
folder = Path(sys.argv[2])
t.run(folder, sorted((folder / "raw").iterdir()))
"""


def test_killed_anywhere_the_next_run_gives_the_same_bytes(tmp_path, monkeypatch):
    write(tmp_path / "raw", rows())

    steps = kills.steps_of(CONCATENATE, tmp_path)
    folder = tmp_path / "concatenated"
    expected = helpers.tree(folder)
    for limit in (1, steps // 3, 2 * steps // 3, steps - 2):
        shutil.rmtree(folder)
        assert kills.killed(kills.run(CONCATENATE, limit, tmp_path))
        assert helpers.tree(folder) != expected
        # other processes and buckets than before: what was begun decides
        monkeypatch.setattr(module, "BUCKET_BYTES", 300)
        run(tmp_path, sorted((tmp_path / "raw").iterdir()), workers=2 if limit == steps // 3 else 1)
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()  # `quarry prep` does this under its lock
        assert helpers.tree(folder) == expected


def test_finished_steps_are_not_done_again(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BUCKET_BYTES", 2000)
    paths = write(tmp_path / "raw", rows())
    joined = []
    whole = module._join

    def failing(task):
        if len(joined) == 3:
            raise OSError("disk full")
        joined.append(task.bucket)
        return whole(task)

    monkeypatch.setattr(module, "_join", failing)
    with pytest.raises(OSError, match="disk full"):
        run(tmp_path, paths)
    monkeypatch.setattr(module, "_join", whole)
    monkeypatch.setattr(module, "_read", lambda *args: pytest.fail("read again"))
    part = tmp_path / "concatenated" / "out.jsonl.work" / "parts" / "000.jsonl"
    before = part.stat().st_mtime_ns
    monkeypatch.setattr(module.shutil, "rmtree", lambda *args, **kwargs: None)  # to look at the work folder afterwards
    assert run(tmp_path, paths)[1].repositories == 30
    assert part.stat().st_mtime_ns == before
