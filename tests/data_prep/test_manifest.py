"""Every way in which prepared data can be other than recorded is found, and the file is named."""

import json
import shutil

import pytest

from data_prep.errors import DataError
from data_prep.files import digest_of, record_file, sampled_sha256, verify_file
from data_prep.manifest import HeldoutManifest, MixtureManifest, data_digest, heldout_path, mixture_path


def flip(path, position=-1):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2])


def refused(root, message, phase="first"):
    with pytest.raises(DataError, match=message) as error:
        MixtureManifest.read(mixture_path(root, phase)).verify(root)
    assert "quarry prep" in str(error.value)
    return str(error.value)


def test_what_was_prepared_passes(copy):
    for phase in ("first", "second", "third"):
        MixtureManifest.read(mixture_path(copy, phase)).verify(copy, full=True)
    HeldoutManifest.read(heldout_path(copy)).verify(copy)


@pytest.mark.parametrize("position", [0, 1000, -1])
def test_one_flipped_bit_of_the_tokens(copy, position):
    flip(copy / "tokenized" / "code_a.bin", position)
    assert "code_a.bin: SHA-256" in refused(copy, "altered or swapped")


def test_one_flipped_bit_of_the_index(copy):
    flip(copy / "views" / "first" / "web_b.idx")
    assert "views/first/web_b.idx" in refused(copy, "altered or swapped")


def test_truncated_files(copy):
    truncate(copy / "tokenized" / "math_a.bin")
    assert "math_a.bin" in refused(copy, "truncated or replaced")


def test_swapped_sources(copy):
    a, b = copy / "tokenized" / "web_a.bin", copy / "tokenized" / "web_b.bin"
    shutil.move(a, copy / "c")
    shutil.move(b, a)
    shutil.move(copy / "c", b)
    assert "web_a.bin" in refused(copy, "truncated or replaced|altered or swapped")


def test_a_missing_file_and_a_dangling_link(copy):
    (copy / "tokenized" / "web_a.bin").unlink()
    assert "web_a.bin: a link to ../../tokenized/web_a.bin, which does not exist" in refused(copy, "does not exist")
    (copy / "views" / "first" / "code_a.idx").unlink()
    assert "code_a.idx: no such file" in refused(copy, "no such file")


def test_another_tokenizer(copy):
    flip(copy / "tokenizer" / "tokenizer.model")
    assert "tokenizer.model" in refused(copy, "another tokenizer")


def test_held_out_sets_are_checked_too(copy):
    flip(copy / "heldout" / "web.bin")
    with pytest.raises(DataError, match=r"heldout/web.bin: SHA-256"):
        HeldoutManifest.read(heldout_path(copy)).verify(copy)


def test_an_edited_manifest(copy):
    path = mixture_path(copy, "first")
    content = json.loads(path.read_text())
    content["samples"] += 1
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"first/manifest.json: its digest is .*, its content has .*edited by hand"):
        MixtureManifest.read(path)
    content["smaples"] = content.pop("samples")
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"samples: Field required; smaples: Extra inputs"):
        MixtureManifest.read(path)
    path.write_text("{")
    with pytest.raises(DataError, match="manifest.json: manifest: Invalid JSON"):
        MixtureManifest.read(path)
    path.unlink()
    with pytest.raises(DataError, match="no manifest at"):
        MixtureManifest.read(path)


def resigned(root, change):
    """A manifest with a source changed and its digest made to fit: lies that only the files can show."""
    path = mixture_path(root, "first")
    content = json.loads(path.read_text())
    change(content["sources"]["web_a"])
    del content["digest"]
    path.write_text(json.dumps({**content, "digest": digest_of(content)}))


def test_a_manifest_that_lies(copy):
    resigned(copy, lambda source: source.update(documents=source["documents"] + 1))
    assert "web_a.idx: documents is" in refused(copy, "the manifest says")
    resigned(copy, lambda source: source.update(documents=source["documents"] - 1, tokens_available=1))
    assert "web_a.idx: tokens is" in refused(copy, "the manifest says 1")


def test_a_token_beyond_the_vocabulary(copy):
    resigned(copy, lambda source: source.update(max_token_id=400))
    refused(copy, "largest token id 400, the vocabulary has 400 entries")


def test_a_pointer_beyond_the_tokens(copy):
    from data_prep.indexed import Index

    path = copy / "views" / "first" / "web_a.idx"
    index = Index.read(path)
    offsets = index.offsets.copy()
    offsets[0] = 10**9
    Index(index.dtype, index.lengths, offsets, index.bounds).write(path)
    resigned(copy, lambda source: source.update(idx=record_file(path).model_dump()))
    assert "web_a.idx: points to byte" in refused(copy, "which has")


@pytest.mark.parametrize("prefix", ["/etc/passwd", "../other/a"])
def test_a_manifest_cannot_point_outside_of_its_root(copy, prefix):
    resigned(copy, lambda source: source.update(prefix=prefix))
    with pytest.raises(DataError, match="leaves the data root"):
        MixtureManifest.read(mixture_path(copy, "first"))


def test_the_data_digest_covers_every_phase_file_and_the_held_out_sets(copy):
    digests = {data_digest(copy, phase) for phase in ("first", "second", "third")}
    assert len(digests) == 3
    path = heldout_path(copy)
    content = json.loads(path.read_text())
    del content["digest"]
    content["inputs"] = "0" * 64
    path.write_text(json.dumps({**content, "digest": digest_of(content)}))
    assert data_digest(copy, "first") not in digests


def test_large_files_are_verified_by_sample(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(bytes(range(256)) * 100_000)
    record = record_file(path, full_max_bytes=1000)
    verify_file(path, record, remedy="")
    for position in (0, -1):
        flip(path, position)
        with pytest.raises(DataError, match="sampled SHA-256"):
            verify_file(path, record, remedy="")
        flip(path, position)
    assert sampled_sha256(path, blocks=2, block_bytes=16) == sampled_sha256(path, blocks=2, block_bytes=16)
    # between the blocks only the full digest sees it
    flip(path, (path.stat().st_size - (1 << 16)) * 128 // 255 + (1 << 16) + 100)
    verify_file(path, record, remedy="")
    with pytest.raises(DataError, match="large: SHA-256"):
        verify_file(path, record, remedy="", full=True)
