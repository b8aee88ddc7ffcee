import json

import pytest

from training.files import compare_folder, digest_folder, read_json_lines


def test_compare_folder_names_each_difference(tmp_path):
    for name in ("kept", "altered", "cut", "gone"):
        (tmp_path / name).write_bytes(b"0123456789")
    record = digest_folder(tmp_path)
    assert compare_folder(tmp_path, record) == []
    (tmp_path / "altered").write_bytes(b"0123456780")
    (tmp_path / "cut").write_bytes(b"012345678")
    (tmp_path / "gone").unlink()
    problems = "\n".join(compare_folder(tmp_path, record))
    assert "altered was altered: SHA-256" in problems
    assert "cut has 9 bytes, recorded 10" in problems
    assert "gone is missing" in problems
    assert "kept" not in problems


def test_read_json_lines_leaves_out_a_cut_last_line_and_nothing_else(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_json_lines(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"step": 2}')
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(json.JSONDecodeError):
        read_json_lines(path)
