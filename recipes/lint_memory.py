"""The linter's rule about memory: a rank's must fit its GPU, by the account of recipes/memory.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from recipes import grpo_stage, sft_stage
from recipes.gpus import GPUS
from recipes.job_options import Parallel
from recipes.lint_layout import phase_layout_rules
from recipes.memory import RankMemory, rank_memory
from recipes.problem import Problem
from recipes.schema import Phase, Recipe

LOSS_CHUNK_TOKENS = 2048
"""Offered as a chunk: logits of 0.8 GB for 8B's vocabulary with tensor 2, and matrix products that are still large."""


def memory_rules(recipe: Recipe) -> Iterator[Problem]:
    """What does not fit the cluster's GPU, stage by stage; nothing on CPU. Takes a recipe that the other rules have passed.

    Of reinforcement learning it looks at the training passes, not at rollouts.
    """
    gpu = GPUS.get(recipe.cluster.gpu)
    if gpu is None:
        return
    for stage in recipe.stages:
        kind = recipe.stage_kind(stage)
        if kind == "sft":
            seen = sft_stage.as_phase(recipe, stage, sequences=recipe.sft[stage].global_batch_sequences)
        elif kind == "grpo":
            seen = grpo_stage.as_phase(recipe, stage)
        elif kind == "phase":
            seen = recipe
        else:
            continue
        phase = seen.phase[stage]
        need = phase_memory(seen, phase, phase.parallel)
        if need.total_bytes > gpu.memory_bytes:
            key = f"{kind}.{stage}.parallel"
            rule = (
                f"a rank needs {_gb(need.total_bytes)} the {gpu.name.upper()} has {_gb(gpu.memory_bytes)}: {parts_text(need)}"
            )
            yield Problem(key, phase.parallel.name, rule, _remedy(seen, stage, key, gpu.memory_bytes))


def phase_memory(recipe: Recipe, phase: Phase, parallel: Parallel) -> RankMemory:
    """Memory of the fullest rank of `phase` on the layout `parallel`."""
    return rank_memory(
        recipe.model,
        parallel,
        phase.precision,
        phase.optimizer or recipe.optimizer,
        seq_length_tokens=phase.seq_length_tokens,
        micro_batches=max(1, phase.global_batch_samples // (parallel.data * parallel.micro_batch_samples)),
    )


def parts_text(memory: RankMemory) -> str:
    """'weights 8.4 GB, gradients 16.8 GB, ...', the largest first."""
    parts = {
        "weights": memory.parameters_bytes + memory.fp8_weights_bytes,
        "gradients": memory.gradients_bytes,
        "optimizer": memory.optimizer_bytes,
        "communication": memory.communication_bytes,
        "fragmentation": memory.allowance_bytes,
    }
    if memory.optimizer_step_bytes == memory.fullest_bytes:
        parts["fp32 copies in the optimizer's step"] = memory.optimizer_step_bytes
    else:
        parts["activations"] = memory.activations_bytes
        parts["logits" if memory.logits_bytes > memory.workspace_bytes else "a layer's workspace"] = memory.passing_bytes
    largest = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {_gb(size)}" for name, size in largest if size >= 5e7)


def _changes(parallel: Parallel) -> Iterator[dict[str, Any]]:
    """Changes of a layout that need less memory, those first that cost least speed."""
    if parallel.loss_chunk_tokens is None:
        yield {"loss_chunk_tokens": LOSS_CHUNK_TOKENS}
    samples = parallel.micro_batch_samples
    while samples > 1:
        samples //= 2
        yield {"micro_batch_samples": samples}
    if parallel.recompute == "none" or (parallel.recompute == "selective" and not parallel.recompute_modules):
        yield {"recompute": "selective", "recompute_modules": ["mlp"]}
    for tensor in (2, 4, 8):
        if tensor > parallel.tensor:
            yield {"tensor": tensor, "sequence_parallel": True}
    if parallel.context < 64:
        yield {"context": 2 * parallel.context}
    if parallel.recompute != "full":
        yield {"recompute": "full", "recompute_modules": None}
    for tensor in (2, 4, 8):
        if tensor > parallel.tensor:
            yield {"tensor": tensor, "sequence_parallel": True, "recompute": "full", "recompute_modules": None}


def _remedy(recipe: Recipe, stage: str, key: str, memory_bytes: int) -> str:
    phase = recipe.phase[stage]
    for change in _changes(phase.parallel):
        layout = phase.parallel.model_copy(update=change)
        changed = phase.model_copy(update={"parallel": layout})
        moved = recipe.model_copy(update={"phase": {**recipe.phase, stage: changed}})
        if any(phase_layout_rules(moved, stage, changed)):
            continue
        need = phase_memory(moved, changed, layout).total_bytes
        if need <= memory_bytes:
            settings = " ".join(
                f"{key}.{name}={_value(value)}" for name, value in change.items() if getattr(phase.parallel, name) != value
            )
            return f"{settings} needs {_gb(need)}"
    return "no single change fits; see `quarry plan --search`"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    return "null" if value is None else str(value).lower()


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
