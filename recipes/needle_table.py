"""Results of the retrieval test (`needle` of an evaluation's results.json) as one table, for terminals, Markdown and reports."""

from __future__ import annotations

from typing import Any

TITLE = "Retrieval of one fact among others"


def needle_table(needle: dict[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """(headings, lines, note); docs/evaluation.md describes the keys. A cell that has not been measured is '-'."""
    depths = needle["options"]["depths_percent"]
    headings = ["length, tokens", *(f"depth {d:g} %" for d in depths), "answer ranked first, %", "generated, %", "texts"]
    lines = []
    for length in needle["by_length"]:
        cells = {c["depth_percent"]: c for c in needle["cells"] if c["length_tokens"] == length["length_tokens"]}
        lines.append(
            [
                str(length["length_tokens"]),
                *(f"{100 * cells[d]['ranked_first']:.0f}" if d in cells else "-" for d in depths),
                f"{100 * length['ranked_first']:.1f} ± {100 * length['ranked_first_stderr']:.1f}",
                f"{100 * length['generated']:.1f}",
                str(length["count"]),
            ]
        )
    note = (
        f"Chance of ranking the answer first: {100 * needle['chance_ranked_first']:.1f} %; of generating it: about 0. Not RULER, and not "
        "comparable with published numbers."
    )
    return headings, lines, note
