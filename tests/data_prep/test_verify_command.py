"""`quarry verify`: exit codes, usage, what --full adds; pairs without a data root around them."""

import argparse
import os
import shutil
from pathlib import Path

import pytest

from data_prep.errors import DataError
from data_prep.files import record_file, write_json
from data_prep.indexed import bin_path, idx_path
from data_prep.manifest import HeldoutManifest, heldout_path
from data_prep.records import TokenizedRecord
from data_prep.verify import inspect, verify
from launchers import verify_command
from tests.data_prep.verifying import files_of, finding, flip, pair, sign_again, write_again


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


def test_a_damaged_record_is_not_taken_for_none(tmp_path):
    prefix = pair(tmp_path, [[1, 2, 0], [3, 0]], vocab_size=4, eod_id=0)
    whole = (tmp_path / "own.json").read_bytes()
    for damaged in (whole[:-9], b"", whole.replace(b"quarry.tokens/1", b"puarry.tokens/1")):
        (tmp_path / "own.json").write_bytes(damaged)
        assert "run the same `quarry tokenize` again" in finding(verify(prefix), "own.json", "record").remedy
    (tmp_path / "own.json").write_text('{"of": "somebody else"}')
    verification = inspect(prefix)
    assert (verification.findings, len(verification.notes)) == ([], 1)
    assert verification.notes[0].startswith("own: no record of `quarry tokenize` beside it")


def test_a_folder_of_pairs(tmp_path):
    """Named as in the examples, and not the tokens/ of a data root."""
    from data_prep.merge import file_xxh3

    prefix = pair(tmp_path / "tokens", [[1, 2, 0], [3, 0]])
    (tmp_path / "text.jsonl").write_text("text")
    piece = {"file": 0, "start": 0, "end": 4, "xxh3": file_xxh3(tmp_path / "text.jsonl")}
    pair(
        tmp_path / "tokens", [[1, 2, 0], [3, 0]], vocab_size=4, files=[{"path": str(tmp_path / "text.jsonl")}], shards=[[piece]]
    )
    for suffix in (".bin", ".idx"):
        shutil.copy(prefix.with_suffix(suffix), tmp_path / "tokens" / f"other{suffix}")
    assert verify(tmp_path / "tokens", full=True) == []
    flip(tmp_path / "text.jsonl", 0)
    flip(tmp_path / "tokens" / "own.bin", 2)
    (tmp_path / "tokens" / "other.bin").write_bytes(b"")
    (tmp_path / "tokens" / "third.shards").mkdir()
    found = verify(tmp_path / "tokens", full=True)
    assert files_of(found) == {str(tmp_path / "text.jsonl"), "own.bin", "other.idx", "third.shards"}
    assert not any("quarry prep" in f.remedy for f in found if f.file != str(tmp_path / "text.jsonl"))


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
    write_again(path, files=[{**record.files[0].model_dump(mode="json"), "path": own}])
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
