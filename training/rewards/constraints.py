"""Instruction following: the share of checkable instructions that a completion follows, strictly or loosely read."""

from __future__ import annotations

from typing import Literal

from pydantic import JsonValue, ValidationError

from training.rewards.base import Options, Reward, RewardError, Sample, Score, need, shorten
from training.rewards.constraint_kinds import CONSTRAINTS, Constraint


class InstructionOptions(Options):
    """Options of `instructions`; `reference` is a list of constraints, each {"kind": ..., its arguments} (docs/rewards.md)."""

    mode: Literal["strict", "loose"] = "strict"
    """`loose` (IFEval): also met if it is met without the first line, the last line or both, or with asterisks removed."""
    aggregate: Literal["all", "share"] = "all"
    """`all`: 1 only if every one is met. `share`: the share that is."""


class Instructions(Reward):
    """Whether the instructions of a sample are followed."""

    options_type = InstructionOptions
    options: InstructionOptions

    def prepare(self) -> None:
        need("py3langid", "instructions")

    def score(self, sample: Sample) -> Score:
        constraints = _read(sample.reference)
        met = [self.follows(constraint, sample.completion) for constraint in constraints]
        value = sum(met) / len(met) if self.options.aggregate == "share" else float(all(met))
        missed = [c.kind for c, ok in zip(constraints, met, strict=True) if not ok]
        return Score(
            value=value,
            reason=f"not followed: {', '.join(missed)}" if missed else "all followed",
            details={"met": met, "kinds": [c.kind for c in constraints]},
        )

    def check_reference(self, reference: JsonValue) -> None:
        _read(reference)

    def follows(self, constraint: Constraint, text: str) -> bool:
        """Whether the text, or in loose mode one of its variants, meets the constraint. An empty text meets nothing."""
        candidates = variants(text) if self.options.mode == "loose" else [text]
        return any(candidate.strip() and constraint.met(candidate) for candidate in candidates)


def _read(reference: JsonValue) -> list[Constraint]:
    try:
        return CONSTRAINTS.validate_python(reference)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(str(p) for p in problem["loc"]) or "constraints"
        raise RewardError(shorten(f"reference, {place}: {problem['msg']}")) from None


def variants(text: str) -> list[str]:
    """IFEval's loosened readings: as it is, without first line, last line or both, and each of them without asterisks."""
    lines = text.split("\n")
    cuts = [text, "\n".join(lines[1:]).strip(), "\n".join(lines[:-1]).strip(), "\n".join(lines[1:-1]).strip()]
    return [variant for cut in cuts for variant in (cut, cut.replace("*", ""))]
