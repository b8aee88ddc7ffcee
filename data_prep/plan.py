"""The mixture planner: what each phase takes of each source, and the refusals before a token is spent.

A phase's data set is read by Megatron's BlendedDataset (data_prep/shares.py), which begins a second epoch of a view that is too short.
A view therefore holds at least as many samples of tokens as the blend asks for, and one more token (the last label).

The sources are dealt independently of each other (data_prep/deal.py), so that planning takes as many cores as there are.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from data_prep.deal import Deal, Dealer, Need, Piece
from data_prep.errors import DataError
from data_prep.shares import SURPLUS, samples_asked, samples_given, weights
from recipes.schema import Data, Phase, Recipe

__all__ = [
    "SURPLUS",
    "Draw",
    "Plan",
    "SourcePlan",
    "make_plan",
    "phase_inputs",
    "phases_of",
    "plan",
    "samples_asked",
    "weights",
]

DEALING = 2
"""Raise it when equal inputs would give other views."""
MAX_VIEW_DOCUMENTS = (1 << 31) - 1
"""GPTDataset numbers the documents of a data set in 32 bits."""
PARALLEL_DOCUMENTS = 20_000_000
"""Below this, planning takes about a second and starting processes would take as long."""


@dataclass(frozen=True)
class Draw:
    """What one phase takes from one source."""

    phase: str
    source: str
    category: str
    share_percent: float
    weight: float
    samples_given: int | None
    """Samples that Megatron's blend takes of the view, exactly; None in phases too long to repeat it (shares.SIMULATED_SAMPLES)."""
    samples_asked: int
    """Samples that Megatron's blend asks the view for, surplus included."""
    tokens_needed: int
    """samples_asked * sequence length + 1."""
    tokens_planned: int
    """weight * the phase's tokens."""
    pieces: tuple[Piece, ...]
    """The documents of the view, in its order; one repeats only when all that could be dealt had been dealt."""
    documents: int
    tokens: int
    """In those documents; at least tokens_needed."""
    source_tokens: int
    epochs: float
    """Tokens dealt so far / source_tokens, over the curriculum to the end of this phase."""
    min_document_tokens: int
    only_long: bool
    """The view holds no document below min_document_tokens."""
    long_source_tokens: int
    """Tokens of the source in documents of at least min_document_tokens."""
    long_tokens: int
    """Tokens of the view in documents of at least min_document_tokens."""
    long_epochs: float
    """Of the documents of at least min_document_tokens, as `epochs`."""


@dataclass(frozen=True)
class SourcePlan:
    """One source over the whole curriculum."""

    category: str
    documents: int
    tokens: int
    tokens_drawn: int
    epochs: float


@dataclass(frozen=True)
class Plan:
    """What every phase takes, and every refusal."""

    draws: dict[str, dict[str, Draw]]
    """Phase -> source -> draw; without those that could not be planned."""
    sources: dict[str, SourcePlan]
    """Every source of the recipe whose documents are known, drawn or not."""
    problems: list[str]


def plan(recipe: Recipe, lengths_of: Callable[[str], np.ndarray], *, workers: int = 1) -> dict[str, dict[str, Draw]]:
    """Phase -> source -> Draw for the whole curriculum; DataError with all refusals, one a line, before anything is written.

    `lengths_of(source)` gives the document lengths in tokens, int [N], of a tokenized source, or a column of a file. With several `workers`
    large plans are made by as many processes.
    """
    made = make_plan(recipe, lengths_of, workers=workers)
    if made.problems:
        raise DataError("\n".join(made.problems))
    return made.draws


def make_plan(
    recipe: Recipe, lengths_of: Callable[[str], np.ndarray], *, workers: int = 1, unknown: Sequence[str] = ()
) -> Plan:
    """As `plan`, with the refusals as data. Sources in `unknown` are left out: what they hold is not known."""
    data = recipe.data
    wanted: dict[str, dict[str, _Wanted]] = {}
    problems: list[str] = []
    for name in phases_of(recipe):
        try:
            wanted[name] = _wanted(recipe, name, problems)
        except DataError as error:
            problems.append(str(error))
    tasks = [
        _Task(
            name,
            recipe.seed,
            tuple(phase[name].need for phase in wanted.values() if name in phase),
            data.max_epochs,
            lengths_of(name),
        )
        for name in data.sources
        if name not in unknown
    ]
    dealt = {task.source: found for task, found in zip(tasks, _deal_all(tasks, workers), strict=True)}
    draws: dict[str, dict[str, Draw]] = {name: {} for name in phases_of(recipe)}
    for source, found in dealt.items():
        if found.shortage is not None:
            phases = [name for name in wanted if source in wanted[name]]
            problems.append(_shortage(found, phases[found.shortage], wanted[phases[found.shortage]][source], data))
            continue
        deals = iter(found.deals)
        for name, phase in wanted.items():
            if source in phase:
                draws[name][source] = _draw(recipe, name, phase[source], found, next(deals))
    for phase in draws.values():
        problems += [problem for draw in phase.values() if (problem := _too_many_documents(draw)) is not None]
    problems += _over_cap(draws, data)
    return Plan({name: dict(sorted(phase.items())) for name, phase in draws.items()}, _sources(data, dealt), problems)


def phases_of(recipe: Recipe) -> list[str]:
    """The phases of a curriculum in their order."""
    return [name for name in recipe.stages if name in recipe.phase]


# --- what a phase wants ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wanted:
    source: str
    weight: float
    samples_given: int | None
    samples_asked: int
    need: Need


def _wanted(recipe: Recipe, name: str, problems: list[str]) -> dict[str, _Wanted]:
    """Source -> what the phase wants of it; refusals go to `problems`."""
    phase, data = recipe.phase[name], recipe.data
    shares = weights(data, name, phase)
    problems += _bad_long_categories(name, phase)
    total = float(np.array(list(shares.values())).sum())
    given = samples_given(shares, phase.samples)
    found = {}
    for source, weight in shares.items():
        planned = weight * phase.samples
        if planned < 1 or (given is not None and given[source] == 0):
            problems.append(
                f"phase '{name}': source '{source}' gets {planned:.2g} of {phase.samples} samples, so it may be left out silently; raise "
                f"its share to at least {100 / phase.samples:.3g} %, train more steps, or set its share to 0"
            )
            continue
        asked = samples_asked(phase.samples, weight, total)
        need = Need(
            asked * phase.seq_length_tokens + 1,
            phase.min_document_tokens,
            data.sources[source].category in phase.require_long_in,
        )
        found[source] = _Wanted(source, weight, given[source] if given else None, asked, need)
    return found


def _bad_long_categories(name: str, phase: Phase) -> list[str]:
    drawn = {category for category, share in phase.mixture.shares_percent.items() if share > 0}
    unknown = sorted(set(phase.require_long_in) - drawn)
    problems = []
    if unknown:
        problems.append(
            f"phase '{name}': require_long_in names {', '.join(unknown)}, of which the phase takes nothing (its categories: "
            f"{', '.join(sorted(drawn))}); take it out of phase.{name}.require_long_in"
        )
    if phase.require_long_in and phase.min_document_tokens == 0:
        problems.append(
            f"phase '{name}': require_long_in is set and min_document_tokens is 0; set phase.{name}.min_document_tokens to the "
            f"length that a document must have"
        )
    return problems


# --- dealing -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    source: str
    seed: int
    needs: tuple[Need, ...]
    max_epochs: float
    lengths: np.ndarray
    """Or what is sliced like one; for large sources a column of a file, which is sent to a process by its name."""


@dataclass(frozen=True)
class _Dealt:
    source: str
    documents: int
    tokens: int
    long_tokens: dict[int, int]
    """min_document_tokens -> tokens of the source in documents of at least that length."""
    deals: list[Deal]
    shortage: int | None
    """Number of the need that is hopelessly over data.max_epochs; nothing was dealt then."""


def _deal_source(task: _Task) -> _Dealt:
    lengths = task.lengths
    times = getattr(lengths, "stands_for", 1)  # an estimate's documents stand for several (data_prep/estimate.py)
    dealer = Dealer(task.source, lengths, task.seed, [replace(need, tokens=-(-need.tokens // times)) for need in task.needs])
    long_tokens = {
        length: times * dealer.long_source_tokens(length) for length in {need.min_document_tokens for need in task.needs}
    }
    shortage = _hopeless(times * dealer.source_tokens, long_tokens, task)
    deals = dealer.deal_all() if shortage is None else []
    if times > 1:
        deals = [
            replace(d, pieces=(), documents=times * d.documents, tokens=times * d.tokens, long_tokens=times * d.long_tokens)
            for d in deals
        ]
    return _Dealt(task.source, times * dealer.documents, times * dealer.source_tokens, long_tokens, deals, shortage)


def _hopeless(tokens: int, long_tokens: dict[int, int], task: _Task) -> int | None:
    """The first need so far over the cap that dealing would only take long and be refused anyway."""
    limit = 2 * task.max_epochs + 2
    wanted = 0
    wanted_long = dict.fromkeys(long_tokens, 0)
    for number, need in enumerate(task.needs):
        wanted += need.tokens
        wanted_long[need.min_document_tokens] += need.tokens if need.only_long else 0
        length = need.min_document_tokens
        if wanted > limit * tokens or wanted_long[length] > limit * long_tokens[length]:
            return number
    return None


def _deal_all(tasks: list[_Task], workers: int) -> list[_Dealt]:
    if workers > 1 and sum(len(task.lengths) for task in tasks) >= PARALLEL_DOCUMENTS:
        # spawn: the caller may have threads, which fork does not survive
        with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=multiprocessing.get_context("spawn")) as pool:
            return list(pool.map(_deal_source, tasks))
    return [_deal_source(task) for task in tasks]


def _draw(recipe: Recipe, name: str, wanted: _Wanted, found: _Dealt, deal: Deal) -> Draw:
    need = wanted.need
    return Draw(
        phase=name,
        source=found.source,
        category=recipe.data.sources[found.source].category,
        share_percent=100 * wanted.weight,
        weight=wanted.weight,
        samples_given=wanted.samples_given,
        samples_asked=wanted.samples_asked,
        tokens_needed=need.tokens,
        tokens_planned=round(wanted.weight * recipe.phase[name].tokens),
        pieces=deal.pieces,
        documents=deal.documents,
        tokens=deal.tokens,
        source_tokens=found.tokens,
        epochs=deal.epochs,
        min_document_tokens=need.min_document_tokens,
        only_long=need.only_long,
        long_source_tokens=found.long_tokens[need.min_document_tokens],
        long_tokens=deal.long_tokens,
        long_epochs=deal.long_epochs,
    )


def _sources(data: Data, dealt: Mapping[str, _Dealt]) -> dict[str, SourcePlan]:
    return {
        name: SourcePlan(
            category=data.sources[name].category,
            documents=found.documents,
            tokens=found.tokens,
            tokens_drawn=sum(deal.tokens for deal in found.deals),
            epochs=found.deals[-1].epochs if found.deals else 0.0,
        )
        for name, found in dealt.items()
    }


# --- refusals ------------------------------------------------------------------------------------------------------------------------


def _shortage(found: _Dealt, phase: str, wanted: _Wanted, data: Data) -> str:
    need, category = wanted.need, data.sources[found.source].category
    has = found.long_tokens[need.min_document_tokens] if need.only_long else found.tokens
    if has == 0 and found.tokens:
        return (
            f"phase '{phase}': source '{found.source}' has no document of at least {need.min_document_tokens:,} tokens, and "
            f"phase.{phase}.require_long_in names its category '{category}'; give it longer documents, lower "
            f"phase.{phase}.min_document_tokens, or take '{category}' out of require_long_in"
        )
    if has == 0:
        return f"phase '{phase}': source '{found.source}' has no tokens, {need.tokens:,} are needed; give it data, or set its share to 0"
    what = f" in documents of at least {need.min_document_tokens:,}" if need.only_long else ""
    return (
        f"phase '{phase}': source '{found.source}' needs {need.tokens:,} tokens and has {has:,}{what}: far over data.max_epochs="
        f"{data.max_epochs:g}; add data to the source, or lower the share of '{category}'"
    )


def _too_many_documents(draw: Draw) -> str | None:
    if draw.documents <= MAX_VIEW_DOCUMENTS:
        return None
    return (
        f"phase '{draw.phase}': source '{draw.source}' gives {draw.documents:,} documents, and Megatron numbers those of a data set in 32 "
        f"bits (at most {MAX_VIEW_DOCUMENTS:,}); split the source in two with half the weight each"
    )


def _over_cap(drawn: Mapping[str, Mapping[str, Draw]], data: Data) -> list[str]:
    """One problem per source that the curriculum reads more often than data.max_epochs."""
    problems = []
    for source in sorted({name for draws in drawn.values() for name in draws}):
        draws = [phase[source] for phase in drawn.values() if source in phase]
        over = next((draw for draw in draws if draw.epochs > data.max_epochs), None)
        long = next((draw for draw in draws if draw.only_long and draw.long_epochs > data.max_epochs), None)
        if over is not None:
            problems.append(
                f"phase '{over.phase}': source '{source}' needs {over.tokens_needed:,} tokens and has {over.source_tokens:,} in all; it is "
                f"read {over.epochs:.2f} times by then, {draws[-1].epochs:.2f} times by the end, and data.max_epochs is "
                f"{data.max_epochs:g}; add data to the source, lower the share of '{over.category}', or set "
                f"data.max_epochs={math.ceil(draws[-1].epochs * 100) / 100:g}"
            )
        elif long is not None:
            problems.append(
                f"phase '{long.phase}': source '{source}' needs {long.tokens_needed:,} tokens in documents of at least "
                f"{long.min_document_tokens:,} and has {long.long_source_tokens:,} in such; they are read {long.long_epochs:.2f} times by "
                f"then, and data.max_epochs is {data.max_epochs:g}; add longer documents, lower phase.{long.phase}.min_document_tokens, "
                f"take '{long.category}' out of phase.{long.phase}.require_long_in, or set "
                f"data.max_epochs={math.ceil(long.long_epochs * 100) / 100:g}"
            )
    return problems


# --- what a view depends on ----------------------------------------------------------------------------------------------------------


def phase_inputs(recipe: Recipe, phase: str, source_digests: Mapping[str, str]) -> dict[str, object]:
    """Everything that the views of `phase` depend on: its sources, what it and the phases before take of them, and the seed.

    Neither later phases, nor sources that `phase` does not draw, nor data.max_epochs (which only refuses) count.
    """
    own = weights(recipe.data, phase, recipe.phase[phase])
    phases = phases_of(recipe)
    steps = []
    for name in phases[: phases.index(phase) + 1]:
        spec = recipe.phase[name]
        shares = weights(recipe.data, name, spec)
        taken = {source: weight for source, weight in shares.items() if source in own}
        steps.append(
            {
                "samples": spec.samples,
                "seq_length_tokens": spec.seq_length_tokens,
                "min_document_tokens": spec.min_document_tokens,
                "only_long": sorted(s for s in taken if recipe.data.sources[s].category in spec.require_long_in),
                "weights": taken,
                "total_weight": math.fsum(shares.values()),
            }
        )
    spec = recipe.phase[phase]
    return {
        "dealing": DEALING,
        "phase": phase,
        "tokens": spec.tokens,
        "steps": spec.steps,
        "global_batch_samples": spec.global_batch_samples,
        "mixture": spec.mixture.model_dump(mode="json"),
        "seed": recipe.seed,
        "surplus": SURPLUS,
        "sources": {source: [recipe.data.sources[source].category, source_digests[source]] for source in own},
        "dealt": [step for step in steps if step["weights"]],
    }
