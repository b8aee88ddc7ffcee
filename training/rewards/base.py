"""What every reward is made of: the sample that it sees, the score that it gives, its options."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from types import ModuleType
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

REASON_MAX_CHARACTERS = 500
"""Reasons go into logs for thousands of samples; a model's 100 KB answer inside an error message must not."""


class RewardError(ValueError):
    """A reward that cannot be used as it is configured, or here; the message names it, the key, the value and the remedy."""


class Message(BaseModel):
    """One turn of the prompt."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: str
    content: str


class Sample(BaseModel):
    """One completion with what is needed to judge it. Everything is JSON: it travels to worker processes without pickle."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    prompt: tuple[Message, ...] = ()
    completion: str
    """The text that the model wrote, without end-of-turn token."""
    reference: JsonValue = None
    """What the reward compares with; its form is the reward's (docs/rewards.md)."""
    domain: str = "default"
    metadata: dict[str, JsonValue] = {}


class Score(BaseModel):
    """A value in [0, 1] and why. `failed`: the reward itself broke (crash, time-out, unreachable judge); the value is then 0."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
    reason: str = ""
    details: dict[str, JsonValue] = {}
    failed: bool = False

    @classmethod
    def failure(cls, reason: str, **details: JsonValue) -> Score:
        """Zero, marked as the reward's failure and not the model's."""
        return cls(value=0.0, reason=shorten(reason), details=details, failed=True)


class Options(BaseModel):
    """Base of every reward's options: unknown keys, wrong types and values out of range are refused by name."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    time_limit_seconds: Annotated[float, Field(gt=0, le=3600)] = 10.0
    """Wall-clock limit of one sample; beyond it the sample gets a failure score."""


class Reward(ABC):
    """A reward: built once per worker from checked options, then asked sample by sample.

    `score` may raise: whoever calls it turns that into a failure score. It must be deterministic unless it asks a service.
    """

    options_type: ClassVar[type[Options]] = Options
    runs_in: ClassVar[Literal["worker", "thread"]] = "worker"
    """`worker`: a process that can be killed, for anything that computes. `thread`: waits for a service and enforces its own limit."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def prepare(self) -> None:  # noqa: B027 - most rewards need nothing
        """Import and check what is needed; RewardError with the remedy where it is missing. Called once, before the first sample."""

    @abstractmethod
    def score(self, sample: Sample) -> Score:
        """Score one sample."""

    def check_reference(self, reference: JsonValue) -> None:  # noqa: B027
        """RewardError where samples with this reference could never be scored; cheap, and without `prepare`."""

    def close(self) -> None:  # noqa: B027
        """Release connections."""


def shorten(text: str, limit: int = REASON_MAX_CHARACTERS) -> str:
    """`text` in at most `limit` characters, its middle left out."""
    if len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def need(module: str, reward: str, package: str | None = None) -> ModuleType:
    """The module, imported when first asked for; RewardError with the remedy where it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is not None and error.name.partition(".")[0] != top:
            raise  # it is there, one of its own dependencies is not
        raise RewardError(
            f"reward '{reward}' needs the package '{package or top}', which is not installed; pip install 'quarry[rl]'"
        ) from None
