"""Verifies prepared data down to the last byte and says everything that is wrong: file, what, expected, found, remedy.

A path may be a data root, the views of a phase, the held-out sets, the data of an SFT stage, an index cache (each a folder or its
manifest), one .bin/.idx pair (its prefix or either file), such as `quarry tokenize` writes, or a folder of them. No pickle is ever loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from data_prep.errors import DataError
from data_prep.index_caches import RECORD_NAME, IndexCache
from data_prep.indexed import bin_path, idx_path
from data_prep.manifest import HeldoutManifest, MixtureManifest, mixture_path
from data_prep.progress import Progress, Silent
from data_prep.sft_manifest import SftManifest
from data_prep.sources import threads
from data_prep.verification import PairRecord, Verification
from data_prep.verify_reading import Finding
from data_prep.verify_root import TOKENS_FORMAT, Root
from data_prep.verify_sft import check_sft

__all__ = ["Finding", "inspect", "verify"]

Collect = Callable[[Verification], object]
ROOT_FOLDERS = ("views", "tokenized", "heldout", "tokens", "clean", "corpus")
USAGE = (
    "name a data root, a folder or manifest below views/, heldout/, sft/ or cache/, a .bin/.idx pair by its prefix or either file, or a "
    "folder of such pairs"
)
TOKENIZE = "run the same `quarry tokenize` again, which makes again what is not as recorded"


def verify(path: Path, *, workers: int | None = None, progress: Progress | None = None, full: bool = False) -> list[Finding]:
    """All findings of `inspect`."""
    return inspect(path, workers=workers, progress=progress, full=full).findings


def inspect(path: Path, *, workers: int | None = None, progress: Progress | None = None, full: bool = False) -> Verification:
    """Verify what lies at `path`, every byte of it; `full` also reads the users' own files that records name, outside of the root.

    `workers` files are read at a time (default: one per core). DataError when there is nothing at `path` that can be verified.
    """
    path = path.absolute()
    base, collect = _what(path)
    verification = Verification(base, workers=workers or threads(), progress=progress or Silent(), full=full)
    collect(verification)
    verification.run()
    if not verification.findings and not verification.files:
        raise DataError(f"{path}: no record and no data there; {USAGE}")
    return verification


def _what(path: Path) -> tuple[Path, Collect]:
    """What names are shown relative to, and the function that collects the checks of `path`."""
    if path.is_dir():
        if any((path / name).is_dir() for name in ROOT_FOLDERS):
            return path, lambda v: Root(path, v).everything()
        for name in ("manifest.json", RECORD_NAME):
            if (path / name).is_file():
                return _manifest(path / name)
        if path.parent.name == "views" or path.name == "heldout":
            return _manifest(path / "manifest.json")  # which is missing
        if prefixes := _prefixes(path):
            return _pairs(path, prefixes)
    elif path.name in ("manifest.json", RECORD_NAME) and path.is_file():
        return _manifest(path)
    for suffix in (".bin", ".idx", ""):
        prefix = path.with_name(path.name.removesuffix(suffix)) if suffix else path
        if path.name.endswith(suffix) and (bin_path(prefix).exists() or idx_path(prefix).exists()):
            return _pair(prefix)
    raise DataError(f"{path}: {'nothing to verify there' if path.exists() else 'no such file or folder'}; {USAGE}")


def _manifest(path: Path) -> tuple[Path, Collect]:
    folder = path.parent
    formats = {
        MixtureManifest.FORMAT: "view", HeldoutManifest.FORMAT: "heldout", IndexCache.FORMAT: "cache", SftManifest.FORMAT: "sft",
    }  # fmt: skip
    kind = formats.get(_format(path))
    if kind is None:  # missing or damaged: what it should be is told by where it lies
        kinds = {"views": "view", "sft": "sft"}
        kind = kinds.get(folder.parent.name) or ("heldout" if folder.name == "heldout" else "cache")
    root = folder.parent if kind == "heldout" else folder.parents[1]
    if kind == "view":
        return root, lambda v: Root(root, v).view(folder.name)
    if kind == "sft":
        return root, lambda v: check_sft(Root(root, v), folder.name)
    if kind == "heldout":
        return root, lambda v: Root(root, v).heldout()
    if folder.parents[1].name == "cache":
        root = folder.parents[2]

    def cache(v: Verification) -> None:
        checks = Root(root, v)
        manifest = None
        if mixture_path(root, folder.parent.name).exists():
            manifest = checks.view(folder.parent.name)
        if manifest is not None and manifest.digest[:16] == folder.name:
            checks.cache(manifest)
        else:
            if manifest is not None:
                v.find(folder, "views that it was built for", manifest.digest[:16], folder.name, "build it with `quarry prep`")
            checks.cache_folder(folder, None)

    return root, cache


def _pair(prefix: Path) -> tuple[Path, Collect]:
    """One pair: by its own record, or by that of the folder of a data root that it lies in."""
    folder = prefix.parent
    if (folder / "manifest.json").is_file():
        return _manifest(folder / "manifest.json")
    if folder.name == "tokenized" and (folder / f"{prefix.name.removesuffix('.heldout')}.json").is_file():
        return folder.parent, lambda v: Root(folder.parent, v).source(prefix.name.removesuffix(".heldout"))

    record = prefix.with_name(f"{prefix.name}.json")
    in_root = folder.name == "tokens" and (folder.parent / "tokenized").is_dir()
    base = folder.parent if in_root else folder

    def collect(v: Verification) -> None:
        if not in_root:
            v.remedy = TOKENIZE
        if _is_record(record):
            return Root(base, v).tokens(record, inputs=v.full and not in_root)
        if (left := prefix.with_name(f"{prefix.name}.shards")).exists():
            v.find(left, "folder of a job", "none beside its output", "one that runs, was killed or was refused", TOKENIZE)
            if not bin_path(prefix).exists() and not idx_path(prefix).exists():
                return None
        v.notes.append(
            f"{v.shown(prefix)}: no record of `quarry tokenize` beside it; bounds were checked, but no digest and no vocabulary"
        )
        v.pair(prefix, PairRecord(record), vocab_size=None, eod_id=None)
        return None

    return base, collect


def _prefixes(folder: Path) -> list[Path]:
    """Of the pairs in a folder, also where only the record or the shards of an unfinished job are left."""
    found = {
        path.with_name(path.name.removesuffix(path.suffix))
        for path in folder.iterdir()
        if path.suffix in (".bin", ".idx", ".shards")
    }
    found |= {path.with_name(path.stem) for path in folder.glob("*.json") if _format(path) == TOKENS_FORMAT}
    return sorted(found)


def _pairs(folder: Path, prefixes: list[Path]) -> tuple[Path, Collect]:
    found = [_pair(prefix) for prefix in prefixes]

    def collect(v: Verification) -> None:
        for _, one in found:
            one(v)

    return found[0][0] if len({base for base, _ in found}) == 1 else folder, collect


def _is_record(path: Path) -> bool:
    """Whether the JSON file beside a pair is a record of its tokens, damaged ones included; others may keep files of their own there."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True
    return isinstance(values, dict) and (str(values.get("format", "")).startswith("quarry.") or "bin" in values)


def _format(path: Path) -> str:
    """What a JSON file says that it is; empty where it cannot be read."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return ""
    return str(values.get("format", "")) if isinstance(values, dict) else ""
