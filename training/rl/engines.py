"""Which rollout engine a job gets, and how the weights reach one that is a server."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.utils import unwrap_model

from data_prep.files import write_json
from data_prep.tokenizer import Tokenizer, describe, write_hf_tokenizer
from model.convert import export
from training.rl.engine import RolloutEngine
from training.rl.job import Job
from training.rl.rollout import MegatronEngine


def build_engine(job: Job, model: list[Any], tokenizer: Tokenizer, stage_dir: Path) -> RolloutEngine:
    """The engine that `job.grpo.rollout` names, for this rank's `model`."""
    rollout = job.grpo.rollout
    if rollout.engine == "megatron":
        return MegatronEngine(model, rollout, seed=job.seed, end_id=tokenizer.eod_id)
    from training.rl.vllm import VllmClient, VllmEngine

    speaks = torch.distributed.get_rank() == mpu.get_model_parallel_src_rank()
    client = VllmClient(rollout, seed=job.seed, end_id=tokenizer.eod_id) if speaks else None
    return VllmEngine(client, weights_writer(job, model, tokenizer, stage_dir))


def weights_writer(job: Job, model: list[Any], tokenizer: Tokenizer, stage_dir: Path) -> Callable[[int], None]:
    """A collective function that writes the model as the server's Hugging Face folder, by way of a distributed checkpoint.

    Twice through the file system: 16 GB each way for 8B. Simple and right first; vLLM's NCCL transfer would be faster.
    """
    server = job.grpo.rollout.server
    assert server is not None
    target, scratch = Path(server.weights_folder), stage_dir / "rollout_weights"

    def write(step: int) -> None:
        folder = scratch / f"iter_{step:07d}"
        first = torch.distributed.get_rank() == 0
        if first:
            shutil.rmtree(scratch, ignore_errors=True)
            folder.mkdir(parents=True)
        torch.distributed.barrier()
        (core,) = unwrap_model(model)
        dist_checkpointing.save({"model": core.sharded_state_dict()}, str(folder))
        if first:
            write_json(
                scratch / "model.json",
                {
                    "format": "quarry.model/1",
                    "model": job.model.model_dump(mode="json"),
                    "rope_base": job.grpo.rope_base,
                    "max_position_tokens": job.grpo.seq_length_tokens,
                    "tokenizer": describe(tokenizer),
                },
            )
            export(
                folder,
                target,
                dtype=job.precision.dtype,
                write_tokenizer=lambda f: write_hf_tokenizer(tokenizer, f),
                replace=True,
            )
            shutil.rmtree(scratch)
        torch.distributed.barrier()

    return write
