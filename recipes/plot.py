"""The picture of a curriculum: learning rate, sequence length and mixture over one token axis; the plan and the report draw with it.

Phases differ a hundredfold in tokens, so the axis is not linear over the whole: a phase's width grows with the square root of its
tokens (and has a floor), while within a phase tokens run linearly. `TokenAxis` is that mapping, for anyone who draws beside it.
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from recipes.plan import PhasePlan, categories, human_base, human_length, human_lr, human_tokens, plan_phase
from recipes.schedules import learning_rate_function
from recipes.schema import Recipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

MINIMUM_SHARE = 0.06
"""Least width of a phase, as a share of the axis: its label has to fit."""
CATEGORY_COLORS = {
    "web": "#9db8d9",
    "web_hq": "#4a7ab5",
    "code": "#e8964e",
    "code_instructions": "#f3c08f",
    "repositories": "#b9632a",
    "math": "#5a9e6f",
    "long_cot": "#a3cfa0",
    "technical": "#8c8fa3",
    "multilingual": "#54a9a8",
    "domain": "#b08d6e",
    "synthetic": "#d98cae",
    "language_instructions": "#e3c94f",
    "books": "#7d6bb0",
}
"""Related kinds of text have related colors: web blue, code orange, mathematics green."""
OTHER_COLORS = ("#c95f5f", "#6f9fc9", "#a8a13f", "#9a7fb8", "#5fb38c", "#c98a9f")
"""For categories that a team adds."""
INK, MUTED, FAINT, LINE = "#2f3542", "#7a8190", "#c9ced6", "#b4492f"


@dataclass(frozen=True)
class TokenAxis:
    """Maps tokens of the curriculum to positions in [0, 1]."""

    stages: tuple[str, ...]
    """Phases in order."""
    tokens: tuple[int, ...]
    """Tokens of each."""
    edges: tuple[float, ...]
    """Position where each phase starts, and 1.0."""

    @classmethod
    def of(cls, recipe: Recipe) -> TokenAxis:
        stages = tuple(s for s in recipe.stages if s in recipe.phase)
        tokens = tuple(recipe.phase[s].tokens for s in stages)
        roots = [math.sqrt(t) for t in tokens]
        floor = min(MINIMUM_SHARE, 1 / len(stages))
        widths = [max(r / sum(roots), floor) for r in roots]
        edges = [0.0]
        for width in widths:
            edges.append(edges[-1] + width / sum(widths))
        return cls(stages, tokens, (*edges[:-1], 1.0))

    def span(self, stage: str) -> tuple[float, float]:
        """Left and right edge of a phase."""
        index = self.stages.index(stage)
        return self.edges[index], self.edges[index + 1]

    def x(self, stage: str, stage_tokens: float) -> float:
        """Position of the moment after `stage_tokens` tokens of the phase `stage`."""
        left, right = self.span(stage)
        return left + (right - left) * stage_tokens / self.tokens[self.stages.index(stage)]


def category_color(category: str, known: list[str]) -> str:
    """The color of a category; those that a team adds take theirs in the order of `known`."""
    if category in CATEGORY_COLORS:
        return CATEGORY_COLORS[category]
    others = [c for c in known if c not in CATEGORY_COLORS]
    return OTHER_COLORS[others.index(category) % len(OTHER_COLORS)]


def draw_learning_rate(ax: Axes, recipe: Recipe, axis: TokenAxis) -> None:
    """Base learning rate: logarithmic down to a third of the lowest end of a phase, linear from there to zero."""
    from matplotlib.ticker import FuncFormatter

    plans = {s: plan_phase(recipe, s) for s in axis.stages}
    ends = [lr for p in plans.values() for lr in (p.first_lr, p.peak_lr, p.last_lr) if lr > 0]
    linear_below = min(ends) / 3
    for stage in axis.stages:
        f, tokens = learning_rate_function(recipe, stage), recipe.phase[stage].tokens
        # Denser at both ends: a warm-up is a thousandth of a phase, and a decay to zero falls steeply on this scale.
        grid = sorted({round(tokens * u) for i in range(201) for u in (i / 200, (i / 200) ** 4, 1 - (i / 200) ** 4)})
        ax.plot([axis.x(stage, t) for t in grid], [f(t) for t in grid], color=LINE, lw=1.8, solid_capstyle="round", zorder=3)
    for before, after in zip(axis.stages, axis.stages[1:], strict=False):
        low, high = sorted((plans[before].last_lr, plans[after].first_lr))
        if high > low * 1.01:
            ax.plot([axis.span(after)[0]] * 2, [low, high], color=LINE, lw=1.2, ls=(0, (1.5, 1.5)), zorder=3)
    ax.set_yscale("symlog", linthresh=linear_below, linscale=0.4)
    ax.set_ylim(0, max(ends) * 2.5)
    decades = range(math.ceil(math.log10(linear_below * 1.5)), math.floor(math.log10(max(ends) * 2.5)) + 1)
    ax.set_yticks([0, *(10.0**d for d in decades)])
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: "0" if y == 0 else f"$10^{{{round(math.log10(y))}}}$"))
    ax.minorticks_off()
    _label_rates(ax, axis, plans)
    ax.set_ylabel("learning rate (base)")
    ax.grid(axis="y", color=FAINT, lw=0.5, alpha=0.7)


def _label_rates(ax: Axes, axis: TokenAxis, plans: dict[str, PhasePlan]) -> None:
    """Peak of the first phase, start of a phase that jumps, end of every phase; to the right of a point, where the curve falls away."""
    style = {"fontsize": 7, "color": INK, "textcoords": "offset points", "ha": "left"}
    previous = 0.0
    for index, stage in enumerate(axis.stages):
        plan, (left, right) = plans[stage], axis.span(stage)
        if index == 0 or plan.first_lr > previous * 1.01:
            ax.annotate(human_lr(plan.peak_lr), (left, plan.peak_lr), xytext=(6, 3), **style)
        previous = plan.last_lr
        if plan.last_lr > 0:
            last = index == len(axis.stages) - 1
            ax.annotate(
                human_lr(plan.last_lr),
                (right, plan.last_lr),
                **(style | {"ha": "right"} if last else style),
                xytext=(4 - 8 * last, 4),
            )
            ax.plot([right], [plan.last_lr], "o", ms=2.8, color=LINE, zorder=4)


def draw_length(ax: Axes, recipe: Recipe, axis: TokenAxis) -> None:
    """Sequence length as steps on a logarithmic axis, with each phase's RoPE base."""
    lengths = [recipe.phase[s].seq_length_tokens for s in axis.stages]
    low, high = min(lengths), max(lengths)
    for stage, length in zip(axis.stages, lengths, strict=True):
        left, right = axis.span(stage)
        ax.fill_between([left, right], [low / 4] * 2, [length] * 2, color="#5b7fa8", alpha=0.22, lw=0)
        ax.plot([left, right], [length] * 2, color="#5b7fa8", lw=2, solid_capstyle="butt")
        text = f"{human_length(length)}\nθ {human_base(recipe.phase[stage].rope_base)}"
        ax.annotate(
            text,
            ((left + right) / 2, length),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=7,
            color=INK,
        )
    ax.set_yscale("log", base=2)
    ax.set_ylim(low / 2, high * (high / low) ** 0.45 * 2)
    ticks = sorted(set(lengths))
    ax.set_yticks(ticks, [human_length(t) for t in ticks])
    ax.minorticks_off()
    ax.set_ylabel("length, RoPE θ")


def draw_mixture(ax: Axes, recipe: Recipe, axis: TokenAxis) -> None:
    """Stacked shares per phase; the legend stands to the right."""
    names = categories(recipe)
    for stage in axis.stages:
        left, right = axis.span(stage)
        shares, bottom = recipe.phase[stage].mixture.shares_percent, 0.0
        for category in names:
            share = shares.get(category, 0)
            if not share:
                continue
            color = category_color(category, names)
            ax.bar(left, share, right - left, bottom, align="edge", color=color, edgecolor="white", lw=0.6)
            if share >= 5.5:
                ax.text(
                    (left + right) / 2,
                    bottom + share / 2,
                    f"{share:.3g}",
                    ha="center",
                    va="center",
                    fontsize=6.5,
                    color=_ink_on(color),
                )
            bottom += share
    handles = [_patch(category_color(c, names)) for c in names]
    ax.legend(
        handles[::-1],
        [n.replace("_", " ") for n in names[::-1]],
        loc="center left",
        bbox_to_anchor=(1.005, 0.5),
        frameon=False,
        fontsize=7.5,
        handlelength=1,
        handleheight=1,
        labelspacing=0.35,
    )
    ax.set_ylim(0, 100)
    ax.set_yticks([0, 25, 50, 75, 100])
    ax.set_ylabel("mixture (% of tokens)")


def _ink_on(color: str) -> str:
    """Dark or white, whichever reads better on `color`."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"


def _patch(color: str) -> Patch:
    from matplotlib.patches import Patch

    return Patch(facecolor=color, edgecolor="white")


def mark_phases(axes: list[Axes], recipe: Recipe, axis: TokenAxis, *, titles: bool = True) -> None:
    """Lines at the boundaries of all panels (dashed where a merge stands between), titles above, tokens below."""
    starts = {axis.span(s)[0]: s for s in axis.stages[1:]}
    for ax in axes:
        ax.set_xlim(0, 1)
        for x, stage in starts.items():
            merged = recipe.previous(stage) in recipe.merge
            ax.axvline(x, color=INK, lw=0.7, alpha=0.55, ls=(0, (4, 3)) if merged else "-", zorder=0.5)
        ax.tick_params(axis="x", length=0, labelbottom=False)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            ax.spines[side].set_color(FAINT)
        ax.tick_params(labelsize=7.5, colors=INK)
        ax.yaxis.label.set_size(8)
        ax.yaxis.label.set_color(INK)
    total = 0
    ticks, labels = [0.0], ["0"]
    for stage, tokens in zip(axis.stages, axis.tokens, strict=True):
        total += tokens
        ticks.append(axis.span(stage)[1])
        labels.append(human_tokens(total, digits=4))
        if titles:
            left, right = axis.span(stage)
            wide = right - left > 0.13
            title = recipe.phase[stage].title if wide else "\n".join(textwrap.wrap(recipe.phase[stage].title, 9))
            asked = recipe.phase[stage].tokens_requested or tokens
            place = {
                "xy": ((left + right) / 2, 1),
                "xycoords": ("data", "axes fraction"),
                "textcoords": "offset points",
                "ha": "center",
            }
            axes[0].annotate(human_tokens(asked), xytext=(0, 5), va="bottom", fontsize=7, color=MUTED, **place)
            axes[0].annotate(
                title, xytext=(0, 16), va="bottom", fontsize=8 if wide else 7.5, color=INK, linespacing=1.15, **place
            )
    axes[-1].set_xticks(ticks, labels)
    axes[-1].tick_params(axis="x", length=3, labelbottom=True)
    axes[-1].set_xlabel(
        "tokens seen (linear within a phase; a phase's width grows with the square root of its tokens)", fontsize=7.5, color=INK
    )


def figure(recipe: Recipe) -> Figure:
    """Three stacked panels over one token axis. The caller saves it; no global state of pyplot is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(11.5, 7.2), facecolor="white")
    FigureCanvasAgg(fig)
    grid = fig.add_gridspec(3, 1, height_ratios=(1.15, 0.8, 1.35), hspace=0.1, left=0.065, right=0.845, top=0.86, bottom=0.075)
    axes = [fig.add_subplot(grid[i]) for i in range(3)]
    axis = TokenAxis.of(recipe)
    draw_learning_rate(axes[0], recipe, axis)
    draw_length(axes[1], recipe, axis)
    draw_mixture(axes[2], recipe, axis)
    mark_phases(axes, recipe, axis)
    merges = any(s in recipe.merge for s in recipe.stages)
    subtitle = f"{recipe.model.name}, {human_tokens(recipe.total_tokens)} tokens" + (
        ", dashed: a merge between two phases" if merges else ""
    )
    fig.text(0.065, 0.965, recipe.name, fontsize=13, fontweight="bold", color=INK, ha="left", va="center")
    fig.text(0.845, 0.965, subtitle, fontsize=8.5, color=INK, ha="right", va="center")
    return fig


def draw_curriculum(recipe: Recipe, target: Path | str | IO[bytes], format: str | None = None) -> None:
    """Draw the curriculum into a file or a binary buffer; `format` (png, svg, pdf) defaults to the file's suffix."""
    if format is None:
        if not isinstance(target, Path | str):
            raise ValueError("a buffer has no suffix: give format='png', 'svg' or 'pdf'")
        format = Path(target).suffix.lstrip(".")
    # No date in the file: the same recipe gives the same bytes.
    metadata = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(format)
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "quarry", "svg.fonttype": "none", "font.family": "DejaVu Sans"}):
        figure(recipe).savefig(target, format=format, dpi=160, metadata=metadata)
