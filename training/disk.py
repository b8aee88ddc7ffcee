"""Tells a full disk from other failures, however deep the checkpoint writer has wrapped it."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
# Writers in other processes and torch's CheckpointException pass on the words only.
WORDS = tuple(os.strerror(number) for number in FULL)


# Megatron 0.19.2's checkpoint writer at most logs the words; it raises the class only (`error: <class 'OSError'>`), on every rank. Where
# torch's zip writer meets the full disk first, the class is RuntimeError and the words are nowhere.
WRITER_LOGGER = "megatron.core.dist_checkpointing.strategies.filesystem_async"
WRITER_ERRORS = (f"error: {OSError}", f"error: {RuntimeError}")
FULL_BYTES = 16 << 20
"""A file system with less free than this, after a write to it failed, is full: a writer's last buffer is smaller."""


class Witness(logging.Handler):
    """Remembers that Megatron's writer in this process has logged a full disk."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False
        logging.getLogger(WRITER_LOGGER).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.seen = self.seen or any(words in record.getMessage() for words in WORDS)


def is_full(error: BaseException, folder: Path | None = None) -> bool:
    """Whether `error`, or one that it came from, is that no space or quota was left.

    Where it only says that Megatron's writer met an error, the file system of `folder` decides.
    """
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        if (isinstance(one, OSError) and one.errno in FULL) or any(words in str(one) for words in WORDS):
            return True
        writer_failed = any(words in str(one) for words in WRITER_ERRORS)
        if folder is not None and writer_failed and shutil.disk_usage(_existing(folder)).free < FULL_BYTES:
            return True
        todo += [one.__cause__, one.__context__]
    return False


def message(folder: Path) -> str:
    """One sentence that names the disk, its space and what to do."""
    place = _existing(folder)
    usage = shutil.disk_usage(place)
    mount = place.resolve()
    while not os.path.ismount(mount):
        mount = mount.parent
    return (
        f"disk full: no space or quota is left under {folder} (file system {mount}: {usage.free / 1e9:.2f} GB free of "
        f"{usage.total / 1e9:.2f} GB); free some, or lower keep_checkpoints of the phase; the stage then goes on from its last checkpoint"
    )


def _existing(folder: Path) -> Path:
    return next(p for p in (folder, *folder.parents) if p.exists())
