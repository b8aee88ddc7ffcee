"""The curves of a report: what a run's metrics, held-out losses and recipe look like over the tokens of the curriculum."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from launchers import charts, text
from launchers.charts import Band, Chart, Line
from launchers.jsonl import Row, finite
from launchers.progress import RunProgress
from recipes.schedules import learning_rate_function

PLAN_POINTS_PER_PHASE = 64
MAX_READOUT_POINTS = 1500
SMOOTH_STEPS = 9
"""A running mean covers at least so many logged steps, and a thirtieth of its phase."""
LOG_RATE_RANGE = 20
"""Learning rates whose phases end so many times below the peak are drawn on a logarithmic axis."""


class Figures:
    """All charts of one run; each is a string of HTML, empty if there is nothing to show yet."""

    def __init__(self, progress: RunProgress, colors: dict[str, str]) -> None:
        self.progress = progress
        self.recipe = progress.recipe
        self.colors = colors
        self.phases = [s for s in progress.stages if s.kind == "phase"]
        self.bands: list[Band] = []
        end = 0
        for number, s in enumerate(self.phases, 1):
            begin, end = end, end + self.recipe.phase[s.stage].tokens
            self.bands.append(Band(number, s.stage, begin, end))
        self.rows = [[r for r in s.metrics if finite(r.get("total_tokens")) is not None] for s in self.phases]

    def series(self, key: str) -> list[list[tuple[float, float]]]:
        """(total tokens, value) of every logged step, one list per phase."""
        return [[(r["total_tokens"], r[key]) for r in rows if finite(r.get(key)) is not None] for rows in self.rows]

    def ribbon(self) -> str:
        done = max((r[-1]["total_tokens"] for r in self.rows if r), default=0)
        return charts.ribbon(self.bands, done)

    def loss(self) -> str:
        series = self.series("loss")
        values = [y for points in series for _, y in points]
        if not values:
            return ""
        chart = Chart("training loss", 360, self.bands, min(values) * 0.97, max(values) * 1.03, log=min(values) > 0)
        for points in series:
            chart.add(Line(points, "raw"))
        for points in series:
            chart.add(Line(charts.smooth(points, max(SMOOTH_STEPS, len(points) // 30)), "curve"))
        return chart.svg()

    def heldout(self) -> str:
        measured = sorted(
            # What post-training costs of it is in a table of its own: it adds no tokens to the axis.
            (row for s in self.phases for row in s.heldout if isinstance(row.get("losses"), dict)),
            key=lambda row: (row.get("total_tokens", 0), row.get("when") == "start"),
        )
        if sum(row.get("total_tokens", 0) > 0 for row in measured) > 1:
            measured = [row for row in measured if row.get("total_tokens", 0) > 0]  # the untrained model would hide the rest
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in measured:
            for category, nats in row["losses"].items():
                if finite(nats) is not None:
                    lines.setdefault(category, []).append((row["total_tokens"], nats))
        values = [y for points in lines.values() for _, y in points]
        if not values:
            return ""
        span = max(values) - min(values)
        chart = Chart("held-out loss per category", 400, self.bands, min(values) - 0.05 * span, max(values) + 0.05 * span)
        for category, points in lines.items():
            chart.add(Line(points, "part", category, self.colors.get(category, "var(--soft)"), dots=True))
        return chart.svg()

    def learning_rate(self) -> str:
        planned, ends = [], []
        for band in self.bands:
            f = learning_rate_function(self.recipe, band.name)
            tokens = self.recipe.phase[band.name].tokens
            warmup = self.recipe.phase[band.name].schedule.warmup_tokens
            at = {*(tokens * i // PLAN_POINTS_PER_PHASE for i in range(PLAN_POINTS_PER_PHASE + 1)), min(warmup, tokens)}
            at |= {tokens >> i for i in range(20)}  # a power law bends most at its start
            planned.append([(band.begin_tokens + t, f(t)) for t in sorted(at)])
            ends += [rate for rate in (f(warmup), f(tokens)) if rate > 0]
        # A row's rate is that of the step that ended there, so it belongs to where the step began.
        steps = [self.recipe.phase[b.name].tokens_per_step for b in self.bands]
        series = [[(x - step, y) for x, y in points] for points, step in zip(self.series("lr"), steps, strict=True)]
        high = max(y for points in (*planned, *series) for _, y in points)
        log = high > LOG_RATE_RANGE * min(ends, default=high)
        chart = Chart("learning rate", 230, self.bands, min(ends) / 3 if log else 0, high * (1.5 if log else 1.06), log=log)
        for points in planned:
            chart.add(Line(points, "plan"))
        for points in series:
            chart.add(Line(points, "curve"))
        chart.label(max(planned[-1][-1][1], chart.low), "dashed: planned", "var(--soft)")
        return chart.svg(lambda rate: f"{rate:.3g}")

    def length(self) -> str:
        lengths = [self.recipe.phase[b.name].seq_length_tokens for b in self.bands]
        return self._steps("sequence length", lengths, text.length, sorted(set(lengths)))

    def rope(self) -> str:
        bases = [self.recipe.phase[b.name].rope_base for b in self.bands]
        return self._steps("RoPE base", bases, text.tokens, sorted(set(bases)))

    def _steps(self, title: str, values: Sequence[float], words: Callable[[Any], str], ticks: Sequence[float]) -> str:
        chart = Chart(title, 170, self.bands, min(values) / 1.25, max(values) * 1.6, log=True, ticks=_apart(ticks))
        points: list[tuple[float, float]] = []
        for band, value in zip(self.bands, values, strict=True):
            points += [(band.begin_tokens, value), (band.end_tokens, value)]
        chart.add(Line(points, "curve"))
        before = None
        for band, value in zip(self.bands, values, strict=True):
            if value != before and chart.x(band.end_tokens) - chart.x(band.begin_tokens) > 30:
                chart.note((band.begin_tokens + band.end_tokens) / 2, value, words(value))
            before = value
        return chart.svg(words)

    def mixture(self) -> str:
        chart = Chart("planned mixture", 270, self.bands, 0, 100, ticks=[0, 25, 50, 75, 100])
        for band in self.bands:
            shares = self.recipe.phase[band.name].mixture.shares_percent
            chart.add_stack(
                band.begin_tokens, band.end_tokens, [(c, shares.get(c, 0.0), color) for c, color in self.colors.items()]
            )
        for i, (category, color) in enumerate(self.colors.items()):
            chart.label(
                100 * (i + 0.5) / len(self.colors), category, color
            )  # a legend: in the order of the stack, not at its heights
        return chart.svg(lambda value: f"{value:.0f} %")

    def throughput(self) -> str:
        series = self.series("tokens_per_second")
        values = sorted(y for points in series for _, y in points)
        if not values:
            return ""
        high = max(values[int(0.99 * (len(values) - 1))], values[len(values) // 2]) * 1.1
        chart = Chart("throughput", 200, self.bands, 0, high)
        for points in series:
            chart.add(Line(points, "raw"))
        for points in series:
            chart.add(Line(charts.smooth(points, max(SMOOTH_STEPS, len(points) // 30)), "curve"))
        return chart.svg(text.tokens)

    def readout(self) -> dict[str, Any]:
        """What the page's script shows under the pointer: plain numbers, thinned."""
        flat = [(i, row) for i, rows in enumerate(self.rows) for row in rows]
        kept = flat[:: max(1, math.ceil(len(flat) / MAX_READOUT_POINTS))]
        if flat and kept[-1] is not flat[-1]:
            kept.append(flat[-1])
        phases = [
            {
                "name": s.stage,
                "steps": self.recipe.phase[s.stage].steps,
                "length": text.length(self.recipe.phase[s.stage].seq_length_tokens),
                "rope": text.tokens(self.recipe.phase[s.stage].rope_base),
            }
            for s in self.phases
        ]
        return {
            "tokens": [row["total_tokens"] for _, row in kept],
            "phase": [i for i, _ in kept],
            "step": [row.get("step") for _, row in kept],
            "loss": [_rounded(row, "loss") for _, row in kept],
            "lr": [_rounded(row, "lr") for _, row in kept],
            "speed": [_rounded(row, "tokens_per_second") for _, row in kept],
            "phases": phases,
            "total": self.bands[-1].end_tokens if self.bands else 1,
            "width": charts.WIDTH,
            "left": charts.LEFT,
            "right": charts.RIGHT,
        }


def _rounded(row: Row, key: str) -> float | None:
    value = finite(row.get(key))
    return None if value is None else float(f"{value:.6g}")


def _apart(values: Sequence[float], factor: float = 1.3) -> list[float]:
    """Values whose labels do not touch on a logarithmic axis."""
    kept: list[float] = []
    for value in values:
        if not kept or value >= kept[-1] * factor:
            kept.append(value)
    return kept
