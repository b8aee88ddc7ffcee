"""What the rewards of a run looked like, per domain, and the rule that stops a run whose rewards are broken."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any

from training.rewards.base import Score, shorten


class TooManyFailures(RuntimeError):
    """More rewards of a domain failed than the plan allows; the message has the share and the most frequent reasons."""


class DomainStatistics:
    """Counts and moments of one domain's scores (Welford: exact enough after millions of samples)."""

    def __init__(self) -> None:
        self.samples = 0
        self.failures = 0
        self.zeros = 0
        self.ones = 0
        self._mean = 0.0
        self._squares = 0.0
        self._part_sums: dict[str, list[float]] = {}

    def add(self, score: Score) -> None:
        self.samples += 1
        if score.failed:
            self.failures += 1
            return
        self.zeros += score.value == 0
        self.ones += score.value == 1
        scored = self.samples - self.failures
        delta = score.value - self._mean
        self._mean += delta / scored
        self._squares += delta * (score.value - self._mean)
        parts = score.details.get("parts", {})
        assert isinstance(parts, dict)
        for title, value in parts.items():
            sums = self._part_sums.setdefault(title, [0.0, 0.0])
            sums[0] += float(value)  # type: ignore[arg-type]
            sums[1] += 1

    def summary(self) -> dict[str, Any]:
        """Plain values for a metrics file. Failed samples count in `samples` and `failures` only; std divides by n."""
        scored = self.samples - self.failures
        return {
            "samples": self.samples,
            "failures": self.failures,
            "mean": self._mean if scored else None,
            "std": math.sqrt(self._squares / scored) if scored else None,
            "share_zero": self.zeros / scored if scored else None,
            "share_one": self.ones / scored if scored else None,
            "part_means": {title: total / count for title, (total, count) in sorted(self._part_sums.items())},
        }


class FailureGuard:
    """Stops a run when the share of failed scores among a domain's last samples is above a limit."""

    def __init__(self, max_share: float, window_samples: int, min_samples: int) -> None:
        self.max_share = max_share
        self.min_samples = min(min_samples, window_samples)
        self._window_samples = window_samples
        self._windows: dict[str, deque[str | None]] = {}

    def add(self, pairs: Iterable[tuple[str, Score]]) -> None:
        """Count a batch of (domain, score); TooManyFailures afterwards where a domain is above its limit."""
        for domain, score in pairs:
            window = self._windows.setdefault(domain, deque(maxlen=self._window_samples))
            window.append((score.reason or "no reason given") if score.failed else None)
        for domain, window in self._windows.items():
            failed = [reason for reason in window if reason is not None]
            if len(window) >= self.min_samples and len(failed) > self.max_share * len(window):
                common = "; ".join(f"{n} times: {shorten(reason, 160)}" for reason, n in Counter(failed).most_common(3))
                raise TooManyFailures(
                    f"domain '{domain}': {len(failed)} of the last {len(window)} rewards failed ({len(failed) / len(window):.1%}, the limit is "
                    f"{self.max_share:.1%}). {common}. Mend what fails, or raise max_failure_share; training on these values would teach noise"
                )

    def state(self) -> dict[str, list[str | None]]:
        """For a checkpoint."""
        return {domain: list(window) for domain, window in self._windows.items()}

    def restore(self, state: dict[str, list[str | None]]) -> None:
        self._windows = {domain: deque(window, maxlen=self._window_samples) for domain, window in state.items()}
