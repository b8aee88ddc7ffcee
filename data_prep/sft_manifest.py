"""The packed data set of an SFT stage: what lies on disk, its digests, and how a sequence is read. Format: docs/sft.md.

    sft/<stage>/manifest.json                           SftManifest, written last
    sft/<stage>/samples/<source>/00000.bin .idx         tokens of one input file's samples: Megatron's format, a document per sample
    sft/<stage>/samples/<source>/00000.mask             uint8 per token of the .bin, in its order: 1 where the assistant wrote it
    sft/<stage>/samples/<source>/00000.table.npy        per sample: hash of tokens and mask, first place with a loss, learned tokens
    sft/<stage>/samples/<source>/00000.refused.jsonl    what was refused, with line and reason
    sft/<stage>/packs/<name>.bounds.npy, .samples.npy   int64: sequence p holds samples[bounds[p]:bounds[p+1]]

Samples are numbered through over all files in the manifest's order. Packing points to them and copies nothing, so that another length or
layout costs seconds; the tokens of a file are made once.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from data_prep.errors import DataError
from data_prep.files import FileRecord, Sha256, Strict, verify_file
from data_prep.indexed import Index, bin_path, idx_path
from data_prep.manifest import Count, Prefix, Signed, TokenizerRecord
from data_prep.sft_packing import padded

REMEDY = "prepare it again with `python -m data_prep.sft`"
TABLE = np.dtype([("hash", "<u8"), ("first_loss", "<i4"), ("learned", "<i4")])
"""A row per sample: 64 bits of BLAKE2b over tokens and mask; the first place whose token is learned (1 at least); how many are."""


def manifest_path(data_root: Path, stage: str) -> Path:
    return data_root / "sft" / stage / "manifest.json"


def mask_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".mask")


def table_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".table.npy")


def refused_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".refused.jsonl")


class SampleFile(Strict):
    """Samples of one input file."""

    input: str
    """Path as it was found."""
    input_sha256: Sha256
    prefix: Prefix
    read: Count
    """Lines or rows that were looked at."""
    samples: Count
    tokens: Count
    learned_tokens: Count
    max_token_id: Annotated[int, Field(ge=-1)]
    refused: dict[str, Count]
    """Reason -> number."""
    inputs: Sha256
    """Digest of input, tokenizer, chat template and rules; equal inputs need no new rendering."""
    files: dict[str, FileRecord]
    """Suffix -> record."""


class Packs(Strict):
    """Sequences of one set of samples."""

    name: str
    sequences: Count
    samples: Count
    tokens: Count
    """Of the samples, after cutting and without padding."""
    learned_tokens: Count
    """Those that give a loss."""
    utilisation_percent: float
    """tokens / (sequences * seq_length_tokens)"""
    cut_samples: Count
    files: dict[str, FileRecord]


class SftManifest(Signed):
    """The data of one SFT stage."""

    FORMAT: ClassVar[str] = "quarry.sft/1"

    format: Literal["quarry.sft/1"]
    stage: str
    seq_length_tokens: Annotated[int, Field(gt=0)]
    multiple_tokens: Annotated[int, Field(gt=0)]
    too_long: Literal["refuse", "cut"]
    tokenizer: TokenizerRecord
    pad_id: Count
    """Token of the places that hold no sample."""
    sources: dict[str, list[SampleFile]]
    """Sorted by name; samples are numbered through in this order."""
    too_long_samples: dict[str, Count]
    """Source -> samples longer than a sequence: left out or cut, as `too_long` says."""
    heldout_copies: Count
    """Samples that are left out of training because an equal one of another source is held out."""
    training: Packs
    heldout: dict[str, Packs]
    """Source -> its held-out samples; a source without any is absent."""
    inputs: Sha256
    digest: Sha256

    @property
    def files(self) -> list[SampleFile]:
        return [file for _, files in sorted(self.sources.items()) for file in files]

    def verify(self, data_root: Path, *, full: bool = False) -> None:
        """Compare every file with its record and the arrays with each other; DataError names the file and what differs."""
        self.tokenizer.verify(data_root)
        for file in self.files:
            for suffix, record in file.files.items():
                verify_file(data_root / (file.prefix + suffix), record, remedy=REMEDY, full=full)
            if file.max_token_id >= self.tokenizer.vocab_size:
                raise DataError(
                    f"{data_root / file.prefix}.bin: largest token id {file.max_token_id}, the tokenizer has {self.tokenizer.vocab_size}; "
                    f"{REMEDY}"
                )
        for packs in (self.training, *self.heldout.values()):
            for suffix, record in packs.files.items():
                verify_file(packs_prefix(data_root, self.stage, packs.name, suffix), record, remedy=REMEDY, full=full)


def packs_prefix(data_root: Path, stage: str, name: str, suffix: str) -> Path:
    return data_root / "sft" / stage / "packs" / f"{name}{suffix}"


def read_array(path: Path) -> np.ndarray:
    """A .npy file, mapped; never a pickle."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no array ({error}); {REMEDY}") from None


class SampleStore:
    """Random access to the samples of a manifest by number; files are mapped when first read."""

    def __init__(self, manifest: SftManifest, data_root: Path) -> None:
        self._root, self._files = data_root, manifest.files
        self._first = np.cumsum([0, *(file.samples for file in self._files)])
        self._open: dict[int, tuple[Index, np.ndarray, np.ndarray]] = {}
        self._limit = manifest.seq_length_tokens

    def __len__(self) -> int:
        return int(self._first[-1])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of every sample before cutting, int32 [N]."""
        parts = [Index.map(idx_path(self._root / file.prefix)).lengths for file in self._files]
        return np.concatenate([np.zeros(0, np.int32), *parts])

    def table(self) -> np.ndarray:
        """TABLE rows of every sample [N]."""
        parts = [np.asarray(read_array(table_path(self._root / file.prefix))) for file in self._files]
        return np.concatenate([np.zeros(0, TABLE), *parts])

    def sample(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32 [n], learned uint8 [n]) of a sample, cut to the length of a sequence."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        place = int(np.searchsorted(self._first, number, side="right")) - 1
        index, tokens, mask = self._mapped(place)
        local = number - int(self._first[place])
        start = int(index.offsets[local]) // index.dtype.itemsize
        end = start + min(int(index.lengths[local]), self._limit)
        return tokens[start:end].astype(np.int32), np.asarray(mask[start:end])

    def _mapped(self, place: int) -> tuple[Index, np.ndarray, np.ndarray]:
        if place not in self._open:
            prefix = self._root / self._files[place].prefix
            index = Index.map(idx_path(prefix))
            tokens = np.memmap(bin_path(prefix), dtype=index.dtype, mode="r")
            mask = np.memmap(mask_path(prefix), dtype=np.uint8, mode="r")
            if len(tokens) != len(mask):
                raise DataError(f"{mask_path(prefix)}: {len(mask)} bytes for {len(tokens)} tokens; {REMEDY}")
            self._open[place] = index, tokens, mask
        return self._open[place]


class PackedSequences:
    """The sequences of one set of packs; `self[p]` is what the model gets, see `sequence`."""

    def __init__(self, manifest: SftManifest, data_root: Path, packs: Packs, store: SampleStore | None = None) -> None:
        self.manifest, self.packs = manifest, packs
        self.store = store or SampleStore(manifest, data_root)
        self._bounds = read_array(packs_prefix(data_root, manifest.stage, packs.name, ".bounds.npy"))
        self.samples = read_array(packs_prefix(data_root, manifest.stage, packs.name, ".samples.npy"))
        """Numbers of all samples, sequence after sequence, int64 [N]."""

    def __len__(self) -> int:
        return self.packs.sequences

    def numbers(self, sequence: int) -> np.ndarray:
        """Numbers of the samples of a sequence, in order."""
        return self.samples[self._bounds[sequence] : self._bounds[sequence + 1]]

    def __getitem__(self, sequence: int) -> dict[str, np.ndarray]:
        if not 0 <= sequence < len(self):
            raise IndexError(f"sequence {sequence} of {len(self)}")
        samples = [self.store.sample(int(number)) for number in self.numbers(sequence)]
        return lay_out(samples, self.manifest.seq_length_tokens, self.manifest.multiple_tokens, self.manifest.pad_id)


def lay_out(
    samples: list[tuple[np.ndarray, np.ndarray]], length_tokens: int, multiple_tokens: int, pad_id: int
) -> dict[str, np.ndarray]:
    """Samples laid end to end, as the model gets them; all arrays [length_tokens] but bounds.

    tokens, labels, position_ids int64: labels are the sample's own next tokens (pad_id at its end), positions restart with each sample.
    loss_mask float32: 1 where the label is a token that the assistant wrote. bounds int32 [n+1]: where each sample begins, from 0 to
    length_tokens; each sample takes up a multiple of `multiple_tokens`, and what is left at the end is a piece of its own without loss.
    """
    tokens = np.full(length_tokens, pad_id, dtype=np.int64)
    labels = np.full(length_tokens, pad_id, dtype=np.int64)
    mask = np.zeros(length_tokens, dtype=np.float32)
    positions = np.zeros(length_tokens, dtype=np.int64)
    bounds = [0]
    for ids, learned in samples:
        start, n = bounds[-1], len(ids)
        end = start + int(padded(np.array([n]), multiple_tokens)[0])
        if end > length_tokens:
            raise DataError(f"a sequence of {length_tokens} tokens was given samples of {end}; {REMEDY}")
        tokens[start : start + n] = ids
        labels[start : start + n - 1] = ids[1:]
        mask[start : start + n - 1] = learned[1:]
        positions[start:end] = np.arange(end - start)
        bounds.append(end)
    if bounds[-1] < length_tokens:
        positions[bounds[-1] :] = np.arange(length_tokens - bounds[-1])
        bounds.append(length_tokens)
    return {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": mask,
        "position_ids": positions,
        "bounds": np.array(bounds, dtype=np.int32),
    }
