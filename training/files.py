"""Digests of a checkpoint's files, and logs whose last line may have been cut."""

from __future__ import annotations

import contextlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data_prep.files import file_sha256


def digest_folder(folder: Path) -> dict[str, dict[str, int | str]]:
    """{path relative to `folder`: {"bytes", "sha256"}} of every file below it. Threads: hashing releases the GIL."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        sums = list(pool.map(file_sha256, paths))
    return {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": s} for p, s in zip(paths, sums, strict=True)}


def compare_folder(folder: Path, recorded: dict[str, dict[str, int | str]]) -> list[str]:
    """Differences between the files below `folder` and their record, one sentence each; empty when all are as recorded."""
    problems: list[str] = []
    to_hash: list[str] = []
    for name, record in recorded.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != record["bytes"]:
            problems.append(f"{path} has {path.stat().st_size} bytes, recorded {record['bytes']}")
        else:
            to_hash.append(name)
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        for name, found in zip(to_hash, pool.map(lambda n: file_sha256(folder / n), to_hash), strict=True):
            if found != recorded[name]["sha256"]:
                problems.append(
                    f"{folder / name} was altered: SHA-256 {found[:12]}..., recorded {str(recorded[name]['sha256'])[:12]}..."
                )
    return problems


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file; a last line that was cut while it was being written is left out. [] if there is no file."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    whole, last = lines[:-1], lines[-1]
    objects = [json.loads(line) for line in whole if line.strip()]
    if last.strip():
        # The writer may have been killed inside this line; what it held is written again after the resume.
        with contextlib.suppress(json.JSONDecodeError):
            objects.append(json.loads(last))
    return objects
