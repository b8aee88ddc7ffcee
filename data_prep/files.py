"""Files that are either whole or absent, and the digests that prove which: temporary name, fsync, rename; SHA-256.

Above FULL_DIGEST_MAX_BYTES a file is verified by a sampled digest (evenly spaced blocks and the size), because reading terabytes
before each job would cost more than it saves; the full digest is still recorded, once, when the file is made.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from data_prep.errors import DataError
from data_prep.plain_files import (
    atomic_write,
    canonical_json,
    digest_of,
    exclusive_lock,
    file_sha256,
    remove_leftovers,
    replace_symlink,
    temporary_name,
    write_bytes,
    write_json,
)

__all__ = [
    "FULL_DIGEST_MAX_BYTES",
    "SAMPLED_BLOCKS",
    "SAMPLED_BLOCK_BYTES",
    "FileRecord",
    "SampledDigest",
    "Sha256",
    "Strict",
    "atomic_write",
    "canonical_json",
    "digest_of",
    "exclusive_lock",
    "file_sha256",
    "record_file",
    "remove_leftovers",
    "replace_symlink",
    "sampled_sha256",
    "temporary_name",
    "verify_file",
    "write_bytes",
    "write_json",
]

FULL_DIGEST_MAX_BYTES = 1 << 30
"""Files up to 1 GiB are verified in full (about a second at disk speed); larger ones by sample."""
SAMPLED_BLOCKS = 256
SAMPLED_BLOCK_BYTES = 1 << 16
"""256 blocks of 64 KiB: 16 MiB read from a file of any size, first and last block included."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SampledDigest(Strict):
    """Digest of `blocks` evenly spaced blocks and the size; says that a large file is the one recorded, without reading all of it."""

    blocks: int
    block_bytes: int
    sha256: Sha256


class FileRecord(Strict):
    """Size and digests of one file."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256
    sampled: SampledDigest | None = None
    """Only for files above FULL_DIGEST_MAX_BYTES."""


def sampled_sha256(path: Path, blocks: int = SAMPLED_BLOCKS, block_bytes: int = SAMPLED_BLOCK_BYTES) -> str:
    """SHA-256 over the file's size and `blocks` blocks of `block_bytes`, evenly spaced from the first byte to the last."""
    size = path.stat().st_size
    last = max(0, size - block_bytes)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as f:
        for i in range(blocks):
            f.seek(last * i // max(1, blocks - 1))
            digest.update(f.read(block_bytes))
    return digest.hexdigest()


def record_file(path: Path, full_max_bytes: int = FULL_DIGEST_MAX_BYTES) -> FileRecord:
    """Size and digests of `path` as it lies on disk."""
    size = path.stat().st_size
    sampled = None
    if size > full_max_bytes:
        sampled = SampledDigest(blocks=SAMPLED_BLOCKS, block_bytes=SAMPLED_BLOCK_BYTES, sha256=sampled_sha256(path))
    return FileRecord(bytes=size, sha256=file_sha256(path), sampled=sampled)


def verify_file(
    path: Path, record: FileRecord, *, remedy: str, full: bool = False, seen: dict[Path, str] | None = None
) -> None:
    """Compare `path` with its record; DataError names file, expected, found and remedy.

    `full` reads every byte even where a sampled digest is recorded. `seen` maps resolved paths to digests of this process's run, so
    that a .bin that several views link to is read once.
    """
    if not path.exists():
        what = f"a link to {os.readlink(path)}, which does not exist" if path.is_symlink() else "no such file"
        raise DataError(f"{path}: {what}; {remedy}")
    size = path.stat().st_size
    if size != record.bytes:
        raise DataError(f"{path}: {size} bytes, the record says {record.bytes}: truncated or replaced; {remedy}")
    sampled = record.sampled is not None and not full
    key = path.resolve() / ("sampled" if sampled else "full")
    found = seen.get(key) if seen is not None else None
    if found is None:
        found = sampled_sha256(path, record.sampled.blocks, record.sampled.block_bytes) if sampled else file_sha256(path)
        if seen is not None:
            seen[key] = found
    expected = record.sampled.sha256 if sampled else record.sha256
    if found != expected:
        kind = "sampled SHA-256" if sampled else "SHA-256"
        raise DataError(f"{path}: {kind} {found}, the record says {expected}: the content was altered or swapped; {remedy}")
