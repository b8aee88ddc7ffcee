"""Builds one rank's slice of a model in Megatron, without other ranks, and says what it allocates (`state`), hands to a stage with another
optimizer (`handed`) and saves for its backward pass (`saved`), how many micro batches it has in flight (`schedule`) and what it counts
(`flops`).

    python -m tests.recipes.slice_worker < JOBS.json     # a list of jobs, see `Job`; prints a list of results

A rank's arguments are those that training.arguments compiles, and Megatron's own `get_model` and `get_megatron_optimizer` build from them.
What is not real: process groups are torch's fake backend, which answers at once for ranks that do not exist. For `state` the "GPU" is torch's
meta device (tensors have shapes and storages have sizes, but no memory), and since Transformer Engine is not here, the order of its
parameters, which of them are FP8 and what its precision-aware Adam allocates are stand-ins; placing, buckets, padding and the optimizer
around it are Megatron's.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from training import cpu_backend, cpu_optimizer, fast_import


def to_meta(device: Any) -> Any:
    return "meta" if _to_cpu(device) is not device else device


_to_cpu = cpu_backend.to_cpu
cpu_backend.to_cpu = to_meta  # "cuda" is the meta device

with fast_import.quick_imports():
    cpu_backend.install()
    import torch
    import torch._dynamo  # once, and not in every rank: operations on meta tensors ask for it
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.enums import ModelType
    from megatron.core.fp8_utils import is_first_last_bf16_layer
    from megatron.core.optimizer import distrib_optimizer, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.training import global_vars
    from megatron.training import training as upstream
    from megatron.training.argument_utils import ArgumentGroupFactory
    from megatron.training.arguments import parse_and_validate_args
    from torch.testing._internal.distributed.fake_pg import FakeStore

    import model.spec
    from recipes.schema import Recipe
    from tests.recipes import fused_adam
    from training import token_ids
    from training.arguments import add_granite_arguments, compile_phase
    from training.one_rank import phase_model
cpu_optimizer.install()
token_ids.install(0)
# Help texts of 800 arguments, read from source code: a third of a second for every rank.
ArgumentGroupFactory._get_field_docstrings = lambda self, src_cfg_class: {}
logging.disable(logging.WARNING)  # Megatron logs every bucket


@dataclasses.dataclass
class Job:
    kind: str
    """state, handed, saved, schedule or flops."""
    recipe: dict[str, Any]
    stage: str
    rank: int
    transformer_engine: bool = False
    """Parameters in Transformer Engine's order."""
    fp8_parameters: list[int] | None = None
    """Matrices are FP8 parameters in all layers but this many at the start and the end; None: in none."""
    fp8: str | None = None
    """FP8 recipe that the optimizer is told of: Megatron takes no FP8 arguments without Transformer Engine."""
    documents_tokens: list[int] | None = None
    """Lengths of the documents of a batch (flops)."""


class NormInside(tensor_parallel.ColumnParallelLinear):
    """Stand-in for TELayerNormColumnParallelLinear: the norm's weight is registered before the matrix (transformer_engine/pytorch/module/
    layernorm_linear.py)."""

    def register_parameter(self, name: str, parameter: torch.nn.Parameter | None) -> None:
        if name == "weight":
            super().register_parameter("layer_norm_weight", torch.nn.Parameter(torch.empty(self.input_size)))
        super().register_parameter(name, parameter)


def _engine_layer(*given: Any) -> Any:
    layer = _local_layer(*given)
    layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp
    layer.self_attention.submodules.linear_qkv = NormInside
    layer.mlp.keywords["submodules"].linear_fc1 = NormInside
    return layer


_local_layer = model.spec._local_layer


def _type(self: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
    if dtype is not None:
        return _cpu_type(self, dtype, **kwargs)
    return _cpu_type(self).replace("torch.cuda.meta.", "torch.cuda.")


_cpu_type = torch.Tensor.type
torch.Tensor.type = _type


def storages_bytes(tensors: Any) -> int:
    """Sum over the storages behind `tensors`, each once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def rank_of(job: Job) -> tuple[Recipe, Any]:
    """The recipe and Megatron's arguments of this rank, in a world of fake process groups."""
    recipe = Recipe.model_validate(job.recipe)
    layout = recipe.phase[job.stage].parallel
    os.environ.update(WORLD_SIZE=str(layout.gpus), RANK=str(job.rank), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    sys.argv = ["pretrain", *compile_phase(recipe, job.stage, Path("run"))]
    if job.kind == "state":
        sys.argv.remove("--use-cpu-initialization")
        sys.argv.append("--init-model-with-meta-device")
    if recipe.optimizer.precision_aware:
        fused_adam.install()
    args = parse_and_validate_args(add_granite_arguments)
    if job.fp8 is not None:
        args.fp8_recipe = job.fp8
    global_vars._GLOBAL_ARGS = args
    dist.init_process_group("fake", store=FakeStore(), rank=job.rank, world_size=layout.gpus)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    return recipe, args


def state(job: Job) -> dict[str, Any]:
    """Bytes of the rank's parameter and gradient buffers, of the optimizer's state (main weights, moments) and of the copies of gradients that
    it makes, and which rank it is."""
    recipe, args = rank_of(job)
    torch.Tensor.normal_ = lambda self, *_, **__: self  # on the meta device it would import torch._dynamo to do nothing
    if job.transformer_engine:
        model.spec._local_layer = _engine_layer

    def provide(**kwargs: Any) -> Any:
        chunk = phase_model(recipe, job.stage, args)(**kwargs)
        if job.fp8_parameters is not None:
            start, end = job.fp8_parameters
            config = SimpleNamespace(
                first_last_layers_bf16=start + end > 0,
                num_layers_at_start_in_bf16=start,
                num_layers_at_end_in_bf16=end,
                num_layers=args.num_layers,
            )
            for layer in chunk.decoder.layers:
                if not is_first_last_bf16_layer(config, layer.layer_number - 1):
                    attention, mlp = layer.self_attention, layer.mlp
                    for linear in (attention.linear_proj, attention.linear_qkv, mlp.linear_fc1, mlp.linear_fc2):
                        weight = linear.weight
                        weight.is_fp8 = True
                        # As Transformer Engine's, which keep what they were initialised with until the optimizer has taken it.
                        weight.get_high_precision_init_val = functools.partial(torch.empty_like, weight)
                        weight.clear_high_precision_init_val = lambda: None
        return chunk

    def is_fp8(parameter: torch.Tensor) -> bool:
        return getattr(parameter, "is_fp8", False)

    placed = []
    param_and_grad_buffer._param_uses_quantized_storage = is_fp8
    param_and_grad_buffer.is_float8tensor = is_fp8
    param_and_grad_buffer.modify_underlying_storage = lambda parameter, data: placed.append(data)
    distrib_optimizer.DistributedOptimizer._is_distopt_quantized_param = staticmethod(is_fp8)

    chunks = upstream.get_model(provide, ModelType.encoder_or_decoder)
    config, overrides = upstream.get_megatron_optimizer_config(args)
    optimizer = get_megatron_optimizer(config, chunks, config_overrides=overrides, use_gloo_process_groups=False)
    buffers = [buffer for chunk in chunks for buffer in chunk.buffers]
    inside = {b.param_data.untyped_storage()._cdata for b in buffers}
    reduced = {b.grad_data.untyped_storage()._cdata for b in buffers}
    kept, gradients = [], []
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        one.init_state_fn(one.optimizer, one.config)
        kept += [tensor for values in one.optimizer.state.values() for tensor in values.values()]
        kept += getattr(one.optimizer, "scales", {}).values()
        stepped = [p for group in one.optimizer.param_groups for p in group["params"]]
        if args.bf16:  # of fp32 weights, and where the optimizer has main weights of its own, these are parts of the buffers
            kept += [p for p in stepped if p.untyped_storage()._cdata not in inside]
        one._copy_model_grads_to_main_grads()
        read = "decoupled_grad" if one.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 else "grad"
        gradients += [getattr(p, read) for p in stepped]
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    outside = [p for p in parameters if not is_fp8(p) and p.untyped_storage()._cdata not in inside]
    return {
        "parameters_bytes": storages_bytes(b.param_data for b in buffers),
        "gradients_bytes": storages_bytes(b.grad_data for b in buffers),
        "optimizer_bytes": storages_bytes(kept),
        "gradient_copies_bytes": storages_bytes(g for g in gradients if g.untyped_storage()._cdata not in reduced),
        "outside_bytes": storages_bytes(outside),
        "fp8_tensors": len(placed),
        "data_rank": parallel_state.get_data_parallel_rank(with_context_parallel=True),
        "pipeline_rank": parallel_state.get_pipeline_model_parallel_rank(),
        "buckets": sum(len(buffer.buckets) for buffer in buffers),
    }


def handed(job: Job) -> dict[str, Any]:
    """What the optimizer of the recipe saves, an optimizer all in fp32 loads and saves again, and the first loads back.

    `dtypes`: of all that is saved. `lost_on_the_way`, `lost_on_the_way_back`: largest relative difference of main weights and moments.
    """
    recipe, args = rank_of(job)
    cpu_backend.to_cpu = _to_cpu
    chunks = upstream.get_model(phase_model(recipe, job.stage, args), ModelType.encoder_or_decoder)
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    weights = chunks[0].sharded_state_dict(metadata=metadata)
    config, overrides = upstream.get_megatron_optimizer_config(args)
    fp32 = {name: torch.float32 for name in ("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")}
    plain = dataclasses.replace(config, use_precision_aware_optimizer=False, **fp32)

    def built(config: Any) -> Any:
        made = get_megatron_optimizer(config, chunks, config_overrides=overrides, use_gloo_process_groups=False)
        one = getattr(made, "chained_optimizers", [made])[0]
        one.init_state_fn(one.optimizer, one.config)
        return one

    def read(one: Any) -> dict[str, torch.Tensor]:
        state = one.sharded_state_dict(weights, metadata=metadata)["param_state"]
        return {tensor.key: tensor.data.clone() for values in state.values() for tensor in values.values()}

    def write(one: Any, tensors: dict[str, torch.Tensor]) -> None:
        template = one.sharded_state_dict(weights, is_loading=True, metadata=metadata)
        for values in template["param_state"].values():
            for name, tensor in values.items():
                values[name] = tensors[tensor.key].clone()
        one.load_state_dict(template)

    def lost(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
        assert before.keys() == after.keys()
        return max(float(((after[key] - value).abs() / value.abs().max()).max()) for key, value in before.items())

    first, second = built(config), built(plain)
    drawn = {key: torch.rand_like(value) + 0.5 for key, value in read(second).items()}
    write(first, drawn)
    saved = read(first)
    write(second, saved)
    way = lost(saved, read(second))
    write(second, drawn)
    write(first, read(second))
    return {
        "keys": len(saved),
        "dtypes": sorted({str(value.dtype) for value in saved.values()}),
        "lost_on_the_way": way,
        "lost_on_the_way_back": lost(drawn, read(first)),
    }


def saved(job: Job) -> dict[str, Any]:
    """Bytes that autograd keeps of one micro batch's forward pass through one model chunk, each storage once; parameters are not counted.

    The rank computes with what its fake process groups give it, which is nonsense of the right shape.
    """
    recipe, args = rank_of(job)
    cpu_backend.to_cpu = _to_cpu
    phase = recipe.phase[job.stage]
    layout = phase.parallel
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    chunk = phase_model(recipe, job.stage, args)(pre_process=first, post_process=last)
    if args.bf16:
        chunk.bfloat16()
    chunk.train()
    samples, tokens = layout.micro_batch_samples, phase.seq_length_tokens // layout.context
    ids = torch.randint(recipe.model.vocab_size, (samples, tokens))
    if not first:
        inner = tokens // layout.tensor if layout.sequence_parallel else tokens
        dtype = torch.bfloat16 if args.bf16 else torch.float32
        chunk.set_input_tensor(torch.zeros(inner, samples, recipe.model.hidden_size, dtype=dtype, requires_grad=True))
    own = {p.untyped_storage()._cdata for p in chunk.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (key := tensor.untyped_storage()._cdata) not in own:
            kept[key] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        chunk(ids, torch.arange(tokens).expand(samples, -1), None, labels=ids)
    return {
        "saved_bytes": storages_bytes(kept.values()),
        "tensors": sorted(([*t.shape], str(t.dtype), t.untyped_storage().nbytes()) for t in kept.values()),
    }


def schedule(job: Job) -> dict[str, Any]:
    """Most model chunks at once that have run forward and not yet backward, while Megatron's own schedule runs one step on this stage."""
    recipe, args = rank_of(job)
    cpu_backend.to_cpu = _to_cpu
    phase = recipe.phase[job.stage]
    layout, chunks = phase.parallel, []
    for vp_stage in range(layout.virtual_pipeline or 1):
        place = {"ignore_virtual": False, "vp_stage": vp_stage if layout.virtual_pipeline else None}
        first, last = parallel_state.is_pipeline_first_stage(**place), parallel_state.is_pipeline_last_stage(**place)
        chunk = phase_model(recipe, job.stage, args)(pre_process=first, post_process=last, vp_stage=place["vp_stage"])
        chunk.model_type, chunk.vp_stage = ModelType.encoder_or_decoder, place["vp_stage"]
        chunk.config.batch_p2p_comm = False
        chunks.append(chunk.train())
    ids = torch.zeros(layout.micro_batch_samples, phase.seq_length_tokens, dtype=torch.int64)
    running = most = 0

    def forward_step(iterator: Any, chunk: Any) -> tuple[torch.Tensor, Any]:
        nonlocal running, most
        output = chunk(ids, torch.arange(ids.size(1)).expand_as(ids), None, labels=ids)
        running += 1
        most = max(most, running)

        def began(gradient: torch.Tensor) -> None:
            nonlocal running
            running -= 1

        output.register_hook(began)
        return output, lambda losses: (losses.sum(), {})

    micro_batches = phase.global_batch_samples // (layout.data * layout.micro_batch_samples)
    sizes = {"num_microbatches": micro_batches, "seq_length": ids.size(1), "micro_batch_size": ids.size(0)}
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[None] * len(chunks) if len(chunks) > 1 else None,
        model=chunks if len(chunks) > 1 else chunks[0],
        forward_only=False,
        **sizes,
    )
    return {"in_flight": most, "left": running}


def flops(job: Job) -> dict[str, Any]:
    """Megatron's own count for one global batch, and for a batch of documents that see only themselves."""
    recipe, args = rank_of(job)
    batch = recipe.phase[job.stage].global_batch_samples
    lengths = job.documents_tokens or []
    return {
        "batch": upstream.num_floating_point_operations(args, batch),
        "documents": upstream.num_floating_point_operations(args, batch, sum(n * n for n in lengths), sum(lengths)),
    }


def main() -> int:
    torch.set_num_threads(1)
    out = []
    for values in json.load(sys.stdin):
        read, write = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(read)
            with os.fdopen(write, "w") as f:
                job = Job(**values)
                json.dump(
                    {"state": state, "handed": handed, "saved": saved, "schedule": schedule, "flops": flops}[job.kind](job), f
                )
            fast_import.leave(0)
        os.close(write)
        with os.fdopen(read) as f:
            text = f.read()
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            return 1
        out.append(json.loads(text))
    json.dump(out, sys.__stdout__)
    return 0


if __name__ == "__main__":
    real = os.dup(1)
    os.dup2(2, 1)  # what Megatron prints is no result
    sys.__stdout__ = os.fdopen(real, "w")
    sys.exit(main())
