"""Which rewards a sample gets, by its domain, and how they make one value."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator

from training.rewards.base import RewardError, Score, shorten
from training.rewards.registry import build, check_options, reward_class

OTHER = "*"
"""Domain of samples whose own is not named in the plan."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Part(_Strict):
    """One reward inside a domain."""

    reward: str
    """Name in the registry, or module:Class."""
    options: dict[str, Any] = {}
    role: Literal["sum", "gate", "penalty"] = "sum"
    """`sum`: weight * score, weights scaled to 1. `gate`: below `at_least` the total is `otherwise`, and the rest is not even run.
    `penalty`: weight * (1 - score) is taken off."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    at_least: Annotated[float, Field(gt=0, le=1)] = 1.0
    otherwise: Annotated[float, Field(ge=0, lt=1)] = 0.0
    name: str = ""
    """How the part is called in statistics; the reward's name where empty."""

    @property
    def title(self) -> str:
        return self.name or self.reward


class DomainPlan(_Strict):
    """The parts of one domain, combined to a value in [0, 1]:

    total = max(0, sum_i w_i s_i / sum_i w_i - sum_j w_j (1 - p_j)) if every gate is passed, else the first failed gate's `otherwise`.
    """

    parts: Annotated[tuple[Part, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _combine(self) -> DomainPlan:
        titles = [part.title for part in self.parts]
        if double := sorted({t for t in titles if titles.count(t) > 1}):
            raise ValueError(f"two parts are called '{double[0]}'; give one of them a name")
        if not any(part.role in ("sum", "gate") for part in self.parts):
            raise ValueError("only penalties: at least one part must have the role sum or gate")
        return self

    def combine(self, scores: dict[str, Score]) -> Score:
        """One score of the parts' scores by title; parts behind a failed gate may be absent. A failed part makes the total a failure."""
        details: dict[str, Any] = {"parts": {title: score.value for title, score in scores.items()}}
        for part in self.parts:
            score = scores.get(part.title)
            if score is not None and score.failed:
                return Score.failure(f"{part.title}: {score.reason}", **details)
        for part in self.parts:
            if part.role == "gate" and scores[part.title].value < part.at_least:
                reason = shorten(f"gate {part.title}: {scores[part.title].reason}")
                return Score(value=part.otherwise, reason=reason, details={**details, "gate": part.title})
        summed = [part for part in self.parts if part.role == "sum"]
        weight = sum(part.weight for part in summed)
        # Gates alone are a reward too: passed is 1.
        total = sum(part.weight * scores[part.title].value for part in summed) / weight if summed else 1.0
        total -= sum(part.weight * (1 - scores[part.title].value) for part in self.parts if part.role == "penalty")
        reason = "; ".join(f"{title}: {score.reason}" for title, score in scores.items() if score.reason)
        return Score(value=min(1.0, max(0.0, total)), reason=shorten(reason), details=details)


class RewardPlan(_Strict):
    """Rewards of all domains, and how they are run."""

    domains: Annotated[dict[str, DomainPlan], Field(min_length=1)]
    """Domain -> its parts; '*' stands for every domain that is not named. A sample of another domain is refused."""
    workers: Annotated[int, Field(gt=0, le=256)] = 4
    """Processes that score; a program under test runs beside its worker."""
    worker_memory_bytes: Annotated[int, Field(ge=256 << 20)] | None = 8 << 30
    """Address space of one worker (RLIMIT_AS); None: unlimited."""
    threads: Annotated[int, Field(gt=0, le=1024)] = 32
    """Requests to judges and reward models in flight together."""
    start_seconds: Annotated[float, Field(gt=0)] = 120.0
    """Limit for a worker's start, imports included."""
    max_failure_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Of the last `failure_window_samples` of a domain, the share of failed scores above which training stops; 1 never stops."""
    failure_window_samples: Annotated[int, Field(gt=0)] = 1024
    failure_min_samples: Annotated[int, Field(gt=0)] = 64
    """A share is looked at from this many samples on: one failure among two is no rate."""

    @field_validator("domains")
    @classmethod
    def _known(cls, domains: dict[str, DomainPlan]) -> dict[str, DomainPlan]:
        for domain, plan in domains.items():
            for part in plan.parts:
                try:
                    check_options(part.reward, part.options)
                except RewardError as error:
                    raise ValueError(f"domain '{domain}': {error}") from None
        return domains

    @classmethod
    def parse(cls, value: Any, source: str = "reward plan") -> RewardPlan:
        """A plan of plain values; RewardError with every problem, one a line."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            lines = [
                f"{source}: {'.'.join(str(p) for p in e['loc']) or '(root)'}: {e['msg'].removeprefix('Value error, ')}"
                for e in error.errors(include_url=False)
            ]
            raise RewardError("\n".join(lines)) from None

    @classmethod
    def read(cls, path: Path) -> RewardPlan:
        """A plan from a YAML or JSON file."""
        import yaml

        try:
            value = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise RewardError(f"{path}: cannot be read as YAML or JSON: {error}") from None
        return cls.parse(value, str(path))

    def domain(self, name: str) -> tuple[str, DomainPlan]:
        """The entry that holds for a domain; RewardError where there is none."""
        key = name if name in self.domains else OTHER
        if key not in self.domains:
            raise RewardError(
                f"a sample's domain is '{name}', the plan has {', '.join(self.domains)}; add it, or '*' for all others"
            )
        return key, self.domains[key]

    def check_references(self, samples: Iterable[tuple[str, JsonValue]], shown: int = 5) -> None:
        """RewardError that names the first problems of (domain, reference) pairs: a domain without rewards, a reference of the wrong form.

        Call it with all prompts before the first step. Their content is not tried: a schema is checked, an answer not yet parsed.
        """
        rewards = {
            (domain, part.title): build(part.reward, part.options)
            for domain, plan in self.domains.items()
            for part in plan.parts
        }
        problems = []
        for number, (name, reference) in enumerate(samples):
            try:
                domain, plan = self.domain(name)
                for part in plan.parts:
                    rewards[domain, part.title].check_reference(reference)
            except RewardError as error:
                problems.append(f"sample {number} (domain '{name}'): {error}")
        if problems:
            more = f"\nand {len(problems) - shown} more" if len(problems) > shown else ""
            raise RewardError("\n".join(problems[:shown]) + more)

    def rewards(self, runs_in: Literal["worker", "thread"]) -> dict[str, tuple[str, dict[str, Any]]]:
        """Key 'domain/title' -> (reward, options) of all parts that run in a worker process or in a thread."""
        return {
            f"{domain}/{part.title}": (part.reward, part.options)
            for domain, plan in self.domains.items()
            for part in plan.parts
            if reward_class(part.reward).runs_in == runs_in
        }
