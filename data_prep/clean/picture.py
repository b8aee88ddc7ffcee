"""The funnel as a picture: for each source which share of its text stays and which step took the rest."""

from __future__ import annotations

import io
from typing import Any

from data_prep.clean.funnel import in_order, taken, unit_of

KEPT = "#b9cbb4"
STEP_COLORS = {
    "text": "#9aa0ab",
    "language": "#4a7ab5",
    "code": "#e8964e",
    "gopher_quality": "#c9a227",
    "gopher_repetition": "#e3c94f",
    "c4": "#a8813f",
    "fineweb": "#d98cae",
    "gneissweb": "#7d6bb0",
    "decontamination": "#c03b2b",
    "masking": "#222222",
    "exact_duplicates": "#2f6f6d",
    "near_duplicates": "#54a9a8",
}
"""Related steps have related colors: shape yellow to brown, duplicates teal, contamination red."""
INK, MUTED = "#2f3542", "#7a8190"
ROW_INCHES, HEAD_INCHES = 0.36, 1.5


def draw(report: dict[str, Any]) -> bytes:
    """PNG; one bar per source, the sum last, as wide as 100 %; text at the right says how much came in and out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    unit = unit_of(report)
    rows = in_order(report)
    height = HEAD_INCHES + ROW_INCHES * len(rows)
    figure = Figure(figsize=(11.5, height), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.19, 0.42 / height, 0.5, ROW_INCHES * len(rows) / height))
    steps = [step for step in report["steps"] if any(step in s["steps"] and taken(s["steps"][step], unit) for _, s in rows)]
    for place, (_name, source) in enumerate(rows):
        parts = [("stays", source["out"][unit]), *((s, taken(source["steps"][s], unit)) for s in steps if s in source["steps"])]
        total, left = max(1, sum(amount for _, amount in parts)), 0.0
        for step, amount in parts:
            width = 100 * amount / total
            axes.barh(place, width, left=left, height=0.72, color=STEP_COLORS.get(step, KEPT), linewidth=0)
            if step != "stays" and width >= 6:
                axes.text(left + width / 2, place, f"{width:.0f}", ha="center", va="center", fontsize=8, color="white")
            left += width
        before, after = source["in"][unit], source["out"][unit]
        share = f"{100 * after / before:.1f} %" if before else "-"
        documents = f"{source['in']['documents']:,} → {source['out']['documents']:,}"
        for x, label in ((113, share), (135, f"{_short(before)} → {_short(after)}"), (158, documents)):
            axes.text(x, place, label, ha="right", va="center", fontsize=9, color=INK, clip_on=False)
    for x, label in ((113, "stays"), (135, unit), (158, "documents")):
        axes.text(x, -1, label, ha="right", va="center", fontsize=9, color=MUTED, clip_on=False)
    axes.axhline(len(rows) - 1.5, color=MUTED, lw=0.6)
    axes.set_xlim(0, 100)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=9, color=INK)
    axes.set_xticks(range(0, 101, 20), [f"{x} %" for x in range(0, 101, 20)], fontsize=8, color=MUTED)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    figure.text(0.012, 1 - 0.26 / height, f"What cleaning left of {report['recipe']}", fontsize=13, color=INK, va="center")
    figure.text(0.012, 1 - 0.52 / height, f"share of {unit}; {report['cleaning']}", fontsize=9, color=MUTED, va="center")
    _legend(figure, steps, height)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130, metadata={"Software": None})
    return out.getvalue()


def _legend(figure: Any, steps: list[str], height: float) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(color=KEPT, label="stays"),
        *(Patch(color=STEP_COLORS[step], label=step.replace("_", " ")) for step in steps),
    ]
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.3, 1 - 0.08 / height), ncols=5, fontsize=8, frameon=False,
        labelcolor=INK, handlelength=1, handleheight=1, columnspacing=1.4,
    )  # fmt: skip


def _short(amount: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if amount >= limit * 0.9995:
            return f"{amount / limit:.3g}{unit}"
    return f"{amount:.0f}"
