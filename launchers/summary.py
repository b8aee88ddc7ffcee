"""What a finished chain says at its end: where things lie, what was learned, and what the time went into."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launchers import text
from launchers.progress import RunProgress, StageProgress


def print_summary(progress: RunProgress, console: Console) -> None:
    """Print the summary of a run whose stages are all finished."""
    run = progress.run
    console.print()
    console.print(_times(progress))
    heldout = _heldout(progress)
    if heldout is not None:
        console.print()
        console.print(heldout)
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
    a, b = first.own_heldout or {}, last.own_heldout or {}
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("held-out loss, nats per token")
    for name in (f"after {first.stage}", f"after {last.stage}", "change"):
        table.add_column(name, justify="right")
    for category in sorted({*a, *b}):
        old, new = a.get(category), b.get(category)
        change = None if old is None or new is None else new - old
        style = "" if change is None else "green" if change < 0 else "yellow"
        table.add_row(
            Text(category), text.loss(old), text.loss(new), Text("-" if change is None else f"{change:+.4f}", style=style)
        )
    return table


def _times(progress: RunProgress) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0), show_footer=True, footer_style="bold")
    total = progress.wall_seconds
    start, train, rest = (
        sum(getattr(s, k) for s in progress.stages) for k in ("startup_seconds", "training_seconds", "other_seconds")
    )
    table.add_column("stage", footer="all")
    table.add_column("tokens", justify="right", footer=text.tokens(sum(s.stage_tokens for s in progress.stages)))
    table.add_column("final loss", justify="right")
    for name, seconds in (("wall time", total), ("start-up", start), ("training", train), ("evaluate, save", rest)):
        table.add_column(name, justify="right", footer=text.duration(seconds))
    for s in progress.stages:
        phase = s.kind == "phase"
        table.add_row(
            Text(s.stage),
            text.tokens(s.stage_tokens) if phase else "",
            text.loss(s.loss) if phase else "",
            text.duration(s.wall_seconds),
            *(text.duration(v) if phase else "" for v in (s.startup_seconds, s.training_seconds)),
            text.duration(s.other_seconds),
        )
    return table
