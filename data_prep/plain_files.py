"""Files that are either whole or absent (temporary name, fsync, rename), digests and locks, with the standard library alone.

Import them from data_prep.files, except where a program must start fast: that module needs pydantic, which takes a tenth of a second.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value that digests are taken of: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`, in hex."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def with_digest(values: dict[str, Any]) -> dict[str, Any]:
    """The JSON object with the digest of all of it under `digest`."""
    return {**values, "digest": digest_of(values)}


def is_whole(values: dict[str, Any]) -> bool:
    """Whether a JSON object agrees with its own digest; one without a digest does."""
    rest = {key: value for key, value in values.items() if key != "digest"}
    return "digest" not in values or digest_of(rest) == values["digest"]


def file_sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


LEFTOVER = re.compile(r"\..+\.\d+\.tmp", re.DOTALL)


def temporary_name(path: Path) -> Path:
    """The name that a file has while it is written; leftovers of a killed run are found by `remove_leftovers`."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path) -> int:
    """Delete temporary files of killed runs below `folder` (call it under the data root's lock); returns how many.

    Only what has a name that `temporary_name` gives: a root may be a folder that others use too.
    """
    count = 0
    for path in folder.rglob(".*.tmp"):
        if LEFTOVER.fullmatch(path.name) and not path.is_dir():
            path.unlink()
            count += 1
    return count


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears under `path` only when complete and on disk; nothing is left behind on an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a failed write does not say of what
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)


def write_bytes(path: Path, content: bytes) -> None:
    with atomic_write(path) as f:
        f.write(content)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def replace_symlink(path: Path, target: str) -> None:
    """Make `path` a symbolic link to `target`, atomically; an equal link is left alone."""
    if path.is_symlink() and os.readlink(path) == target:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    temporary.unlink(missing_ok=True)
    os.symlink(target, temporary)
    os.replace(temporary, path)


@contextlib.contextmanager
def exclusive_lock(path: Path, waiting: Callable[[str], None] = lambda holder: None) -> Iterator[None]:
    """Hold an advisory lock on `path`; a second process waits (after one call of `waiting` with the holder's process id).

    The lock is the kernel's: it goes when its process dies, so a killed preparation never blocks the next.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            waiting(f.read().strip() or "unknown")
            fcntl.flock(f, fcntl.LOCK_EX)
        f.seek(0)
        f.truncate()
        f.write(f"{os.getpid()}\n")
        f.flush()
        yield
