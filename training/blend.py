"""A phase's views as Megatron's own blended data set, the same for the job that builds its index cache and the ranks that load it.

Imports megatron.core's data sets only. Everything that enters the names of Megatron's cache files comes from the views' manifest, and the
paths among it are relative to the data root: neither the layout of a job nor where the root is mounted changes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset

from data_prep.manifest import MixtureManifest
from training.documents import POSITIONS_KEY, positions_and_loss_mask
from training.token_ids import TokenIds

PhaseDataset = BlendedDataset | GPTDataset
"""Megatron returns the one member itself when a blend has one."""


@dataclass
class ViewConfig(GPTDatasetConfig):
    """GPTDatasetConfig, and where the paths of the blend begin."""

    data_root: str = ""
    documents_apart: bool = False
    """Samples say where their documents begin, and have no loss where one would be predicted from another."""


class ViewDataset(GPTDataset):
    """GPTDataset over a view named by its path below the data root; the name is part of the key of its cache files, the root is not."""

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: ViewConfig) -> IndexedDataset:
        return GPTDataset.build_low_level_dataset(str(Path(config.data_root) / dataset_path), config)

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        """Tokens, labels [s] int64, loss_mask [s] float32 and position_ids [s] int64; with documents_apart instead of the last the
        places in the documents [s] int32 (documents.POSITIONS_KEY).

        Megatron's own inter_document_masking keeps the loss of predicting a document's first token from another document's last, and
        cannot tell whose the label of a sample's last token is.
        """
        if not self.config.documents_apart:
            return super().__getitem__(idx)
        text, _, lengths = self._query_document_sample_shuffle_indices(idx)
        positions, loss_mask = positions_and_loss_mask(np.asarray(lengths))
        assert len(positions) == self.config.sequence_length, "Megatron's training samples are whole"
        return {
            "tokens": torch.from_numpy(text[:-1]),
            "labels": torch.from_numpy(text[1:]),
            "loss_mask": torch.from_numpy(loss_mask),
            POSITIONS_KEY: torch.from_numpy(positions),
        }


def blended(
    manifest: MixtureManifest,
    data_root: Path,
    cache: Path,
    *,
    build: bool,
    needed_here: Callable[[], bool] = lambda: True,
    documents_apart: bool = False,
) -> PhaseDataset | None:
    """Megatron's data set over the views of `manifest`, with its indices in the folder `cache`.

    With `build` False Megatron never builds: it maps the files that must be there (its --dataloader-fast-cache-load), every rank
    by itself, and FileNotFoundError says which is missing. None on ranks where `needed_here` is False. `documents_apart` changes what
    a sample says of its tokens, not which they are: the indices are the same.
    """
    config = ViewConfig(
        random_seed=manifest.seed,
        sequence_length=manifest.seq_length_tokens,
        blend_per_split=[
            ([s.prefix for s in manifest.sources.values()], [s.weight for s in manifest.sources.values()]),
            None,
            None,
        ],
        path_to_cache=str(cache),
        fast_cache_load=not build,
        data_root=str(data_root),
        documents_apart=documents_apart,
        # Not the run's tokenizer, whose size is the model's: a larger embedding reads the same samples.
        tokenizer=TokenIds(manifest.tokenizer.vocab_size, manifest.tokenizer.eod_id),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train, _, _ = BlendedMegatronDatasetBuilder(ViewDataset, [manifest.samples, 0, 0], needed_here, config).build()
    return train


def members(dataset: PhaseDataset) -> list[GPTDataset]:
    """The data sets of the sources, in the manifest's order."""
    return list(dataset.datasets) if isinstance(dataset, BlendedDataset) else [dataset]
