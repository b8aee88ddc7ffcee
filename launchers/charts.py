"""Inline SVG charts: over the tokens of a curriculum, where all share their horizontal axis, or over the steps of one stage. Phases or epochs
are bands, colours come from the page.

Hand-made instead of matplotlib: a page of charts takes milliseconds while the chain trains, follows light and dark mode through CSS, and
its curves can be read under the pointer. Every text that comes from a recipe goes through `html.escape`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate

from launchers import text

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 1160, 68, 158, 22, 30
"""Pixels; RIGHT holds the names of the lines."""
STEPS_WIDTH = 600
MAX_POINTS = 900
"""Per line; more than the pixels of a chart can show."""
LABEL_HEIGHT = 15

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Band:
    """One phase on the horizontal axis, or one epoch: then in steps, as all of that chart."""

    number: int
    """0: not written."""
    name: str
    begin_tokens: float
    end_tokens: float


@dataclass(frozen=True)
class Line:
    """One curve: (tokens, value) in order of tokens. `css` names its class; `name` is written at its end."""

    points: Points
    css: str
    name: str = ""
    color: str = ""
    dots: bool = False


class Chart:
    """An SVG chart under construction; `y` maps values into it."""

    def __init__(
        self,
        title: str,
        height: int,
        bands: Sequence[Band],
        low: float,
        high: float,
        *,
        log: bool = False,
        ticks: Sequence[float] = (),
        over_steps: bool = False,
    ) -> None:
        """`over_steps`: half as wide, with steps in the place of tokens, and out of reach of the cursor that goes through all charts."""
        self.title, self.height, self.bands = title, height, bands
        self.width = STEPS_WIDTH if over_steps else WIDTH
        self.css, self._unit, self._x_words = ("steps", "step", _whole) if over_steps else ("chart", "tokens", text.tokens)
        self.total_tokens = bands[-1].end_tokens if bands else 1.0
        if high <= low:
            low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
        self.low, self.high, self.log = low, high, log
        self._ticks = list(ticks) or (_log_ticks(low, high) if log else _linear_ticks(low, high))
        self._parts: list[str] = []
        self._labels: list[tuple[float, str, str]] = []

    def x(self, tokens: float) -> float:
        return LEFT + (self.width - LEFT - RIGHT) * tokens / self.total_tokens

    def y(self, value: float) -> float:
        scale: Callable[[float], float] = math.log if self.log else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return self.height - BOTTOM - (self.height - TOP - BOTTOM) * min(1.0, max(0.0, share))

    def add(self, line: Line) -> None:
        points = [(x, y) for x, y in line.points if math.isfinite(y) and (y > 0 or not self.log)]
        if not points:
            return
        style = f' style="--c:{line.color}"' if line.color else ""
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in thin(points, MAX_POINTS))
        self._parts.append(f'<polyline class="{line.css}"{style} points="{path}"/>')
        if line.dots:
            self._parts += [
                f'<circle class="dot"{style} cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="3.2">'
                f"<title>{escape(line.name)}: {text.loss(y)} at {self._x_words(x)} {self._unit}</title></circle>"
                for x, y in points
            ]
        if line.name:
            self._labels.append((self.y(points[-1][1]), line.name, line.color))

    def add_stack(self, begin_tokens: float, end_tokens: float, shares: Sequence[tuple[str, float, str]]) -> None:
        """Shares (name, percent, colour) of one phase on top of each other, from the bottom."""
        below = 0.0
        for name, percent, color in shares:
            if percent <= 0:
                continue
            x, width = self.x(begin_tokens), self.x(end_tokens) - self.x(begin_tokens)
            top, bottom = self.y(below + percent), self.y(below)
            self._parts.append(
                f'<rect class="share" style="--c:{color}" x="{x:.1f}" y="{top:.1f}" width="{max(0.5, width - 1):.1f}" '
                f'height="{bottom - top:.1f}"><title>{escape(name)}: {percent:.4g} %</title></rect>'
            )
            if bottom - top > 13 and width > 34:
                self._parts.append(
                    f'<text class="in" x="{x + width / 2:.1f}" y="{(top + bottom) / 2 + 4:.1f}" text-anchor="middle">{percent:.3g}</text>'
                )
            below += percent

    def label(self, value: float, name: str, color: str) -> None:
        """A name at the right edge, at this height."""
        self._labels.append((self.y(value), name, color))

    def note(self, tokens: float, value: float, words: str) -> None:
        """Words over a point of the chart, centred."""
        self._parts.append(
            f'<text class="note" x="{self.x(tokens):.1f}" y="{self.y(value) - 6:.1f}" text-anchor="middle">{escape(words)}</text>'
        )

    def svg(self, tick_format: Callable[[float], str] = text.number) -> str:
        bottom, right = self.height - BOTTOM, self.width - RIGHT
        parts = [
            f'<svg class="{self.css}" viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(self.title)}">'
        ]
        for band in self.bands:
            x, width = self.x(band.begin_tokens), self.x(band.end_tokens) - self.x(band.begin_tokens)
            parts.append(
                f'<rect class="band b{band.number % 2}" x="{x:.1f}" y="{TOP}" width="{width:.1f}" height="{bottom - TOP}"/>'
                f'<text class="phase" x="{x + width / 2:.1f}" y="{TOP - 7}" text-anchor="middle">{band.number}'
                f"<title>{escape(band.name)}</title></text>"
            )
        for value in self._ticks:
            if self.low <= value <= self.high:
                y = self.y(value)
                parts.append(
                    f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
                    f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(tick_format(value))}</text>'
                )
        for value in _linear_ticks(0, self.total_tokens, 8 if self.css == "chart" else 5):
            if self.css == "chart" or value == int(value):
                parts.append(
                    f'<text class="tick" x="{self.x(value):.1f}" y="{bottom + 18}" text-anchor="middle">{self._x_words(value)}</text>'
                )
        parts += self._parts
        for y, name, color in spread(self._labels, TOP + 6, bottom):
            style = f' style="--c:{color}"' if color else ""
            parts.append(f'<text class="name"{style} x="{right + 10}" y="{y + 4:.1f}">{escape(shorten(name))}</text>')
        parts.append(f'<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{bottom}"/></svg>')
        return "".join(parts)


def ribbon(bands: Sequence[Band], done_tokens: float) -> str:
    """The phases as one strip over all charts: number and, where there is room, name."""
    chart = Chart("phases", 30 + TOP + BOTTOM, bands, 0, 1)
    parts = [f'<svg class="ribbon" viewBox="0 0 {WIDTH} 30" role="img" aria-label="phases">']
    for band in bands:
        x, width = chart.x(band.begin_tokens), chart.x(band.end_tokens) - chart.x(band.begin_tokens)
        name = f"{band.number} {band.name}"
        shown = name if len(name) * 7.2 < width - 8 else str(band.number)
        state = "done" if band.end_tokens <= done_tokens else "now" if band.begin_tokens < done_tokens else "next"
        parts.append(
            f'<rect class="seg {state}" x="{x + 1:.1f}" y="3" width="{max(1.0, width - 2):.1f}" height="24" rx="4">'
            f"<title>{escape(name)}: {text.tokens(band.end_tokens - band.begin_tokens)} tokens</title></rect>"
            f'<text class="segname {state}" x="{x + width / 2:.1f}" y="19.5" text-anchor="middle">{escape(shown)}</text>'
        )
    return "".join(parts) + "</svg>"


def thin(points: Points, limit: int) -> Points:
    """At most about `limit` points; of each stretch its lowest and highest value stay, so that no spike is lost."""
    if len(points) <= limit:
        return points
    size = math.ceil(len(points) / (limit / 2))
    kept: list[tuple[float, float]] = []
    for i in range(0, len(points), size):
        stretch = points[i : i + size]
        low, high = min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])
        kept += sorted({low, high})
    return kept


def smooth(points: Points, width: int) -> list[tuple[float, float]]:
    """Mean over the `width` points around each point (fewer at the ends): unlike an exponential average it does not lag behind."""
    sums = [0.0, *accumulate(y for _, y in points)]
    half = width // 2
    result = []
    for i, (x, _) in enumerate(points):
        first, last = max(0, i - half), min(len(points), i + half + 1)
        result.append((x, (sums[last] - sums[first]) / (last - first)))
    return result


def spread(labels: Sequence[tuple[float, str, str]], top: float, bottom: float) -> list[tuple[float, str, str]]:
    """The labels moved apart so that none covers another, in order and within the chart."""
    ordered = sorted(labels)
    placed: list[float] = []
    for y, _, _ in ordered:
        placed.append(max(y, placed[-1] + LABEL_HEIGHT) if placed else max(y, top))
    limit = bottom
    for i in range(len(placed) - 1, -1, -1):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - LABEL_HEIGHT
    return [(y, name, color) for y, (_, name, color) in zip(placed, ordered, strict=True)]


def _whole(value: float) -> str:
    return f"{value:.0f}"


def shorten(name: str, limit: int = 22) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return []
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if (high - low) / (step * m) <= count)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = [10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    steps: tuple[tuple[float, ...], ...] = ((1,), (1, 2, 5), (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8))
    ticks: list[float] = []
    for multiples in steps:
        ticks = [d * m for d in decades for m in multiples if low <= d * m <= high]
        if len(ticks) >= 4:
            break
    return ticks
