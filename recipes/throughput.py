"""How long one optimizer step takes: a model of times that can be read, with few constants, fitted on published runs.

The time of a step is a sum over one rank. Matrix products run at a fitted share of the peak and read and write their operands once,
so thin and short ones are slower; attention runs at a share of its own, in bf16, and its backward pass does 2.5 times the forward's
work (FlashAttention computes the scores again); everything else in a layer (norms, RoPE, SwiGLU, residuals, casts to FP8) is traffic
to memory. Communication is bytes over a link. Pipelines wait (stages - 1) / chunks micro batches. What overlaps is counted only where
it is longer than what it hides behind.

`CONSTANTS` holds the fit of `benchmarks/planner.py`; docs/planning.md says how well it predicts runs that it has not seen, and what
is not modelled (kernel launches, stragglers, data loading, checkpoints, restarts).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from recipes.activations import layer_bytes, rank_tokens
from recipes.document_packing import Packing
from recipes.flops import flops_per_token
from recipes.gpus import Gpu
from recipes.job_options import Parallel, Precision
from recipes.schema import Model

ATTENTION_BACKWARD = 2.5
"""FLOPs of attention's backward pass over its forward: five products against two (FlashAttention-2, arXiv 2307.08691, section 4.1)."""
ADAM_BYTES_PER_PARAMETER = 4 * 4 + 3 * 4 + 2
"""Of the rank's share: reads fp32 gradient, weight and both moments, writes weight, moments and the bf16 copy."""
LATENCY_SECONDS = 15e-6
"""Of one collective or one step of a ring [assumed: NCCL's usual start-up; it matters only where messages are small]."""
BF16, FP32, FP8 = 2, 4, 1
"""Bytes of a value."""


@dataclass(frozen=True)
class Constants:
    """What published runs say about how close kernels and links come to their peaks: shares of the peak, 0 to 1."""

    matmul_bf16: float
    matmul_fp8_hopper: float
    matmul_fp8_blackwell: float
    attention_hopper: float
    attention_hopper_2024: float
    """Of the attention kernels in NeMo 24.03 and 24.07; used for rows of that time only."""
    attention_blackwell: float
    memory: float
    links: float
    """Of NVLink's and the network's bandwidth."""
    contention: float
    """Of the time of gradients and weights on their way behind computation: what the computation loses to it."""
    tensor_hidden: float
    """Share of tensor parallelism's communication that Megatron's --tp-comm-overlap hides, where it is on."""


CONSTANTS = Constants(
    matmul_bf16=0.7495,
    matmul_fp8_hopper=0.7172,
    matmul_fp8_blackwell=0.6036,
    attention_hopper=0.4796,
    attention_hopper_2024=0.3304,
    attention_blackwell=0.4076,
    memory=0.7367,
    links=0.7526,
    contention=0.2992,
    tensor_hidden=0.6034,
)
"""The fit of `python -m benchmarks.planner` on docs/measurements/published_throughput.yaml; a test fits them again."""


@dataclass(frozen=True)
class Job:
    """What a step computes, on what, in which layout. The layout is taken as one that the linter has passed."""

    model: Model
    parallel: Parallel
    precision: Precision
    seq_length_tokens: int
    global_batch_samples: int
    gpu: Gpu
    gpus_per_node: int = 8
    tensor_overlap: bool = False
    """Megatron's --tp-comm-overlap: on in NVIDIA's runs, not in Quarry's arguments."""
    kernels_of_2024: bool = False
    packing: Packing | None = None
    """Of documents that stay apart and whose lengths are known; None: every token of a sample sees all before it."""

    @property
    def attended_tokens(self) -> float:
        """Twice the tokens that an average token sees."""
        return self.seq_length_tokens if self.packing is None else self.packing.attended_tokens

    @property
    def nvlink_gpus(self) -> int:
        """GPUs that NVLink joins: the node, or the rack where that is what it joins (NVL72)."""
        return max(self.gpus_per_node, self.gpu.nvlink_domain_gpus) if self.gpu.nvlink_domain_gpus > 8 else self.gpus_per_node

    @property
    def micro_batches(self) -> float:
        """Per data-parallel rank and step."""
        return self.global_batch_samples / (self.parallel.data * self.parallel.micro_batch_samples)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on its slowest rank, by what they are spent on; their sum is `total`."""

    matmul: float
    attention: float
    elementwise: float
    """Norms, RoPE, SwiGLU, residuals, casts: memory traffic inside the layers."""
    head: float
    """Logits and loss, on the last pipeline stage."""
    recompute: float
    offload: float
    """Moving activations to the host and back, where it takes longer than the layers that it hides behind."""
    tensor_parallel: float
    context_parallel: float
    pipeline_bubble: float
    pipeline_transfers: float
    data_parallel: float
    """Reduction of gradients and gathering of weights that do not hide behind computation."""
    optimizer: float
    tokens_per_second_per_gpu: float
    mfu: float
    """Model FLOPs (recipes/flops.py) over the dense bf16 peak, whatever the precision."""

    @property
    def total(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Name -> seconds, of everything that `total` sums."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("tokens_per_second_per_gpu", "mfu")}


def step_time(job: Job, constants: Constants = CONSTANTS) -> StepTime:
    """The time of one optimizer step of `job`, and the speed that it means."""
    layout, model = job.parallel, job.model
    micro_batches, stages, chunks = job.micro_batches, layout.pipeline, layout.virtual_pipeline or 1
    layer = _layer(job, constants)
    per_stage = model.num_layers / stages
    head = _head_seconds(job, constants)
    # A layer's parts, over all layers of a stage and all micro batches.
    spent = {name: seconds * per_stage * micro_batches for name, seconds in layer.items()}
    body = sum(layer.values()) * per_stage
    data, optimizer = _data_parallel(job, constants, body), _optimizer(job, constants)
    parts = {
        **spent,
        "head": head * micro_batches,
        # The first and the last micro batch cross stages that have no head.
        "pipeline_bubble": (stages - 1) / chunks * body,
        "pipeline_transfers": _pipeline_transfers(job, constants, micro_batches),
        "data_parallel": data,
        "optimizer": optimizer,
    }
    total = sum(parts.values())
    tokens = job.global_batch_samples * job.seq_length_tokens
    speed = tokens / total / layout.gpus
    return StepTime(
        **parts,
        tokens_per_second_per_gpu=speed,
        mfu=speed * flops_per_token(model, job.attended_tokens) / job.gpu.peak_bf16_flops,
    )


def _tokens(job: Job) -> float:
    """Tokens of a micro batch on one context-parallel rank, padding included."""
    padding = 0.0 if job.packing is None else job.packing.padding_share
    return job.parallel.micro_batch_samples * job.seq_length_tokens * (1 + padding) / job.parallel.context


def _attention_rate(job: Job, constants: Constants) -> float:
    share = constants.attention_blackwell if job.gpu.architecture == "blackwell" else constants.attention_hopper
    return job.gpu.peak_bf16_flops * (constants.attention_hopper_2024 if job.kernels_of_2024 else share)


def _matmul_rate(job: Job, constants: Constants, fp8: bool) -> float:
    if not fp8:
        return job.gpu.peak_bf16_flops * constants.matmul_bf16
    blackwell = job.gpu.architecture == "blackwell"
    return job.gpu.peak_fp8_flops * (constants.matmul_fp8_blackwell if blackwell else constants.matmul_fp8_hopper)


def _product_seconds(
    job: Job, constants: Constants, tokens: float, width_in: float, width_out: float, fp8: bool
) -> tuple[float, float]:
    """(forward, backward) seconds of a product of activations (tokens x width_in) with a weight (width_in x width_out) of this rank."""
    rate, memory = _matmul_rate(job, constants, fp8), job.gpu.memory_bytes_per_second * constants.memory
    work = 2 * tokens * width_in * width_out / rate
    value = FP8 if fp8 else BF16
    weight, left, right = width_in * width_out, tokens * width_in, tokens * width_out
    forward = work + (value * (left + weight) + BF16 * right) / memory
    # Gradient of the input, and of the weight, which is added to the sum of the step.
    backward = 2 * work + (value * (2 * right + weight + left) + BF16 * left + 2 * gradient_bytes(job) * weight) / memory
    return forward, backward


def _layer(job: Job, constants: Constants) -> dict[str, float]:
    """Seconds of one layer and one micro batch, forward and backward, by part of a StepTime."""
    model, layout = job.model, job.parallel
    tensor, tokens = layout.tensor, _tokens(job)
    hidden, ffn = model.hidden_size, model.ffn_hidden_size / tensor
    queries = model.num_attention_heads * model.head_dim / tensor
    keys = model.num_query_groups * model.head_dim / tensor
    memory = job.gpu.memory_bytes_per_second * constants.memory

    shapes = {"qkv": (hidden, queries + 2 * keys), "out": (queries, hidden), "up": (hidden, 2 * ffn), "down": (ffn, hidden)}
    share, forward, backward = fp8_share(job), {}, 0.0
    for name, (width_in, width_out) in shapes.items():
        # Layers of one model may differ in precision; the average layer stands for them.
        narrow = _product_seconds(job, constants, tokens, width_in, width_out, fp8=True)
        wide = _product_seconds(job, constants, tokens, width_in, width_out, fp8=False)
        forward[name] = share * narrow[0] + (1 - share) * wide[0]
        backward += share * narrow[1] + (1 - share) * wide[1]
    scores = 2 * tokens * job.attended_tokens * queries / _attention_rate(job, constants)
    # Values read and written per token: two norms and two residual sums over the hidden size (sharded by sequence parallelism), RoPE,
    # and SwiGLU; in FP8 each input of a product is read once more and written twice (as it is, and transposed).
    sharded = tensor if layout.sequence_parallel else 1
    norms, sums, rope, swiglu = 2 * 2 * hidden / sharded, 2 * 3 * hidden / sharded, 2 * (queries + keys), 3 * ffn
    casts = share * (BF16 + 2 * FP8) * (2 * hidden + queries + ffn)
    traffic = tokens * (BF16 * (norms + sums + rope + swiglu) + casts) / memory
    communication = _tensor_seconds(job, constants, tokens)
    context = _context_seconds(job, constants, tokens, scores)
    norm_again, swiglu_again = tokens * BF16 * norms / memory, tokens * BF16 * swiglu / memory
    again = {  # forward passes repeat half of the tensor-parallel and a third of the context-parallel communication
        "core_attn": scores + context / 3,
        "mlp": forward["up"] + forward["down"] + swiglu_again + norm_again / 2 + communication / 4,
        "full": sum(forward.values()) + scores + traffic + communication / 2 + context / 3,
    }
    parts = {
        "matmul": sum(forward.values()) + backward,
        "attention": (1 + ATTENTION_BACKWARD) * scores,
        "elementwise": 3 * traffic,  # the backward pass reads the inputs again beside the gradients
        "recompute": _recompute_seconds(job, again),
        "tensor_parallel": communication,
        "context_parallel": context,
    }
    return {**parts, "offload": _offload_seconds(job, constants, sum(parts.values()))}


def _recompute_seconds(job: Job, again: dict[str, float]) -> float:
    """What of `again` the layout does, for an average layer."""
    layout = job.parallel
    if layout.recompute == "selective":
        return sum(again[module] for module in layout.recompute_modules or ["core_attn"])
    if layout.recompute == "none":
        return 0.0
    if layout.recompute_method != "block":
        return again["full"]
    per_chunk = job.model.num_layers / (layout.pipeline * (layout.virtual_pipeline or 1))
    return again["full"] * min(1.0, (layout.recompute_num_layers or 1) / per_chunk)


def _offload_seconds(job: Job, constants: Constants, layer: float) -> float:
    """For an average layer: what waits for activations on their way to the host and back. `layer` is the time of a layer in both directions, a
    third of it forward."""
    layout, gpu, layers = job.parallel, job.gpu, job.model.num_layers
    if layout.offload_layers is None:
        return 0.0
    tokens = rank_tokens(layout, job.seq_length_tokens, layout.micro_batch_samples)
    saved = layer_bytes(job.model, layout, job.precision, tokens, fp8=job.precision.fp8 is not None)
    transfer = saved / (gpu.host_bytes_per_second * constants.links)
    return sum(offload_waits_seconds(layers, layout.offload_layers, transfer, layer / 3, 2 * layer / 3)) / layers


def offload_waits_seconds(layers: int, away: int, transfer: float, forward: float, backward: float) -> tuple[float, float]:
    """Time that the forward and the backward pass of `layers` layers wait for the activations of the first `away` of them.

    The schedule of Transformer Engine 2.17 (cpu_offload.py, DefaultOffloadSynchronizer), layer by layer: one at a time goes to the host once
    it is computed, in `transfer` seconds, and the n-th must be away before the n-th of the layers that stay begins; it comes back from
    when the backward pass begins that layer, and must be there when its own begins.
    """
    stay, now, sent, gone = layers - away, 0.0, 0.0, [0.0]
    for layer in range(layers):
        wait = max(0.0, gone[layer - stay + 1] - now) if layer >= stay else 0.0
        sent, now = sent + wait, now + wait + forward
        if layer < away:
            gone.append(max(now, gone[-1]) + transfer)
    now, fetched, link, back = 0.0, 0.0, 0.0, {}
    for layer in reversed(range(layers)):
        if layer >= stay:
            link = max(link, now) + transfer
            back[layer - stay] = link
        wait = max(0.0, back.get(layer, 0.0) - now)
        fetched, now = fetched + wait, now + wait + backward
    return sent, fetched


def fp8_share(job: Job) -> float:
    """Share of the layers whose products run in FP8."""
    precision, layers = job.precision, job.model.num_layers
    if precision.fp8 is None:
        return 0.0
    return max(0, layers - precision.bf16_layers_at_start - precision.bf16_layers_at_end) / layers


def _link(job: Job, constants: Constants, ranks_apart: int) -> float:
    """Bytes/s between ranks of a group that spans `ranks_apart` consecutive ranks: NVLink inside its domain, else the network."""
    inside = ranks_apart <= job.nvlink_gpus
    return constants.links * (job.gpu.nvlink_bytes_per_second if inside else job.gpu.network_bytes_per_second)


def _tensor_seconds(job: Job, constants: Constants, tokens: float) -> float:
    """Tensor parallelism of one layer: two gathers and two reductions of the activations in each direction.

    Without sequence parallelism two all-reduces move as much. The backward pass gathers inputs again for the weights' gradients; that
    hides behind the gradients of the inputs in any case.
    """
    tensor = job.parallel.tensor
    if tensor == 1:
        return 0.0
    collective = tokens * job.model.hidden_size * BF16 * (tensor - 1) / tensor / _link(job, constants, tensor) + LATENCY_SECONDS
    return 8 * collective * (1 - constants.tensor_hidden if job.tensor_overlap else 1)


def _context_seconds(job: Job, constants: Constants, tokens: float, scores: float) -> float:
    """Context parallelism of one layer, forward and backward: what does not hide behind attention."""
    model, layout = job.model, job.parallel
    if layout.context == 1:
        return 0.0
    queries = BF16 * tokens * model.num_attention_heads * model.head_dim / layout.tensor
    keys = BF16 * tokens * 2 * model.num_query_groups * model.head_dim / layout.tensor
    whole = _link(job, constants, layout.tensor * layout.context)
    if layout.context_communication == "all_gather":
        # Forward all keys and values; backward once more, and their gradients back.
        return 3 * ((layout.context - 1) * keys / whole + LATENCY_SECONDS)
    if layout.context_communication == "p2p":
        return _ring_seconds(job, constants, layout.context, queries, keys, scores, whole)
    dealt = layout.context if layout.context_communication == "a2a" else (layout.context_hierarchy or [layout.context])[0]
    link = _link(job, constants, layout.tensor * dealt)
    # Queries, keys and values before attention and its output after it, and the same for the gradients.
    exchange = 2 * ((2 * queries + keys) * (dealt - 1) / dealt / link + 4 * LATENCY_SECONDS)
    around = layout.context // dealt
    return exchange + (_ring_seconds(job, constants, around, queries, keys, scores, whole) if around > 1 else 0.0)


def _ring_seconds(job: Job, constants: Constants, ranks: int, queries: float, keys: float, scores: float, link: float) -> float:
    """A ring of `ranks`; `queries` and `keys` are bytes per rank, `scores` the seconds of the forward attention.

    Keys and values pass round in ranks - 1 steps, each behind the attention of the step before; backward their gradients follow.
    """
    transfer = keys / link + LATENCY_SECONDS
    compute = scores / ranks
    exposed = max(0.0, transfer - compute) + max(0.0, 2 * transfer - ATTENTION_BACKWARD * compute)
    # Each step's output, half of the tokens on average, is merged into an fp32 sum: read, read and written.
    merge = queries / BF16 / 2 * (BF16 + 2 * FP32) / (job.gpu.memory_bytes_per_second * constants.memory)
    return (ranks - 1) * (exposed + 2 * merge)


def _head_seconds(job: Job, constants: Constants) -> float:
    """Logits, loss and their gradients for one micro batch; the head is never in FP8. A chunked loss computes the logits twice."""
    tokens, vocabulary = _tokens(job), job.model.vocab_size / job.parallel.tensor
    forward, backward = _product_seconds(job, constants, tokens, job.model.hidden_size, vocabulary, fp8=False)
    # The fused loss reads the logits in fp32 twice and writes their gradient.
    loss = tokens * vocabulary * (3 * FP32 + BF16) / (job.gpu.memory_bytes_per_second * constants.memory)
    return forward + backward + loss + (forward if job.parallel.loss_chunk_tokens is not None else 0.0)


def _pipeline_transfers(job: Job, constants: Constants, micro_batches: float) -> float:
    """Activations and gradients between stages: on the critical path in 1F1B, behind computation when interleaved but for the fill."""
    layout = job.parallel
    if layout.pipeline == 1:
        return 0.0
    size = _tokens(job) * job.model.hidden_size * BF16 / (layout.tensor if layout.sequence_parallel else 1)
    transfer = size / _link(job, constants, layout.gpus) + LATENCY_SECONDS
    exposed = micro_batches if layout.virtual_pipeline is None else layout.pipeline - 1
    return 2 * exposed * transfer


def gradient_bytes(job: Job) -> int:
    """Of one parameter's gradient, as it is accumulated and reduced."""
    return BF16 if job.precision.gradients_dtype == "bf16" else FP32


def rank_parameters(job: Job) -> float:
    """Parameters of the largest pipeline stage of one tensor-parallel rank, roughly: for times, not for memory (recipes/memory.py)."""
    model, layout = job.model, job.parallel
    layer = model.hidden_size * (
        2 * model.head_dim * (model.num_attention_heads + model.num_query_groups) + 3 * model.ffn_hidden_size
    )
    embedding = model.vocab_size * model.hidden_size * (2 if layout.pipeline == 1 and not model.tied_embeddings else 1)
    return (model.num_layers / layout.pipeline * layer + embedding) / layout.tensor


def _data_parallel(job: Job, constants: Constants, body: float) -> float:
    """Reduce-scatter of gradients and all-gather of weights over data and context parallelism, less what they hide behind.

    With overlap the reduction runs behind the backward pass of the last micro batch and the gather behind the first forward pass.
    Rings over several nodes use the adapters of all GPUs of a node that belong to the group.
    """
    layout = job.parallel
    ranks = layout.data * layout.context
    if ranks == 1:
        return 0.0
    link = _link(job, constants, ranks * layout.tensor)
    if ranks * layout.tensor > job.nvlink_gpus:
        adapters = max(1, job.nvlink_gpus // layout.tensor)
        link = constants.links * min(job.gpu.nvlink_bytes_per_second, adapters * job.gpu.network_bytes_per_second)
    moved = rank_parameters(job) * (ranks - 1) / ranks
    gather_bytes = FP8 * fp8_share(job) + BF16 * (1 - fp8_share(job)) if job.precision.fp8_param_gather else BF16
    reduce, gather = moved * gradient_bytes(job) / link + LATENCY_SECONDS, moved * gather_bytes / link + LATENCY_SECONDS
    forward = body / (4 if layout.recompute == "full" else 3)
    hidden_reduce = min(reduce, body - forward) if layout.overlap_grad_reduce else 0.0
    hidden_gather = min(gather, forward) if layout.overlap_param_gather else 0.0
    return reduce + gather - (1 - constants.contention) * (hidden_reduce + hidden_gather)


def _optimizer(job: Job, constants: Constants) -> float:
    """Adam over the rank's share of the weights, and reading all gradients once for their norm and once to clear them."""
    layout = job.parallel
    own = rank_parameters(job) / (layout.data * layout.context)
    gradients = gradient_bytes(job) * (own + rank_parameters(job))
    traffic = ADAM_BYTES_PER_PARAMETER * own + gradients
    return traffic / (job.gpu.memory_bytes_per_second * constants.memory)
