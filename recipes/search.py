"""Search for layouts: every valid way to lay one stage over so many GPUs, those that cannot be and why, and the rest by predicted speed.

What must divide what is the linter's (recipes/lint_layout.py), memory recipes/memory.py's, speed recipes/throughput.py's. A shape is tensor
x pipeline x context; of each shape the fastest variant that fits is ranked: micro batch, virtual stages, recomputation. Settings that are never
better are not tried: tensor parallelism without sequence parallelism (as much communication, more memory) and reductions that do not overlap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from recipes.estimates import PART_NAMES, gpu_of, job_memory_bytes, job_of, slowest_parts
from recipes.gpus import Gpu
from recipes.job_options import Parallel
from recipes.lint_layout import phase_layout_rules
from recipes.problem import Problem
from recipes.schema import Phase, Recipe, RecipeError
from recipes.throughput import Job, StepTime, step_time

if TYPE_CHECKING:
    from rich.console import Console

FORMAT = "quarry.search/1"
TENSOR = (1, 2, 4, 8, 16)
CONTEXT = (1, 2, 4, 8, 16, 32, 64)
PIPELINE_AT_MOST = 16
MICRO_BATCHES = (1, 2, 4, 8)
RECOMPUTE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("no recompute", {"recompute": "none"}),
    ("MLP again", {"recompute": "selective", "recompute_modules": ["mlp"]}),
    ("full recompute", {"recompute": "full", "recompute_num_layers": 1}),
)
"""What of a layer is computed again, from nothing to all of it: (words, values of the layout)."""
CHUNKED = ", loss in chunks"
CHUNKED_LOSS_TOKENS = 4096
"""Tokens per chunk of the loss, where logits of a whole micro batch do not fit [assumed: large enough for full-size products]."""


@dataclass(frozen=True)
class Candidate:
    """A layout that is valid and fits, and what it is predicted to do."""

    job: Job
    memory_bytes: int
    time: StepTime
    recompute: str
    """Words of RECOMPUTE."""

    @property
    def layout(self) -> Parallel:
        return self.job.parallel

    @property
    def shape(self) -> tuple[int, int, int]:
        """(tensor, pipeline, context)"""
        return self.layout.tensor, self.layout.pipeline, self.layout.context

    @property
    def speed(self) -> float:
        return self.time.tokens_per_second_per_gpu


@dataclass(frozen=True)
class Rejection:
    """Layouts that fail for one reason."""

    family: str
    reason: str
    layouts: int


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """All that a search found."""

    stage: str
    gpu: Gpu
    gpus: int
    seq_length_tokens: int
    global_batch_samples: int
    considered: int
    """Layouts looked at, micro batches included; of each the least recomputation that fits is searched for."""
    fitting: int
    ranked: list[Candidate]
    """The fastest of each shape, fastest first."""
    rejected: list[Rejection]
    """What breaks a rule, the most layouts first."""
    too_large: list[Rejection]
    """What needs more memory than there is, the fastest first."""
    faster: Candidate | None
    """The fastest layout that would beat the winner but does not fit."""


def with_stage(recipe: Recipe, stage: str, *, gpus: int, seq_length_tokens: int | None = None) -> Recipe:
    """`recipe` with the phase `stage` on `gpus` GPUs and, if given, at another length with the same tokens per step.

    Raises RecipeError for a stage that is no phase, or a length that does not divide the tokens of a step.
    """
    if stage not in recipe.phase:
        known = ", ".join(recipe.phase)
        raise RecipeError(f"--stage {stage}: only phases have layouts to search for; this recipe has {known}")
    if gpus < 1:
        raise RecipeError(f"--gpus {gpus}: a layout needs at least one; e.g. {recipe.phase[stage].parallel.gpus}")
    phase = recipe.phase[stage]
    values: dict[str, Any] = {"parallel": phase.parallel.model_copy(update={"gpus": gpus})}
    if seq_length_tokens is not None:
        per_step = phase.tokens_per_step
        if per_step % seq_length_tokens:
            raise RecipeError(
                f"--seq-length {seq_length_tokens}: a step of {stage} has {per_step} tokens, which that does not divide; "
                f"give a divisor, e.g. {phase.seq_length_tokens}"
            )
        values |= {"seq_length_tokens": seq_length_tokens, "global_batch_samples": per_step // seq_length_tokens}
    return recipe.model_copy(update={"phase": {**recipe.phase, stage: phase.model_copy(update=values)}})


def search(recipe: Recipe, stage: str, *, tensor_overlap: bool = False, chunked_loss: bool = True) -> SearchResult:
    """Layouts for the phase `stage` over its `parallel.gpus` ranks, on the cluster's GPU. RecipeError on CPU, which has no speed to plan.

    `tensor_overlap`: as if Megatron's --tp-comm-overlap were on, as in NVIDIA's runs; Quarry's arguments leave it off. `chunked_loss`: whether
    Quarry's loss in chunks of tokens, which NVIDIA's runs do not have, may be used where a layout does not fit without.
    The result is the same for the same recipe: ties go to less memory, then to the smaller sizes.
    """
    gpu, phase = gpu_of(recipe), recipe.phase[stage]
    if gpu is None:
        raise RecipeError(f"cluster.gpu = {recipe.cluster.gpu}: layouts are searched for GPUs; name one, e.g. --gpu h100")
    found = _Search(recipe, stage, gpu, tensor_overlap=tensor_overlap, chunked_loss=chunked_loss)
    found.run()
    best: dict[tuple[int, int, int], Candidate] = {}
    for candidate in sorted(found.fitting, key=_order):
        best.setdefault(candidate.shape, candidate)
    ranked = list(best.values())
    fastest = ranked[0].speed if ranked else 0.0
    faster = [candidate for candidate in found.too_large if candidate.speed > fastest]
    rules = [Rejection(family, reason, count) for (family, reason), count in found.refused.items()]
    return SearchResult(
        stage=stage,
        gpu=gpu,
        gpus=phase.parallel.gpus,
        seq_length_tokens=phase.seq_length_tokens,
        global_batch_samples=phase.global_batch_samples,
        considered=found.considered,
        fitting=len(found.fitting),
        ranked=ranked,
        rejected=sorted(rules, key=lambda r: (-r.layouts, r.family)),
        too_large=list(found.too_large_families()),
        faster=min(faster, key=_order, default=None),
    )


def _order(candidate: Candidate) -> tuple:
    layout = candidate.layout
    sizes = (*candidate.shape, layout.virtual_pipeline or 1, layout.micro_batch_samples, candidate.recompute)
    return (-candidate.speed, candidate.memory_bytes, sizes)


class _Search:
    """Looks at layouts one by one and sorts them: refused, too large, fitting."""

    def __init__(self, recipe: Recipe, stage: str, gpu: Gpu, *, tensor_overlap: bool, chunked_loss: bool) -> None:
        self.recipe, self.stage, self.phase, self.gpu = recipe, stage, recipe.phase[stage], gpu
        self.tensor_overlap, self.chunked_loss = tensor_overlap, chunked_loss
        self.considered = 0
        self.refused: dict[tuple[str, str], int] = {}
        """(family, reason) -> layouts"""
        self.fitting: list[Candidate] = []
        self.too_large: list[Candidate] = []

    def run(self) -> None:
        for layout in self._layouts():
            if self._allowed(layout):
                self._variants(layout)

    def _layouts(self) -> Iterator[Parallel]:
        """With one sample per micro batch and no recomputation."""
        layers, gpus = self.recipe.model.num_layers, self.phase.parallel.gpus
        nvlink = job_of(self.recipe, self.phase, self.gpu).nvlink_gpus
        for tensor in TENSOR:
            if tensor > gpus:
                continue
            if tensor > nvlink:
                reason = (
                    f"crosses the {'rack' if nvlink > 8 else 'node'} of {nvlink} GPUs: each layer would wait for the network"
                )
                self.refused[(f"TP {tensor}", reason)] = 1
                self.considered += 1
                continue
            for pipeline in range(1, PIPELINE_AT_MOST + 1):
                # Powers of two are tried even where the linter will refuse them: people ask for them.
                if layers % pipeline and pipeline & (pipeline - 1):
                    continue
                virtual = [v for v in range(2, layers // pipeline + 1) if layers % (pipeline * v) == 0] if pipeline > 1 else []
                for context in CONTEXT:
                    if tensor * pipeline * context > gpus:
                        continue
                    for chunks in [None, *virtual]:
                        yield Parallel(
                            name=self.phase.parallel.name,
                            gpus=gpus,
                            tensor=tensor,
                            pipeline=pipeline,
                            virtual_pipeline=chunks,
                            context=context,
                            sequence_parallel=tensor > 1,
                            overlap_grad_reduce=True,
                            overlap_param_gather=True,
                        )

    def _allowed(self, layout: Parallel) -> bool:
        """Whether the linter has no objection; its first is counted."""
        self.considered += 1
        phase = self.phase.model_copy(update={"parallel": layout})
        problem = next(phase_layout_rules(self.recipe, self.stage, phase), None)
        if problem is not None:
            family = _family_of(problem, phase)
            self.refused[family] = self.refused.get(family, 0) + 1
        return problem is None

    def _variants(self, layout: Parallel) -> None:
        """Micro batches of one layout, each with the least recomputation that fits: more would only be slower. A larger micro batch is not
        tried once a smaller one does not fit."""
        for micro in MICRO_BATCHES:
            larger = layout.model_copy(update={"micro_batch_samples": micro})
            if micro > 1 and not self._allowed(larger):
                return
            for words, values in RECOMPUTE:
                if self._fits(larger, values, words):
                    break
                chunks = {**values, "loss_chunk_tokens": CHUNKED_LOSS_TOKENS}
                if self._chunks_help(larger) and self._fits(larger, chunks, words + CHUNKED):
                    break
            else:
                return

    def _chunks_help(self, layout: Parallel) -> bool:
        tokens = layout.micro_batch_samples * self.phase.seq_length_tokens // layout.context
        return self.chunked_loss and tokens > CHUNKED_LOSS_TOKENS

    def _fits(self, layout: Parallel, values: dict[str, Any], words: str) -> bool:
        phase = self.phase.model_copy(update={"parallel": layout.model_copy(update=values)})
        job = replace(job_of(self.recipe, phase, self.gpu), tensor_overlap=self.tensor_overlap)
        candidate = Candidate(job, job_memory_bytes(self.recipe, job), step_time(job), words)
        fits = candidate.memory_bytes <= self.gpu.memory_bytes
        (self.fitting if fits else self.too_large).append(candidate)
        return fits

    def too_large_families(self) -> Iterator[Rejection]:
        """Families of recomputation and shape of which no layout fits, the fastest first."""
        fit = {_memory_family(candidate) for candidate in self.fitting}
        families: dict[tuple[str, tuple[int, int, int]], list[Candidate]] = {}
        for candidate in sorted(self.too_large, key=_order):
            if _memory_family(candidate) not in fit:
                families.setdefault(_memory_family(candidate), []).append(candidate)
        for (recompute, (tensor, pipeline, context)), members in families.items():
            least = min(member.memory_bytes for member in members)
            size = f"{least / 1e9:.0f} GB of {self.gpu.memory_bytes / 1e9:.0f} GB at least"
            yield Rejection(f"{recompute} at TP {tensor} PP {pipeline} CP {context}", size, len(members))


def _family_of(problem: Problem, phase: Phase) -> tuple[str, str]:
    """(family, reason) in which a refusal of the linter is counted."""
    layout, last, gpus = phase.parallel, problem.key.rsplit(".", 1)[-1], phase.parallel.gpus
    sizes = {"tensor": "TP", "pipeline": "PP", "virtual_pipeline": "VP", "context": "CP", "micro_batch_samples": "micro batch"}
    if last in sizes:
        return f"{sizes[last]} {problem.value}", problem.rule
    if last == "gpus" and gpus % layout.pipeline:
        return f"PP {layout.pipeline}", f"does not divide {gpus} GPUs"
    if last in ("global_batch_samples", "heldout_batch_samples") and layout.virtual_pipeline:
        which = "a step" if last == "global_batch_samples" else "the held-out set"
        return (
            f"interleaved PP {layout.pipeline}",
            f"micro batches of {which} per rank: too few, or no multiple of {layout.pipeline}",
        )
    if last == "global_batch_samples" and phase.global_batch_samples < layout.micro_batch_samples * layout.data:
        return (
            "more ranks than samples",
            f"data parallelism x micro batch is over the {phase.global_batch_samples} samples of a step",
        )
    return f"{last} {problem.value}", problem.rule


def _memory_family(candidate: Candidate) -> tuple[str, tuple[int, int, int]]:
    return candidate.recompute.removesuffix(CHUNKED), candidate.shape


def explain(result: SearchResult) -> list[str]:
    """The winner in three lines: where its time goes, what the runner-up loses, what would be faster and does not fit."""
    if not result.ranked:
        return ["no layout fits: take more GPUs, a GPU with more memory, or offload_layers in a layout of your own"]
    first = result.ranked[0]
    lines = [f"time of {describe(first)}: {slowest_parts(first.time)}"]
    if len(result.ranked) > 1:
        second = result.ranked[1]
        lost = {name: second.time.parts()[name] - seconds for name, seconds in first.time.parts().items()}
        name = max(lost, key=lost.__getitem__)
        share = max(0.0, lost[name]) / first.time.total
        lines.append(
            f"{describe(second)} is {1 - second.speed / first.speed:.1%} slower, mostly {PART_NAMES[name]} (+{share:.1%} of the step); "
            "differences below 5% are within the model's error: measure the first few"
        )
    if result.faster is None:
        lines.append("nothing faster was too large for the memory")
    else:
        large = result.faster
        lines.append(
            f"{describe(large)} would be {large.speed / first.speed - 1:.1%} faster, and needs {large.memory_bytes / 1e9:.0f} of "
            f"{result.gpu.memory_bytes / 1e9:.0f} GB"
        )
    return lines


def describe(candidate: Candidate) -> str:
    """'TP2 PP4x5 CP1 DP64, micro batch 2, no recompute'"""
    layout = candidate.layout
    pipeline = f"PP{layout.pipeline}" + (f"x{layout.virtual_pipeline}" if layout.virtual_pipeline else "")
    sizes = f"TP{layout.tensor} {pipeline} CP{layout.context} DP{layout.data}"
    return f"{sizes}, micro batch {layout.micro_batch_samples}, {candidate.recompute}"


def as_data(result: SearchResult, limit: int = 20) -> dict[str, Any]:
    """The result as JSON has it (docs/planning.md, "JSON"): the first `limit` shapes, all reasons."""

    def layout(candidate: Candidate) -> dict[str, Any]:
        return {
            "layout": candidate.layout.model_dump(),
            "data": candidate.layout.data,
            "memory_bytes": candidate.memory_bytes,
            "tokens_per_second_per_gpu": candidate.speed,
            "mfu": candidate.time.mfu,
            "step_parts_seconds": candidate.time.parts(),
        }

    return {
        "format": FORMAT,
        "stage": result.stage,
        "gpu": result.gpu.name,
        "gpus": result.gpus,
        "seq_length_tokens": result.seq_length_tokens,
        "global_batch_samples": result.global_batch_samples,
        "considered": result.considered,
        "fitting": result.fitting,
        "ranked": [layout(candidate) for candidate in result.ranked[:limit]],
        "rejected": [asdict(rejection) for rejection in result.rejected],
        "too_large": [asdict(rejection) for rejection in result.too_large],
        "explanation": explain(result),
    }


def print_search(result: SearchResult, console: Console, *, shown: int = 8) -> None:
    """The best shapes, the winner in three lines, and why the others failed."""
    from rich.table import Table

    gpu, length = result.gpu, result.seq_length_tokens
    console.print(
        f"[bold]{result.stage}[/]: {result.global_batch_samples} samples of {length:,} tokens a step on {result.gpus} {gpu.name.upper()}: "
        f"{result.considered:,} layouts, {result.fitting:,} fit, {len(result.ranked)} shapes",
        highlight=False,
    )
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for name in ("", "TP", "PP", "VP", "CP", "DP", "micro", "GB", "tok/s/GPU", "MFU", "to the best"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("recompute", no_wrap=True)
    for place, each in enumerate(result.ranked[:shown], 1):
        layout = each.layout
        sizes = (
            layout.tensor,
            layout.pipeline,
            layout.virtual_pipeline or "-",
            layout.context,
            layout.data,
            layout.micro_batch_samples,
        )
        slower = each.speed / result.ranked[0].speed - 1
        figures = (
            f"{each.memory_bytes / 1e9:.0f}",
            f"{each.speed:,.0f}",
            f"{each.time.mfu:.1%}",
            f"{slower:+.1%}" if place > 1 else "",
        )
        table.add_row(str(place), *map(str, sizes), *figures, each.recompute)
    console.print(table, highlight=False)
    for line in explain(result):
        console.print(f"- {line}", highlight=False)
    for title, rejections in (("too large", result.too_large), ("not allowed", result.rejected)):
        if rejections:
            console.print(f"{title}:", highlight=False)
        for each in rejections[:shown]:
            console.print(f"- {each.family}: {each.reason} ({each.layouts})", highlight=False)
        if len(rejections) > shown:
            console.print(f"- and {len(rejections) - shown} more families (--json has all)", highlight=False)
