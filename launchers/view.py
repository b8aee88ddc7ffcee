"""What a person sees of a chain on the terminal: a table that stays in place, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launchers import text
from launchers.progress import RunProgress, StageProgress, State

PLAIN_INTERVAL_SECONDS = 5.0
LIVE_INTERVAL_SECONDS = 0.5
PLAIN_WIDTH = 120

STYLES: dict[State, str] = {
    "waiting": "dim",
    "running": "bold cyan",
    "finished": "green",
    "failed": "bold red",
    "interrupted": "yellow",
}
MARKS: dict[State, str] = {"waiting": "·", "running": "▶", "finished": "✓", "failed": "✗", "interrupted": "‖"}


def terminal() -> Console:
    """Standard output; where it is no terminal, wide enough for the tables."""
    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=max(console.width, PLAIN_WIDTH))


def stage_table(progress: RunProgress) -> Table:
    """One row per stage."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name, justify in (
        ("stage", "left"), ("state", "left"), ("tries", "right"), ("step", "right"), ("tokens", "right"),
        ("loss or reward", "right"), ("tokens/s", "right"), (f"per {progress.processor}", "right"), ("MFU", "right"),
        ("time", "right"), ("left", "right"),
    ):  # fmt: skip
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for s in progress.stages:
        table.add_row(
            Text(s.stage),
            Text(f"{MARKS[s.state]} {s.state}", style=STYLES[s.state]),
            str(s.attempts) if s.attempts > 1 else "",
            f"{s.step}/{s.steps}" if s.steps else "",
            text.tokens(s.stage_tokens) if s.stage_tokens else "",
            learned(s),
            *speed(s),
            text.duration(s.wall_seconds) if s.wall_seconds else "",
            text.duration(s.eta_seconds) if s.eta_seconds is not None else "",
            style="dim" if s.state == "waiting" else None,
        )
    return table


def learned(s: StageProgress) -> str:
    """Training loss in nats per token; of reinforcement learning, whose loss means nothing by itself, the mean reward."""
    if s.kind == "grpo":
        return "" if s.reward is None else f"reward {s.reward:.3f}"
    return "" if s.loss is None else text.loss(s.loss)


def speed(s: StageProgress) -> tuple[str, str, str]:
    """Tokens per second over all and per GPU, and model FLOPs utilisation; a dash where it is not known, nothing before the first step."""
    if not s.tokens_per_second:
        return "", "", ""
    return text.tokens(s.tokens_per_second), text.tokens(s.tokens_per_second_per_gpu), text.percent(s.model_flops_utilisation)


def overview(progress: RunProgress) -> Group:
    """The table, one line for the chain, and why a stage stopped."""
    trained = sum(s.stage_tokens for s in progress.stages if s.kind == "phase")  # as the plan counts
    planned = progress.recipe.total_tokens
    eta = progress.eta_seconds
    line = f"{progress.state}: {text.tokens(trained)} of {text.tokens(planned)} tokens, {text.duration(progress.wall_seconds)} in stages"
    if eta and progress.state != "finished":
        line += f", about {text.duration(eta)} left{_unknown(progress)}"
    notes = [
        Text(f"{s.stage}: {s.reason}", style=STYLES[s.state]) for s in progress.stages if s.reason and s.state != "finished"
    ]
    if progress.data_failure:
        notes.insert(0, Text(f"data: {progress.data_failure}", style=STYLES["failed"]))
    return Group(stage_table(progress), Text(line, style=STYLES[progress.state]), *notes)


def _unknown(progress: RunProgress) -> str:
    return f" without {', '.join(progress.not_estimated)} (not known yet)" if progress.not_estimated else ""


class View:
    """Shows the chain while it runs. `update` is cheap and may be called as often as one likes."""

    def __init__(self, progress: RunProgress, console: Console) -> None:
        self.progress = progress
        self.console = console
        self._live = Live(console=console, auto_refresh=False, transient=False) if console.is_terminal else None
        self._next = 0.0
        self._last_line = ""

    def __enter__(self) -> View:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._render()
            self._live.transient = self.progress.state == "finished"  # the summary says it all again
            self._live.stop()

    def say(self, message: str, style: str | None = None) -> None:
        """A line that stays, above the table if there is one."""
        self.console.print(Text(message, style=style or ""), soft_wrap=True)

    def update(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if now < self._next and not force:
            return
        self._next = now + (LIVE_INTERVAL_SECONDS if self._live else PLAIN_INTERVAL_SECONDS)
        self.progress.refresh()
        if self._live:
            self._render()
        else:
            self._plain()

    def _render(self) -> None:
        assert self._live is not None
        self.progress.refresh()
        self._live.update(overview(self.progress), refresh=True)

    def _plain(self) -> None:
        running = [s for s in self.progress.stages if s.state == "running"]
        for s in running:
            line = plain_line(s)
            if line == self._last_line:
                continue
            self._last_line = line
            eta = self.progress.eta_seconds
            self.say(line + (f"  chain about {text.duration(eta)} left{_unknown(self.progress)}" if eta else ""))


def plain_line(s: StageProgress) -> str:
    if not s.step:
        return f"[{s.stage}] starting" if s.steps else f"[{s.stage}] working"
    return (
        f"[{s.stage}] step {s.step}/{s.steps}  {'' if s.kind == 'grpo' else 'loss '}{learned(s)}  {text.rate(s.tokens_per_second)}"
        f"  {text.duration(s.eta_seconds)} left"
    )
