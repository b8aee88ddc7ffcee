"""What each stage of a recipe needs and costs: memory of a rank, speed, time, GPU-hours and money; and what they sum to.

Memory is recipes/memory.py's, FLOPs recipes/flops.py's, time recipes/throughput.py's. A figure that is not modelled is None, and
`StageEstimate.unknown` says why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from recipes import grpo_stage, sft_stage
from recipes.ab_arms import ARMS, arm_phase
from recipes.document_packing import DocumentLengths, Known, Packing, layout_grain_tokens
from recipes.flops import flops_per_token
from recipes.gpus import GPUS, Gpu
from recipes.job_options import Optimizer
from recipes.memory import rank_memory
from recipes.schema import Phase, Recipe
from recipes.throughput import Job, StepTime, step_time

FORMAT = "quarry.plan/1"
DEMANDING = ("phase", "sft", "grpo", "ab")
"""Kinds of stages that train, and so have a layout."""


@dataclass(frozen=True)
class StageEstimate:
    """One stage. Times are of training steps alone: no start-up, no saves, no restarts."""

    stage: str
    kind: str
    unknown: str | None = None
    """Why figures are missing; None: none is."""
    gpus: int | None = None
    memory_bytes: int | None = None
    """Of the fullest rank."""
    flops_per_token: float | None = None
    attended_tokens: float | None = None
    """Where documents stay apart and their lengths are known: mean length of a token's document in its sample, as FLOPs and time count."""
    padding_share: float | None = None
    """There: tokens that are computed for nothing, per token."""
    lengths_unknown: str | None = None
    """Where documents stay apart and attention is counted over whole samples: why."""
    tokens: int | None = None
    steps: int | None = None
    step_seconds: float | None = None
    step_parts_seconds: dict[str, float] | None = None
    tokens_per_second_per_gpu: float | None = None
    mfu: float | None = None
    hours: float | None = None
    gpu_hours: float | None = None
    cost: float | None = None
    """US dollars."""

    @property
    def flops(self) -> float | None:
        """Model FLOPs of the whole stage."""
        return None if self.tokens is None or self.flops_per_token is None else self.tokens * self.flops_per_token


@dataclass(frozen=True)
class Total:
    """Sums over the stages whose time is known."""

    hours: float
    gpu_hours: float
    cost: float
    missing: list[str]
    """Stages that train and are not in the sums."""


def gpu_of(recipe: Recipe) -> Gpu | None:
    """The cluster's GPU; None on CPU."""
    return GPUS.get(recipe.cluster.gpu)


def stage_phase(recipe: Recipe, stage: str) -> Phase | None:
    """What a step of the stage computes, as a phase; None for a stage that does not train. Steps of SFT are not counted: they follow
    from its data."""
    kind = recipe.stage_kind(stage)
    if kind == "phase":
        return recipe.phase[stage]
    if kind == "sft":
        return sft_stage.as_phase(recipe, stage, sequences=recipe.sft[stage].global_batch_sequences).phase[stage]
    if kind == "grpo":
        return grpo_stage.as_phase(recipe, stage).phase[stage]
    if kind == "ab":  # what the gate tries
        return arm_phase(recipe, stage, "b")
    return None


def job_of(recipe: Recipe, phase: Phase, gpu: Gpu, lengths: Known | None = None) -> Job:
    """One step of `phase` on `gpu`. `lengths` of the documents that it draws matter only where they stay apart."""
    return Job(
        model=recipe.model,
        parallel=phase.parallel,
        precision=phase.precision,
        seq_length_tokens=phase.seq_length_tokens,
        global_batch_samples=phase.global_batch_samples,
        gpu=gpu,
        gpus_per_node=recipe.cluster.gpus_per_node,
        packing=packing_of(phase, lengths),
    )


def packing_of(phase: Phase, lengths: Known | None) -> Packing | None:
    """What becomes of the documents of `phase`; None where they see each other or nothing is known of them."""
    if isinstance(lengths, Packing):
        return lengths
    if not isinstance(lengths, DocumentLengths) or not phase.documents_apart:
        return None
    return lengths.packing(phase.seq_length_tokens, phase.parallel, phase.precision)


def job_memory_bytes(recipe: Recipe, job: Job, optimizer: Optimizer | None = None) -> int:
    """Bytes of the fullest rank; `optimizer` is a phase's own, None: the recipe's.

    The first pipeline stage has the embedding and most micro batches in flight, the last the logits: one of them is the fullest.
    """
    ranks = {0, job.parallel.pipeline - 1}
    length = _computed_length(job)
    return max(
        rank_memory(
            job.model,
            job.parallel,
            job.precision,
            optimizer or recipe.optimizer,
            seq_length_tokens=length,
            micro_batches=max(1, int(job.micro_batches)),
            pipeline_rank=rank,
        ).total_bytes
        for rank in ranks
    )


def _computed_length(job: Job) -> int:
    """Tokens of a sample with the padding of its documents, as far as that is known: of the mean sample, rounded up to what packed sequences
    are a multiple of."""
    if job.packing is None or not job.packing.padding_share:
        return job.seq_length_tokens
    grain = layout_grain_tokens(job.seq_length_tokens, job.parallel, job.precision)
    return grain * math.ceil(job.seq_length_tokens * (1 + job.packing.padding_share) / grain)


def estimate(
    recipe: Recipe,
    stage: str,
    *,
    price_per_gpu_hour: float | None = None,
    sft_steps: Mapping[str, int] | None = None,
    lengths: Mapping[str, Known] | None = None,
) -> StageEstimate:
    """What `stage` of a linted recipe needs and costs. `price_per_gpu_hour` None: that of recipes/gpus.py. `sft_steps`: steps of
    fine-tuning stages whose data are prepared. `lengths`: stage -> what is known of its documents."""
    kind = recipe.stage_kind(stage)
    phase, gpu = stage_phase(recipe, stage), gpu_of(recipe)
    if kind == "ab" and gpu is not None:
        price = gpu.price_per_hour if price_per_gpu_hour is None else price_per_gpu_hour
        return _gate(recipe, stage, gpu, price, (lengths or {}).get(recipe.ab[stage].phase))
    if phase is None:
        return StageEstimate(stage, kind, unknown="reads and writes checkpoints, in minutes on one node: not modelled")
    own_lengths = (lengths or {}).get(stage)
    packing = packing_of(phase, own_lengths)
    flops = flops_per_token(recipe.model, phase.seq_length_tokens if packing is None else packing.attended_tokens)
    steps, tokens = (phase.steps, phase.tokens) if kind in ("phase", "grpo") else (None, None)
    unknown = None
    if kind == "sft":
        unknown = "steps follow from the data, which are not prepared yet"
        if sft_steps and stage in sft_steps:
            steps, unknown = sft_steps[stage], None
            tokens = steps * phase.tokens_per_step
    elif kind == "grpo":
        tokens, unknown = None, "speed is that of the training pass; rollouts and rewards are not modelled"
    if gpu is None:
        unknown = unknown or f"no speed or memory is planned for cluster.gpu={recipe.cluster.gpu}"
        return StageEstimate(
            stage,
            kind,
            unknown,
            gpus=phase.parallel.gpus,
            flops_per_token=flops,
            tokens=tokens,
            steps=steps,
            **_spans(phase, packing, own_lengths),
        )
    job = job_of(recipe, phase, gpu, own_lengths)
    time = step_time(job)
    hours = None if unknown or steps is None else steps * time.total / 3600
    gpu_hours = None if hours is None else hours * phase.parallel.gpus
    price = gpu.price_per_hour if price_per_gpu_hour is None else price_per_gpu_hour
    return StageEstimate(
        stage,
        kind,
        unknown,
        gpus=phase.parallel.gpus,
        memory_bytes=job_memory_bytes(recipe, job, phase.optimizer),
        flops_per_token=flops,
        **_spans(phase, packing, own_lengths),
        tokens=tokens,
        steps=steps,
        step_seconds=time.total,
        step_parts_seconds=time.parts(),
        tokens_per_second_per_gpu=time.tokens_per_second_per_gpu,
        mfu=time.mfu,
        hours=hours,
        gpu_hours=gpu_hours,
        cost=None if gpu_hours is None else gpu_hours * price,
    )


def _spans(phase: Phase, packing: Packing | None, lengths: Known | None) -> dict[str, Any]:
    """What of a StageEstimate says how its documents are counted."""
    if packing is not None:
        return asdict(packing)
    if not phase.documents_apart and lengths is None:
        return {}
    return {"lengths_unknown": lengths if isinstance(lengths, str) else "nobody looked for its data"}


def _gate(recipe: Recipe, stage: str, gpu: Gpu, price: float, lengths: Known | None) -> StageEstimate:
    """Both arms of a gate, one after the other in one job; speed and utilisation are of both together, without their held-out losses."""
    phases = [arm_phase(recipe, stage, name) for name in ARMS]
    jobs = [job_of(recipe, phase, gpu, lengths) for phase in phases]
    times = [step_time(job) for job in jobs]
    steps, gpus = recipe.ab[stage].steps, max(phase.parallel.gpus for phase in phases)
    hours = sum(steps * time.total for time in times) / 3600
    tokens = sum(steps * phase.tokens_per_step for phase in phases)
    flops, speed = flops_per_token(recipe.model, jobs[0].attended_tokens), tokens / (hours * 3600 * gpus)
    return StageEstimate(
        stage,
        "ab",
        gpus=gpus,
        memory_bytes=max(job_memory_bytes(recipe, job, phase.optimizer) for job, phase in zip(jobs, phases, strict=True)),
        flops_per_token=flops,
        **_spans(phases[0], jobs[0].packing, lengths),
        tokens=tokens,
        steps=len(phases) * steps,
        step_seconds=sum(time.total for time in times) / len(times),
        tokens_per_second_per_gpu=speed,
        mfu=speed * flops / gpu.peak_bf16_flops,
        hours=hours,
        gpu_hours=hours * gpus,
        cost=hours * gpus * price,
    )


def estimates(
    recipe: Recipe,
    *,
    price_per_gpu_hour: float | None = None,
    sft_steps: Mapping[str, int] | None = None,
    lengths: Mapping[str, Known] | None = None,
) -> list[StageEstimate]:
    """One per stage, in the order of the curriculum; arguments as of `estimate`."""
    known = {"price_per_gpu_hour": price_per_gpu_hour, "sft_steps": sft_steps, "lengths": lengths}
    return [estimate(recipe, stage, **known) for stage in recipe.stages]


def total(every: list[StageEstimate]) -> Total | None:
    """What the stages sum to; None where no stage's time is known."""
    known = [e for e in every if e.hours is not None]
    if not known:
        return None
    return Total(
        hours=sum(e.hours or 0 for e in known),
        gpu_hours=sum(e.gpu_hours or 0 for e in known),
        cost=sum(e.cost or 0 for e in known),
        missing=[e.stage for e in every if e.hours is None and e.kind in DEMANDING],
    )


def as_data(recipe: Recipe, every: list[StageEstimate], price_per_gpu_hour: float | None = None) -> dict[str, Any]:
    """The plan as JSON has it (docs/planning.md, "JSON")."""
    gpu, sums = gpu_of(recipe), total(every)
    price = price_per_gpu_hour if price_per_gpu_hour is not None else gpu.price_per_hour if gpu else None
    return {
        "format": FORMAT,
        "recipe": recipe.name,
        "model": recipe.model.name,
        "gpu": recipe.cluster.gpu,
        "gpu_memory_bytes": gpu.memory_bytes if gpu else None,
        "price_per_gpu_hour": price,
        "stages": [asdict(e) | {"flops": e.flops} for e in every],
        "total": {"tokens": recipe.total_tokens, **(asdict(sums) if sums else {})},
    }


def slowest_parts(time: StepTime, count: int = 4) -> str:
    """'matrix products 71%, attention 9%, ...': where most of a step goes."""
    largest = sorted(time.parts().items(), key=lambda part: -part[1])[:count]
    return ", ".join(f"{PART_NAMES[name]} {seconds / time.total:.0%}" for name, seconds in largest if seconds > 0)


PART_NAMES = {
    "matmul": "matrix products",
    "attention": "attention",
    "elementwise": "norms, SwiGLU and casts",
    "head": "logits and loss",
    "recompute": "recomputation",
    "offload": "activations to the host",
    "tensor_parallel": "tensor-parallel communication",
    "context_parallel": "context-parallel communication",
    "pipeline_bubble": "pipeline bubble",
    "pipeline_transfers": "pipeline transfers",
    "data_parallel": "gradients and weights over data parallelism",
    "optimizer": "optimizer",
}
"""Parts of a StepTime, for people."""
