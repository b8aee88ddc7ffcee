"""A phase's views as Megatron's own blended data set, the same for the job that builds its index cache and the ranks that load it.

Imports megatron.core's data sets only. Everything that enters the names of Megatron's cache files comes from the views' manifest, and the
paths among it are relative to the data root: neither the layout of a job nor where the root is mounted changes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset

from data_prep.manifest import MixtureManifest
from training.token_ids import TokenIds

PhaseDataset = BlendedDataset | GPTDataset
"""Megatron returns the one member itself when a blend has one."""


@dataclass
class ViewConfig(GPTDatasetConfig):
    """GPTDatasetConfig, and where the paths of the blend begin."""

    data_root: str = ""


class ViewDataset(GPTDataset):
    """GPTDataset over a view named by its path below the data root; the name is part of the key of its cache files, the root is not."""

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: ViewConfig) -> IndexedDataset:
        return GPTDataset.build_low_level_dataset(str(Path(config.data_root) / dataset_path), config)


def blended(
    manifest: MixtureManifest, data_root: Path, cache: Path, *, build: bool, needed_here: Callable[[], bool] = lambda: True
) -> PhaseDataset | None:
    """Megatron's data set over the views of `manifest`, with its indices in the folder `cache`.

    With `build` False Megatron never builds: it maps the files that must be there (its --dataloader-fast-cache-load), every rank
    by itself, and FileNotFoundError says which is missing. None on ranks where `needed_here` is False.
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
