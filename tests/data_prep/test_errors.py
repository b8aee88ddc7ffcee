"""What a full disk, a folder of somebody else or a file in the way says."""

import errno
import os

import pytest

from data_prep import __main__ as job
from data_prep.errors import machine_says
from data_prep.plain_files import atomic_write


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "No space left on device; free some space on the file system of "),
        (errno.EROFS, "Read-only file system; let user "),
        (errno.EACCES, "Permission denied; let user "),
        (errno.ENAMETOOLONG, "File name too long; name a shorter path"),
    ],
)
def test_each_names_the_place_and_a_remedy(tmp_path, number, message):
    path = str(tmp_path / "tokens" / "web.bin")
    said = machine_says(OSError(number, os.strerror(number), path))
    assert said is not None
    assert said.startswith(f"{path}: {message}")


def test_what_may_be_a_bug_is_none_of_these(tmp_path):
    assert machine_says(FileNotFoundError(errno.ENOENT, "gone", str(tmp_path / "x"))) is None
    assert machine_says(FileExistsError(errno.EEXIST, "is there", str(tmp_path))) is None


def test_a_write_that_fails_names_its_file(tmp_path):
    with pytest.raises(OSError, match="File too large") as raised, atomic_write(tmp_path / "a"):
        raise OSError(errno.EFBIG, "File too large")
    assert raised.value.filename == str(tmp_path / "a")


def test_a_file_where_a_folder_is_needed(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(OSError, match="a") as raised, atomic_write(tmp_path / "a" / "b" / "c"):
        pass
    assert f"{tmp_path / 'a'} is a file where a folder is needed" in machine_says(raised.value)


@pytest.mark.parametrize(("kind", "code", "word"), [(errno.ENOSPC, 74, "disk full: "), (errno.EACCES, 78, "refused: ")])
def test_the_data_job_tells_a_full_disk_from_a_refusal(tmp_path, capsys, monkeypatch, kind, code, word):
    def fails(*_, **__):
        raise OSError(kind, "no", str(tmp_path))

    monkeypatch.setattr(job, "prepare_everything", fails)
    monkeypatch.setattr(job.Recipe, "read", lambda path: path)
    assert job.main(["--recipe", str(tmp_path / "recipe.json")]) == code
    assert capsys.readouterr().err.startswith(f"{word}{tmp_path}: ")
