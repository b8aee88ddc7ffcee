"""Records which samples really went into each optimizer step, so that the ledger can be recounted from what was consumed.

Off unless the environment variable QUARRY_RECORD_SAMPLES is set: a line per step and data-parallel rank is nothing in a test and tens of
gigabytes over trillions of tokens. It changes no number of the training and no digest of the stage.

    stages/<stage>/samples/from_<step>_rank_<data-parallel rank>.jsonl     <step>: of the checkpoint that the attempt started from
        {"step": 8, "ranks": 2, "skipped": false, "micro_batches": [[[<number of the source>, "<digest>"], ...], ...]}

A sample's digest is taken where the model gets its batch, of the tokens and labels of the whole sequence. The source's number is the
one that Megatron's blend attached to the sample, in the manifest's order.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from training.files import read_json_lines

VARIABLE = "QUARRY_RECORD_SAMPLES"
FOLDER = "samples"
DIGEST_BYTES = 16


def sample_digest(tokens: np.ndarray, labels: np.ndarray) -> str:
    """BLAKE2b of a sample: tokens [s] and labels [s], as little-endian int32."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for array in (tokens, labels):
        digest.update(np.ascontiguousarray(array, dtype="<i4"))
    return digest.hexdigest()


def asked_for() -> bool:
    return os.environ.get(VARIABLE, "") not in ("", "0")


class SampleRecorder:
    """One rank's part. A rank that does not compute the loss, or repeats another's data, records nothing."""

    def __init__(self, stage_dir: Path, loaded_step: int) -> None:
        """Collective: every rank of the job makes one, at the same time, before its first step."""
        import torch
        from megatron.core import parallel_state as mpu
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        self.records = (
            mpu.is_pipeline_last_stage(ignore_virtual=True)
            and mpu.get_tensor_model_parallel_rank() == 0
            and mpu.get_context_parallel_rank() == 0
        )
        self._ranks = mpu.get_data_parallel_world_size()
        # Megatron may run a step again to tell a broken GPU from broken training: its last run is the one that counts.
        self._micro_batches: deque[list[tuple[int, str]]] = deque(maxlen=get_num_microbatches())
        folder = stage_dir / FOLDER
        if torch.distributed.get_rank() == 0:
            folder.mkdir(exist_ok=True)
            for path in folder.glob("from_*.jsonl"):
                if _start(path) >= loaded_step:
                    path.unlink()  # of an attempt whose steps are taken again now, maybe in another layout
        torch.distributed.barrier()
        if self.records:
            path = folder / f"from_{loaded_step:07d}_rank_{mpu.get_data_parallel_rank():05d}.jsonl"
            self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 (closed with the process)

    def add(self, sample: dict[str, Any]) -> None:
        """A micro batch as the data loader gives it: tokens and labels [b, s] on the host, dataset_id [b] where sources are blended."""
        if not self.records:
            return
        tokens, labels = sample["tokens"].numpy(), sample["labels"].numpy()
        sources = sample["dataset_id"].tolist() if "dataset_id" in sample else [0] * len(tokens)
        self._micro_batches.append([(int(s), sample_digest(t, la)) for s, t, la in zip(sources, tokens, labels, strict=True)])

    def commit(self, step: int, *, skipped: bool) -> None:
        """The optimizer has taken `step` with the micro batches added since the last commit, or skipped it for a bad gradient."""
        if not self.records:
            return
        assert len(self._micro_batches) == self._micro_batches.maxlen, "a step without all of its micro batches"
        line = {"step": step, "ranks": self._ranks, "skipped": skipped, "micro_batches": list(self._micro_batches)}
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
        self._file.flush()  # survives a kill of this process
        self._micro_batches.clear()


def _start(path: Path) -> int:
    return int(path.name.split("_")[1])


def read_consumed(stage_dir: Path) -> dict[int, list[tuple[int, str]]]:
    """Step -> (number of the source, digest) of every sample of that step, in the order of the blend.

    Steps that were taken again after a kill count once, as in the model that was handed off. ValueError for a step that not every
    rank has recorded.
    """
    steps: dict[int, dict[int, dict[str, Any]]] = {}
    files = sorted((stage_dir / FOLDER).glob("from_*.jsonl"))
    for start in sorted({_start(path) for path in files}):
        # What was trained after this attempt's checkpoint by an earlier attempt is not in the model.
        steps = {step: lines for step, lines in steps.items() if step <= start}
        for path in files:
            if _start(path) == start:
                rank = int(path.stem.split("_")[3])
                for line in read_json_lines(path):
                    steps.setdefault(line["step"], {})[rank] = line
    consumed: dict[int, list[tuple[int, str]]] = {}
    for step, lines in sorted(steps.items()):
        ranks = next(iter(lines.values()))["ranks"]
        if sorted(lines) != list(range(ranks)):
            raise ValueError(f"{stage_dir / FOLDER}: step {step} was recorded by ranks {sorted(lines)} of {ranks}")
        # Megatron's sampler deals each micro batch to the ranks in turn.
        in_turn = zip(*(lines[rank]["micro_batches"] for rank in range(ranks)), strict=True)
        consumed[step] = [(source, digest) for dealt in in_turn for batch in dealt for source, digest in batch]
    return consumed
