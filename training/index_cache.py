"""Builds Megatron's index caches of every phase ahead of training, on a CPU, so that no GPU ever waits for an index.

    python -m training.index_cache --recipe runs/smoke/recipe.json [--phase foundation] [--workers 4]

Only caches that are missing or do not fit the views are built; torch and Megatron are imported only then (0.3 s without, about 3 s
with). A cache is built under a temporary name by Megatron's own builder, digested, fsynced and renamed; caches of earlier views of the
same phase are removed after it. Exit codes: 0 all caches are there and intact; 78 refused, the views are missing or wrong.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep import index_caches
from data_prep.errors import DataError
from data_prep.files import exclusive_lock, record_file, verify_file
from data_prep.index_caches import BlendIndex, IndexCache, SourceIndex, cache_path
from data_prep.manifest import MixtureManifest, mixture_path
from data_prep.progress import Progress, Shown
from recipes.schema import Recipe, RecipeError
from training import fast_import
from training.exit_codes import FINISHED, REFUSED

if TYPE_CHECKING:
    from training.blend import PhaseDataset

POLL_SECONDS = 0.1
MEMORY_SHARE = 0.5
"""Of the free memory that all builders may take together by estimate; Megatron holds a phase's indices in memory until all are made."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.index_cache", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, required=True, help="resolved recipe, as `quarry launch` writes it")
    parser.add_argument(
        "--phase", action="append", default=[], metavar="PHASE", help="only this phase; may be given several times"
    )
    parser.add_argument("--workers", type=int, help="phases built at the same time (default: one per core, as memory allows)")
    options = parser.parse_args(argv)
    try:
        recipe = Recipe.read(options.recipe)
        phases = [name for name in recipe.stages if name in recipe.phase]
        unknown = [name for name in options.phase if name not in phases]
        if unknown:
            raise RecipeError(f"--phase {unknown[0]}: no such phase among the stages; phases: {', '.join(phases)}")
        build(Path(recipe.data.root), options.phase or phases, workers=options.workers, progress=Shown())
    except (DataError, RecipeError) as error:
        print(f"refused: {error}", file=sys.stderr, flush=True)
        return REFUSED
    return FINISHED


def build(data_root: Path, phases: list[str], *, workers: int | None = None, progress: Progress) -> dict[str, IndexCache]:
    """Make sure that the index cache of every phase is there and fits its views; returns the records.

    One process at a time per data root. DataError when views are missing or an .idx is not the recorded one.
    """
    manifests = {phase: MixtureManifest.read(mixture_path(data_root, phase)) for phase in phases}
    with exclusive_lock(
        data_root / "cache" / ".lock",
        lambda holder: progress.message(f"waiting for process {holder}, which builds index caches in {data_root}"),
    ):
        todo = index_caches.to_build(data_root, manifests)
        if todo:
            _build_all(data_root, {phase: manifests[phase] for phase in todo}, workers, progress)
        for manifest in manifests.values():
            # After the new one is in place. A training that runs keeps what it has mapped.
            for old in index_caches.superseded(data_root, manifest):
                shutil.rmtree(old) if old.is_dir() else old.unlink()
    records = {
        phase: IndexCache.read(cache_path(data_root, manifest) / index_caches.RECORD_NAME)
        for phase, manifest in manifests.items()
    }
    files, size = sum(len(r.files) for r in records.values()), sum(r.total_bytes for r in records.values())
    progress.message(f"index caches of {len(records)} phases: {len(todo)} built; {files} files, {size / 1e6:.1f} MB")
    return records


def _build_all(data_root: Path, manifests: dict[str, MixtureManifest], workers: int | None, progress: Progress) -> None:
    for manifest in manifests.values():
        for source in manifest.sources.values():
            # The cache is made from the .idx alone; a wrong one must not get a cache that fits it.
            verify_file(data_root / f"{source.prefix}.idx", source.idx, remedy="prepare it again with `quarry prep`")
    expected = {phase: expected_bytes(manifest) for phase, manifest in manifests.items()}
    order = sorted(manifests, key=lambda phase: -expected[phase])
    workers = workers or _workers_that_fit([expected[phase] for phase in order])
    with progress.step(f"index caches of {len(order)} phases", sum(expected.values())) as done:
        _import_builder()
        temporary = {phase: _building(cache_path(data_root, manifests[phase])) for phase in order}
        if len(order) == 1 or workers == 1:
            for phase in order:
                build_phase(manifests[phase], data_root, temporary[phase])
                done(expected[phase])
            return
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context

        # fork: a spawned worker would import torch and Megatron again. No thread of this process holds anything by now.
        with ProcessPoolExecutor(min(workers, len(order)), mp_context=get_context("fork")) as pool:
            running = {phase: pool.submit(build_phase, manifests[phase], data_root, temporary[phase]) for phase in order}
            _follow(running, temporary, expected, done)
            for future in running.values():
                future.result()


def _follow(running: dict[str, Any], temporary: dict[str, Path], expected: dict[str, int], done: Callable[[int], None]) -> None:
    """Report the size of what lies on disk until all builders have ended."""
    shown = dict.fromkeys(running, 0)
    while True:
        finished = {phase for phase, future in running.items() if future.done()}
        for phase in running:
            size = expected[phase] if phase in finished else min(expected[phase], _folder_bytes(temporary[phase]))
            if size > shown[phase]:
                done(size - shown[phase])
                shown[phase] = size
        if len(finished) == len(running):
            return
        time.sleep(POLL_SECONDS)


def _folder_bytes(folder: Path) -> int:
    size = 0
    for path in folder.glob("*"):
        try:
            size += path.stat().st_size
        except FileNotFoundError:
            return 0  # renamed a moment ago: it is finished, and counted as such the next time
    return size


def _import_builder() -> None:
    # Megatron warns that there is no Transformer Engine and no rank: neither is needed here.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    with fast_import.quick_imports(), fast_import.without_unused_torch():
        fast_import.without_compiler()
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # warns where there is no GPU, as is meant here
        import training.blend  # noqa: F401


def expected_bytes(manifest: MixtureManifest) -> int:
    """About what the cache of `manifest` takes on disk, and its builder in memory."""
    sources = sum(4 * source.documents + 12 * round(source.weight * manifest.samples) for source in manifest.sources.values())
    return sources + (10 * manifest.samples if len(manifest.sources) > 1 else 0)


def _workers_that_fit(sizes: list[int]) -> int:
    """How many of the phases, largest first, may be built at the same time."""
    import psutil

    room = psutil.virtual_memory().available * MEMORY_SHARE
    fit = 0
    while fit < min(len(sizes), len(os.sched_getaffinity(0))) and sum(sizes[: fit + 1]) <= room:
        fit += 1
    return max(1, fit)


def build_phase(manifest: MixtureManifest, data_root: Path, temporary: Path) -> IndexCache:
    """Build the cache of one phase in `temporary`, write its record, and rename the folder to its place.

    Without torch.distributed; megatron must be importable, a GPU is not touched.
    """
    from training.blend import blended

    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    try:
        dataset = blended(manifest, data_root, temporary, build=True)
        assert dataset is not None
        record = _record(manifest, dataset, temporary)
        for path in temporary.iterdir():
            _fsync(path)
        record.write(temporary / index_caches.RECORD_NAME)
        final = cache_path(data_root, manifest)
        if final.exists():  # one that did not fit; it goes in one step, too
            doomed = temporary.with_name(f".deleting-{final.name}")
            final.rename(doomed)
            shutil.rmtree(doomed)
        temporary.rename(final)
        _fsync(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return record


def _record(manifest: MixtureManifest, dataset: PhaseDataset, folder: Path) -> IndexCache:
    from megatron.core.datasets.blended_dataset import BlendedDataset

    from training.blend import members

    def name(part: Any, index: str) -> str:
        return f"{part.unique_description_hash}-{type(part).__name__}-{part_split(part)}-{index}_index.npy"

    def part_split(part: Any) -> str:
        return (part.split if isinstance(part, BlendedDataset) else part.index_split).name

    sources = {
        source: SourceIndex(
            document_index=name(member, "document"),
            sample_index=name(member, "sample"),
            shuffle_index=name(member, "shuffle"),
            samples=len(member),
        )
        for source, member in zip(manifest.sources, members(dataset), strict=True)
    }
    blend = None
    if isinstance(dataset, BlendedDataset):
        blend = BlendIndex(
            dataset_index=name(dataset, "dataset"), dataset_sample_index=name(dataset, "dataset_sample"), samples=len(dataset)
        )
    return IndexCache.make(
        phase=manifest.phase,
        manifest=manifest.digest,
        builder_version=index_caches.BUILDER_VERSION,
        megatron_version=index_caches.megatron_version(),
        seed=manifest.seed,
        seq_length_tokens=manifest.seq_length_tokens,
        samples=manifest.samples,
        sources=sources,
        blend=blend,
        files={path.name: record_file(path) for path in sorted(folder.iterdir())},
    )


def _building(final: Path) -> Path:
    """Name of a cache while it is built. What a killed build leaves is removed by the next one (`superseded`), which holds the lock."""
    return final.with_name(f".building-{final.name}-{os.getpid()}")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    fast_import.leave(main())
