"""Runs jobs on forked gloo ranks, each job in a layout of its own, in one process tree, so that torch and Megatron are imported once.

    stage_server.start([FOLDER], OUTPUT, program="tests.model.rank_worker:main")

FOLDER/jobs.json: a list of jobs, see `Job`; FOLDER/ids.pt: token ids [B, S]

Writes what the jobs ask for: logits, gradients, checkpoints.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

from training import cpu_backend, cpu_optimizer, fast_import

with fast_import.quick_imports():
    cpu_backend.install()
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.utils import get_batch_on_this_cp_rank

    from model import builder, config
    from recipes.schema import Model
cpu_optimizer.install()
logging.disable(logging.WARNING)  # Megatron logs every bucket
fast_import.results_stay_in_process()


@dataclasses.dataclass
class Job:
    name: str
    model: dict[str, Any]
    ranks: int = 1
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    context: int = 1
    sequence_parallel: bool = False
    dtype: str = "float32"
    seed: int = 1
    load: str | None = None
    """Checkpoint folder to start from."""
    load_optimizer: bool = False
    train_steps: int = 0
    save: str | None = None
    """Checkpoint folder to write at the end, with the optimizer if it was trained or loaded."""
    sharding: str = "fully_reshardable"
    """How the optimizer's state is saved."""
    logits: bool = False
    decode_from: int | None = None
    """Logits again, with a key/value cache: this many tokens at once, three together, then one by one."""
    gradients: bool = False
    """Gradients, and the mean loss."""
    recompute: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further fields of TransformerConfig."""
    context_hierarchy: list[int] | None = None
    loss_chunk_tokens: int | None = None
    check: str | None = None
    """MODULE:FUNCTION that is called with the folder instead of all this, on every rank."""


def forward_step(iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
    ids = next(iterator)
    batch = {"tokens": ids, "labels": ids.roll(-1, 1), "position_ids": torch.arange(ids.size(1)).expand(ids.size(0), -1)}
    if parallel_state.get_context_parallel_world_size() > 1:
        batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group())
    output = model(batch["tokens"], batch["position_ids"].contiguous(), None, labels=batch["labels"].contiguous())

    def loss(per_token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
        total = per_token.float().sum()
        return total, torch.tensor(per_token.numel(), dtype=torch.int), {"loss": total.detach() / per_token.numel()}

    return output, loss


def forward_for_logits(iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
    ids = next(iterator)
    batch = {"tokens": ids, "position_ids": torch.arange(ids.size(1)).expand(ids.size(0), -1)}
    if parallel_state.get_context_parallel_world_size() > 1:
        batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group())
    output = model(batch["tokens"], batch["position_ids"].contiguous(), None)

    def collect(logits: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
        return tensor_parallel.gather_from_tensor_model_parallel_region(logits).detach().clone()

    return output, collect


def run(job: Job, folder: Path) -> None:
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=job.tensor,
        pipeline_model_parallel_size=job.pipeline,
        virtual_pipeline_model_parallel_size=job.virtual_pipeline,
        context_parallel_size=job.context,
        hierarchical_context_parallel_sizes=job.context_hierarchy,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(job.seed)
    torch.manual_seed(job.seed)
    if job.check:
        module, function = job.check.split(":")
        getattr(importlib.import_module(module), function)(folder)
        dist.destroy_process_group()
        return
    ids = torch.load(folder / "ids.pt", weights_only=True)
    model = Model.model_validate(job.model)
    dtype = getattr(torch, job.dtype)
    recompute = (
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1} if job.recompute else {}
    )
    transformer = config.transformer_config(
        model, tensor=job.tensor, pipeline=job.pipeline, virtual_pipeline=job.virtual_pipeline, context=job.context,
        sequence_parallel=job.sequence_parallel, dtype=dtype, **recompute, **job.options)  # fmt: skip
    transformer.finalize_model_grads_func = finalize_model_grads
    transformer.batch_p2p_comm = False
    groups = ProcessGroupCollection.use_mpu_process_groups()
    chunks = []
    for vp_stage in range(job.virtual_pipeline or 1):
        stage = {"vp_stage": vp_stage if job.virtual_pipeline else None}
        built = builder.build(
            transformer, model, rope_base=10000.0, max_sequence_length=ids.size(1), pg_collection=groups, vp_stage=stage["vp_stage"],
            loss_chunk_tokens=job.loss_chunk_tokens,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, **stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, **stage))  # fmt: skip
        built.model_type = "encoder_or_decoder"
        built.vp_stage = stage["vp_stage"]
        chunks.append(built.to(dtype))
    with_optimizer = job.train_steps > 0 or job.load_optimizer
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=with_optimizer, grad_reduce_in_fp32=True)
    ddp = [DistributedDataParallel(transformer, ddp_config, c) for c in chunks]
    optimizer = None
    if with_optimizer:
        options = OptimizerConfig(
            optimizer="adam", lr=1e-2, min_lr=0.0, weight_decay=0.1, clip_grad=1.0, use_distributed_optimizer=True,
            bf16=dtype is torch.bfloat16, params_dtype=dtype)  # fmt: skip
        optimizer = get_megatron_optimizer(options, ddp)
        transformer.grad_scale_func = optimizer.scale_loss

    metadata = {
        "distrib_optim_sharding_type": job.sharding, "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False, "chained_optim_avoid_prefix": True}  # fmt: skip

    def state_dict(*, is_loading: bool, optimizer: Any) -> dict[str, Any]:
        full = metadata | {"dp_cp_group": groups.dp_cp}
        state = {f"model{i}" if len(chunks) > 1 else "model": c.sharded_state_dict(metadata=full) for i, c in enumerate(chunks)}
        if optimizer is not None:
            state["optimizer"] = optimizer.sharded_state_dict(state, metadata=full, is_loading=is_loading)
        return state

    if job.load:
        wanted = state_dict(is_loading=True, optimizer=optimizer if job.load_optimizer else None)
        loaded = dist_checkpointing.load(wanted, job.load, verify_integrity=True)
        for i, chunk in enumerate(chunks):
            chunk.load_state_dict(loaded[f"model{i}" if len(chunks) > 1 else "model"])
        if job.load_optimizer:
            optimizer.load_state_dict(loaded["optimizer"])
        elif optimizer is not None:
            optimizer.reload_model_params()

    forward_backward = get_forward_backward_func()
    common = {"num_microbatches": max(1, job.pipeline), "seq_length": ids.size(1), "micro_batch_size": ids.size(0)}

    def iterators(values: torch.Tensor) -> Any:
        return (
            [iter([values] * common["num_microbatches"]) for _ in ddp]
            if len(ddp) > 1
            else iter([values] * common["num_microbatches"])
        )

    rank = f"{groups.tp.rank()}{groups.pp.rank()}{groups.cp.rank()}"
    if job.logits:
        for c in ddp:
            c.eval()
        with torch.no_grad():
            out = forward_backward(
                forward_step_func=forward_for_logits, data_iterator=iterators(ids), model=ddp, forward_only=True,
                collect_non_loss_data=True, **common)  # fmt: skip
        if parallel_state.is_pipeline_last_stage():
            torch.save(out[0], folder / f"{job.name}.logits.{rank}.pt")
        for c in ddp:
            c.train()
    if job.decode_from is not None:
        context = StaticInferenceContext(max_batch_size=ids.size(0), max_sequence_length=ids.size(1))
        ends = [job.decode_from, *range(job.decode_from + 3, ids.size(1) + 1)]
        chunks[0].eval()
        parts = []
        with torch.no_grad():
            for begin, end in zip([0, *ends], ends, strict=False):
                positions = torch.arange(begin, end).expand(ids.size(0), -1)
                parts.append(
                    chunks[0](ids[:, begin:end], positions, None, inference_context=context, runtime_gather_output=True)
                )
                context.increment_sequence_len_offset(end - begin)
        torch.save(torch.cat(parts, dim=1), folder / f"{job.name}.decoded.{rank}.pt")
        chunks[0].train()
    if job.gradients:
        for c in ddp:
            c.zero_grad_buffer()
        reports = forward_backward(
            forward_step_func=forward_step, data_iterator=iterators(ids), model=ddp, forward_only=False, **common
        )
        if parallel_state.is_pipeline_last_stage():
            torch.save(reports[0]["loss"], folder / f"{job.name}.loss.{rank}.pt")
        for number, c in enumerate(ddp):
            torch.save(
                {n: p.main_grad.clone() for n, p in c.module.named_parameters()},
                folder / f"{job.name}.grads.{rank}.{number}.pt",
            )
    for step in range(job.train_steps):
        for c in ddp:
            c.zero_grad_buffer()
        optimizer.zero_grad()
        forward_backward(
            forward_step_func=forward_step, data_iterator=iterators(ids.roll(step + job.seed, 1)), model=ddp, forward_only=False,
            **common)  # fmt: skip
        updated, _, _ = optimizer.step()
        assert updated
    if job.save:
        Path(job.save).mkdir(parents=True, exist_ok=True)
        state = state_dict(is_loading=False, optimizer=optimizer) | {"iteration": job.train_steps, "checkpoint_version": 3.0}
        dist_checkpointing.save(state, job.save, content_metadata=metadata, verify_integrity=True)
    dist.barrier()
    dist.destroy_process_group()


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0])
    os.environ.update(MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    for values in json.loads((folder / "jobs.json").read_text()):
        job = Job(**values)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(s.getsockname()[1])
        os.environ.update(WORLD_SIZE=str(job.ranks), LOCAL_WORLD_SIZE=str(job.ranks))
        children = []
        for rank in range(job.ranks):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
                    torch.set_num_threads(1)
                    run(job, folder)
                    code = 0
                except BaseException:
                    print(f"job {job.name} rank {rank}:", file=sys.stderr)
                    traceback.print_exc()
                fast_import.leave(code)
            children.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        if any(codes):
            print(f"job {job.name}: exit codes {codes}", file=sys.stderr)
            return 1
    return 0
