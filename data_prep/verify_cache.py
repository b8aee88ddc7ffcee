"""Whether Megatron's index caches say what they must about their views: every document, every sample, every draw, by numpy alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from data_prep.index_caches import BlendIndex, IndexCache, SourceIndex
from data_prep.manifest import MixtureManifest

CHUNK = 1 << 22
"""Entries looked at in one go: tens of MB, whatever the size of the cache."""

Report = Callable[[str, str, str, str], None]
"""(file, what, expected, found)"""


def check_cache(
    folder: Path, record: IndexCache, manifest: MixtureManifest, lengths: Mapping[str, np.ndarray], report: Report
) -> None:
    """Compare the indices of `record` with the lengths in tokens of each view's documents (int32 [documents])."""
    for name, files in record.sources.items():
        if name in lengths:
            _check_source(folder, files, lengths[name], manifest.seq_length_tokens, report)
    if record.blend is not None:
        _check_blend(folder, record.blend, record, manifest.samples, report)
    elif record.sources and (only := next(iter(record.sources.values()))).samples < manifest.samples:
        report(only.sample_index, "samples", f"at least {manifest.samples}", str(only.samples))


def _load(folder: Path, name: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...], report: Report) -> np.ndarray | None:
    """The array, mapped; None after a report. Never a pickle."""
    path = folder / name
    if not path.is_file():
        return None  # reported with the record's files
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header goes through Python's own parser, which raises nearly anything
        report(name, "content", "a numpy array", f"{type(error).__name__}: {error}")
        return None
    fits = array.dtype.name in dtypes and array.ndim == len(shape)
    if not fits or any(want is not None and want != have for want, have in zip(shape, array.shape, strict=True)):
        wanted = "x".join("N" if n is None else str(n) for n in shape)
        found = f"{array.dtype.name} [{'x'.join(map(str, array.shape))}]"
        report(name, "type and shape", f"{' or '.join(dtypes)} [{wanted}]", found)
        return None
    return array


def _chunks(size: int) -> Iterator[slice]:
    return (slice(begin, min(begin + CHUNK, size)) for begin in range(0, size, CHUNK))


def _check_source(folder: Path, files: SourceIndex, lengths: np.ndarray, seq_length: int, report: Report) -> None:
    documents = _load(folder, files.document_index, ("int32",), (None,), report)
    if documents is not None:
        documents = _check_documents(files.document_index, documents, len(lengths), report)
    samples = _load(folder, files.sample_index, ("int32", "int64"), (files.samples + 1, 2), report)
    if documents is not None and samples is not None:
        _check_samples(files.sample_index, samples, lengths[documents], seq_length, report)
    shuffle = _load(folder, files.shuffle_index, ("uint32", "int64"), (files.samples,), report)
    if shuffle is not None:
        _check_permutation(files.shuffle_index, shuffle, report)


def _check_documents(name: str, documents: np.ndarray, count: int, report: Report) -> np.ndarray | None:
    """Each document as often as every other; returns the index when its numbers are those of documents."""
    times = np.zeros(count, np.int64)
    for part in _chunks(len(documents)):
        chunk = np.asarray(documents[part])
        wrong = np.flatnonzero((chunk < 0) | (chunk >= count))
        if len(wrong):
            report(name, f"entry {part.start + wrong[0]}", f"a document from 0 to {count - 1}", str(chunk[wrong[0]]))
            return None
        times += np.bincount(chunk, minlength=count)
    if count and times.min() != times.max():
        report(name, "documents per epoch", "each as often as the others", f"document {times.argmin()} {times.min()} times, "
               f"document {times.argmax()} {times.max()} times")  # fmt: skip
    return np.asarray(documents)


def _check_samples(name: str, samples: np.ndarray, lengths: np.ndarray, seq_length: int, report: Report) -> None:
    """Sample k begins at token k * seq_length of the documents laid end to end."""
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, dtype=np.int64, out=starts[1:])
    for part in _chunks(len(samples)):
        document, offset = (np.asarray(samples[part, column], dtype=np.int64) for column in (0, 1))
        inside = (document >= 0) & (document < len(lengths)) & (offset >= 0)
        document = np.where(inside, document, 0)
        inside &= offset <= lengths[document]
        wrong = np.flatnonzero(~inside | (starts[document] + offset != np.arange(part.start, part.stop) * seq_length))
        if len(wrong):
            number = part.start + int(wrong[0])
            found = f"{'token ' + str(starts[document[wrong[0]]] + offset[wrong[0]]) if inside[wrong[0]] else 'outside of it'}"
            report(name, f"begin of sample {number}", f"token {number * seq_length} of the source's stream", found)
            return


def _check_permutation(name: str, shuffle: np.ndarray, report: Report) -> None:
    seen = np.zeros(len(shuffle), bool)
    for part in _chunks(len(shuffle)):
        chunk = np.asarray(shuffle[part]).astype(np.int64)
        wrong = np.flatnonzero((chunk < 0) | (chunk >= len(shuffle)))
        if len(wrong):
            report(name, f"entry {part.start + wrong[0]}", f"a sample from 0 to {len(shuffle) - 1}", str(chunk[wrong[0]]))
            return
        seen[chunk] = True
    if not seen.all():
        report(name, "samples", "each once", f"sample {int(seen.argmin())} missing, another twice")


def _check_blend(folder: Path, blend: BlendIndex, record: IndexCache, samples: int, report: Report) -> None:
    """Every draw is the next sample of its source, and the source has it."""
    if blend.samples < samples:
        report(blend.dataset_index, "samples", f"at least {samples}", str(blend.samples))
    sources = _load(folder, blend.dataset_index, ("int16",), (blend.samples,), report)
    places = _load(folder, blend.dataset_sample_index, ("int64",), (blend.samples,), report)
    names = list(record.sources)
    drawn = np.zeros(len(names), np.int64)
    for part in _chunks(blend.samples) if sources is not None else ():
        chunk = np.asarray(sources[part])
        wrong = np.flatnonzero((chunk < 0) | (chunk >= len(names)))
        if len(wrong):
            report(
                blend.dataset_index,
                f"entry {part.start + wrong[0]}",
                f"a source from 0 to {len(names) - 1}",
                str(chunk[wrong[0]]),
            )
            return
        counts = np.bincount(chunk, minlength=len(names))
        if places is not None:
            order = np.argsort(chunk, kind="stable")
            first = np.concatenate([[0], np.cumsum(counts)[:-1]])
            expected = np.arange(len(chunk)) - first[chunk[order]] + drawn[chunk[order]]
            wrong = np.flatnonzero(np.asarray(places[part])[order] != expected)
            if len(wrong):
                at = int(order[wrong].min())
                wanted = int(expected[np.flatnonzero(order == at)[0]])
                report(
                    blend.dataset_sample_index,
                    f"entry {part.start + at}",
                    f"sample {wanted} of source '{names[chunk[at]]}', the next one",
                    str(int(places[part.start + at])),
                )
                places = None
        drawn += counts
    for name, count in zip(names, drawn.tolist(), strict=True):
        if count > record.sources[name].samples:
            report(blend.dataset_index, f"samples of source '{name}'", f"at most {record.sources[name].samples}", str(count))
