"""What a phase consumed, recounted without Megatron: from the recorder's files, the views' tokens and the index cache."""

from collections import Counter

import numpy as np

from data_prep.index_caches import RECORD_NAME, IndexCache, cache_path
from data_prep.indexed import Reader
from training.recorder import read_consumed, sample_digest


def consumed_samples(stage_dir):
    """(number of the source, digest) of every sample, in the order of training; every step is there once, without a gap."""
    steps = read_consumed(stage_dir)
    assert list(steps) == list(range(1, len(steps) + 1))
    return [sample for step in steps.values() for sample in step]


def recounted(stage_dir, manifest):
    """The phase's part of the ledger as it must be."""
    counts = Counter(source for source, _ in consumed_samples(stage_dir))
    return {
        name: {"samples": counts[number], "tokens": counts[number] * manifest.seq_length_tokens}
        for number, name in enumerate(manifest.sources)
    }


def source_digests(root, manifest, name, files, cache):
    """Digest of each sample of a source, in the order of the stream: its view's documents laid end to end in the cached order."""
    reader = Reader(root / manifest.sources[name].prefix)
    stream = np.concatenate([reader[document] for document in np.load(cache / files.document_index, allow_pickle=False)])
    length = manifest.seq_length_tokens
    windows = (stream[i * length : (i + 1) * length + 1] for i in range(files.samples))
    return [sample_digest(window[:-1], window[1:]) for window in windows]


def check_samples(stage_dir, root, manifest):
    """Every sample that was trained on is, by its tokens, the one of that source that the blend has at that place."""
    cache = cache_path(root, manifest)
    record = IndexCache.read(cache / RECORD_NAME)
    digests, shuffles = [], []
    for name, files in record.sources.items():
        digests.append(source_digests(root, manifest, name, files, cache))
        shuffles.append(np.load(cache / files.shuffle_index, allow_pickle=False))
    samples = consumed_samples(stage_dir)
    assert len(samples) == manifest.samples
    for number, (source, digest) in enumerate(samples):
        assert digest in digests[source], f"sample {number} is none of {list(record.sources)[source]}"
    if record.blend is None:
        expected = [(0, digests[0][shuffles[0][i]]) for i in range(manifest.samples)]
    else:
        sources, places = (
            np.load(cache / name, allow_pickle=False)
            for name in (record.blend.dataset_index, record.blend.dataset_sample_index)
        )
        pairs = zip(sources[: manifest.samples].tolist(), places[: manifest.samples].tolist(), strict=True)
        expected = [(source, digests[source][shuffles[source][place]]) for source, place in pairs]
    assert samples == expected
