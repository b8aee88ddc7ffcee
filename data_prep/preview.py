"""`quarry prep --dry-run`: the plan as rows, without writing a file; sources that are not tokenized yet are estimated from a sample.

Nothing stops at the first problem: what can be planned is planned, and every refusal is in `Preview.problems`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_prep import corpus, views
from data_prep.columns import Column
from data_prep.errors import DataError
from data_prep.estimate import Estimate, Estimator
from data_prep.indexed import idx_path
from data_prep.overlap import overlaps
from data_prep.plan import Draw, SourcePlan, make_plan, phases_of
from data_prep.prepare import check
from data_prep.records import TokenizedRecord
from data_prep.shares import weights
from data_prep.sources import source_paths
from recipes.schema import Recipe


@dataclass(frozen=True)
class Row:
    """One source in one phase."""

    phase: str
    category: str
    source: str
    share_planned_percent: float
    samples_given: int | None
    """Samples that Megatron's blend takes of it, exactly; None where the phase is too long to repeat the blend, which gives a source
    at most one sample above its share (data_prep/shares.py)."""
    share_given_percent: float
    """What the sample counts give: from samples_given, or as planned where that is None."""
    draw: Draw | None
    """None: what the source holds is not known, or it cannot be drawn from; a problem says why."""


@dataclass(frozen=True)
class Phase:
    """The sums of one phase."""

    tokens: int
    """Trained."""
    samples: int
    tokens_drawn: int
    """In its views; a little more than it trains (Megatron's surplus, whole documents)."""
    min_document_tokens: int
    long_tokens: int
    """Of tokens_drawn, in documents of at least min_document_tokens."""


@dataclass(frozen=True)
class Preview:
    """What `quarry prep` would make."""

    rows: list[Row]
    """In the order of the stages, sources by name."""
    phases: dict[str, Phase]
    sources: dict[str, SourcePlan]
    """Those whose documents are known or estimated, over the whole curriculum."""
    estimated: set[str]
    """Sources whose numbers come from a sample of their text."""
    problems: list[str]
    """Everything that `quarry prep` would refuse, as far as it can be known before it runs."""


def preview(recipe: Recipe, *, workers: int = 1) -> Preview:
    """Plan the recipe over what is tokenized already and estimates of what is not. Raises nothing for bad data: see `problems`."""
    problems: list[str] = []
    try:
        check(recipe)
    except DataError as error:
        problems += str(error).split("\n")
    paths: dict[str, list[Path]] = {}
    lengths: dict[str, Column | Estimate] = {}
    estimated: set[str] = set()
    estimator = Estimator(recipe)
    for name, source in recipe.data.sources.items():
        if source.paths == [] if source.kind != "builtin" else source.builder not in corpus.BUILDERS:
            continue  # among the problems of `check`
        try:
            if source.kind != "builtin":
                paths[name] = source_paths(name, source)
            tokenized = _tokenized_lengths(Path(recipe.data.root), name)
            if tokenized is None:
                estimated.add(name)
            lengths[name] = estimator.lengths(name) if tokenized is None else tokenized
        except DataError as error:
            problems += str(error).split("\n")
    problems += overlaps(recipe.data, paths)
    unknown = sorted(set(recipe.data.sources) - set(lengths))
    made = make_plan(recipe, lengths.__getitem__, workers=workers, unknown=unknown)
    # A phase without a category's source is refused by `check` and by the planner, in the same words.
    problems = list(dict.fromkeys(problems + [line for problem in made.problems for line in problem.split("\n")]))
    rows = _rows(recipe, made.draws)
    return Preview(
        rows, {name: _phase(recipe, name, draws) for name, draws in made.draws.items()}, made.sources, estimated, problems
    )


def _tokenized_lengths(root: Path, name: str) -> Column | None:
    record = TokenizedRecord.read_if_valid(root / "tokenized" / f"{name}.json")
    known = record is not None and idx_path(root / "tokenized" / name).is_file()
    return views.source_lengths(root, name) if known else None


def _rows(recipe: Recipe, draws: dict[str, dict[str, Draw]]) -> list[Row]:
    rows = []
    for phase in phases_of(recipe):
        try:
            shares = weights(recipe.data, phase, recipe.phase[phase])
        except DataError:
            continue  # among the problems
        samples = recipe.phase[phase].samples
        for source, weight in shares.items():
            draw = draws[phase].get(source)
            given = draw.samples_given if draw else None
            rows.append(
                Row(
                    phase=phase,
                    category=recipe.data.sources[source].category,
                    source=source,
                    share_planned_percent=100 * weight,
                    samples_given=given,
                    share_given_percent=100 * (weight if given is None else given / samples),
                    draw=draw,
                )
            )
    return rows


def _phase(recipe: Recipe, name: str, draws: dict[str, Draw]) -> Phase:
    spec = recipe.phase[name]
    return Phase(
        tokens=spec.tokens,
        samples=spec.samples,
        tokens_drawn=sum(draw.tokens for draw in draws.values()),
        min_document_tokens=spec.min_document_tokens,
        long_tokens=sum(draw.long_tokens for draw in draws.values()),
    )
