"""What a search for layouts found (recipes/search.py), in words, as a table and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from recipes.estimates import PART_NAMES, slowest_parts
from recipes.job_options import Parallel
from recipes.search import Candidate, SearchResult

if TYPE_CHECKING:
    from rich.console import Console

FORMAT = "quarry.search/1"


def explain(result: SearchResult) -> list[str]:
    """The winner in three lines: where its time goes, what the runner-up loses, what would be faster and does not fit."""
    if not result.ranked:
        return ["no layout fits: take more GPUs, or a GPU with more memory"]
    first = result.ranked[0]
    lines = [f"time of {describe(first)}: {slowest_parts(first.time)}"]
    if len(result.ranked) > 1:
        second = result.ranked[1]
        lost = {name: second.time.parts()[name] - seconds for name, seconds in first.time.parts().items()}
        name = max(lost, key=lost.__getitem__)
        share = max(0.0, lost[name]) / first.time.total
        lines.append(
            f"{describe(second)} is {1 - second.speed / first.speed:.1%} slower, mostly {PART_NAMES[name]} (+{share:.1%} of the step); "
            "differences below 5% are within the model's error: measure the first few"
        )
    if result.faster is None:
        lines.append("nothing faster was too large for the memory")
    else:
        large = result.faster
        lines.append(
            f"{describe(large)} would be {large.speed / first.speed - 1:.1%} faster, and needs {large.memory_bytes / 1e9:.0f} of "
            f"{result.gpu.memory_bytes / 1e9:.0f} GB"
        )
    return lines


def describe(candidate: Candidate) -> str:
    """'TP2 PP4x5 CP1 DP64, micro batch 2, no recompute'"""
    layout = candidate.layout
    pipeline = f"PP{layout.pipeline}" + (f"x{layout.virtual_pipeline}" if layout.virtual_pipeline else "")
    by = "" if layout.context_communication == "p2p" else f" by {communication_text(layout)}"
    sizes = f"TP{layout.tensor} {pipeline} CP{layout.context}{by} DP{layout.data}"
    return f"{sizes}, micro batch {layout.micro_batch_samples}, {candidate.saving}"


def communication_text(layout: Parallel) -> str:
    """'p2p', 'a2a', 'all_gather', 'a2a 2 x p2p 8'; '-' without context parallelism."""
    if layout.context == 1:
        return "-"
    if layout.context_hierarchy is None:
        return layout.context_communication
    return f"a2a {layout.context_hierarchy[0]} x p2p {layout.context_hierarchy[1]}"


def as_data(result: SearchResult, limit: int = 20) -> dict[str, Any]:
    """The result as JSON has it (docs/planning.md, "JSON"): the first `limit` shapes, all reasons."""

    def layout(candidate: Candidate) -> dict[str, Any]:
        return {
            "layout": candidate.layout.model_dump(),
            "data": candidate.layout.data,
            "memory_bytes": candidate.memory_bytes,
            "tokens_per_second_per_gpu": candidate.speed,
            "mfu": candidate.time.mfu,
            "step_parts_seconds": candidate.time.parts(),
        }

    return {
        "format": FORMAT,
        "stage": result.stage,
        "gpu": result.gpu.name,
        "gpus": result.gpus,
        "seq_length_tokens": result.seq_length_tokens,
        "global_batch_samples": result.global_batch_samples,
        "lengths_unknown": result.lengths_unknown,
        "considered": result.considered,
        "fitting": result.fitting,
        "ranked": [layout(candidate) for candidate in result.ranked[:limit]],
        "rejected": [asdict(rejection) for rejection in result.rejected],
        "rejected_ways": [asdict(rejection) for rejection in result.rejected_ways],
        "too_large": [asdict(rejection) for rejection in result.too_large],
        "explanation": explain(result),
    }


def print_search(result: SearchResult, console: Console, *, shown: int = 8) -> None:
    """The best shapes, the winner in three lines, and why the others failed."""
    from rich.table import Table

    gpu, length = result.gpu, result.seq_length_tokens
    console.print(
        f"[bold]{result.stage}[/]: {result.global_batch_samples} samples of {length:,} tokens a step on {result.gpus} {gpu.name.upper()}: "
        f"{result.considered:,} layouts, {result.fitting:,} fit, {len(result.ranked)} shapes",
        highlight=False,
    )
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for name in ("", "TP", "PP", "VP", "CP", "CP by", "DP", "micro", "GB", "tok/s/GPU", "MFU", "to the best"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("to save memory", no_wrap=True)
    for place, each in enumerate(result.ranked[:shown], 1):
        layout = each.layout
        sizes = (
            layout.tensor,
            layout.pipeline,
            layout.virtual_pipeline or "-",
            layout.context,
            communication_text(layout),
            layout.data,
            layout.micro_batch_samples,
        )
        slower = each.speed / result.ranked[0].speed - 1
        figures = (
            f"{each.memory_bytes / 1e9:.0f}",
            f"{each.speed:,.0f}",
            f"{each.time.mfu:.1%}",
            f"{slower:+.1%}" if place > 1 else "",
        )
        table.add_row(str(place), *map(str, sizes), *figures, each.saving)
    console.print(table, highlight=False)
    for line in explain(result):
        console.print(f"- {line}", highlight=False)
    if result.lengths_unknown:
        console.print(
            f"- attention is counted over whole samples, though documents stay apart: {result.lengths_unknown}", highlight=False
        )
    ways = "not allowed in place of a ring"
    for title, rejections in (("too large", result.too_large), ("not allowed", result.rejected), (ways, result.rejected_ways)):
        if rejections:
            console.print(f"{title}:", highlight=False)
        for each in rejections[:shown]:
            console.print(f"- {each.family}: {each.reason} ({each.layouts})", highlight=False)
        if len(rejections) > shown:
            console.print(f"- and {len(rejections) - shown} more families (--json has all)", highlight=False)
