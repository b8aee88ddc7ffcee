"""Tells a full disk from other failures, however deep the checkpoint writer has wrapped it."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
# Writers in other processes and torch's CheckpointException pass on the words only.
WORDS = tuple(os.strerror(number) for number in FULL)


def is_full(error: BaseException) -> bool:
    """Whether `error`, or one that it came from, is that no space or quota was left."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        if (isinstance(one, OSError) and one.errno in FULL) or any(words in str(one) for words in WORDS):
            return True
        todo += [one.__cause__, one.__context__]
    return False


def message(folder: Path) -> str:
    """One sentence that names the disk, its space and what to do."""
    place = next(p for p in (folder, *folder.parents) if p.exists())
    usage = shutil.disk_usage(place)
    mount = place.resolve()
    while not os.path.ismount(mount):
        mount = mount.parent
    return (
        f"disk full: no space or quota is left under {folder} (file system {mount}: {usage.free / 1e9:.2f} GB free of "
        f"{usage.total / 1e9:.2f} GB); free some, or lower keep_checkpoints of the phase; the stage then goes on from its last checkpoint"
    )
