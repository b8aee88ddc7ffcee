"""The linter's rules about layouts, precisions and the cluster: what must divide what, and what a GPU can do.

Sources: megatron-core 0.19.2 (megatron/training/arguments.py, core/transformer/transformer_config.py, core/pipeline_parallel/
schedules.py) and Transformer Engine 2.17 (FP8 dimensions). Where Megatron silently turns a setting off, the setting is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from recipes.docker_options import DockerOptions, docker_options, layout_of
from recipes.fields import Strict
from recipes.lint_optimizer import optimizer_rules
from recipes.problem import Problem
from recipes.schema import Model, Parallel, Phase, Recipe
from recipes.slurm_options import SlurmOptions, limit_seconds, slurm_options

FP8_RECIPES = {
    "cpu": (),
    "h100": ("tensorwise", "delayed", "blockwise"),
    "h200": ("tensorwise", "delayed", "blockwise"),
    "b200": ("tensorwise", "delayed", "mxfp8"),
    "gb200": ("tensorwise", "delayed", "mxfp8"),
}
"""FP8 recipes that a GPU has in hardware. Blackwell only emulates blockwise, Hopper has no microscaling."""
FP8_MULTIPLE = {"tensorwise": 16, "delayed": 16, "blockwise": 16, "mxfp8": 32}
"""Both dimensions of a matrix in an FP8 product must be multiples of this."""


def _divisors(n: int, limit: int = 1024) -> str:
    found = [d for d in range(1, min(n, limit) + 1) if n % d == 0]
    return ", ".join(map(str, found))


def _nearest_multiple(n: int, unit: int) -> int:
    return max(unit, round(n / unit) * unit)


def model_rules(recipe: Recipe) -> Iterator[Problem]:
    model = recipe.model
    if model.num_attention_heads % model.num_query_groups:
        rule = f"{model.num_attention_heads} attention heads cannot share that many key/value heads evenly"
        yield Problem("model.num_query_groups", model.num_query_groups, rule, f"one of {_divisors(model.num_attention_heads)}")
    if model.head_dim % 2:
        yield Problem(
            "model.head_dim", model.head_dim, "RoPE turns pairs of dimensions", f"an even number, e.g. {model.head_dim + 1}"
        )


def cluster_rules(recipe: Recipe) -> Iterator[Problem]:
    cluster = recipe.cluster
    if cluster.gpu == "cpu" and cluster.kind == "slurm":
        for stage, phase in recipe.phase.items():
            if stage in recipe.stages and phase.parallel.gpus > cluster.gpus_per_node:
                rule = f"ranks on CPU run on one node only, which has room for {cluster.gpus_per_node} (cluster.gpus_per_node)"
                remedy = "name the cluster's GPU, e.g. cluster.gpu=h100, or choose a smaller layout"
                yield Problem(f"phase.{stage}.parallel.gpus", phase.parallel.gpus, rule, remedy)
    if cluster.kind == "slurm":
        yield from _slurm(cluster.options)
    if cluster.kind == "docker":
        yield from _docker(recipe)


def _refused(error: ValidationError, options: type[Strict], module: str) -> Iterator[Problem]:
    """What pydantic says of a cluster's options, as problems."""
    for found in error.errors():
        key = ".".join(("cluster.options", *(str(part) for part in found["loc"])))
        known = ", ".join(options.model_fields)
        remedy = f"known options: {known}" if found["type"] == "extra_forbidden" else f"see {module}"
        yield Problem(key, repr(found["input"]), found["msg"].removeprefix("Value error, "), remedy)


def _docker(recipe: Recipe) -> Iterator[Problem]:
    cluster = recipe.cluster
    try:
        checked = docker_options(cluster.options)
    except ValidationError as error:
        yield from _refused(error, DockerOptions, "recipes/docker_options.py")
        return
    key, gpus = "cluster.options.gpus", checked.gpus
    if gpus is None:
        return
    if cluster.gpu == "cpu":
        yield Problem(
            key, gpus, "ranks run on CPU here (cluster.gpu=cpu)", "set it to null, or name the GPU, e.g. cluster.gpu=h100"
        )
    elif gpus > cluster.gpus_per_node:
        rule = f"the machine has {cluster.gpus_per_node} (cluster.gpus_per_node)"
        yield Problem(key, gpus, rule, f"at most {cluster.gpus_per_node}, or null")
    else:
        needed = {s: layout.gpus for s in recipe.stages if (layout := layout_of(recipe, s)) is not None}
        largest = max(needed, key=needed.__getitem__, default=None)
        if largest is not None and needed[largest] > gpus:
            yield Problem(key, gpus, f"stage {largest} has {needed[largest]} ranks", f"at least {needed[largest]}, or null")


def _slurm(options: dict[str, Any]) -> Iterator[Problem]:
    try:
        checked = slurm_options(options)
    except ValidationError as error:
        yield from _refused(error, SlurmOptions, "recipes/slurm_options.py")
        return
    limit, before = limit_seconds(checked.time), checked.signal_seconds_before_limit
    if before >= limit:
        rule = f"a job would be told to save before it has begun: its limit is {checked.time} (cluster.options.time)"
        yield Problem("cluster.options.signal_seconds_before_limit", before, rule, f"at most {max(1, limit // 2)}")


def phase_layout_rules(recipe: Recipe, stage: str, phase: Phase) -> Iterator[Problem]:
    key, layout, model = f"phase.{stage}.parallel", phase.parallel, recipe.model
    if layout.gpus % layout.model_parallel:
        product = f"tensor {layout.tensor} x pipeline {layout.pipeline} x context {layout.context} = {layout.model_parallel}"
        near = _nearest_multiple(layout.gpus, layout.model_parallel)
        yield Problem(f"{key}.gpus", layout.gpus, f"is no multiple of {product}", f"set {key}.gpus={near}")
    yield from _nodes(recipe, key, layout)
    yield from _tensor(model, key, layout)
    yield from _pipeline(model, key, layout)
    yield from _length(f"phase.{stage}.seq_length_tokens", phase.seq_length_tokens, layout, stage)
    yield from _length("data.heldout_seq_length_tokens", recipe.data.heldout_seq_length_tokens, layout, stage)
    if not layout.gpus % layout.model_parallel:
        yield from _batch(recipe, stage, phase)
    if layout.overlap_param_gather and not layout.overlap_grad_reduce:
        rule = "Megatron overlaps the parameter gather only together with the gradient reduction"
        yield Problem(f"{key}.overlap_param_gather", True, rule, f"set {key}.overlap_grad_reduce=true")
    yield from _context(model, key, layout)
    if phase.documents_apart:
        yield from packed_rules(recipe, key, layout, f"p2p, or phase.{stage}.documents_apart=false")
    yield from _recompute(model, key, layout)
    yield from _offload(recipe, key, layout)
    tokens = phase.seq_length_tokens * layout.micro_batch_samples // layout.context
    if layout.loss_chunk_tokens is not None and layout.loss_chunk_tokens >= tokens:
        rule = f"a micro batch has only {tokens} tokens per rank: all of their logits would exist at once"
        yield Problem(f"{key}.loss_chunk_tokens", layout.loss_chunk_tokens, rule, f"null, or e.g. {max(1, tokens // 4)}")
    yield from _precision(recipe, stage, phase)
    yield from optimizer_rules(recipe, stage, phase)


def _nodes(recipe: Recipe, key: str, layout: Parallel) -> Iterator[Problem]:
    per_node = recipe.cluster.gpus_per_node
    if layout.gpus <= per_node:
        return
    if recipe.cluster.kind in ("local", "docker"):
        rule = f"cluster {recipe.cluster.name} is one machine with {per_node} GPUs (ranks)"
        yield Problem(f"{key}.gpus", layout.gpus, rule, f"at most {per_node}, a larger cluster.gpus_per_node, or cluster=slurm")
    elif layout.gpus % per_node:
        near = _nearest_multiple(layout.gpus, per_node)
        yield Problem(f"{key}.gpus", layout.gpus, f"does not fill nodes of {per_node} GPUs", f"set {key}.gpus={near}")


def _tensor(model: Model, key: str, layout: Parallel) -> Iterator[Problem]:
    tensor = layout.tensor
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size"):
        size = getattr(model, name)
        if size % tensor:
            rule = f"tensor parallelism must divide model.{name} = {size}"
            yield Problem(f"{key}.tensor", tensor, rule, f"one of {_divisors(size, 64)}")
    if layout.sequence_parallel and tensor == 1:
        rule = "without tensor parallelism Megatron silently turns sequence parallelism off"
        yield Problem(f"{key}.sequence_parallel", True, rule, f"set {key}.sequence_parallel=false, or {key}.tensor=2")


def _pipeline(model: Model, key: str, layout: Parallel) -> Iterator[Problem]:
    chunks = layout.pipeline * (layout.virtual_pipeline or 1)
    if layout.virtual_pipeline is not None and layout.pipeline == 1:
        rule = "virtual pipeline stages interleave real ones, and there is only one"
        yield Problem(f"{key}.virtual_pipeline", layout.virtual_pipeline, rule, f"set it to null, or {key}.pipeline=2")
    elif layout.virtual_pipeline == 1:
        yield Problem(
            f"{key}.virtual_pipeline", 1, "one chunk per stage is no interleaving: Megatron silently turns it off", "null, or 2"
        )
    if model.num_layers % chunks:
        product = f"pipeline {layout.pipeline}" + (f" x virtual {layout.virtual_pipeline}" if layout.virtual_pipeline else "")
        name = "virtual_pipeline" if layout.virtual_pipeline and model.num_layers % layout.pipeline == 0 else "pipeline"
        fits = _divisors(model.num_layers // layout.pipeline if name == "virtual_pipeline" else model.num_layers)
        rule = f"{model.num_layers} layers do not divide into {product} = {chunks} chunks"
        yield Problem(f"{key}.{name}", getattr(layout, name), rule, f"one of {fits}")


def _length(key: str, length: int, layout: Parallel, stage: str) -> Iterator[Problem]:
    """Zig-zag context parallelism gives each rank two of 2 x CP chunks; sequence parallelism cuts a rank's part by TP."""
    units = {}
    if layout.context > 1:
        units[f"2 x context {layout.context}"] = 2 * layout.context
    if layout.sequence_parallel and layout.tensor > 1:
        units[f"context {layout.context} x tensor {layout.tensor} (sequence parallelism)"] = layout.context * layout.tensor
    if broken := [why for why, unit in units.items() if length % unit]:
        rule = f"must be a multiple of {' and of '.join(broken)} in the layout of {stage}"
        yield Problem(key, length, rule, f"e.g. {_nearest_multiple(length, math.lcm(*units.values()))}")


def _context(model: Model, key: str, layout: Parallel) -> Iterator[Problem]:
    """Sources: Transformer Engine 2.17, attention/dot_product_attention/context_parallel.py; Megatron's validate_args."""
    kind, hierarchy = layout.context_communication, layout.context_hierarchy
    if layout.context == 1 and kind != "p2p":
        rule = "one context-parallel rank has nobody to exchange with"
        yield Problem(f"{key}.context_communication", kind, rule, f"p2p, which is the default, or {key}.context=2")
        return
    if kind != "a2a+p2p":
        if hierarchy is not None:
            rule = f"{kind} knows one level of ranks"
            yield Problem(f"{key}.context_hierarchy", hierarchy, rule, f"null, or {key}.context_communication=a2a+p2p")
        exchanging = layout.context if kind == "a2a" else 1
    else:
        two_levels = hierarchy is not None and len(hierarchy) == 2 and min(hierarchy) > 1
        if not two_levels or math.prod(hierarchy) != layout.context:
            fits = [[a, layout.context // a] for a in range(2, layout.context) if layout.context % a == 0]
            rule = f"a2a+p2p needs two sizes above 1 whose product is context {layout.context}, those of a2a and of the ring"
            remedy = f"e.g. [{fits[0][0]},{fits[0][1]}]" if fits else f"{key}.context_communication=p2p"
            yield Problem(f"{key}.context_hierarchy", hierarchy, rule, remedy)
            return
        exchanging = hierarchy[0]
    heads, groups = model.num_attention_heads // layout.tensor, model.num_query_groups // layout.tensor
    if min(heads, groups) and (heads % exchanging or groups % exchanging):
        where = f"{key}.context" if kind == "a2a" else f"{key}.context_hierarchy"
        rule = (
            f"{kind} deals out the {heads} heads and {groups} key/value heads of a tensor-parallel rank to {exchanging} ranks"
        )
        fits = [n for n in range(2, exchanging) if math.gcd(heads, groups) % n == 0 and layout.context % n == 0]
        hierarchies = [f"[{n},{layout.context // n}]" for n in fits if n < layout.context]
        if kind == "a2a":
            remedy = f"{key}.context_communication=p2p" + (
                f", or a2a+p2p with context_hierarchy={hierarchies[-1]}" if hierarchies else ""
            )
            yield Problem(where, layout.context, rule, remedy)
        else:
            remedy = f"e.g. {hierarchies[-1]}" if hierarchies else f"{key}.context_communication=p2p"
            yield Problem(where, hierarchy, rule, remedy)


def packed_rules(recipe: Recipe, key: str, layout: Parallel, remedy: str = "p2p") -> Iterator[Problem]:
    """Where micro batches are packed sequences: fine-tuning, and phases whose documents stay apart.

    Source: Transformer Engine 2.17, which refuses its thd format there at the first step. On CPU all kinds take it."""
    if layout.context > 1 and recipe.cluster.gpu != "cpu" and layout.context_communication in ("all_gather", "a2a+p2p"):
        rule = "Transformer Engine 2.17 takes packed samples with p2p or a2a only"
        yield Problem(f"{key}.context_communication", layout.context_communication, rule, remedy)


def _recompute(model: Model, key: str, layout: Parallel) -> Iterator[Problem]:
    for name, mode in (("recompute_num_layers", "full"), ("recompute_method", "full"), ("recompute_modules", "selective")):
        value = getattr(layout, name)
        if value is not None and layout.recompute != mode:
            rule = f"recompute {layout.recompute} does not use it"
            yield Problem(f"{key}.{name}", value, rule, f"set it to null, or {key}.recompute={mode}")
    if layout.recompute_modules is not None and len(set(layout.recompute_modules)) != max(1, len(layout.recompute_modules)):
        rule = "must name at least one part of a layer, each once"
        yield Problem(f"{key}.recompute_modules", layout.recompute_modules, rule, "e.g. [mlp]")
    per_chunk = model.num_layers // (layout.pipeline * (layout.virtual_pipeline or 1))
    if (
        layout.recompute == "full"
        and layout.recompute_num_layers is not None
        and layout.recompute_num_layers > max(1, per_chunk)
    ):
        rule = f"a pipeline stage (or chunk) has only {per_chunk} layers"
        yield Problem(f"{key}.recompute_num_layers", layout.recompute_num_layers, rule, f"at most {per_chunk}")


def _offload(recipe: Recipe, key: str, layout: Parallel) -> Iterator[Problem]:
    """Sources: Megatron's TransformerConfig, which refuses the first three when the job starts."""
    value = layout.offload_layers
    if value is None:
        return
    where = f"{key}.offload_layers"
    if layout.recompute != "none":
        rule = f"recompute {layout.recompute} keeps nothing that could be offloaded: Megatron does one or the other"
        yield Problem(where, value, rule, f"null, or {key}.recompute=none")
    if layout.pipeline > 1:
        rule = f"Megatron offloads without pipeline parallelism only, pipeline is {layout.pipeline}"
        yield Problem(where, value, rule, f"null, or {key}.pipeline=1")
    if value >= recipe.model.num_layers:
        rule = f"at least one of the {recipe.model.num_layers} layers must stay on the GPU"
        yield Problem(where, value, rule, f"at most {recipe.model.num_layers - 1}")
    if recipe.cluster.gpu == "cpu":
        yield Problem(
            where, value, "Transformer Engine offloads from GPUs, and ranks run on CPU here (cluster.gpu=cpu)", "null"
        )


def _batch(recipe: Recipe, stage: str, phase: Phase) -> Iterator[Problem]:
    layout = phase.parallel
    unit = layout.micro_batch_samples * layout.data
    if phase.global_batch_samples % unit:
        rule = f"is no multiple of micro batch {layout.micro_batch_samples} x {layout.data} data-parallel ranks = {unit}"
        near = _nearest_multiple(phase.global_batch_samples, unit)
        remedy = f"set it to {near}, or change phase.{stage}.parallel.micro_batch_samples or .gpus"
        yield Problem(f"phase.{stage}.global_batch_samples", phase.global_batch_samples, rule, remedy)
        return
    if not layout.virtual_pipeline or layout.pipeline == 1:
        return
    counts = {
        f"phase.{stage}.global_batch_samples": (phase.global_batch_samples, phase.global_batch_samples // unit),
        "data.heldout_batch_samples": (recipe.data.heldout_batch_samples, -(-recipe.data.heldout_batch_samples // unit)),
    }
    for key, (samples, micro_batches) in counts.items():
        if micro_batches % layout.pipeline:
            rule = f"gives {micro_batches} micro batches per rank; the interleaved pipeline of {stage} needs a multiple of {layout.pipeline}"
            near = _nearest_multiple(samples, unit * layout.pipeline)
            yield Problem(key, samples, rule, f"e.g. {near}, or phase.{stage}.parallel.virtual_pipeline=null")


def _precision(recipe: Recipe, stage: str, phase: Phase) -> Iterator[Problem]:
    key, precision = f"phase.{stage}.precision", phase.precision
    if precision.fp8 is None:
        for name in ("fp8_format", "fp8_amax_history_steps", "fp8_param_gather", "bf16_layers_at_start", "bf16_layers_at_end"):
            if value := getattr(precision, name):
                remedy = "precision=bf16 has none of it; or choose an fp8 precision"
                yield Problem(f"{key}.{name}", value, "without FP8 it has no effect", remedy)
        return
    fits = FP8_RECIPES[recipe.cluster.gpu]
    if precision.fp8 not in fits:
        rule = f"the cluster's {recipe.cluster.gpu} does not have this FP8 recipe"
        usable = [f"precision=fp8_{name}" if name != "mxfp8" else "precision=mxfp8" for name in fits]
        yield Problem(f"{key}.fp8", precision.fp8, rule, f"use {', '.join(['precision=bf16', *usable])}")
    if precision.dtype != "bf16":
        yield Problem(f"{key}.dtype", precision.dtype, "FP8 runs with bf16 as its wide format", f"set {key}.dtype=bf16")
    if precision.fp8_amax_history_steps is not None and precision.fp8 != "delayed":
        rule = f"only delayed scaling keeps a history, not {precision.fp8}"
        yield Problem(f"{key}.fp8_amax_history_steps", precision.fp8_amax_history_steps, rule, "set it to null")
    per_stage = recipe.model.num_layers // phase.parallel.pipeline
    for name in ("bf16_layers_at_start", "bf16_layers_at_end"):
        value = getattr(precision, name)
        if value and precision.fp8 == "delayed":
            yield Problem(
                f"{key}.{name}",
                value,
                "Megatron's delayed scaling takes no layers out of FP8",
                "set it to 0, or fp8_tensorwise",
            )
        elif value > per_stage:
            yield Problem(f"{key}.{name}", value, f"a pipeline stage has only {per_stage} layers", f"at most {per_stage}")
    yield from _fp8_dimensions(recipe.model, stage, phase)


def _fp8_dimensions(model: Model, stage: str, phase: Phase) -> Iterator[Problem]:
    """Dimensions, per rank, of the four matrices of a layer and of the tokens that they multiply."""
    layout, fp8 = phase.parallel, phase.precision.fp8
    multiple = FP8_MULTIPLE[str(fp8)]
    tensor = layout.tensor
    widths = {
        "model.hidden_size": (model.hidden_size, model.hidden_size, 1),
        "model.ffn_hidden_size": (model.ffn_hidden_size, model.ffn_hidden_size, tensor),
        "model.num_attention_heads": (model.num_attention_heads, model.num_attention_heads * model.head_dim, tensor),
        "model.num_query_groups": (
            model.num_query_groups,
            (model.num_attention_heads + 2 * model.num_query_groups) * model.head_dim,
            tensor,
        ),
    }
    for key, (value, width, parts) in widths.items():
        if width % (multiple * parts):
            per_rank = f"{width} / tensor {parts} = {width / parts:g}" if parts > 1 else str(width)
            rule = f"FP8 {fp8} needs multiples of {multiple}, and the width per rank in {stage} is {per_rank}"
            yield Problem(
                key, value, rule, f"a width of {_nearest_multiple(width, multiple * parts)}, less tensor parallelism, or bf16"
            )
    parts = layout.context * (tensor if layout.sequence_parallel else 1)
    tokens = phase.seq_length_tokens * layout.micro_batch_samples
    if tokens % (multiple * parts):
        rule = f"FP8 {fp8} needs a multiple of {multiple} tokens per rank, and {tokens} / {parts} = {tokens / parts:g}"
        near = _nearest_multiple(phase.seq_length_tokens, multiple * parts)
        yield Problem(f"phase.{stage}.seq_length_tokens", phase.seq_length_tokens, rule, f"e.g. {near}, or bf16")
