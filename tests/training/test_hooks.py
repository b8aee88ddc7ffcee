"""Checkpoints that are kept; the rest of the hooks is exercised by real runs in test_exactness."""

import pytest

from training import cpu_backend

cpu_backend.install()

from training.hooks import prune  # noqa: E402


def checkpoints(folder, steps, newest):
    for step in steps:
        (folder / f"iter_{step:07d}").mkdir()
        (folder / f"iter_{step:07d}" / "metadata.json").write_text("{}")
    (folder / "latest_checkpointed_iteration.txt").write_text(str(newest))
    return folder


def left(folder):
    return sorted(int(p.name.removeprefix("iter_")) for p in folder.glob("iter_*"))


@pytest.mark.parametrize(("keep", "expected"), [(1, [30]), (2, [20, 30]), (3, [10, 20, 30]), (9, [10, 20, 30])])
def test_the_newest_are_kept(tmp_path, keep, expected):
    folder = checkpoints(tmp_path, [10, 20, 30], newest=30)
    prune(folder, keep)
    assert left(folder) == expected
    assert not list(folder.glob(".deleting*"))


def test_a_checkpoint_newer_than_the_tracker_is_left_alone(tmp_path):
    """It is being written, or was cut short: the tracker does not name it yet."""
    folder = checkpoints(tmp_path, [10, 20, 30], newest=20)
    prune(folder, 1)
    assert left(folder) == [20, 30]
