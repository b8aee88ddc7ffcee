"""The one error of data preparation, and what the machine's own refusals mean to a user."""

from __future__ import annotations

import errno
import os
from pathlib import Path


class DataError(ValueError):
    """Data that must not be trained on, or cannot be made; the message names file or key, expected, found and remedy."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
NO_FOLDER = (errno.EEXIST, errno.ENOTDIR)
"""Of what should be a folder, where a folder is made or a file in it."""


def machine_says(error: OSError) -> str | None:
    """One sentence with a remedy for a disk that is full, not writable or not readable; None for what may be a bug of ours."""
    where = f"{error.filename}: " if error.filename else ""
    said = os.strerror(error.errno) if error.errno else ""
    if error.errno in FULL:
        place = _existing(Path(os.fsdecode(error.filename))) if error.filename else None
        disk = f" on the file system of {place}" if place else ""
        return (
            f"{where}{said}; free some space{disk} (or raise the quota or `ulimit -f`) and run the command again: it goes on from what "
            "was finished"
        )
    if error.errno in FORBIDDEN:
        return f"{where}{said}; let user {os.getuid()} read and write there, or name another place, and run the command again"
    if error.errno in NO_FOLDER and error.filename:
        first = next((path for path in _upwards(error.filename) if path.exists() and not path.is_dir()), None)
        if first is not None:
            return f"{where}{said}; {first} is a file where a folder is needed: name another place, or move it away"
    if error.errno == errno.ENAMETOOLONG:
        return f"{where}{said}; name a shorter path"
    if error.errno == errno.EMFILE:
        return f"{where}{said}; allow more open files (`ulimit -n`) and run the command again"
    return None


def _upwards(name: str | bytes) -> list[Path]:
    path = Path(os.fsdecode(name))
    return [path, *path.parents]


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())
