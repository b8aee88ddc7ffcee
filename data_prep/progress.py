"""What a person sees while data is prepared: a bar on a terminal, elsewhere a line from time to time and one per finished step."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol

LINE_SECONDS = 10.0
"""Between two lines of a running step where there is no terminal: enough to see that a job lives, few enough for a log of days."""


class Done(Protocol):
    """Called with what was done since the last call; documents and tokens where a step counts them."""

    def __call__(self, size_bytes: int, documents: int = 0, tokens: int = 0) -> None: ...


class Progress(Protocol):
    """Told about the steps of a preparation, in order."""

    def message(self, text: str) -> None: ...

    def step(self, name: str, total_bytes: int | None) -> contextlib.AbstractContextManager[Done]:
        """A step; the context's value is called with what is done. `total_bytes` None: unknown."""
        ...


class Silent:
    """Shows nothing; for tests and callers with a display of their own."""

    def message(self, text: str) -> None:
        pass

    @contextlib.contextmanager
    def step(self, name: str, total_bytes: int | None) -> Iterator[Done]:
        yield lambda size_bytes, documents=0, tokens=0: None


class _Tally:
    """Sums of a step and their rates."""

    def __init__(self, total_bytes: int | None) -> None:
        self.total_bytes, self.started = total_bytes, time.monotonic()
        self.bytes = self.documents = self.tokens = 0

    def add(self, size_bytes: int, documents: int, tokens: int) -> None:
        self.bytes += size_bytes
        self.documents += documents
        self.tokens += tokens

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def rates(self) -> str:
        seconds = max(self.seconds, 1e-9)
        parts = []
        if self.documents:
            parts.append(f"{_short(self.documents / seconds)} documents/s")
        if self.tokens:
            parts.append(f"{_short(self.tokens / seconds)} tokens/s")
        if self.bytes:
            parts.append(f"{self.bytes / seconds / 1e6:.1f} MB/s")
        return "  ".join(parts)

    def eta(self) -> str:
        if not self.total_bytes or not self.bytes:
            return ""
        left = max(0.0, self.seconds * (self.total_bytes / self.bytes - 1))
        hours, rest = divmod(round(left), 3600)
        return f"{hours}:{rest // 60:02d}:{rest % 60:02d} left"


def _short(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.2f}{unit}"
    return f"{value:.1f}"


class Shown:
    """On a terminal a bar with rates that goes away when its step is done; elsewhere a line every LINE_SECONDS; a line per finished step."""

    def __init__(self, line_seconds: float = LINE_SECONDS) -> None:
        self._line_seconds = line_seconds
        self._console: Any = None
        if sys.stdout.isatty():  # rich costs a tenth of a second to import
            from rich.console import Console

            self._console = Console(highlight=False)

    def message(self, text: str) -> None:
        if self._console is None:
            print(text, flush=True)
        else:
            self._console.print(text, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def step(self, name: str, total_bytes: int | None) -> Iterator[Done]:
        tally = _Tally(total_bytes)
        with self._bar(name, tally) if self._console is not None else self._lines(name, tally) as done:
            yield done
        amount = f"  {tally.bytes / 1e6:.1f} MB" if tally.bytes else ""
        tokens = f"  {tally.tokens:,} tokens" if tally.tokens else ""  # steps before tokenizing count none
        counts = f"  {tally.documents:,} documents{tokens}  {tally.rates()}" if tally.documents else ""
        self.message(f"{name:<40} {tally.seconds:6.1f} s{amount}{counts}")

    @contextlib.contextmanager
    def _bar(self, name: str, tally: _Tally) -> Iterator[Done]:
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TextColumn("{task.fields[rates]}"),
            TimeRemainingColumn(),
        )
        with Bar(*columns, console=self._console, transient=True) as bar:
            task = bar.add_task(name, total=tally.total_bytes, rates="")

            def show(size_bytes: int, documents: int = 0, tokens: int = 0) -> None:
                tally.add(size_bytes, documents, tokens)
                bar.update(task, advance=size_bytes, rates=tally.rates())

            yield show

    @contextlib.contextmanager
    def _lines(self, name: str, tally: _Tally) -> Iterator[Done]:
        shown = tally.started

        def show(size_bytes: int, documents: int = 0, tokens: int = 0) -> None:
            nonlocal shown
            tally.add(size_bytes, documents, tokens)
            now = time.monotonic()
            if now - shown >= self._line_seconds:
                shown = now
                share = (
                    f"{100 * tally.bytes / tally.total_bytes:5.1f} %" if tally.total_bytes else f"{tally.bytes / 1e6:.0f} MB"
                )
                self.message(f"{name}: {share}  {tally.rates()}  {tally.eta()}".rstrip())

        yield show
