"""The training data of a phase: Megatron's blended data set over the views that data_prep made, and the ledger of what was drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from megatron.core import parallel_state as mpu
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.utils import get_batch_on_this_cp_rank
from megatron.training import get_args

from data_prep.index_caches import cache_path
from data_prep.manifest import MixtureManifest
from recipes.document_packing import multiple_tokens
from training import documents
from training.blend import PhaseDataset, blended
from training.recorder import SampleRecorder

recorder: SampleRecorder | None = None
"""Told of every micro batch that is trained on; None unless that was asked for. Megatron's own state is process-global, too."""

# BlendedDataset adds a dataset_id of another shape, which context parallelism cannot slice.
BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids")


def reads_data(vp_stage: int | None = None) -> bool:
    """Only the first and the last pipeline stage look at tokens and labels."""
    ignore_virtual = vp_stage is None
    return mpu.is_pipeline_first_stage(ignore_virtual=ignore_virtual, vp_stage=vp_stage) or mpu.is_pipeline_last_stage(
        ignore_virtual=ignore_virtual, vp_stage=vp_stage
    )


def load_dataset(
    manifest: MixtureManifest, data_root: Path, vp_stage: int | None = None, *, documents_apart: bool = False
) -> PhaseDataset | None:
    """Megatron's data set over the phase's views, with the index cache that `quarry prep` built; builds nothing.

    Every tensor-parallel rank maps the files itself, so no batch is broadcast. Returns None on ranks that read no data; where documents
    are kept apart attention has to know of them on every pipeline stage, and all ranks read.
    """
    cache = cache_path(data_root, manifest)
    return blended(
        manifest,
        data_root,
        cache,
        build=False,
        needed_here=lambda: documents_apart or reads_data(vp_stage),
        documents_apart=documents_apart,
    )


def count_drawn(dataset: PhaseDataset, manifest: MixtureManifest, consumed_samples: int) -> dict[str, dict[str, int]]:
    """What the first `consumed_samples` samples of `dataset` were drawn from: {source: {"samples", "tokens"}}, exactly."""
    names = list(manifest.sources)
    if isinstance(dataset, BlendedDataset):
        counts = np.bincount(dataset.dataset_index[:consumed_samples], minlength=len(names))
    else:  # Megatron returns the data set itself when the blend has one member
        counts = np.array([consumed_samples])
    return {
        name: {"samples": int(n), "tokens": int(n) * manifest.seq_length_tokens} for name, n in zip(names, counts, strict=True)
    }


def get_batch(data_iterator: Any, vp_stage: int | None = None) -> dict[str, Any]:
    """The next micro batch of this rank: tokens, labels, position_ids [b, s/cp] int64, loss_mask [b, s/cp] float32, and `packed`.

    With context parallelism a rank holds chunks r and 2cp-1-r of the sequence (Megatron's zig-zag order). In a phase that keeps documents
    apart the micro batch is one packed sequence, [1, T/cp] with T >= b * s (training/documents.py), and `packed` says where its
    documents begin; None where all tokens of a sample see each other, as held-out sequences do in every phase.
    """
    args = get_args()
    if not (args.documents_apart or reads_data(vp_stage)):
        return dict.fromkeys((*BATCH_KEYS, "packed"))
    sample = next(data_iterator)
    if recorder is not None and mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage):
        recorder.add(sample)  # before context parallelism cuts the sequence
    if documents.POSITIONS_KEY in sample:
        multiple, grain = multiple_tokens(args.context_parallel_size), documents.grain_tokens(args)
        whole, bounds = documents.pack(sample, multiple, grain)
        batch, packed = documents.on_this_rank(whole, bounds, restart_positions=args.restart_positions)
        return {**batch, "packed": packed}
    batch = {key: sample[key].cuda(non_blocking=True) for key in BATCH_KEYS}
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
    return {**batch, "packed": None}
