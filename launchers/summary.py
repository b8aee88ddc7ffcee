"""What a finished chain says at its end: where things lie, what was learned, and what the time went into."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launchers import text
from launchers.progress import RunProgress, StageProgress
from launchers.view import learned


def print_summary(progress: RunProgress, console: Console) -> None:
    """Print the summary of a run whose stages are all finished."""
    run = progress.run
    console.print()
    console.print(_times(progress))
    for table in (_heldout(progress), *(_answers(s) for s in progress.stages), _rewards(progress)):
        if table is not None:
            console.print()
            console.print(table)
    console.print()
    places = [(f"model ({s.stage})", model_folder(progress, s)) for s in progress.stages if s.kind == "export"]
    if not places and progress.stages:
        places = [("checkpoint", model_folder(progress, progress.stages[-1]))]
    places += [("metrics", run.path / "stages" / "*" / "metrics.jsonl"), ("report", run.report)]
    for what, path in places:
        console.print(Text(f"{what:<18}{path}"), soft_wrap=True)


def model_folder(progress: RunProgress, stage: StageProgress) -> Path:
    """Where the model of a finished stage lies: the Hugging Face folder of an export, else the checkpoint."""
    folder = progress.run.stage(stage.stage)
    if stage.kind == "export":
        return folder / "hf"
    checkpoint = (stage.handoff or {}).get("checkpoint")
    return folder / checkpoint if checkpoint else folder


def first_and_last_heldout(progress: RunProgress) -> tuple[StageProgress, StageProgress] | None:
    """The first and the last phase that measured held-out losses; None if no two did."""
    measured = [s for s in progress.stages if s.own_heldout]
    return (measured[0], measured[-1]) if len(measured) > 1 else None


def _heldout(progress: RunProgress) -> Table | None:
    ends = first_and_last_heldout(progress)
    if ends is None:
        return None
    first, last = ends
    return _changes(
        "held-out loss, nats per token",
        (f"after {first.stage}", f"after {last.stage}"),
        first.own_heldout or {},
        last.own_heldout or {},
    )


def _answers(s: StageProgress) -> Table | None:
    """What fine-tuning lowered."""
    if s.answers is None:
        return None
    return _changes("held-out answers, nats per token", (f"before {s.stage}", f"after {s.stage}"), *s.answers)


def _rewards(progress: RunProgress) -> Table | None:
    """Mean rewards of the first and the last step of reinforcement learning; each stage has a row, and each domain where there are several."""
    ends = {s.stage: (s.rewards[0], s.rewards[-1]) for s in progress.stages if s.kind == "grpo" and s.rewards}
    first, last = ({}, {})  # type: tuple[dict[str, float], dict[str, float]]
    for stage, rows in ends.items():
        for values, row in zip((first, last), rows, strict=True):
            domains = row.get("reward_per_domain") or {}
            values |= {stage: row["reward"]} | ({f"{stage}: {d}": r for d, r in domains.items()} if len(domains) > 1 else {})
    return _changes("mean reward", ("first step", "last step"), first, last, rises=True) if ends else None


def _changes(
    title: str, columns: tuple[str, str], old: dict[str, float], new: dict[str, float], *, rises: bool = False
) -> Table:
    """A row for each name with its value before and after; `rises`: more is better."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column(title)
    for name in (*columns, "change"):
        table.add_column(name, justify="right")
    for name in sorted({*old, *new}):
        a, b = old.get(name), new.get(name)
        change = None if a is None or b is None else b - a
        style = "" if change is None else "green" if (change > 0) == rises and change else "yellow"
        table.add_row(Text(name), text.loss(a), text.loss(b), Text("-" if change is None else f"{change:+.4f}", style=style))
    return table


def _times(progress: RunProgress) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0), show_footer=True, footer_style="bold")
    total = progress.wall_seconds
    start, train, rest = (
        sum(getattr(s, k) for s in progress.stages) for k in ("startup_seconds", "training_seconds", "other_seconds")
    )
    table.add_column("stage", footer="all")
    table.add_column("tokens", justify="right", footer=text.tokens(sum(s.stage_tokens for s in progress.stages)))
    table.add_column("final loss or reward", justify="right")
    for name, seconds in (("wall time", total), ("start-up", start), ("training", train), ("evaluate, save", rest)):
        table.add_column(name, justify="right", footer=text.duration(seconds))
    for s in progress.stages:
        trains = bool(s.gpus)
        table.add_row(
            Text(s.stage),
            text.tokens(s.stage_tokens) if trains else "",
            learned(s) if trains else "",
            text.duration(s.wall_seconds),
            *(text.duration(v) if trains else "" for v in (s.startup_seconds, s.training_seconds)),
            text.duration(s.other_seconds),
        )
    return table
