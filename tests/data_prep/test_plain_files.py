"""Temporary files: what a killed run leaves is found, what others keep is not touched."""

from data_prep.plain_files import remove_leftovers, temporary_name


def test_only_what_a_run_of_ours_left_is_deleted(tmp_path):
    ours = temporary_name(tmp_path / "tokens" / "web.bin")
    theirs = [tmp_path / ".editor.tmp", tmp_path / "notes.12.tmp", tmp_path / ".folder.12.tmp" / "file"]
    for path in (ours, *theirs):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert remove_leftovers(tmp_path) == 1
    assert not ours.exists()
    assert all(path.exists() for path in theirs)
