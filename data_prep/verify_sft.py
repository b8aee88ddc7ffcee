"""What the packed data set of an SFT stage must hold: the files that its manifest names, and packs that lose, repeat and overfill nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from data_prep.errors import DataError
from data_prep.indexed import optimal_dtype
from data_prep.sft_manifest import Packs, SftManifest, manifest_path, mask_path, packs_prefix, read_array
from data_prep.sft_packing import padded
from data_prep.verification import Digest, PairRecord

if TYPE_CHECKING:
    from data_prep.verify_root import Root


def check_sft(checks: Root, stage: str) -> SftManifest | None:
    """Every file of the stage's data, and the packs against the samples."""
    root, v = checks.root, checks.v
    path = manifest_path(root, stage)
    manifest = checks.signed(path, SftManifest)
    if manifest is None:
        return None
    checks.same_tokenizer(path, manifest.tokenizer)
    if manifest.stage != stage:
        v.find(path, "stage", stage, manifest.stage)
    dtype = optimal_dtype(manifest.tokenizer.vocab_size).name
    lengths = []
    for file in manifest.files:
        prefix = root / file.prefix
        record = PairRecord(
            path, file.samples, file.tokens, dtype, Digest.of(file.files[".bin"]), Digest.of(file.files[".idx"])
        )
        index = v.pair(prefix, record, vocab_size=manifest.tokenizer.vocab_size, eod_id=None)
        for suffix, recorded in file.files.items():
            if suffix not in (".bin", ".idx"):
                v.file(prefix.with_name(prefix.name + suffix), Digest.of(recorded), path)
        mask = mask_path(prefix)
        if mask.exists() and mask.stat().st_size != file.tokens:
            v.find(mask, "bytes", file.tokens, mask.stat().st_size)
        if index is None:
            return manifest  # found; what the packs say of other samples would mean nothing
        lengths.append(index.lengths)
    whole = np.concatenate([np.zeros(0, np.int32), *lengths])
    taken = np.zeros(len(whole), dtype=bool)
    for packs in (manifest.training, *manifest.heldout.values()):
        _check_packs(checks, manifest, packs, whole, taken)
    return manifest


def _check_packs(checks: Root, manifest: SftManifest, packs: Packs, lengths: np.ndarray, taken: np.ndarray) -> None:
    """The packs of one set; `taken` [N] says which samples are in the sets before, and gets those of this one."""
    v = checks.v
    bounds_path, samples_path = (
        packs_prefix(checks.root, manifest.stage, packs.name, s) for s in (".bounds.npy", ".samples.npy")
    )
    for path, suffix in ((bounds_path, ".bounds.npy"), (samples_path, ".samples.npy")):
        v.file(path, Digest.of(packs.files[suffix]), manifest_path(checks.root, manifest.stage))
    try:
        bounds, samples = np.asarray(read_array(bounds_path)), np.asarray(read_array(samples_path))
    except DataError:
        return  # found with the file
    if len(bounds) != packs.sequences + 1 or bounds[0] != 0 or bounds[-1] != len(samples) or (np.diff(bounds) < 1).any():
        v.find(
            bounds_path,
            "bounds",
            f"{packs.sequences} sequences of {packs.samples} samples",
            f"{len(bounds) - 1}, {len(samples)}",
        )
        return
    if len(samples) and (samples.min() < 0 or samples.max() >= len(lengths)):
        v.find(samples_path, "numbers of samples", f"0 to {len(lengths) - 1}", f"{samples.min()} to {samples.max()}")
        return
    twice = samples[taken[samples]] if taken[samples].any() else np.flatnonzero(np.bincount(samples) > 1)
    if len(twice):
        v.find(
            samples_path, "samples in one place each", "every one", f"sample {twice[0]} and {len(twice) - 1} others are in two"
        )
    taken[samples] = True
    cut = np.minimum(lengths[samples], manifest.seq_length_tokens)
    fills = np.add.reduceat(padded(cut, manifest.multiple_tokens), bounds[:-1])
    if (fills > manifest.seq_length_tokens).any():
        first = int(np.argmax(fills > manifest.seq_length_tokens))
        v.find(bounds_path, f"tokens of sequence {first}", f"at most {manifest.seq_length_tokens}", int(fills[first]))
    if int(cut.sum(dtype=np.int64)) != packs.tokens:
        v.find(samples_path, "tokens", packs.tokens, int(cut.sum(dtype=np.int64)))
