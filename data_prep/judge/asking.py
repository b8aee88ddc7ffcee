"""Many requests: concurrency, requests and tokens per minute, retries with jittered back-off, and when to give the judge up."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from data_prep.errors import DataError
from data_prep.judge.client import Failed, Reply
from data_prep.judge.config import Rubric

MAX_BACKOFF_SECONDS = 60.0
MAX_RETRY_AFTER_SECONDS = 600.0
"""A server may ask for a break, not for a day."""


@dataclass(frozen=True)
class Limits:
    concurrency: int = 16
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    """Of prompts and answers together; reserved by estimate, corrected by what the endpoint counts."""
    attempts: int = 6
    """At one sample, in one run."""
    timeout_seconds: float = 120.0
    """Of one attempt."""
    backoff_seconds: float = 1.0
    """Upper bound of the wait behind a first failure; it doubles with each."""
    patience_failures: int = 100
    """With patience_seconds: that many attempts in a row without a judgement, over at least that time, and the judge is given up."""
    patience_seconds: float = 120.0

    def check(self) -> None:
        for name in ("concurrency", "attempts", "patience_failures"):
            if getattr(self, name) < 1:
                raise DataError(f"--{name.replace('_', '-')} is {getattr(self, name)}; use at least 1")
        for name in ("requests_per_minute", "tokens_per_minute", "timeout_seconds", "backoff_seconds", "patience_seconds"):
            value = getattr(self, name)
            zero_allowed = name in ("backoff_seconds", "patience_seconds")
            if value is not None and not (0 <= value < float("inf") and (value > 0 or zero_allowed)):
                raise DataError(f"--{name.replace('_', '-')} is {value}; use a positive number")


@dataclass(frozen=True)
class Question:
    """A sample to be judged."""

    key: str
    messages: list[dict[str, str]]
    rubric: Rubric
    tokens: int
    """Estimate, prompt and longest answer."""
    size_bytes: int
    """Of the prompt, for progress."""


class Asks(Protocol):
    async def ask(self, messages: list[dict[str, str]], rubric: Rubric) -> Reply: ...


class Told(Protocol):
    """Is told at once, in the thread of the caller, so that nothing is known that is not stored."""

    def judged(self, question: Question, reply: Reply, attempts: int) -> None: ...

    def failed(self, question: Question, failure: Failed) -> None:
        """One attempt."""
        ...

    def unjudged(self, question: Question) -> None:
        """After the last attempt."""
        ...


class Pace:
    """Lets amounts through at a rate, without bursts: in no minute more than the rate and one amount."""

    def __init__(self, per_minute: float | None, clock: Callable[[], float], sleep: Callable[[float], Awaitable[None]]):
        self._seconds_each = 60.0 / per_minute if per_minute else 0.0
        self._clock, self._sleep = clock, sleep
        self._free_at = 0.0

    async def take(self, amount: float) -> None:
        if self._seconds_each:
            now = self._clock()
            start = max(now, self._free_at)
            self._free_at = start + amount * self._seconds_each
            if start > now:
                await self._sleep(start - now)

    def correct(self, amount: float) -> None:
        """What was taken turned out to be more by this much (or less)."""
        self._free_at += amount * self._seconds_each


class Asking:
    """State of one run over an endpoint."""

    def __init__(
        self,
        client: Asks,
        limits: Limits,
        told: Told,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ):
        self._client, self._limits, self._told = client, limits, told
        self._clock, self._sleep, self._jitter = clock, sleep, jitter
        self._requests = Pace(limits.requests_per_minute, clock, sleep)
        self._tokens = Pace(limits.tokens_per_minute, clock, sleep)
        self._pause_until = 0.0
        self._answered = False
        self._failures_in_a_row = 0
        self._last_success = clock()
        self.given_up: str | None = None
        """Why no further sample is asked about."""

    async def run(self, questions: Iterator[Question | None]) -> None:
        """Ask every question until it is judged, its attempts are used up, or the judge is given up; then the rest is left unasked.

        Raises DataError when the endpoint refuses from the start (key, address or model).
        """
        self._last_success = self._clock()
        # A group: when one worker fails for a reason of its own (a full disk, a fault of ours), the others stop too.
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._limits.concurrency):
                    group.create_task(self._work(questions))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _work(self, questions: Iterator[Question]) -> None:
        while self.given_up is None:
            try:
                question = next(questions)
            except StopIteration:
                return
            # None: a line that needs no question. Millions of them in a row must not hold up the answers that are under way.
            await (asyncio.sleep(0) if question is None else self._settle(question))

    async def _settle(self, question: Question) -> None:
        for attempt in range(1, self._limits.attempts + 1):
            await self._wait_for_turn(question)
            if self.given_up is not None:
                break
            try:
                reply = await self._client.ask(question.messages, question.rubric)
            except Failed as failure:
                self._told.failed(question, failure)
                self._note(failure)
                if not failure.again or attempt == self._limits.attempts or self.given_up is not None:
                    break
                await self._sleep(self._backoff(attempt, failure))
            else:
                self._told.judged(question, reply, attempt)
                self._answered, self._failures_in_a_row, self._last_success = True, 0, self._clock()
                if reply.prompt_tokens is not None and reply.answer_tokens is not None:
                    self._tokens.correct(reply.prompt_tokens + reply.answer_tokens - question.tokens)
                return
        self._told.unjudged(question)

    async def _wait_for_turn(self, question: Question) -> None:
        await self._requests.take(1)
        await self._tokens.take(question.tokens)
        # Another request may have been told to wait longer meanwhile.
        while (wait := self._pause_until - self._clock()) > 0:
            await self._sleep(wait)

    def _note(self, failure: Failed) -> None:
        if failure.fatal and not self._answered:
            raise DataError(
                f"the endpoint refuses every request ({failure}); check --endpoint, --model and the key in the environment. Nothing was "
                "written; what was judged before is kept"
            )
        self._failures_in_a_row += 1
        limits = self._limits
        quiet_seconds = self._clock() - self._last_success
        if self._failures_in_a_row >= limits.patience_failures and quiet_seconds >= limits.patience_seconds:
            self.given_up = f"{self._failures_in_a_row} attempts in a row failed, the last with {failure.kind}"

    def _backoff(self, attempt: int, failure: Failed) -> float:
        """Full jitter: uniform between 0 and backoff * 2^(attempt - 1) (Brooker 2015, Exponential Backoff and Jitter), and behind what
        the server asked for, which holds for all requests."""
        wait = self._jitter() * min(MAX_BACKOFF_SECONDS, self._limits.backoff_seconds * 2 ** (attempt - 1))
        if failure.wait_seconds is None:
            return wait
        asked = min(failure.wait_seconds, MAX_RETRY_AFTER_SECONDS)
        self._pause_until = max(self._pause_until, self._clock() + asked)
        return asked + wait
