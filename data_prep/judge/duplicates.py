"""What can only be seen over many samples: leakage of benchmarks, searched in batches, and near duplicates; both by data_prep/clean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.errors import DataError
from data_prep.judge.config import Curation
from data_prep.judge.rules import Finding
from data_prep.judge.samples import Sample
from recipes.cleaning import NearDuplicates


class Leakage:
    """The benchmarks' runs of words, and the search for them in the messages of samples."""

    def __init__(self, curation: Curation):
        from data_prep.clean.decontamination import Decontaminator, build_index

        assert curation.decontamination is not None
        try:
            self.index = build_index(curation.decontamination)
        except DataError as error:  # its message names the key of a recipe
            raise DataError(
                str(error).replace("data.cleaning.decontamination", f"rules {curation.name}: decontamination")
            ) from None
        self._decontaminator = Decontaminator(self.index)

    def find(self, samples: Sequence[Sample]) -> list[Finding | None]:
        """For each sample the first run of words in one of its messages that a benchmark's item has."""
        from data_prep.clean.words import word_hashes

        texts = [text for sample in samples for text in sample.texts()]
        owners = [number for number, sample in enumerate(samples) for _ in sample.texts()]
        findings: list[Finding | None] = [None] * len(samples)
        hits = self._decontaminator.find(texts, [word_hashes(text).exact for text in texts])
        for owner, hit in zip(owners, hits, strict=True):
            if hit is not None and findings[owner] is None:
                findings[owner] = Finding("leakage", f"{hit.benchmark}, {hit.item}: {hit.words}")
        return findings


class NearDuplicateSearch:
    """MinHash over the words of whole conversations; one 64-bit hash per band and sample is kept: 112 bytes for 14 bands."""

    def __init__(self, config: NearDuplicates):
        from data_prep.clean.minhash import Signatures

        self._config = config
        # The folder is where datatrove's step would write; only its arithmetic is used here.
        self._signatures = Signatures(config, Path("unused"))
        self._numbers: list[int] = []
        self._bands: list[np.ndarray] = []

    def add(self, number: int, sample: Sample) -> None:
        """Numbers ascend."""
        shingles = self._signatures.get_shingles("\n".join(sample.texts()))
        if len(shingles):
            bands = np.array(self._signatures.get_signature(shingles), dtype=np.uint64)
            self._numbers.append(number)
            self._bands.append(_band_hashes(bands))

    def duplicates(self) -> dict[int, int]:
        """Number of a sample that goes -> number of the one that stays, the first of its cluster."""
        from data_prep.clean.minhash import clusters

        if not self._numbers:
            return {}
        numbers, bands = np.array(self._numbers), np.stack(self._bands)
        pairs = []
        for column in bands.T:
            order = np.argsort(column, kind="stable")
            same = np.flatnonzero(column[order][1:] == column[order][:-1])
            pairs.append(np.stack([order[same], order[same + 1]], axis=1))
        members, roots = clusters(np.concatenate(pairs)) if sum(map(len, pairs)) else (np.empty(0, dtype=np.int64),) * 2
        return {int(numbers[m]): int(numbers[r]) for m, r in zip(members, roots, strict=True) if m != r}


def _band_hashes(bands: np.ndarray) -> np.ndarray:
    """uint64 [bands] from uint64 [bands, hashes]: equal bands have equal hashes, others almost never (64 bits)."""
    import hashlib

    return np.array(
        [int.from_bytes(hashlib.blake2b(band.tobytes(), digest_size=8).digest(), "little") for band in bands], dtype=np.uint64
    )
