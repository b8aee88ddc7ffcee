"""The record of Megatron's index caches: which files a phase's cache has, and that they fit its views. Numpy-free; builds nothing.

    cache/<phase>/<manifest digest, 16 characters>/     one folder per state of the views, put in place whole
        record.json                                     this record
        <hash>-ViewDataset-train-{document,sample,shuffle}_index.npy, -description.txt     one set per source
        <hash>-BlendedDataset-train-{dataset,dataset_sample}_index.npy, -description.txt   where a phase has several sources

`training.index_cache` builds them in a CPU job; a training start only verifies them, because GPUs must not wait for an index.
The hashes are of paths relative to the data root, so a root can be moved or mounted elsewhere without building again.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from data_prep.errors import DataError
from data_prep.files import FileRecord, Sha256, Strict, verify_file
from data_prep.manifest import MixtureManifest, Signed

BUILDER_VERSION = 1
"""Of training/blend.py: raise it when the same views would give other files or other names."""
RECORD_NAME = "record.json"
REMEDY = "build the index caches with `quarry prep`, which needs no GPU"

Count = Annotated[int, Field(ge=0)]


class SourceIndex(Strict):
    """Files of one source: in which order its documents are read, where each sample begins, in which order samples are taken."""

    document_index: str
    """int32 [documents * epochs], numbers of documents of the view."""
    sample_index: str
    """int32 or int64 [samples + 1, 2]: position in the document index, and token inside that document."""
    shuffle_index: str
    """uint32 or int64 [samples], numbers of samples."""
    samples: Count
    """At least what the blend draws."""


class BlendIndex(Strict):
    """Files of the blend: sample i of the phase is sample `dataset_sample_index[i]` of source number `dataset_index[i]`."""

    dataset_index: str
    """int16 [samples of the blend], number of the source in the manifest's order."""
    dataset_sample_index: str
    """int64 [samples of the blend]"""
    samples: Count


class IndexCache(Signed):
    """record.json of a cache; written last, so that a folder with it is whole."""

    FORMAT: ClassVar[str] = "quarry.index_cache/1"

    format: Literal["quarry.index_cache/1"]
    phase: str
    manifest: Sha256
    """Digest of the views' manifest that the cache was built for."""
    builder_version: int
    megatron_version: str
    seed: Count
    seq_length_tokens: Annotated[int, Field(gt=0)]
    samples: Annotated[int, Field(gt=0)]
    sources: dict[str, SourceIndex]
    blend: BlendIndex | None
    """None for a single source, which Megatron does not blend."""
    files: dict[str, FileRecord]
    """Every other file of the folder."""
    digest: Sha256

    @property
    def total_bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())

    def summary(self) -> str:
        return f"{len(self.files)} files, {self.total_bytes / 1e6:.1f} MB"


def megatron_version() -> str:
    """Of the Megatron installed here, without importing it."""
    return importlib.metadata.version("megatron-core")


def cache_path(data_root: Path, manifest: MixtureManifest) -> Path:
    """Folder of the cache that belongs to this state of a phase's views."""
    return data_root / "cache" / manifest.phase / manifest.digest[:16]


def superseded(data_root: Path, manifest: MixtureManifest) -> list[Path]:
    """Other entries beside the cache of `manifest`: caches of earlier views, and what killed builds left."""
    current = cache_path(data_root, manifest)
    return sorted(path for path in current.parent.iterdir() if path != current) if current.parent.is_dir() else []


def verify_cache(
    data_root: Path,
    manifest: MixtureManifest,
    *,
    read_files: bool = True,
    full: bool = False,
    seen: dict[Path, str] | None = None,
) -> IndexCache:
    """The record of the cache of `manifest` when it fits and its files are intact; otherwise a DataError that names the file.

    Digests are taken of files up to 1 GiB and sampled above (`full`: of all); with `read_files` False only sizes are compared.
    """
    folder = cache_path(data_root, manifest)
    if not folder.is_dir():
        others = [path.name for path in superseded(data_root, manifest)]
        what = f"; there is one for other views ({', '.join(others)})" if others else ""
        raise DataError(f"phase '{manifest.phase}' has no index cache {folder}{what}; {REMEDY}")
    record = IndexCache.read(folder / RECORD_NAME)
    for what, expected, found in (
        ("manifest digest", manifest.digest, record.manifest),
        ("phase", manifest.phase, record.phase),
        ("seed", manifest.seed, record.seed),
        ("seq_length_tokens", manifest.seq_length_tokens, record.seq_length_tokens),
        ("samples", manifest.samples, record.samples),
        ("sources", list(manifest.sources), list(record.sources)),
        ("builder version", BUILDER_VERSION, record.builder_version),
        ("Megatron version", megatron_version(), record.megatron_version),
    ):
        if expected != found:
            raise DataError(f"{folder / RECORD_NAME}: the cache was built for {what} {found}, needed is {expected}; {REMEDY}")
    for name, file in record.files.items():
        path = folder / name
        if read_files:
            verify_file(path, file, remedy=REMEDY, full=full, seen=seen)
        elif not path.is_file() or path.stat().st_size != file.bytes:
            found = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
            raise DataError(f"{path}: {found}, the record says {file.bytes} bytes; {REMEDY}")
    return record


def to_build(data_root: Path, manifests: Mapping[str, MixtureManifest]) -> dict[str, str]:
    """Phases whose cache is missing or does not fit, and why; empty when nothing is to be done. Imports no torch."""
    reasons: dict[str, str] = {}
    for phase, manifest in manifests.items():
        try:
            verify_cache(data_root, manifest)
        except DataError as error:
            reasons[phase] = str(error)
    return reasons
