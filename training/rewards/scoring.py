"""Scores a batch of samples as its plan says: gates first, the rest of what passed them, processes and requests side by side."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

from training.rewards.base import Reward, RewardError, Sample, Score
from training.rewards.plan import Part, RewardPlan
from training.rewards.pool import WorkerPool
from training.rewards.registry import build
from training.rewards.statistics import DomainStatistics, FailureGuard


class Rewards:
    """The rewards of a plan, started. Use it as a context manager: it holds processes and connections.

    RewardError from the constructor where anything of the plan cannot work here.
    """

    def __init__(self, plan: RewardPlan) -> None:
        self.plan = plan
        self.statistics: dict[str, DomainStatistics] = {}
        """Per domain, since the start."""
        self.guard = FailureGuard(plan.max_failure_share, plan.failure_window_samples, plan.failure_min_samples)
        self._waiting: dict[str, Reward] = {}
        self._pool: WorkerPool | None = None
        self._threads: ThreadPoolExecutor | None = None
        try:
            for key, (name, options) in plan.rewards("thread").items():
                self._waiting[key] = build(name, options)
                self._waiting[key].prepare()
            if self._waiting:
                self._threads = ThreadPoolExecutor(plan.threads, thread_name_prefix="reward")
            if computed := plan.rewards("worker"):
                self._pool = WorkerPool(
                    computed,
                    workers=plan.workers,
                    memory_bytes=plan.worker_memory_bytes,
                    start_seconds=plan.start_seconds,
                )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        for reward in self._waiting.values():
            reward.close()

    @property
    def worker_restarts(self) -> int:
        return 0 if self._pool is None else self._pool.restarts

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One score per sample, in their order. Never raises for what a sample holds.

        RewardError for a domain without rewards; TooManyFailures when more of a domain's rewards failed than the plan allows.
        """
        domains = [self.plan.domain(sample.domain) for sample in samples]
        scores: list[dict[str, Score]] = [{} for _ in samples]

        def run(wanted: list[tuple[int, Part]]) -> None:
            jobs = [(f"{domains[i][0]}/{part.title}", samples[i]) for i, part in wanted]
            for (i, part), score in zip(wanted, self._run(jobs), strict=True):
                scores[i][part.title] = score

        run([(i, part) for i, (_, domain) in enumerate(domains) for part in domain.parts if part.role == "gate"])
        passed = [
            all(
                scores[i][p.title].value >= p.at_least and not scores[i][p.title].failed
                for p in domain.parts
                if p.role == "gate"
            )
            for i, (_, domain) in enumerate(domains)
        ]
        run([(i, part) for i, (_, domain) in enumerate(domains) if passed[i] for part in domain.parts if part.role != "gate"])
        totals = [domain.combine(scores[i]) for i, (_, domain) in enumerate(domains)]
        pairs = [(sample.domain, total) for sample, total in zip(samples, totals, strict=True)]
        for name, total in pairs:
            self.statistics.setdefault(name, DomainStatistics()).add(total)
        self.guard.add(pairs)
        return totals

    def _run(self, jobs: list[tuple[str, Sample]]) -> list[Score]:
        scores: list[Score | None] = [None] * len(jobs)
        asked = {i: self._ask(key, sample) for i, (key, sample) in enumerate(jobs) if key in self._waiting}
        computed = [i for i in range(len(jobs)) if i not in asked]
        if computed:
            assert self._pool is not None
            for i, score in zip(computed, self._pool.score([jobs[i] for i in computed]), strict=True):
                scores[i] = score
        for i, future in asked.items():
            scores[i] = future.result()
        return scores  # type: ignore[return-value]

    def _ask(self, key: str, sample: Sample) -> Any:
        assert self._threads is not None
        return self._threads.submit(_guarded, self._waiting[key], sample)

    def summary(self) -> dict[str, dict[str, Any]]:
        """Per domain: samples, failures, mean, std, shares of 0 and 1, mean of each part."""
        return {domain: statistics.summary() for domain, statistics in sorted(self.statistics.items())}


def _guarded(reward: Reward, sample: Sample) -> Score:
    try:
        return reward.score(sample)
    except RewardError as error:
        return Score.failure(str(error))
    except Exception as error:
        return Score.failure(f"{type(error).__name__}: {error}")
