"""A gate's verdict (ab.json) for people: a few lines of plain text, the same in a job's log and on a terminal."""

from __future__ import annotations

from typing import Any

SHOWN_CATEGORIES = 4
"""Of the held-out losses, those that are furthest apart."""


def verdict_lines(verdict: dict[str, Any]) -> list[str]:
    """Lines of the verdict `ab.json` holds; docs/fp8.md describes its keys."""
    arms = verdict["arms"]
    lines = [f"gate '{verdict['stage']}': {verdict['steps']} steps of '{verdict['phase']}' from {verdict['start']}"]
    for name in ("a", "b"):
        arm = arms[name]
        speed = f", {arm['seconds'] / len(arm['steps']):.2f} s a step" if arm["steps"] and arm["seconds"] else ""
        lines.append(f"  {name}: {arm['what']}{speed}")
    if verdict["criteria"]:
        width = max(len(c["name"]) for c in verdict["criteria"])
        lines.append(f"  {'':<{width}}  {'a':>9}  {'b':>9}  {'b - a':>10}  {'relative':>9}  {'limit':>7}")
        for c in verdict["criteria"]:
            mark = "" if c["passed"] else "  FAILS"
            lines.append(
                f"  {c['name']:<{width}}  {c['a']:9.4f}  {c['b']:9.4f}  {c['b'] - c['a']:+10.5f}  {c['relative_percent']:+8.4f}%"
                f"  {c['limit_percent']:6g}%{mark}"
            )
    if statistics := verdict["statistics"]:
        lines.append(
            f"  difference of a step: {statistics['mean_absolute_difference_nats']:.2e} nats in the mean, "
            f"{statistics['max_absolute_difference_nats']:.2e} at most (step {statistics['max_at_step']})"
        )
        for when in ("start", "end"):
            percents = sorted(statistics["heldout_percent"][when].items(), key=lambda item: -abs(item[1]))
            shown = ", ".join(f"{c} {p:+.3f}%" for c, p in percents[:SHOWN_CATEGORIES])
            more = f" and {len(percents) - SHOWN_CATEGORIES} nearer" if len(percents) > SHOWN_CATEGORIES else ""
            lines.append(f"  held-out loss at the {when}, b against a: {shown}{more}")
        if norms := statistics["grad_norm"]:
            lines.append(
                f"  gradient norm: mean {norms['mean_a']:.4g} and {norms['mean_b']:.4g}, ratio {norms['mean_ratio']:.4f}; "
                f"one step differs by {norms['max_absolute_relative_percent']:.2f}% at most"
            )
    if verdict["data"]:
        lines.append(f"  samples: {verdict['data']['samples']:,}, the same in both arms ({verdict['data']['sha256'][:12]})")
    if any(arms[name]["emulated"] for name in arms):
        lines.append("  FP8 was emulated on CPU: this tries the gate, and says nothing about FP8 on a GPU")
    lines.append(
        f"  verdict: {verdict['verdict'].upper()}"
        + ("" if verdict["final"] else " (an arm did not end; the same command runs it again)")
    )
    lines += [f"    {reason}" for reason in verdict["reasons"]]
    return lines
