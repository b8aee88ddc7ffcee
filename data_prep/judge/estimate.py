"""What judging will take, before it starts and again when the first answers have been measured."""

from __future__ import annotations

from dataclasses import dataclass

from data_prep.errors import DataError
from data_prep.judge.asking import Limits
from data_prep.judge.cache import Cache
from data_prep.judge.config import Rubric
from data_prep.judge.planning import Plan
from data_prep.plain_files import digest_of

MIN_MEASURED = 8
"""Judgements in the cache from which their mean is taken instead of the rubric's assumption."""


@dataclass(frozen=True)
class Prices:
    """Per million tokens, in one currency."""

    input: float | None = None
    output: float | None = None

    def check(self) -> None:
        for name, value in (("input", self.input), ("output", self.output)):
            if value is not None and not 0 <= value < float("inf"):
                raise DataError(f"--price-{name} is {value}; use a price per million tokens, 0 or more")
        if (self.input is None) != (self.output is None):
            raise DataError("--price-input and --price-output: give both or none")

    def cost(self, prompt_tokens: float, answer_tokens: float) -> float | None:
        if self.input is None or self.output is None:
            return None
        return (prompt_tokens * self.input + answer_tokens * self.output) / 1e6


@dataclass(frozen=True)
class Estimate:
    requests: int
    """Without repetitions."""
    cached: int
    """Judged before, not asked again."""
    prompt_tokens: int
    answer_tokens: int
    prompt_bytes: int
    cost: float | None
    seconds: float | None
    """By the rate limits and by what earlier requests took, whichever is more; None when neither is known."""
    basis: str
    """What the seconds rest on."""

    def sentence(self) -> str:
        cost = f", cost {self.cost:,.2f}" if self.cost is not None else ""
        time = f", about {duration(self.seconds)} ({self.basis})" if self.seconds is not None else f", time {self.basis}"
        cached = f" ({self.cached:,} more are judged already)" if self.cached else ""
        return f"to ask: {self.requests:,} samples{cached}, about {self.prompt_tokens:,} tokens in, {self.answer_tokens:,} out{cost}{time}"


def judge_group(model: str, rubric: Rubric) -> str:
    """What measurements are comparable over."""
    return digest_of([model, rubric.asked])


def estimate(plan: Plan, cache: Cache, rubrics: dict[str, Rubric], model: str, limits: Limits, prices: Prices) -> Estimate:
    measured = {name: cache.measured(judge_group(model, rubric)) for name, rubric in rubrics.items()}
    requests = cached = prompt_tokens = prompt_bytes = 0
    answer_tokens = busy_seconds = 0.0
    known = True
    for key, size_bytes, tokens, name in plan.asked():
        if cache.holds(key):
            cached += 1
            continue
        requests += 1
        prompt_tokens += tokens
        prompt_bytes += size_bytes
        before = measured[name] if (m := measured[name]) is not None and m.judgements >= MIN_MEASURED else None
        answer_tokens += before.answer_tokens if before and before.answer_tokens is not None else rubrics[name].answer_tokens
        busy_seconds += before.seconds if before else 0.0
        known &= before is not None
    paced = 60 * max(
        requests / limits.requests_per_minute if limits.requests_per_minute else 0.0,
        (prompt_tokens + answer_tokens) / limits.tokens_per_minute if limits.tokens_per_minute else 0.0,
    )
    by_requests = busy_seconds / limits.concurrency if known else 0.0
    if by_requests >= paced and by_requests > 0:
        seconds, basis = by_requests, "from earlier requests"
    elif paced > 0:
        seconds, basis = paced, "from the rate limits, if the endpoint keeps up"
    else:
        seconds, basis = (None, "is known after the first answers") if requests else (0.0, "nothing to ask")
    return Estimate(
        requests,
        cached,
        prompt_tokens,
        round(answer_tokens),
        prompt_bytes,
        prices.cost(prompt_tokens, answer_tokens),
        seconds,
        basis,
    )


def duration(seconds: float) -> str:
    """8 s, 3:20 min, 5:07 h, 2 d 3 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    if whole < 48 * 3600:
        return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
