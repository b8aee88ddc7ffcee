"""The verdict of a gate, from what its two arms left: pure arithmetic over losses, with no Megatron and no torch.

An arm that did not take every step with a finite loss, or whose samples are not the other's, never passes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.files import digest_of
from training.files import read_json_lines
from training.recorder import read_consumed

Samples = dict[int, list[tuple[int, str]]]


class DifferentSamples(ValueError):
    """The arms were not trained on the same samples in the same order: there is nothing to compare."""


@dataclass(frozen=True, kw_only=True)
class ArmRun:
    """What one arm left."""

    name: str
    losses: dict[int, float]
    """Step -> training loss, nats per token."""
    grad_norms: dict[int, float | None]
    skipped: list[int] = field(default_factory=list)
    """Steps that the optimizer refused."""
    heldout: dict[str, dict[str, float]]
    """start and end -> category -> held-out loss, nats per token."""
    samples: Samples
    """Step -> (source, digest) of its samples, in the order of the blend."""
    seconds: float = 0.0
    """Of all steps together."""


def read_arm(name: str, stage_dir: Path, *, with_samples: bool = True) -> ArmRun:
    """Read an arm's metrics.jsonl, heldout.jsonl and samples/; DifferentSamples where not every rank recorded a step."""
    rows = read_json_lines(stage_dir / "metrics.jsonl")
    return ArmRun(
        name=name,
        losses={row["step"]: float(row["loss"]) for row in rows},
        grad_norms={row["step"]: row.get("grad_norm") for row in rows},
        skipped=[row["step"] for row in rows if row.get("skipped")],
        heldout={row["when"]: row["losses"] for row in read_json_lines(stage_dir / "heldout.jsonl")},
        samples=_samples(stage_dir) if with_samples else {},
        seconds=sum(row.get("seconds") or 0.0 for row in rows),
    )


def _samples(stage_dir: Path) -> Samples:
    try:
        return read_consumed(stage_dir)
    except ValueError as error:
        raise DifferentSamples(f"{error}; move {stage_dir} away and start the gate again") from error


def faults(arm: ArmRun, steps: int) -> list[str]:
    """Why nothing can be concluded from an arm, one sentence each; empty: all its steps are there and finite."""
    found = []
    missing = [step for step in range(1, steps + 1) if step not in arm.losses]
    if missing:
        found.append(f"arm {arm.name}: {_steps(missing)} of {steps} missing")
    if extra := [step for step in arm.losses if not 1 <= step <= steps]:
        found.append(f"arm {arm.name}: {_steps(extra)} beyond the {steps} of the gate")
    bad = [step for step, loss in sorted(arm.losses.items()) if not math.isfinite(loss)]
    if bad:
        found.append(f"arm {arm.name}: the loss is {arm.losses[bad[0]]} at step {bad[0]}")
    bad = [step for step, norm in sorted(arm.grad_norms.items()) if norm is not None and not math.isfinite(norm)]
    if bad:
        found.append(f"arm {arm.name}: the gradient norm is {arm.grad_norms[bad[0]]} at step {bad[0]}")
    if arm.skipped:
        found.append(f"arm {arm.name}: the optimizer skipped {_steps(arm.skipped)}")
    for when in ("start", "end"):
        losses = arm.heldout.get(when)
        if not losses:
            found.append(f"arm {arm.name}: no held-out loss at the {when}")
        elif bad_categories := [category for category, loss in losses.items() if not math.isfinite(loss)]:
            found.append(
                f"arm {arm.name}: the held-out loss of {bad_categories[0]} is {losses[bad_categories[0]]} at the {when}"
            )
    return found


def same_samples(a: ArmRun, b: ArmRun, steps: int) -> dict[str, Any]:
    """{"samples", "sha256"} of what both arms consumed; DifferentSamples if it is not the same, or not all was recorded."""
    for arm in (a, b):
        if sorted(arm.samples) != list(range(1, steps + 1)):
            raise DifferentSamples(
                f"arm {arm.name} recorded the samples of {len(arm.samples)} steps, it took {steps}; move the arm's folder away "
                "and start the gate again"
            )
    for step in range(1, steps + 1):
        if a.samples[step] != b.samples[step]:
            raise DifferentSamples(
                f"arms a and b were trained on different samples from step {step} on: the data changed between them; move the folder "
                "arms/ of the gate away and start it again"
            )
    count = sum(len(samples) for samples in a.samples.values())
    return {"samples": count, "sha256": digest_of([a.samples[step] for step in range(1, steps + 1)])}


def compare(a: ArmRun, b: ArmRun, steps: int, *, tolerance_percent: float, step_tolerance_percent: float) -> dict[str, Any]:
    """Criteria, statistics and reasons of the verdict: {"verdict": "pass" | "fail", "reasons", "criteria", "statistics"}.

    With faults in an arm there are reasons only. Differences are b - a in nats per token; percents are relative to a.
    """
    reasons = [*faults(a, steps), *faults(b, steps)]
    for when in ("start", "end"):
        if a.heldout.get(when, {}).keys() != b.heldout.get(when, {}).keys():
            reasons.append(f"the arms have held-out losses of different categories at the {when}")
    if reasons:
        return {"verdict": "fail", "reasons": reasons, "criteria": [], "statistics": None}
    losses_a, losses_b = ([arm.losses[step] for step in range(1, steps + 1)] for arm in (a, b))
    quarter = max(1, steps // 4)
    percents = [_percent(x, y) for x, y in zip(losses_a, losses_b, strict=True)]
    worst = max(range(steps), key=lambda i: abs(percents[i]))
    criteria = [
        _criterion(
            f"training loss, mean of the last {quarter} step{'s' * (quarter > 1)}",
            _mean(losses_a[-quarter:]),
            _mean(losses_b[-quarter:]),
            tolerance_percent,
        ),
        _criterion(
            "held-out loss at the end, mean of categories",
            _mean(a.heldout["end"].values()),
            _mean(b.heldout["end"].values()),
            tolerance_percent,
        ),
        _criterion(f"training loss of step {worst + 1}, the worst", losses_a[worst], losses_b[worst], step_tolerance_percent),
    ]
    reasons = [
        f"{c['name']}: {c['a']:.4f} and {c['b']:.4f} nats, {c['relative_percent']:+.3f}% (limit {c['limit_percent']:g}%)"
        for c in criteria
        if not c["passed"]
    ]
    return {
        "verdict": "fail" if reasons else "pass",
        "reasons": reasons,
        "criteria": criteria,
        "statistics": {
            "mean_absolute_difference_nats": _mean([abs(y - x) for x, y in zip(losses_a, losses_b, strict=True)]),
            "max_absolute_difference_nats": max(abs(y - x) for x, y in zip(losses_a, losses_b, strict=True)),
            "mean_relative_percent": _mean(percents),
            "max_absolute_relative_percent": abs(percents[worst]),
            "max_at_step": worst + 1,
            "grad_norm": _grad_norms(a, b, steps),
            "heldout_percent": {
                when: {c: _percent(a.heldout[when][c], b.heldout[when][c]) for c in a.heldout[when]}
                for when in ("start", "end")
            },
        },
    }


def _criterion(name: str, a: float, b: float, limit_percent: float) -> dict[str, Any]:
    percent = _percent(a, b)
    # Written so that a NaN does not pass.
    return {"name": name, "a": a, "b": b, "relative_percent": percent, "limit_percent": limit_percent,
            "passed": abs(percent) <= limit_percent}  # fmt: skip


def _percent(a: float, b: float) -> float:
    """(b - a) / a in percent; where a is 0 any difference is infinite."""
    if a == b:
        return 0.0
    return 100.0 * (b - a) / abs(a) if a else math.inf


def _grad_norms(a: ArmRun, b: ArmRun, steps: int) -> dict[str, float] | None:
    """Ratio of the mean norms and the largest relative difference of one step; None where an arm does not say its norms."""
    pairs = [(a.grad_norms[step], b.grad_norms[step]) for step in range(1, steps + 1)]
    norms = [(x, y) for x, y in pairs if x is not None and y is not None]
    if len(norms) < steps or not sum(x for x, _ in norms):
        return None
    return {
        "mean_a": _mean([x for x, _ in norms]),
        "mean_b": _mean([y for _, y in norms]),
        "mean_ratio": sum(y for _, y in norms) / sum(x for x, _ in norms),
        "max_absolute_relative_percent": max(abs(_percent(x, y)) for x, y in norms),
    }


def _mean(values: Any) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def _steps(steps: Sequence[int]) -> str:
    """'step 3', 'steps 3 to 7', 'steps 3, 5, 9 ...'."""
    first, last = min(steps), max(steps)
    if len(steps) == 1:
        return f"step {first}"
    if len(steps) == last - first + 1:
        return f"steps {first} to {last}"
    return f"steps {', '.join(map(str, sorted(steps)[:5]))}{' ...' if len(steps) > 5 else ''}"


def curves(arm: ArmRun) -> Mapping[str, Any]:
    """An arm's numbers for ab.json, in the order of the steps; what is not finite is null (the reasons say which)."""
    order = sorted(arm.losses)
    return {
        "steps": order,
        "losses": [_finite(arm.losses[step]) for step in order],
        "grad_norms": [_finite(arm.grad_norms.get(step)) for step in order],
        "heldout": {when: {c: _finite(v) for c, v in losses.items()} for when, losses in arm.heldout.items()},
        "seconds": arm.seconds,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
