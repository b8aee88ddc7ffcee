"""One shard without its duplicates: the documents that stay as plain JSON lines, the others aside with what they are a copy of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import zstandard
from datatrove.pipeline.base import PipelineStep

from data_prep.clean.duplicates import STEPS
from data_prep.clean.filtering import ZSTD_LEVEL, filtered_path
from data_prep.clean.records import AppliedShard, ShardRecord, Tally
from data_prep.clean.shards import Shard
from data_prep.files import atomic_write, record_file
from data_prep.text_files import chunks, lines


@dataclass(frozen=True)
class ApplyStage:
    """What the last stage is made from; sent to every worker."""

    root: Path
    shards: tuple[Shard, ...]
    steps: tuple[str, ...]
    """Of STEPS, those that are switched on."""
    work: Path
    inputs: str


def final_path(root: Path, shard: Shard) -> Path:
    return root / "clean" / shard.source / f"{shard.name}.jsonl"


def duplicates_path(root: Path, shard: Shard) -> Path:
    return root / "clean" / shard.source / "duplicates" / f"{shard.name}.jsonl.zst"


def applied_record_path(work: Path, shard: Shard) -> Path:
    return work / "applied" / f"{shard.rank:05d}.json"


class ApplyShards(PipelineStep):
    """datatrove step without input: its rank says which shard."""

    type = "CLEAN"
    name = "documents that stay"

    def __init__(self, stage: ApplyStage):
        super().__init__()
        self.stage = stage

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        apply_shard(self.stage, self.stage.shards[rank])


def apply_shard(stage: ApplyStage, shard: Shard) -> None:
    """Write the shard's final files; its record, in the work folder, last."""
    filtered = ShardRecord.model_validate_json(filtered_path(stage.root, shard, "json").read_bytes())
    removals = np.load(stage.work / "removals" / f"{shard.rank:05d}.npy")
    tallies = {step: Tally() for step in stage.steps}
    kept, gone = final_path(stage.root, shard), duplicates_path(stage.root, shard)
    with (
        atomic_write(kept) as out,
        atomic_write(gone) as aside,
        zstandard.ZstdCompressor(ZSTD_LEVEL).stream_writer(aside, closefd=False) as packed,
    ):
        pending = iter(removals.tolist())
        next_removal = next(pending, None)
        for number, line in enumerate(_stored_lines(filtered_path(stage.root, shard, "kept.jsonl.zst"))):
            if next_removal is None or number != next_removal[0]:
                out.write(line + b"\n")
                continue
            _, kind, rank, place = next_removal
            next_removal = next(pending, None)
            document = orjson.loads(line)
            step, copy = STEPS[kind], stage.shards[rank]
            stays = f"{copy.source}/{copy.name}.jsonl:{place}"
            reason = "same_source" if copy.source == shard.source else f"of {copy.source}"
            entry = {"id": document["id"], "step": step, "reason": reason, "copy_of": stays, "text": document["text"]}
            packed.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))
            size = len(document["text"].encode())
            tallies[step].removed(size, reason, document["id"], document["text"], f"copy of {stays}")
    counts = {step: tally.count() for step, tally in tallies.items()}
    AppliedShard(
        inputs=stage.inputs,
        documents=filtered.documents - sum(c.removed_documents for c in counts.values()),
        bytes=filtered.bytes - sum(c.removed_bytes for c in counts.values()),
        steps=counts,
        file=record_file(kept),
        duplicates=record_file(gone),
    ).write(applied_record_path(stage.work, shard))


def _stored_lines(path: Path) -> Iterator[bytes]:
    for line in lines(chunks(path)):
        assert isinstance(line, bytes), f"{path}: a line longer than any that was read"
        yield line
