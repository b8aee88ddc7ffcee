"""What a person sees while data is prepared: a bar on a terminal, one line per finished step elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Protocol


class Progress(Protocol):
    """Told about the steps of a preparation, in order."""

    def message(self, text: str) -> None: ...

    def step(self, name: str, total_bytes: int | None) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """A step; the context's value is called with bytes done. `total_bytes` None: unknown."""
        ...


class Silent:
    """Shows nothing; for tests and callers with a display of their own."""

    def message(self, text: str) -> None:
        pass

    @contextlib.contextmanager
    def step(self, name: str, total_bytes: int | None) -> Iterator[Callable[[int], None]]:
        yield lambda done: None


class Shown:
    """On a terminal a rich bar that goes away when its step is done; in both cases a line per step with its seconds."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(highlight=False)

    def message(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def step(self, name: str, total_bytes: int | None) -> Iterator[Callable[[int], None]]:
        started, done = time.monotonic(), 0
        if self.console.is_terminal:
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            with Bar(*columns, console=self.console, transient=True) as bar:
                task = bar.add_task(name, total=total_bytes)

                def show(size: int) -> None:
                    nonlocal done
                    done += size
                    bar.advance(task, size)

                yield show
        else:

            def count(size: int) -> None:
                nonlocal done
                done += size

            yield count
        seconds = time.monotonic() - started
        amount = f"  {done / 1e6:.1f} MB" if done else ""
        self.message(f"{name:<40} {seconds:6.1f} s{amount}")
