"""Memory of one rank before anything is started: what Megatron allocates for parameters, gradients and optimizer, to the byte, and an
account of activations, logits and communication.

Parameters and gradients lie in the flat buffers of Megatron's DistributedDataParallel, whose padding and buckets are computed here as there
(megatron-core 0.19.2: core/optimizer/param_layout.py, core/optimizer/distrib_optimizer.py `_compute_per_buffer_param_layout`,
training/training.py `get_model`). tests/recipes/test_against_megatron.py builds the rank's slice in Megatron and compares. State of the
precision-aware optimizer is Transformer Engine's (2.17.1: pytorch/optimizers/fused_adam.py `initialize_state`, `step`), whose allocations a
stand-in repeats there; nothing of it was measured on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from recipes import activations
from recipes.job_options import Optimizer, Parallel, Precision
from recipes.schema import Model

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
SCALE_OF_STATE_BYTES = 4
"""Transformer Engine's scale of a tensor of the optimizer's state that is not in fp32."""
BUCKET_PARAMETERS = 40_000_000
"""Least size of a bucket where the gradient reduction overlaps; 1e6 per data-parallel rank if that is more."""
SCALE_BYTES = {"blockwise": 4, "mxfp8": 1}
SCALED_VALUES = {"blockwise": 128 * 128, "mxfp8": 32}
"""Weights that share one scale of SCALE_BYTES; the other recipes have one scale per tensor."""
NCCL_BYTES = 1_000_000_000
"""Allowance for NCCL's own buffers, which no allocator of ours sees: [assumed: some 10 communicators of a layout x about 100 MB each]."""
FRAGMENTATION_SHARE = 0.05
"""Part of what comes and goes (activations, logits, workspace) that the caching allocator holds in blocks that nothing fits
[assumed: PyTorch with expandable segments keeps a few percent]."""


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one rank at its fullest moment of a training step."""

    pipeline_rank: int
    parameters_bytes: int
    """Megatron's parameter buffers."""
    gradients_bytes: int
    optimizer_bytes: int
    """Of the data-parallel rank that owns most."""
    optimizer_step_bytes: int
    """What of that rank is there in fp32 only while the optimizer makes its step: gradients, state. Activations are gone by then."""
    fp8_weights_bytes: int
    """FP8 copies of weights that Transformer Engine keeps between micro batches."""
    activations_bytes: int
    """What the micro batches in flight save for their backward passes."""
    logits_bytes: int
    """Logits, their fp32 copy and gradient at their peak; 0 but on the last pipeline stage."""
    workspace_bytes: int
    """One layer's backward pass with what it computes again, or its attention across ranks, whichever is larger."""
    communication_bytes: int
    allowance_bytes: int
    """Fragmentation."""

    @property
    def passing_bytes(self) -> int:
        """Logits and a layer's workspace are never there together: the larger of the two counts."""
        return max(self.logits_bytes, self.workspace_bytes)

    @property
    def total_bytes(self) -> int:
        lasting = self.parameters_bytes + self.gradients_bytes + self.optimizer_bytes + self.fp8_weights_bytes
        return lasting + self.fullest_bytes + self.communication_bytes + self.allowance_bytes

    @property
    def fullest_bytes(self) -> int:
        """What comes and goes in a step, at its most: in the forward and backward passes, or in the optimizer."""
        return max(self.activations_bytes + self.passing_bytes, self.optimizer_step_bytes)


@dataclass(frozen=True)
class Weight:
    """One parameter tensor of a rank."""

    numel: int
    fp8: bool = False
    """Kept in FP8 (fp8_param_gather)."""
    shared_embedding: bool = False
    """A tied embedding of which another pipeline stage has a copy: a bucket of its own."""


@dataclass(frozen=True)
class Bucket:
    """A part of a flat buffer that is reduced and gathered at once. All in elements."""

    size: int
    """With padding; a multiple of the number of data-parallel ranks."""
    ranges: list[tuple[int, int]]
    """First and last-plus-one element of each parameter, from the bucket's start."""


def fp8_layers(model: Model, precision: Precision) -> list[bool]:
    """Of each layer, whether its matrix products run in FP8."""
    last = model.num_layers - precision.bf16_layers_at_end
    return [precision.fp8 is not None and precision.bf16_layers_at_start <= i < last for i in range(model.num_layers)]


def chunk_layers(model: Model, parallel: Parallel, pipeline_rank: int, chunk: int) -> range:
    """Layers of one model chunk of a pipeline rank."""
    count = model.num_layers // (parallel.pipeline * (parallel.virtual_pipeline or 1))
    first = (chunk * parallel.pipeline + pipeline_rank) * count
    return range(first, first + count)


def chunk_weights(
    model: Model, parallel: Parallel, precision: Precision, pipeline_rank: int, chunk: int, *, transformer_engine: bool = True
) -> list[Weight]:
    """Parameters of a model chunk on one rank, in the order in which the built model lists them.

    Transformer Engine's layers hold the norms inside linear_qkv and linear_fc1, plain torch's before attention and SwiGLU.
    """
    tensor, hidden, chunks = parallel.tensor, model.hidden_size, parallel.virtual_pipeline or 1
    embedding = model.vocab_size // tensor * hidden
    first = pipeline_rank == 0 and chunk == 0
    last = pipeline_rank == parallel.pipeline - 1 and chunk == chunks - 1
    tied_apart = model.tied_embeddings and parallel.pipeline > 1
    weights = [Weight(embedding, shared_embedding=tied_apart)] if first else []
    heads = model.num_attention_heads * model.head_dim
    qkv = (heads + 2 * model.num_query_groups * model.head_dim) // tensor * hidden
    in_fp8 = fp8_layers(model, precision)
    for layer in chunk_layers(model, parallel, pipeline_rank, chunk):
        fp8 = precision.fp8_param_gather and in_fp8[layer]
        norm = [Weight(hidden)]
        attention = [Weight(heads // tensor * hidden, fp8), *(norm if transformer_engine else []), Weight(qkv, fp8)]
        weights += [] if transformer_engine else norm
        weights += [*attention, *norm]
        weights += [
            Weight(2 * model.ffn_hidden_size // tensor * hidden, fp8),
            Weight(model.ffn_hidden_size // tensor * hidden, fp8),
        ]
    if last:
        weights.append(Weight(hidden))
        if not (first and model.tied_embeddings):
            weights.append(Weight(embedding, shared_embedding=tied_apart))
    return weights


def buckets(weights: list[Weight], bucket_parameters: int | None, data_parallel: int) -> list[Bucket]:
    """Megatron's buckets of one flat buffer: last parameter first, each on a multiple of 64 elements, the end of a bucket on one of 128 and
    of the number of ranks. `bucket_parameters` None: one bucket, but for tied embeddings."""
    unit = math.lcm(data_parallel, 128)
    made: list[Bucket] = []
    ranges: list[tuple[int, int]] = []

    def close(end: int) -> None:
        made.append(Bucket(-(-end // unit) * unit, list(ranges)))
        ranges.clear()

    end = 0
    for weight in reversed(weights):
        start = -(-end // 64) * 64
        if weight.shared_embedding and ranges:
            close(start)
            start = 0
        end = start + weight.numel
        ranges.append((start, end))
        if weight.shared_embedding or (bucket_parameters is not None and end >= bucket_parameters):
            close(end)
            end = 0
    if ranges:
        close(end)
    return made


def _owned_parts(all_buckets: list[Bucket], data_parallel: int, data_rank: int) -> list[int]:
    """Elements of each tensor of which the distributed optimizer of one data-parallel rank updates some: its slice of each bucket, less
    padding."""
    parts = []
    for bucket in all_buckets:
        part = bucket.size // data_parallel
        first, last = data_rank * part, (data_rank + 1) * part
        parts += [size for start, end in bucket.ranges if (size := min(end, last) - max(start, first)) > 0]
    return parts


def owned_elements(all_buckets: list[Bucket], data_parallel: int, data_rank: int) -> int:
    """Parameters that the distributed optimizer of one data-parallel rank updates."""
    return sum(_owned_parts(all_buckets, data_parallel, data_rank))


def most_owned_elements(all_buckets: list[Bucket], data_parallel: int) -> int:
    """owned_elements of the rank that owns most."""
    most = sum(bucket.size for bucket in all_buckets) // data_parallel
    # Padding lies at the ends of buckets, so that the first rank nearly always owns a full part.
    if owned_elements(all_buckets, data_parallel, 0) == most:
        return most
    return max(owned_elements(all_buckets, data_parallel, rank) for rank in range(data_parallel))


def in_flight_chunks(parallel: Parallel, pipeline_rank: int, micro_batches: int | None) -> int:
    """Forward passes of a model chunk whose backward pass has not begun, at most (1F1B, or interleaved with virtual stages)."""
    chunks = parallel.virtual_pipeline or 1
    behind = parallel.pipeline - pipeline_rank - 1
    warm_up = behind if chunks == 1 else 2 * behind + (chunks - 1) * parallel.pipeline
    return warm_up + 1 if micro_batches is None else min(warm_up + 1, micro_batches * chunks)


def optimizer_holds_weights(precision: Precision, optimizer: Optimizer) -> bool:
    """Transformer Engine's FusedAdam has the main weights and reads gradients as they are reduced; otherwise Megatron has both in fp32
    (optimizer_config.py, `use_precision_aware_optimizer_no_fp8_or_ds_fp8`)."""
    return optimizer.precision_aware and (optimizer.main_params_dtype != "fp32" or precision.fp8 in (None, "delayed"))


def optimizer_bytes(precision: Precision, optimizer: Optimizer, owned: int, tensors: int) -> int:
    """Bytes of the optimizer's state over `owned` parameters, which are parts of `tensors` tensors: Adam's moments and, beside bf16 weights,
    the weights that steps are made on."""
    states = [optimizer.exp_avg_dtype, optimizer.exp_avg_sq_dtype]
    if precision.dtype == "bf16":
        states.append(optimizer.main_params_dtype)
    return sum(DTYPE_BYTES[s] * owned + (s != "fp32") * SCALE_OF_STATE_BYTES * tensors for s in states)


def optimizer_step_bytes(precision: Precision, optimizer: Optimizer, owned: int) -> int:
    """Bytes of fp32 copies that a rank has from the optimizer's step to the next `zero_grad`: of bf16 gradients, unless FusedAdam reads them
    itself; of states that its kernel does not take as they are (fused_adam.py `step`: all of a parameter group at once)."""
    copies = 0
    if precision.gradients_dtype == "bf16" and not optimizer_holds_weights(precision, optimizer):
        copies += 1
    moments = (optimizer.exp_avg_dtype, optimizer.exp_avg_sq_dtype)
    if moments != ("bf16", "bf16"):
        copies += sum(dtype != "fp32" for dtype in moments)
    copies += optimizer.main_params_dtype != "fp32"
    return copies * DTYPE_BYTES["fp32"] * owned


@dataclass(frozen=True)
class State:
    """Bytes of a rank's parameters, gradients and optimizer."""

    parameters: int
    gradients: int
    optimizer: int
    optimizer_step: int
    """Beside them while a step is made."""


def state_bytes(
    model: Model,
    parallel: Parallel,
    precision: Precision,
    optimizer: Optimizer,
    pipeline_rank: int,
    *,
    data_rank: int | None = None,
    transformer_engine: bool = True,
) -> State:
    """Bytes of parameters, gradients and optimizer state of data-parallel rank `data_rank`, or (None) of the one that owns most.

    Context-parallel ranks share in the optimizer: data-parallel ranks here are data x context. `transformer_engine`: see chunk_weights.
    """
    data_parallel = parallel.gpus // (parallel.tensor * parallel.pipeline)
    overlapped = max(BUCKET_PARAMETERS, 1_000_000 * data_parallel) if parallel.overlap_grad_reduce else None
    parameters = gradients = 0
    every: list[Bucket] = []
    for chunk in range(parallel.virtual_pipeline or 1):
        weights = chunk_weights(model, parallel, precision, pipeline_rank, chunk, transformer_engine=transformer_engine)
        # Only the first chunk of the first stage reduces while something else still computes.
        bucket_parameters = overlapped if pipeline_rank == 0 and chunk == 0 else None
        for fp8 in (False, True):
            if mine := [weight for weight in weights if weight.fp8 == fp8]:
                made = buckets(mine, bucket_parameters, data_parallel)
                elements = sum(bucket.size for bucket in made)
                if not fp8:
                    parameters += elements * DTYPE_BYTES[precision.dtype]
                elif precision.fp8 != "mxfp8":  # whose parameters are gathered through the gradients' buffer and lie elsewhere
                    parameters += elements
                gradients += elements * DTYPE_BYTES[precision.gradients_dtype]
                every += made
    if data_rank is None:
        owned, tensors = most_owned_elements(every, data_parallel), sum(len(bucket.ranges) for bucket in every)
    else:
        owned = owned_elements(every, data_parallel, data_rank)
        tensors = len(_owned_parts(every, data_parallel, data_rank))
    return State(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer_bytes(precision, optimizer, owned, tensors),
        optimizer_step=optimizer_step_bytes(precision, optimizer, owned),
    )


def _state_layout(parallel: Parallel) -> Parallel:
    """What of a layout state_bytes looks at: a search tries many that differ in the rest."""
    names = ("gpus", "tensor", "pipeline", "virtual_pipeline", "overlap_grad_reduce")
    return Parallel(name="state", **{name: getattr(parallel, name) for name in names})


@lru_cache(maxsize=4096)
def _fullest_state(model: Model, parallel: Parallel, precision: Precision, optimizer: Optimizer, pipeline_rank: int) -> State:
    return state_bytes(model, parallel, precision, optimizer, pipeline_rank)


def fp8_weights_bytes(model: Model, parallel: Parallel, precision: Precision, pipeline_rank: int) -> int:
    """FP8 weights beside Megatron's buffers: by rows and by columns (transposed), which Transformer Engine keeps from the first micro batch
    of a step to its last, each with its scales. With fp8_param_gather the parameter itself is the one by rows, but for mxfp8.

    Of one scale per tensor Hopper needs both; Blackwell multiplies without the transposed one, and is counted as Hopper.
    """
    layers = [i for c in range(parallel.virtual_pipeline or 1) for i in chunk_layers(model, parallel, pipeline_rank, c)]
    in_fp8 = fp8_layers(model, precision)
    attention = 2 * model.hidden_size * model.head_dim * (model.num_attention_heads + model.num_query_groups)
    matrices = (attention + 3 * model.hidden_size * model.ffn_hidden_size) // parallel.tensor
    copies = 1 if precision.fp8_param_gather and precision.fp8 != "mxfp8" else 2
    values = sum(in_fp8[i] for i in layers) * matrices * copies
    return values + values * SCALE_BYTES.get(precision.fp8 or "", 0) // SCALED_VALUES.get(precision.fp8 or "", 1)


def communication_bytes(model: Model, parallel: Parallel, precision: Precision, tokens: int, pipeline_rank: int) -> int:
    """Buffers of communication: NCCL's (NCCL_BYTES), what pipeline stages send and receive in both directions, and the input of the output
    layer gathered over sequence parallelism, a buffer that Megatron never frees."""
    one = activations.layer_input_bytes(model, parallel, precision, tokens)
    total = NCCL_BYTES if parallel.gpus > 1 else 0
    if parallel.pipeline > 1:
        total += 4 * one
    if parallel.sequence_parallel and pipeline_rank == parallel.pipeline - 1 and not parallel.loss_chunk_tokens:
        total += one * parallel.tensor
    return total


def stage_memory(
    model: Model,
    parallel: Parallel,
    precision: Precision,
    optimizer: Optimizer,
    *,
    seq_length_tokens: int,
    micro_batch_samples: int,
    pipeline_rank: int,
    micro_batches: int | None = None,
) -> RankMemory:
    """Memory of the ranks of one pipeline stage; arguments as of rank_memory."""
    state = _fullest_state(model, _state_layout(parallel), precision, optimizer, pipeline_rank)
    tokens = activations.rank_tokens(parallel, seq_length_tokens, micro_batch_samples)
    if parallel.micro_batch_samples != micro_batch_samples:
        parallel = parallel.model_copy(update={"micro_batch_samples": micro_batch_samples})
    in_fp8 = fp8_layers(model, precision)
    chunks = range(parallel.virtual_pipeline or 1)
    # Chunks of the same layers keep the same: most of them.
    kinds = dict.fromkeys(tuple(in_fp8[i] for i in chunk_layers(model, parallel, pipeline_rank, chunk)) for chunk in chunks)
    saved, again = [], []
    for layers in kinds:
        kept, recomputed = activations.chunk_bytes(model, parallel, precision, tokens, list(layers))
        saved.append(kept)
        again.append(recomputed)
    activation = in_flight_chunks(parallel, pipeline_rank, micro_batches) * max(saved)
    activation += activations.sequence_bytes(model, parallel, seq_length_tokens, micro_batch_samples)
    logits = 0
    if pipeline_rank == parallel.pipeline - 1:
        activation += activations.head_bytes(model, parallel, precision, tokens)
        logits = activations.logits_bytes(model, parallel, precision, tokens)
        logits += activations.chunked_loss_bytes(model, parallel, precision, tokens)
    backward = max(again) + activations.backward_bytes(model, parallel, precision, tokens)
    workspace = max(backward, activations.attention_bytes(model, parallel, precision, tokens))
    return RankMemory(
        pipeline_rank=pipeline_rank,
        parameters_bytes=state.parameters,
        gradients_bytes=state.gradients,
        optimizer_bytes=state.optimizer,
        optimizer_step_bytes=state.optimizer_step,
        fp8_weights_bytes=fp8_weights_bytes(model, parallel, precision, pipeline_rank),
        activations_bytes=activation,
        logits_bytes=logits,
        workspace_bytes=workspace,
        communication_bytes=communication_bytes(model, parallel, precision, tokens, pipeline_rank),
        allowance_bytes=int(FRAGMENTATION_SHARE * (activation + max(logits, workspace))),
    )


def rank_memory(
    model: Model,
    parallel: Parallel,
    precision: Precision,
    optimizer: Optimizer,
    *,
    seq_length_tokens: int,
    micro_batch_samples: int | None = None,
    micro_batches: int | None = None,
    pipeline_rank: int | None = None,
) -> RankMemory:
    """Memory of a rank in bytes, of pipeline stage `pipeline_rank` or (None) of the stage that needs most.

    `micro_batch_samples` None: the layout's. `micro_batches` per step and data-parallel rank bound how many are in flight; None: enough to
    fill the pipeline. The layout must be one that the linter's other rules have passed.
    """
    samples = parallel.micro_batch_samples if micro_batch_samples is None else micro_batch_samples
    ranks = range(parallel.pipeline) if pipeline_rank is None else [pipeline_rank]
    stages = [
        stage_memory(
            model,
            parallel,
            precision,
            optimizer,
            seq_length_tokens=seq_length_tokens,
            micro_batch_samples=samples,
            pipeline_rank=rank,
            micro_batches=micro_batches,
        )
        for rank in ranks
    ]
    return max(stages, key=lambda stage: stage.total_bytes)
