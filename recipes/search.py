"""Search for layouts: every valid way to lay one stage over so many GPUs, those that cannot be and why, and the rest by predicted speed.

What must divide what is the linter's (recipes/lint_layout.py), memory recipes/memory.py's, speed recipes/throughput.py's. A shape is tensor
x pipeline x context; of each shape the fastest variant that fits is ranked: micro batch, virtual stages, way of context parallelism (ring,
gather, all-to-all), and what is done for memory (recomputation of the MLP, of some layers or of all, loss in chunks, offload).
Settings that are never better are not tried: tensor parallelism without sequence parallelism (as much communication, more memory) and
reductions that do not overlap.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from recipes.activations import layer_bytes, rank_tokens
from recipes.document_packing import DocumentLengths, Packing
from recipes.estimates import gpu_of, job_memory_bytes, job_of, packing_of
from recipes.gpus import Gpu
from recipes.job_options import Parallel
from recipes.lint_layout import phase_layout_rules
from recipes.problem import Problem
from recipes.schema import Phase, Recipe, RecipeError
from recipes.throughput import Job, StepTime, step_time

TENSOR = (1, 2, 4, 8, 16)
CONTEXT = (1, 2, 4, 8, 16, 32, 64)
PIPELINE_AT_MOST = 16
MICRO_BATCHES = (1, 2, 4, 8)
MLP_AGAIN: dict[str, Any] = {"recompute": "selective", "recompute_modules": ["mlp"]}
FULL: dict[str, Any] = {"recompute": "full", "recompute_num_layers": 1}
HOST_MEMORY_SHARE = 0.5
"""Of a GPU's part of the host's memory, what offloaded activations may fill [assumed: the rest for data, saves and the page cache]."""
CHUNKED = ", loss in chunks"
CHUNKED_LOSS_TOKENS = 4096
"""Tokens per chunk of the loss, where logits of a whole micro batch do not fit [assumed: large enough for full-size products]."""
CHUNKS = {"loss_chunk_tokens": CHUNKED_LOSS_TOKENS}


@dataclass(frozen=True)
class Candidate:
    """A layout that is valid and fits, and what it is predicted to do."""

    job: Job
    memory_bytes: int
    time: StepTime
    saving: str
    """What is done for memory, in words: 'no recompute', 'MLP again, loss in chunks', '7 layers on the host' ..."""

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
    lengths_unknown: str | None
    """Why attention is counted over whole samples although documents stay apart; None: it is not, or they do not."""
    considered: int
    """Layouts looked at, micro batches included; of each the fastest way of context parallelism and of saving memory is searched for."""
    fitting: int
    """Of these, those that fit in some way."""
    ranked: list[Candidate]
    """The fastest of each shape, fastest first."""
    rejected: list[Rejection]
    """What breaks a rule, the most layouts first."""
    rejected_ways: list[Rejection]
    """Ways of context parallelism, of layouts that a ring is allowed in."""
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


def search(
    recipe: Recipe,
    stage: str,
    *,
    tensor_overlap: bool = False,
    chunked_loss: bool = True,
    offload: bool = False,
    ring_only: bool = False,
    lengths: DocumentLengths | str | None = None,
) -> SearchResult:
    """Layouts for the phase `stage` over its `parallel.gpus` ranks, on the cluster's GPU. RecipeError on CPU, which has no speed to plan.

    `tensor_overlap`: as if Megatron's --tp-comm-overlap were on, as in NVIDIA's runs; Quarry's arguments leave it off. `chunked_loss`: whether
    Quarry's loss in chunks of tokens, which NVIDIA's runs do not have, may be used where a layout does not fit without. `offload`:
    whether activations may wait on the host; how fast that is follows from data sheets alone, no published run says. `ring_only`:
    context parallelism as in all published runs. `lengths`: of the phase's documents, where they stay apart, or
    why they are not known.
    The result is the same for the same recipe: ties go to less memory, then to the smaller sizes.
    """
    gpu, phase = gpu_of(recipe), recipe.phase[stage]
    if gpu is None:
        raise RecipeError(f"cluster.gpu = {recipe.cluster.gpu}: layouts are searched for GPUs; name one, e.g. --gpu h100")
    found = _Search(
        recipe,
        stage,
        gpu,
        tensor_overlap=tensor_overlap,
        chunked_loss=chunked_loss,
        offload=offload,
        ring_only=ring_only,
        lengths=lengths,
    )
    found.run()
    best: dict[tuple[int, int, int], Candidate] = {}
    for candidate in sorted(found.fitting, key=_order):
        best.setdefault(candidate.shape, candidate)
    ranked = list(best.values())
    fastest = ranked[0].speed if ranked else 0.0
    faster = [candidate for candidate in found.too_large if candidate.speed > fastest]
    return SearchResult(
        stage=stage,
        gpu=gpu,
        gpus=phase.parallel.gpus,
        seq_length_tokens=phase.seq_length_tokens,
        global_batch_samples=phase.global_batch_samples,
        lengths_unknown=(lengths if isinstance(lengths, str) else None) if phase.documents_apart else None,
        considered=found.considered,
        fitting=found.layouts_that_fit,
        ranked=ranked,
        rejected=_most_first(found.refused),
        rejected_ways=_most_first(found.refused_ways),
        too_large=list(found.too_large_families()),
        faster=min(faster, key=_order, default=None),
    )


def _most_first(refused: dict[tuple[str, str], int]) -> list[Rejection]:
    return sorted((Rejection(*family, count) for family, count in refused.items()), key=lambda r: (-r.layouts, r.family))


def _order(candidate: Candidate) -> tuple:
    layout = candidate.layout
    kind = layout.context_communication
    sizes = (*candidate.shape, layout.virtual_pipeline or 1, layout.micro_batch_samples, candidate.saving, kind)
    return (-candidate.speed, candidate.memory_bytes, sizes)


class _Search:
    """Looks at layouts one by one and sorts them: refused, too large, fitting."""

    def __init__(
        self,
        recipe: Recipe,
        stage: str,
        gpu: Gpu,
        *,
        tensor_overlap: bool,
        chunked_loss: bool,
        offload: bool,
        ring_only: bool,
        lengths: DocumentLengths | str | None,
    ) -> None:
        self.recipe, self.stage, self.phase, self.gpu = recipe, stage, recipe.phase[stage], gpu
        self.job = replace(job_of(recipe, self.phase, gpu), tensor_overlap=tensor_overlap)
        self.lengths = lengths
        self.packings: dict[tuple[int, ...], Packing | None] = {}
        """(tensor, context, micro batch) -> what becomes of the documents"""
        self.chunked_loss, self.offload, self.ring_only = chunked_loss, offload, ring_only
        self.considered = self.layouts_that_fit = 0
        self.refused: dict[tuple[str, str], int] = {}
        """(family, reason) -> layouts"""
        self.refused_ways: dict[tuple[str, str], int] = {}
        self.fitting: list[Candidate] = []
        self.too_large: list[Candidate] = []

    def run(self) -> None:
        for layout in self._layouts():
            if self._allowed(layout):
                self._variants(layout)

    def _layouts(self) -> Iterator[Parallel]:
        """With one sample per micro batch and no recomputation."""
        layers, gpus = self.recipe.model.num_layers, self.phase.parallel.gpus
        nvlink = self.job.nvlink_gpus
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
        return self._no_objection(layout, self.refused)

    def _no_objection(self, layout: Parallel, refused: dict[tuple[str, str], int]) -> bool:
        phase = self.phase.model_copy(update={"parallel": layout})
        problem = next(phase_layout_rules(self.recipe, self.stage, phase), None)
        if problem is not None:
            family = _family_of(problem, phase)
            refused[family] = refused.get(family, 0) + 1
        return problem is None

    def _variants(self, layout: Parallel) -> None:
        """Micro batches of one layout. A larger micro batch is not tried once a smaller one does not fit."""
        ways = [layout, *self._other_communications(layout)]
        for micro in MICRO_BATCHES:
            larger = [way.model_copy(update={"micro_batch_samples": micro}) for way in ways]
            if (micro > 1 and not self._allowed(larger[0])) or not self._any_fits(larger):
                return
            self.layouts_that_fit += 1

    def _other_communications(self, layout: Parallel) -> Iterator[Parallel]:
        """The layout with other ways of context parallelism than a ring, where the linter allows them."""
        if layout.context == 1 or self.ring_only:
            return
        levels = [[dealt, layout.context // dealt] for dealt in CONTEXT if 1 < dealt < layout.context]
        two = [{"context_communication": "a2a+p2p", "context_hierarchy": each} for each in levels]
        for way in ({"context_communication": "all_gather"}, {"context_communication": "a2a"}, *two):
            other = layout.model_copy(update=way)
            if self._no_objection(other, self.refused_ways):
                yield other

    def _any_fits(self, ways: list[Parallel]) -> bool:
        """Whether a layout and micro batch fits in one of its ways of context parallelism.

        Where one fits as it is, only those that would be faster are tried with less memory: computing the MLP again, or the fewest layers
        that are enough, or having these on the host; more would only be slower. Where nothing helps, everything is computed again.
        """
        fits, faster = False, []
        for way in sorted(ways, key=lambda way: step_time(self._job(way)).total):
            fits = self._fits_with_chunks(way, "no recompute")
            if fits:
                break
            faster.append(way)
        for way in faster:
            fits |= self._fits_with_chunks(way.model_copy(update=MLP_AGAIN), "MLP again")
            for chunks in ({}, CHUNKS) if self._chunks_help(way) else ({},):
                fits |= self._fits_with_some_layers(way.model_copy(update=chunks), CHUNKED if chunks else "")
        if not fits:
            fits = any([self._fits_with_chunks(way.model_copy(update=FULL), "full recompute") for way in faster])
        return fits

    def _fits_with_some_layers(self, layout: Parallel, chunked: str) -> bool:
        """The fewest layers, of each pipeline stage or chunk, that make it fit when computed again; and when kept on the host."""
        layers, fits = self.recipe.model.num_layers, False
        per_chunk = layers // (layout.pipeline * (layout.virtual_pipeline or 1))

        def again(count: int) -> Parallel:
            values = {"recompute": "full", "recompute_method": "block", "recompute_num_layers": count}
            return layout.model_copy(update=values)

        if count := self._fewest(per_chunk - 1, again):
            of = "stage" if layout.virtual_pipeline is None else "chunk"
            words = f"{count} of {per_chunk} layers{f' a {of}' if layout.pipeline > 1 else ''} again{chunked}"
            fits |= self._fits(again(count), words)
        if self.offload and layout.pipeline == 1:  # Megatron offloads without a pipeline only

            def away(count: int) -> Parallel:
                return layout.model_copy(update={"offload_layers": count})

            tokens = rank_tokens(layout, self.phase.seq_length_tokens, layout.micro_batch_samples)
            each = layer_bytes(self.recipe.model, layout, self.phase.precision, tokens, fp8=False)
            room = int(HOST_MEMORY_SHARE * self.gpu.host_memory_bytes // each)
            if count := self._fewest(min(layers - 1, room), away):
                fits |= self._fits(away(count), f"{count} layers on the host{chunked}")
        return fits

    def _fewest(self, most: int, layout: Callable[[int], Parallel]) -> int | None:
        """The least of 1..most with which `layout` fits; None: not even `most`."""

        def fits(count: int) -> bool:
            return self._memory_bytes(self._job(layout(count))) <= self.gpu.memory_bytes

        if most < 1 or not fits(most):
            return None
        return bisect_left(range(1, most), True, key=fits) + 1

    def _chunks_help(self, layout: Parallel) -> bool:
        tokens = layout.micro_batch_samples * self.phase.seq_length_tokens // layout.context
        return self.chunked_loss and tokens > CHUNKED_LOSS_TOKENS

    def _fits_with_chunks(self, layout: Parallel, words: str) -> bool:
        """As it is, or with the loss in chunks."""
        if self._fits(layout, words):
            return True
        return self._chunks_help(layout) and self._fits(layout.model_copy(update=CHUNKS), words + CHUNKED)

    def _fits(self, layout: Parallel, words: str) -> bool:
        job = self._job(layout)
        candidate = Candidate(job, self._memory_bytes(job), step_time(job), words)
        fits = candidate.memory_bytes <= self.gpu.memory_bytes
        (self.fitting if fits else self.too_large).append(candidate)
        return fits

    def _job(self, layout: Parallel) -> Job:
        """One step in `layout`."""
        if not isinstance(self.lengths, DocumentLengths):
            return replace(self.job, parallel=layout)
        key = (layout.tensor, layout.context, layout.micro_batch_samples)
        if key not in self.packings:
            phase = self.phase.model_copy(update={"parallel": layout})
            self.packings[key] = packing_of(phase, self.lengths)
        return replace(self.job, parallel=layout, packing=self.packings[key])

    def _memory_bytes(self, job: Job) -> int:
        return job_memory_bytes(self.recipe, job, self.phase.optimizer)

    def too_large_families(self) -> Iterator[Rejection]:
        """Families of recomputation and shape of which no layout fits, the fastest first."""
        fit = {_memory_family(candidate) for candidate in self.fitting}
        families: dict[tuple[str, tuple[int, int, int]], list[Candidate]] = {}
        for candidate in sorted(self.too_large, key=_order):
            if _memory_family(candidate) not in fit:
                families.setdefault(_memory_family(candidate), []).append(candidate)
        for (saving, (tensor, pipeline, context)), members in families.items():
            least = min(member.memory_bytes for member in members)
            size = f"{least / 1e9:.0f} GB of {self.gpu.memory_bytes / 1e9:.0f} GB at least"
            yield Rejection(f"{saving} at TP {tensor} PP {pipeline} CP {context}", size, len(members))


def _family_of(problem: Problem, phase: Phase) -> tuple[str, str]:
    """(family, reason) in which a refusal of the linter is counted."""
    layout, last, gpus = phase.parallel, problem.key.rsplit(".", 1)[-1], phase.parallel.gpus
    sizes = {"tensor": "TP", "pipeline": "PP", "virtual_pipeline": "VP", "context": "CP", "micro_batch_samples": "micro batch"}
    kind = layout.context_communication
    if last == "context_communication":
        return kind, problem.rule
    if kind.startswith("a2a") and last in ("context", "context_hierarchy"):
        return kind, "the heads of a tensor-parallel rank do not divide by the ranks that would share them"
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
    return candidate.saving.removesuffix(CHUNKED), candidate.shape
