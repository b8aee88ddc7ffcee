"""Whatever is done to prepared data is found, and the file is named; data that is as prepared passes. Damage is done to copies."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.files import file_sha256, record_file
from data_prep.index_caches import cache_path
from data_prep.indexed import Index, Reader
from data_prep.manifest import heldout_path, mixture_path
from data_prep.verify import inspect, verify
from tests.data_prep import helpers

# --- clean ---------------------------------------------------------------------------------------------------------------------------
from tests.data_prep.verifying import cache, files_of, finding, flip, manifest, record_again, sign_again, write_again


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
    """Files of which every byte counts: all but the lock."""
    return sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink() and path.name != ".lock")


def test_the_protected_files_are_those_of_the_issue(clean):
    kinds = {path.suffix for path in protected(clean)}
    assert kinds == {".bin", ".idx", ".json", ".model", ".npy", ".txt"}


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    write_again(root / "tokenizer" / "record.json", sha256=file_sha256(path))
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
    write_again(path, **{key: record[key] + 1})
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
