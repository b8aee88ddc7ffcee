"""What `quarry judge` leaves beside its samples: one audit line per sample, and a record whose counts add up."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from data_prep.files import FileRecord, Sha256, Strict
from data_prep.judge.agreement import Agreement
from data_prep.judge.config import Verdict
from data_prep.records import Count, Record

Outcome = Literal["accepted", "borderline", "rejected", "unjudged"]
OUTCOMES: tuple[Outcome, ...] = ("accepted", "borderline", "rejected", "unjudged")
OUTCOME_OF: dict[Verdict, Outcome] = {"accept": "accepted", "borderline": "borderline", "reject": "rejected"}


class AuditLine(Strict):
    """What happened to one sample of the input, and why."""

    number: int
    """From 1, in the order of the input."""
    id: str
    file: str
    line: int
    content_sha256: Sha256 | None
    repairs: list[str]
    outcome: Outcome
    step: str
    """The rule that refused it, or `judge`."""
    reason: str
    """What counts are kept by."""
    detail: str
    rubric: str | None = None
    key: Sha256 | None = None
    """Of the cache."""
    score: float | None = None
    scores: dict[str, int] | None = None
    flags: dict[str, bool] | None = None
    judge_verdict: Verdict | None = None
    """The judge's own; the outcome does not depend on it."""
    contradiction: bool | None = None
    """The judge's own verdict is not the one that follows from its scores and flags."""
    explanation: str | None = None
    attempts: Count | None = None
    """Of the run that judged it."""
    failures: dict[str, Count] = Field(default_factory=dict)
    """Kind -> failed attempts, over all runs."""


class DimensionScores(Strict):
    mean: float
    distribution: dict[str, Count]
    """Score -> samples."""


class RubricRecord(Strict):
    sha256: Sha256
    judged: Count
    outcomes: dict[Outcome, Count]
    scores: dict[str, DimensionScores]
    flags: dict[str, Count]
    contradictions: Count


class JudgeRecord(Strict):
    endpoint: str
    model: str
    answered_as: dict[str, Count]
    """Name that the endpoint gave its model -> judgements."""
    sampling: dict[str, Any]
    proves: str
    """What this judge's verdicts are worth."""


class Work(Strict):
    """Of this run; what came from the cache cost nothing."""

    asked: Count
    judged: Count
    failed_attempts: dict[str, Count]
    prompt_tokens: Count
    answer_tokens: Count
    cost: float | None
    """In the currency of the prices given; None without prices."""
    seconds: float
    given_up: str | None


class JudgedRecord(Record):
    """Written last. Every sample has one outcome and one audit line."""

    format: Literal["quarry.judged/1"] = "quarry.judged/1"
    files_in: dict[str, Sha256]
    samples: Count
    outcomes: dict[Outcome, Count]
    steps: dict[str, dict[str, Count]]
    """Step -> reason -> samples that it decided."""
    repairs: dict[str, Count]
    rules: dict[str, Any]
    rubrics: dict[str, RubricRecord]
    judge: JudgeRecord
    work: Work
    calibration: Agreement | None
    warnings: list[str]
    files: dict[str, FileRecord]

    @model_validator(mode="after")
    def _adds_up(self) -> JudgedRecord:
        by_outcome = sum(self.outcomes.values())
        by_step = sum(count for reasons in self.steps.values() for count in reasons.values())
        assert by_outcome == by_step == self.samples, f"{self.samples} samples, {by_outcome} by outcome, {by_step} by step"
        judged = sum(rubric.judged for rubric in self.rubrics.values())
        assert judged + self.outcomes["unjudged"] == sum(self.steps.get("judge", {}).values())
        return self
