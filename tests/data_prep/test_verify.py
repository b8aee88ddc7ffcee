"""Whatever is done to prepared data is found, and the file is named; data that is as prepared passes. Damage is done to copies."""

import argparse
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.cache_job import build_caches
from data_prep.errors import DataError
from data_prep.files import digest_of, file_sha256, record_file, write_json
from data_prep.index_caches import IndexCache, cache_path
from data_prep.indexed import Index, Reader, bin_path, idx_path
from data_prep.manifest import HeldoutManifest, MixtureManifest, heldout_path, mixture_path
from data_prep.merge import file_xxh3
from data_prep.progress import Silent
from data_prep.records import TokenizedRecord
from data_prep.verify import inspect, verify
from launchers import verify_command
from tests.data_prep import helpers


@pytest.fixture(scope="module")
def clean(prepared, tmp_path_factory):
    """A prepared data root with index caches; read only."""
    folder = tmp_path_factory.mktemp("verify")
    shutil.copytree(prepared / "data", folder / "data", symlinks=True)
    build_caches(helpers.recipe(folder), progress=Silent())
    return folder / "data"


@pytest.fixture
def root(clean, tmp_path):
    """A copy in another place, to be broken."""
    shutil.copytree(clean, tmp_path / "data", symlinks=True)
    return tmp_path / "data"


def files_of(findings):
    return {finding.file for finding in findings}


def finding(findings, file, what=""):
    """The one finding of `file` whose description holds `what`."""
    found = [f for f in findings if f.file == file and what in f.what]
    assert len(found) == 1, findings
    assert found[0].remedy
    return found[0]


def flip(path, position, mask=1):
    content = bytearray(path.read_bytes())
    content[position] ^= mask
    path.write_bytes(bytes(content))


def manifest(root, phase="first"):
    return MixtureManifest.read(mixture_path(root, phase))


def sign_again(path, change):
    """Change a signed JSON file and make its digest fit: a lie that only the files can show."""
    values = json.loads(path.read_text())
    change(values)
    del values["digest"]
    write_json(path, {**values, "digest": digest_of(values)})


def record_again(root, name):
    """All records of a source's tokens, and of the views on them, fitted to the .bin and .idx as they are now."""
    source, heldout, tokens = (root / folder / stem for folder, stem in (
        ("tokenized", name), ("tokenized", f"{name}.heldout"), ("tokens", name)))  # fmt: skip
    index, whole = Index.read(idx_path(source)), Index.read(idx_path(tokens))
    files = {key: record_file(path).model_dump() for key, path in (("bin", bin_path(source)), ("idx", idx_path(source)))}
    files |= {"heldout_bin": files["bin"], "heldout_idx": record_file(idx_path(heldout)).model_dump()}
    write_again(source.with_suffix(".json"), documents=index.documents, tokens=index.tokens, **files)
    written = {suffix: {"bytes": path.stat().st_size, "xxh3": file_xxh3(path)} for suffix, path in (
        ("bin", bin_path(tokens)), ("idx", idx_path(tokens)))}  # fmt: skip
    write_again(tokens.with_suffix(".json"), documents=whole.documents, tokens=whole.tokens, **written)
    for folder in (root / "views").iterdir():
        if (folder / f"{name}.idx").exists():
            view = {"bin": files["bin"], "idx": record_file(folder / f"{name}.idx").model_dump()}
            sign_again(folder / "manifest.json", lambda m, view=view: m["sources"][name].update(view))


def write_again(path, **values):
    write_json(path, {**json.loads(path.read_text()), **values})


# --- clean ---------------------------------------------------------------------------------------------------------------------------


def test_what_was_prepared_passes_as_a_whole_and_in_every_part(clean):
    assert verify(clean) == []
    assert verify(clean, workers=4, full=True) == []
    parts = [
        clean / "views" / "first",
        mixture_path(clean, "third"),
        clean / "views" / "second" / "code_a",
        clean / "heldout",
        heldout_path(clean),
        clean / "heldout" / "web.bin",
        clean / "tokenized" / "web_a.idx",
        clean / "tokenized" / "web_a.heldout",
        cache_path(clean, manifest(clean)),
        cache_path(clean, manifest(clean, "second")) / "record.json",
    ]
    for part in parts:
        assert verify(part) == [], part


def test_every_token_is_read_once(clean):
    seen = inspect(clean)
    tokens = sum(path.stat().st_size // 2 for path in clean.rglob("*.bin") if not path.is_symlink())
    assert seen.tokens == tokens > 10_000


def test_nothing_is_written(clean):
    before = {str(p): p.lstat().st_mtime_ns for p in clean.rglob("*")}
    verify(clean)
    assert {str(p): p.lstat().st_mtime_ns for p in clean.rglob("*")} == before


# --- bytes ---------------------------------------------------------------------------------------------------------------------------


def protected(root):
    """Files of which every byte counts: all but the lock and the records that carry no digest of themselves."""
    return sorted(
        path
        for path in root.rglob("*")
        if path.is_file()
        and not path.is_symlink()
        and path.name != ".lock"
        and (path.suffix != ".json" or path.name == "manifest.json" or path.parent.parent.parent.name == "cache")
    )


def test_the_protected_files_are_those_of_the_issue(clean):
    kinds = {path.suffix for path in protected(clean)}
    assert kinds == {".bin", ".idx", ".json", ".model", ".npy", ".txt"}


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), place=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_one_altered_byte_anywhere(clean, tmp_path, data, place, mask):
    copy = tmp_path / "flipped"
    if not copy.exists():
        shutil.copytree(clean, copy, symlinks=True)
    path = data.draw(st.sampled_from([p.relative_to(copy) for p in protected(copy)]))
    position = int(place * (copy / path).stat().st_size)
    flip(copy / path, position, mask)
    try:
        assert str(path) in files_of(verify(copy))
    finally:
        flip(copy / path, position, mask)


@pytest.mark.parametrize("file", ["tokens/web_a.bin", "views/first/web_a.idx", "heldout/code.idx", "tokenizer/tokenizer.model"])
@pytest.mark.parametrize("left", [0, 1, 40, -2])
def test_truncated_files(root, file, left):
    content = (root / file).read_bytes()
    (root / file).write_bytes(content[:left])
    found = verify(root)
    assert file in files_of(found)
    assert any(f.file == file and "SHA-256" in f.what for f in found)


def test_all_findings_are_listed(root):
    victims = ["tokens/web_a.bin", "views/second/code_a.idx", "heldout/web.bin"]
    for victim in victims:
        flip(root / victim, 50)
    assert files_of(verify(root)) >= set(victims)


def test_an_altered_file_behind_many_links_is_named_once(root):
    flip(root / "tokens" / "code_a.bin", 100)
    assert [f.file for f in verify(root) if "SHA-256" in f.what or "XXH3" in f.what] == ["tokens/code_a.bin"]


@pytest.mark.parametrize("folders", [["tokens"], ["tokenized"], ["tokens", "tokenized"]])
@pytest.mark.parametrize("suffixes", [[".bin"], [".bin", ".idx"], [".bin", ".idx", ".json"]])
def test_two_sources_swapped(root, suffixes, folders):
    names = [f"{stem}{suffix}" for suffix in suffixes for stem in ("web_a", "web_b")]
    for folder in folders:
        for a, b in zip(names[::2], names[1::2], strict=True):
            a, b = root / folder / a, root / folder / b
            a.rename(root / "c")
            b.rename(a)
            (root / "c").rename(b)
    found = verify(root)
    if folders == ["tokens"] and ".json" not in suffixes:
        for ours, theirs in (("web_a", "web_b"), ("web_b", "web_a")):
            assert f"(that of tokens/{theirs}.bin: swapped?)" in finding(found, f"tokens/{ours}.bin", "SHA-256").found
    elif folders == ["tokenized"] and ".json" not in suffixes:
        # links to the other's tokens: the files are as recorded, the links are not
        assert {"tokenized/web_a.bin", "tokenized/web_b.bin"} <= files_of(found)
    elif "tokenized" in folders and ".json" in suffixes:
        assert finding(found, "tokenized/web_a.json", "source").found == "web_b"
    assert any("web_a" in f.file for f in found)
    assert any("web_b" in f.file for f in found)


def test_a_missing_file_and_a_dangling_link(root):
    (root / "views" / "first" / "web_a.idx").unlink()
    (root / "tokens" / "code_a.bin").unlink()
    found = verify(root)
    assert finding(found, "views/first/web_a.idx").found == "no such file"
    assert "a link to ../../tokenized/code_a.bin, which does not exist" in finding(found, "views/first/code_a.bin").found
    assert "a link to ../tokens/code_a.bin, which does not exist" in finding(found, "tokenized/code_a.bin").found
    assert finding(found, "tokens/code_a.bin").found == "no such file"


# --- tokenizer and tokens --------------------------------------------------------------------------------------------------------------


def test_another_tokenizer(root):
    path = root / "tokenizer" / "tokenizer.model"
    recorded = file_sha256(path)
    flip(path, 1000)
    wrong = finding(verify(root), "tokenizer/tokenizer.model")
    assert (wrong.expected, wrong.found) == (recorded, file_sha256(path))
    # made to fit its record, it does not fit what was tokenized with the one before
    record = json.loads((root / "tokenizer" / "record.json").read_text())
    write_json(root / "tokenizer" / "record.json", {**record, "sha256": file_sha256(path)})
    found = verify(root)
    for name in helpers.CATEGORY:
        assert finding(found, f"tokenized/{name}.json", "tokenizer").found == recorded
    assert finding(found, "views/first/manifest.json", "tokenizer.sha256")


def test_an_id_over_the_vocabulary(root):
    """With records that fit: only reading the tokens shows it."""
    path = root / "tokens" / "math_a.bin"
    tokens = np.fromfile(path, np.uint16)
    tokens[[77, 500]] = 400, 65535
    tokens.tofile(path)
    record_again(root, "math_a")
    found = verify(root)
    wrong = finding(found, "tokens/math_a.bin", "token ids")
    assert wrong.what == "token ids (2 of them, the first at token 77)"
    assert (wrong.expected, wrong.found) == ("below 400", "400")
    assert finding(found, "tokenized/math_a.json", "max_token_id").expected == "65535"


def test_a_document_without_its_end(root):
    reader = Reader(root / "tokenized" / "web_b")
    start = int(reader.index.offsets[2]) // 2
    end = start + int(reader.index.lengths[2]) - 1
    path = root / "tokens" / "web_b.bin"
    tokens = np.fromfile(path, np.uint16)
    tokens[end] = 9
    tokens.tofile(path)
    record_again(root, "web_b")
    wrong = finding(verify(root), "tokens/web_b.bin")
    assert wrong.what == f"last id of documents (1 of them, the first begins at token {start})"
    assert (wrong.expected, wrong.found) == ("2, the end of a document", "9")


@pytest.mark.parametrize("key", ["documents", "tokens", "max_token_id", "heldout_tokens"])
def test_a_record_with_a_wrong_count(root, key):
    path = root / "tokenized" / "web_a.json"
    record = json.loads(path.read_text())
    write_json(path, {**record, key: record[key] + 1})
    named = "tokenized/web_a.heldout.idx" if "heldout" in key else "tokenized/web_a.idx"
    assert files_of(verify(root)) == {"tokenized/web_a.json" if key == "max_token_id" else named}


def test_records_that_are_none(root):
    (root / "tokenized" / "web_a.json").write_text("{}")
    (root / "tokenizer" / "record.json").write_text('{"format": 1')
    found = verify(root)
    assert "TokenizedRecord of this version" in finding(found, "tokenized/web_a.json").expected
    assert "TokenizerFile of this version" in finding(found, "tokenizer/record.json").expected


def test_an_edited_manifest(root):
    path = mixture_path(root, "first")
    path.write_text(path.read_text().replace('"samples": 40', '"samples": 41'))
    assert "edited by hand?" in finding(verify(root), "views/first/manifest.json").found


# --- views -----------------------------------------------------------------------------------------------------------------------------


def edit_index(path, change):
    """Write an .idx anew after `change` of its lengths and offsets."""
    old = Index.read(path)
    arrays = {"lengths": old.lengths.copy(), "offsets": old.offsets.copy()}
    change(arrays)
    Index(old.dtype, arrays["lengths"], arrays["offsets"], np.arange(len(arrays["lengths"]) + 1)).write(path)


def edit_view(root, name, change, phase="first"):
    """Write a view's index anew, with a manifest that fits it."""
    path = root / "views" / phase / f"{name}.idx"
    edit_index(path, change)
    values = {"idx": record_file(path).model_dump(), "tokens_available": Index.read(path).tokens}
    sign_again(mixture_path(root, phase), lambda m: m["sources"][name].update(values))


@pytest.mark.parametrize("step", [2, -2])
def test_a_pointer_that_is_off_by_one_token(root, step):
    def shift(arrays):
        arrays["offsets"][1] += step

    before = Index.read(root / "views" / "first" / "web_a.idx").offsets[1]
    edit_view(root, "web_a", shift)
    wrong = finding(verify(root), "views/first/web_a.idx", "pointers")
    assert wrong.what == "pointers (1 of them, the first of document 1)"
    assert wrong.expected == "a document of tokenized/web_a.idx"
    assert wrong.found.endswith(f"tokens from byte {before + step}")


def test_a_document_cut_short(root):
    def cut(arrays):
        arrays["lengths"][0] -= 1

    edit_view(root, "web_a", cut)
    assert finding(verify(root), "views/first/web_a.idx", "pointers (1 of them, the first of document 0)")


def test_a_pointer_beyond_the_end(root):
    def beyond(arrays):
        arrays["offsets"][0] = 10**9

    edit_view(root, "web_a", beyond)
    found = [f for f in verify(root) if f.file == "views/first/web_a.idx"]
    assert {"pointers into web_a.bin", "pointers (1 of them, the first of document 0)"} == {f.what for f in found}


def test_a_document_twice_before_the_source_is_used_up(root):
    def repeat(arrays):
        for array in arrays.values():
            array[0] = array[1]

    edit_view(root, "web_a", repeat)
    assert "1 repeats" in finding(verify(root), "views/first/web_a.idx", "epochs").found


def test_a_link_to_another_source(root):
    link = root / "views" / "first" / "web_a.bin"
    link.unlink()
    link.symlink_to("../../tokenized/web_b.bin")
    assert finding(verify(root), "views/first/web_a.bin", "link").expected == "to tokenized/web_a.bin"


def test_a_held_out_document_in_another_source(root):
    """Its tokens are put over a longer document of a view, which is cut to its length; all records fit."""
    held = Reader(root / "tokenized" / "code_a.heldout")
    number = int(held.index.lengths.argmin())
    document = held[number]
    view = Index.read(root / "views" / "first" / "web_a.idx")
    place = int(np.flatnonzero(view.lengths > len(document))[0])
    offset = int(view.offsets[place])
    tokens = np.fromfile(root / "tokens" / "web_a.bin", np.uint16)
    tokens[offset // 2 : offset // 2 + len(document)] = document
    tokens.tofile(root / "tokens" / "web_a.bin")

    def cut(arrays):
        arrays["lengths"][arrays["offsets"] == offset] = len(document)

    for path in (root / "tokens" / "web_a.idx", root / "tokenized" / "web_a.idx"):
        edit_index(path, cut)
    edit_view(root, "web_a", cut)
    record_again(root, "web_a")
    wrong = finding(verify(root), "views/first/web_a.idx", f"held-out documents (1 of them, the first is document {place})")
    assert wrong.found == f"document {number} of tokenized/code_a.heldout"


# --- index caches --------------------------------------------------------------------------------------------------------------------------


def cache(root, phase="first"):
    folder = cache_path(root, manifest(root, phase))
    return folder, IndexCache.read(folder / "record.json")


def test_a_cache_of_earlier_views(root):
    sign_again(mixture_path(root, "first"), lambda m: m.update(inputs="1" * 64))
    found = verify(root)
    folder = f"cache/first/{manifest(root).digest[:16]}"
    assert finding(found, folder, "index cache of these views").found == "no such folder"
    (old,) = (root / "cache" / "first").iterdir()
    assert finding(found, f"cache/first/{old.name}").found == "of other views"
    wrong = finding(verify(old), f"cache/first/{old.name}", "views that it was built for")
    assert "quarry prep" in wrong.remedy


def test_a_cache_under_the_name_of_another(root):
    old, _ = cache(root)
    sign_again(mixture_path(root, "first"), lambda m: m.update(inputs="1" * 64))
    old.rename(cache_path(root, manifest(root)))
    assert any("built for manifest digest" in f.found for f in verify(root))


CHANGES = {
    "document twice": ("document_index", lambda a: a.__setitem__(0, a[1]), "documents per epoch"),
    "document beyond": ("document_index", lambda a: a.__setitem__(1, 10**6), "entry 1"),
    "sample shifted": ("sample_index", lambda a: a.__setitem__((7, 1), a[7, 1] + 1), "begin of sample 7"),
    "sample beyond": ("sample_index", lambda a: a.__setitem__((2, 0), 10**6), "begin of sample 2"),
    "sample negative": ("sample_index", lambda a: a.__setitem__((2, 0), -1), "begin of sample 2"),
    "shuffle twice": ("shuffle_index", lambda a: a.__setitem__(0, a[1]), "samples"),
    "shuffle beyond": ("shuffle_index", lambda a: a.__setitem__(1, 10**6), "entry 1"),
    "blend source": ("dataset_index", lambda a: a.__setitem__(4, 99), "entry 4"),
    "blend negative": ("dataset_index", lambda a: a.__setitem__(4, -1), "entry 4"),
    "blend place": ("dataset_sample_index", lambda a: a.__setitem__(9, a[9] + 1), "entry 9"),
}


def replace_array(root, which, array):
    """Another array in a cache file of phase `first`, with a record that fits it; the file's path relative to the root."""
    folder, record = cache(root)
    name = getattr(record.sources["web_a"] if hasattr(record.sources["web_a"], which) else record.blend, which)
    np.save(folder / name, array, allow_pickle=True)
    sign_again(folder / "record.json", lambda r: r["files"].update({name: record_file(folder / name).model_dump()}))
    return str((folder / name).relative_to(root))


@pytest.mark.parametrize("case", list(CHANGES))
def test_indices_that_lie(root, case):
    which, change, what = CHANGES[case]
    folder, record = cache(root)
    array = np.load(folder / getattr(record.sources["web_a"] if "dataset" not in which else record.blend, which))
    change(array)
    name = replace_array(root, which, array)
    assert finding(verify(root), name, what)


def test_an_array_of_another_type_or_shape(root):
    name = replace_array(root, "shuffle_index", np.zeros(3, np.float64))
    assert finding(verify(root), name, "type and shape").found == "float64 [3]"


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_pickle_is_loaded(root, tmp_path):
    array = np.array([Bomb(tmp_path / "exploded")], dtype=object)
    name = replace_array(root, "shuffle_index", array)
    wrong = finding(verify(root), name, "content")
    assert "Python objects in dtype" in wrong.found
    assert not (tmp_path / "exploded").exists()
    np.load(root / name, allow_pickle=True)
    assert (tmp_path / "exploded").exists(), "the file would have been dangerous"


def test_the_caches_of_a_moved_root_fit(root):
    """Their names do not hold the path: `root` is a copy in another place, and passes."""
    assert verify(root) == []


# --- leftovers -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "left",
    [
        "tokenized/.web_a.bin.123.tmp",
        "views/first/other.idx",
        "heldout/law.bin",
        "tokenized/gone.idx",
        "cache/first/.building-0123-99",
        "cache/gone_phase/0123456789abcdef",
    ],
)
def test_leftovers_are_named(root, left):
    path = root / left
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
    assert files_of(verify(root)) == {left}


def test_a_file_beside_those_of_a_cache(root):
    folder, _ = cache(root)
    (folder / "extra.npy").write_bytes(b"")
    assert files_of(verify(root)) == {f"cache/first/{folder.name}/extra.npy"}


def test_views_and_caches_that_are_missing(root):
    mixture_path(root, "second").unlink()
    shutil.rmtree(cache(root)[0])
    found = verify(root)
    assert "no manifest" in finding(found, "views/second/manifest.json").found
    assert finding(found, f"cache/first/{manifest(root).digest[:16]}").found == "no such folder"


# --- pairs and the command -----------------------------------------------------------------------------------------------------------------


def pair(folder, texts, vocab=1000, **record):
    from data_prep.indexed import Writer

    with Writer(folder / "own", vocab) as writer:
        for tokens in texts:
            writer.add(np.array(tokens))
    if record:
        files = {name: record_file(folder / f"own.{name}").model_dump() for name in ("bin", "idx")}
        counts = {"documents": len(texts), "tokens": sum(map(len, texts)), "max_token_id": max(map(max, texts))}
        values = {"format": "quarry.tokens/1", "dtype": "uint16", **counts, **files, **record}
        write_json(folder / "own.json", values)
    return folder / "own"


def test_a_pair_without_a_record(tmp_path):
    prefix = pair(tmp_path, [[1, 2, 0], [3, 0]])
    assert verify(prefix) == []
    bin_path(prefix).write_bytes(bin_path(prefix).read_bytes()[:-1])
    assert {f.what for f in verify(prefix)} == {"pointers into own.bin", "size in bytes"}
    flip(idx_path(prefix), 0)
    assert "no Megatron index" in finding(verify(idx_path(prefix)), "own.idx").found
    idx_path(prefix).unlink()
    assert finding(verify(bin_path(prefix)), "own.idx").found == "no such file"


def test_a_pair_with_a_record_beside_it(tmp_path):
    prefix = pair(tmp_path, [[1, 2, 0], [3, 0]], vocab_size=4, eod_id=0)
    assert verify(prefix) == []
    prefix = pair(tmp_path, [[1, 2, 0], [3, 7, 1]], vocab_size=4, eod_id=0, documents=3)
    assert {f.what for f in verify(prefix)} == {
        "documents, by own.json",
        "token ids (1 of them, the first at token 4)",
        "last id of documents (1 of them, the first begins at token 3)",
    }


def test_the_output_of_tokenizing(prepared, tmp_path):
    """Its record has digests of another kind, which verify takes as they are."""
    from data_prep.tokenize_files import tokenize_files
    from data_prep.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(prepared / "data" / "tokenizer" / "tokenizer.model")
    lines = [*(prepared / "raw" / "web_a.jsonl").read_text().splitlines(), "bad", '{"text": ""}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    record = tokenize_files([tmp_path / "in.jsonl"], tokenizer, tmp_path / "out")
    assert (record.quarantined_lines, record.empty_documents) == (1, 1)
    assert verify(tmp_path / "out") == []
    for name, what in (("out.bin", "XXH3, recorded in out.json"), ("out.idx", "XXH3"), ("out.quarantine.jsonl", "lines")):
        content = (tmp_path / name).read_bytes()
        if name.startswith("out.q"):
            (tmp_path / name).write_bytes(content[: content.index(b"\n") + 1])
        else:
            flip(tmp_path / name, len(content) // 2 + 1)
        assert finding(verify(tmp_path / "out.idx"), name, what)
        (tmp_path / name).write_bytes(content)
    assert verify(tmp_path / "out", full=True) == []
    flip(tmp_path / "in.jsonl", 2000)
    assert verify(tmp_path / "out") == []
    assert "XXH3 of bytes 0 to " in finding(verify(tmp_path / "out", full=True), "in.jsonl").what
    (tmp_path / "in.jsonl").unlink()
    assert finding(verify(tmp_path / "out", full=True), "in.jsonl").found == "no such file"
    (tmp_path / "out.shards").mkdir()
    assert finding(verify(tmp_path / "out.bin"), "out.shards").found == "left by a run that was killed"


def test_joined_repositories(root):
    folder = root / "concatenated"
    folder.mkdir()
    files = {"file": "code.jsonl", "quarantine": "code.quarantine.jsonl"}
    for name in files.values():
        (folder / name).write_text(name)
    record = {key: record_file(folder / name).model_dump() for key, name in files.items()}
    write_json(folder / "code.json", {"format": "quarry.concatenated/1", **record})
    assert verify(root) == []
    for name in files.values():
        flip(folder / name, 3)
    assert files_of(verify(root)) == {f"concatenated/{name}" for name in files.values()}
    (folder / "code.json").write_text("{")
    assert finding(verify(root), "concatenated/code.json", "record")


def test_cleaned_text(root):
    """A record of cleaning names its files at any depth."""
    (root / "clean" / "web_a").mkdir(parents=True)
    files = {}
    for name in ("00000.jsonl", "removed.zst"):
        path = root / "clean" / "web_a" / name
        path.write_bytes(name.encode())
        files[name] = {"file": str(path.relative_to(root)), "record": record_file(path).model_dump()}
    entry = {
        "path": files["00000.jsonl"]["file"],
        "record": files["00000.jsonl"]["record"],
        "duplicates": files["removed.zst"]["file"],
        "duplicates_record": files["removed.zst"]["record"],
    }
    write_json(root / "clean" / "web_a" / "record.json", {"format": "quarry.clean/1", "files": [entry]})
    assert verify(root) == []
    for name in files:
        flip(root / "clean" / "web_a" / name, 3)
    assert files_of(verify(root)) == {f"clean/web_a/{name}" for name in files}
    (root / "clean" / "web_a" / "record.json").write_text("{}")
    assert finding(verify(root), "clean/web_a/record.json", "record")


@settings(deadline=None, max_examples=60)
@given(
    documents=st.lists(st.lists(st.integers(0, 99), max_size=40), min_size=1, max_size=40),
    block=st.sampled_from([16, 64, 1 << 20]),
    dtype=st.sampled_from([1000, 70_000]),
)
def test_fingerprints_and_ends_do_not_depend_on_blocks(tmp_path_factory, documents, block, dtype):
    """Blocks of a few tokens: every document lies across some border."""
    from data_prep import verify_reading

    prefix = pair(tmp_path_factory.mktemp("blocks"), [[*d, 100] for d in documents], vocab=dtype)
    index = Index.read(idx_path(prefix))
    look = verify_reading.Look(index.dtype, 101, 100, wants_heads=True)
    look.add(index)
    reading = verify_reading.Reading(bin_path(prefix), {"sha256": ""}, look)
    whole, verify_reading.BLOCK_BYTES = verify_reading.BLOCK_BYTES, block
    try:
        verify_reading.read_all([reading], 1, lambda size: None)
    finally:
        verify_reading.BLOCK_BYTES = whole
    assert (look.max_token_id, look.over, look.unended, look.first_unended) == (100, 0, 0, None)
    assert reading.digests["sha256"] == file_sha256(bin_path(prefix))
    heads = look.heads_of(index)
    for a in range(len(documents)):
        for b in range(a):
            alike = len(documents[a]) == len(documents[b]) and documents[a][:15] == documents[b][:15]
            if len(documents[a]) < 16 or documents[a][:16] != documents[b][:16]:
                assert (heads[a] == heads[b]) == (alike and documents[a][:16] == documents[b][:16])


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    block=st.sampled_from([16, 64, 1 << 20]),
    wrong=st.sets(st.integers(0, 29)),
    overlap=st.booleans(),
)
def test_every_wrong_end_is_counted_once(tmp_path_factory, lengths, block, wrong, overlap):
    from data_prep import verify_reading

    ends = [9 if number in wrong else 100 for number in range(len(lengths))]
    texts = [[5] * (length - 1) + [end] if length else [] for length, end in zip(lengths, ends, strict=True)]
    prefix = pair(tmp_path_factory.mktemp("ends"), texts)
    look = verify_reading.Look(np.dtype(np.uint16), 101, 100)
    index = Index.read(idx_path(prefix))
    look.add(index)
    expected = sum(length > 0 and number in wrong for number, length in enumerate(lengths))
    if overlap and lengths[0]:  # one more document that covers all: it ends where the last one does
        whole = Index(index.dtype, np.array([sum(lengths)], np.int32), np.array([0]), np.arange(2))
        look.starts, look.lengths = np.zeros(0, np.int64), np.zeros(0, np.int32)
        look.add(Index(index.dtype, index.lengths[1:], index.offsets[1:], np.arange(len(lengths))))
        look.add(whole)
        last = max(number for number, length in enumerate(lengths) if length)
        expected += (last in wrong) - (0 in wrong)
    before, verify_reading.BLOCK_BYTES = verify_reading.BLOCK_BYTES, block
    try:
        verify_reading.read_all([verify_reading.Reading(bin_path(prefix), look=look)], 1, lambda size: None)
    finally:
        verify_reading.BLOCK_BYTES = before
    assert look.unended == expected


def arguments(path, **options):
    return argparse.Namespace(path=path, **{"workers": None, "full": False, **options})


def test_the_command(root, capsys):
    assert verify_command.run(arguments(root)) == 0
    assert "nothing found; read " in capsys.readouterr().out
    flip(root / "tokens" / "code_a.bin", 10)
    assert verify_command.run(arguments(root, workers=2)) == 1
    out = capsys.readouterr().out
    assert "tokens/code_a.bin\n  SHA-256, recorded in tokenized/code_a.json: expected " in out
    assert "    run `quarry prep`, which makes again what is not as recorded" in out
    assert "1 finding in 1 file; read " in out


def test_usage(clean, tmp_path):
    with pytest.raises(DataError, match="no such file or folder; name a data root"):
        verify(tmp_path / "nowhere")
    with pytest.raises(DataError, match="nothing to verify there"):
        verify(tmp_path)
    (tmp_path / "views").mkdir()
    with pytest.raises(DataError, match="no record and no data there"):
        verify(tmp_path)
    with pytest.raises(DataError, match="--workers is 0"):
        verify_command.run(arguments(clean, workers=0))


def test_the_users_own_files_are_read_only_when_asked_for(prepared, tmp_path):
    shutil.copytree(prepared / "data", tmp_path / "data", symlinks=True)
    path = tmp_path / "data" / "tokenized" / "web_a.json"
    record = TokenizedRecord.model_validate_json(path.read_bytes())
    own = str(shutil.copy(record.files[0].path, tmp_path / "own.jsonl"))
    values = json.loads(path.read_text())
    values["files"][0]["path"] = own
    write_json(path, values)
    flip(Path(own), 5)
    prefix = tmp_path / "data" / "tokenized" / "web_a"
    assert verify(prefix) == []
    wrong = finding(verify(prefix, full=True), own)
    assert "the text has changed since" in wrong.remedy


def test_heldout_counts(root):
    sign_again(heldout_path(root), lambda m: m["categories"]["web"].update(tokens=1))
    assert finding(verify(root / "heldout"), "heldout/web.idx", "tokens").expected == "1"
    assert HeldoutManifest.read(heldout_path(root)).categories["web"].tokens == 1
    assert os.path.exists(root / "heldout" / "web.bin")
