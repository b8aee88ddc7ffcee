"""`quarry status`: where a run stands, from its folder alone; without a run, the list of runs."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from launchers.errors import LaunchError
from launchers.run_arguments import add_run, add_runs_root

EXIT_UNFINISHED_BADLY = 1
WATCH_SECONDS = 0.2

EPILOG = """examples:
  quarry status                 the runs under runs/, the latest first
  quarry status smoke-tiny      its stages: state, step, tokens, loss, speed, time left
  quarry status /data/runs/x    a run anywhere
  quarry status smoke-tiny --watch   the same, kept up to date until the run ends

exit codes: 0 finished, running or not begun; 1 a stage failed or was interrupted; 2 there is no such run.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "status",
        help="show where a run stands, or list the runs",
        description="Show the stages of a run, or the list of runs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run(parser, optional=True)
    parser.add_argument("--watch", action="store_true", help="go on until the run ends (Ctrl-C ends the watching only)")
    add_runs_root(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from launchers.view import terminal

    console = terminal()
    if args.watch:
        if not args.name:
            raise LaunchError("--watch follows one run: name it (`quarry status` lists the runs)")
        return watch_run(console, args.name, args.runs_root)
    return show_run(console, args.name, args.runs_root) if args.name else show_list(console, args.runs_root)


def show_run(console: Any, name: str, runs_root: Path) -> int:
    """Print the table of one run; the exit code tells whether it stands still for a bad reason."""
    from launchers.progress import RunProgress
    from launchers.runs import find_run
    from launchers.view import overview

    progress = RunProgress(find_run(name, runs_root))
    progress.refresh()
    console.print(f"run {progress.run.name}: {progress.recipe.name}, {progress.recipe.model.name}", style="bold")
    console.print(overview(progress))
    if progress.broken_lines:
        console.print(f"{progress.broken_lines} lines that a crash cut were left out", style="dim")
    return EXIT_UNFINISHED_BADLY if progress.state in ("failed", "interrupted") else 0


def watch_run(console: Any, name: str, runs_root: Path) -> int:
    """Show a run until nothing of it runs or waits any more; then as `show_run`."""
    from launchers.progress import RunProgress
    from launchers.runs import find_run
    from launchers.view import View

    run = find_run(name, runs_root)
    progress = RunProgress(run)
    with View(progress, console) as view:
        while True:
            view.update()
            if not is_going_on(progress):
                break
            time.sleep(WATCH_SECONDS)
        view.update(force=True)
    if console.is_terminal and progress.state != "finished":  # the table stays on the terminal
        return EXIT_UNFINISHED_BADLY if progress.state in ("failed", "interrupted") else 0
    return show_run(console, name, runs_root)


def is_going_on(progress: Any) -> bool:
    """Whether a launcher, a stage or a Slurm job of the run may still bring it forward, as far as its folder tells."""
    from launchers.cancel_command import is_locked, live_launcher

    if progress.state == "finished":
        return False
    if live_launcher(progress.journal.rows) is not None or is_locked(progress.run):
        return True
    if progress.state == "running":
        return True
    last = {row["stage"]: row for row in progress.journal.rows if row.get("stage")}
    jobs = [row for row in last.values() if row.get("executor") == "slurm" or row.get("decision") == "again"]
    stopped = any(row.get("decision") == "stop" or row["event"] in ("cancel", "job_failed") for row in last.values())
    slurm = any(row.get("executor") == "slurm" for row in progress.journal.rows)
    return slurm and bool(jobs) and not stopped


def show_list(console: Any, runs_root: Path) -> int:
    """Print one line per run."""
    from rich.table import Table
    from rich.text import Text

    from launchers import text
    from launchers.progress import RunProgress
    from launchers.runs import list_runs
    from launchers.view import STYLES
    from recipes.schema import RecipeError

    runs = list_runs(runs_root)
    if not runs:
        console.print(f"no runs under {runs_root}/; `quarry launch curriculum=smoke cluster=local` makes one")
        return 0
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("run", "state", "stage", "finished", "tokens", "model"):
        table.add_column(name)
    for folder in runs:
        try:
            progress = RunProgress(folder)
        except RecipeError as error:
            table.add_row(Text(folder.name), Text("unreadable", style="red"), Text(str(error)))
            continue
        progress.refresh()
        finished = sum(s.state == "finished" for s in progress.stages)
        now = next((s.stage for s in progress.stages if s.state != "finished"), "")
        trained = text.tokens(sum(s.stage_tokens for s in progress.stages if s.kind == "phase"))
        table.add_row(
            Text(folder.name),
            Text(progress.state, style=STYLES[progress.state]),
            Text(now),
            f"{finished}/{len(progress.stages)}",
            f"{trained}/{text.tokens(progress.recipe.total_tokens)}",
            Text(progress.recipe.model.name),
        )
    console.print(table)
    return 0
