"""What a person sees while a model is evaluated: a line now and then, with how much is done and when the part ends."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

LINE_SECONDS = 5.0


class Progress:
    """Prints; a part is told how much of its total is done and says how long the rest will take."""

    def __init__(self, say: Callable[[str], None] = lambda text: print(text, flush=True), every_seconds: float = LINE_SECONDS):
        self._say, self._every = say, every_seconds

    def message(self, text: str) -> None:
        self._say(text)

    @contextlib.contextmanager
    def part(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A part of `total` units (tokens or benchmarks); its value is called with how many more are done."""
        begun = said = time.monotonic()
        so_far = 0

        def done(units: int) -> None:
            nonlocal so_far, said
            so_far += units
            now = time.monotonic()
            if now - said >= self._every and 0 < so_far < total:
                said = now
                left = (now - begun) * (total - so_far) / so_far
                self._say(f"{name}: {100 * so_far / total:.0f} %, about {_duration(left)} left")

        yield done
        if so_far:
            self._say(f"{name}: done in {_duration(time.monotonic() - begun)}")


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
