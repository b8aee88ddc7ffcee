"""The folder of a run: where things lie, what it is called, which stages are finished, and what a changed recipe would change."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers.errors import LaunchError
from launchers.journal import Journal
from launchers.jsonl import Row
from launchers.stage_job import check_name
from recipes.schema import Recipe

HANDOFF_FORMAT = "quarry.handoff/1"

# Changes that cannot alter what a finished stage has learned, whatever stage they are made in.
HARMLESS_KEYS = ("cluster", "logging", "extra")


@dataclass(frozen=True)
class RunFolder:
    """runs_root/NAME/"""

    path: Path

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.json"

    @property
    def journal(self) -> Path:
        return self.path / "journal.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def stage(self, stage: str) -> Path:
        return self.path / "stages" / stage

    def handoff(self, stage: str) -> Row | None:
        """The stage's hand-off, None if there is none yet. LaunchError if it is damaged or belongs to another stage or version."""
        path = self.stage(stage) / "handoff.json"
        try:
            value = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise LaunchError(
                f"{path} is damaged ({error}); move {path.parent} away and launch again to train the stage anew"
            ) from None
        for key, expected in (("format", HANDOFF_FORMAT), ("stage", stage)):
            found = value.get(key) if isinstance(value, dict) else None
            if found != expected:
                raise LaunchError(
                    f"{path}: {key} is {found!r}, expected {expected!r}; it was not written by this stage in this version: "
                    f"move {path.parent} away and launch again, or start a new run with --run NAME"
                )
        return value

    def finished(self, recipe: Recipe, accepted_digests: set[str]) -> dict[str, Row]:
        """Hand-offs of the finished stages, in order; LaunchError if one is of another recipe, or stands behind an unfinished one."""
        result: dict[str, Row] = {}
        missing: str | None = None
        for stage in recipe.stages:
            value = self.handoff(stage)
            if value is None:
                missing = missing or stage
                continue
            path = self.stage(stage)
            if missing is not None:
                raise LaunchError(
                    f"stage '{stage}' is finished but '{missing}' before it is not: it continued from a model that is gone; "
                    f"move {path} away too to train both again, or put {self.stage(missing)} back"
                )
            if value.get("recipe_digest") not in accepted_digests:
                raise LaunchError(
                    f"{path / 'handoff.json'}: recipe_digest is {str(value.get('recipe_digest'))[:12]}..., this run's recipe has "
                    f"{recipe.digest()[:12]}...: trained with another recipe; start a new run with --run NAME, or move {path} away"
                )
            result[stage] = value
        return result

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One launcher per run. The kernel drops the lock with its process, so that a dead launcher never blocks."""
        path = self.path / "lock"
        with open(path, "a+") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                f.seek(0)
                raise LaunchError(
                    f"run '{self.name}' is being launched already ({f.read().strip() or 'by another process'}); watch it with "
                    f"`quarry status {self.name}`, or stop that launcher (Ctrl-C there saves) and try again; --run NAME starts another run"
                ) from None
            f.truncate(0)
            f.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            f.flush()
            try:
                yield
            finally:
                f.truncate(0)


def default_name(recipe: Recipe) -> str:
    """Name of a run that has not been given one: the same recipe finds its run again."""
    return check_name("run", f"{recipe.name}-{recipe.model.name}".replace("_", "-"))


def find_run(text: str, runs_root: Path) -> RunFolder:
    """The run called `text` under `runs_root`, or the folder `text`. LaunchError with the runs that there are."""
    for path in (runs_root / text, Path(text)):
        if (path / "recipe.json").is_file():
            return RunFolder(path)
    known = ", ".join(run.name for run in list_runs(runs_root)) or "none"
    raise LaunchError(
        f"no run '{text}': neither {runs_root / text} nor {text} holds a recipe.json; runs under {runs_root}: {known}"
    )


def list_runs(runs_root: Path) -> list[RunFolder]:
    """Runs under a folder, the one launched last first."""
    found = [RunFolder(path.parent) for path in runs_root.glob("*/recipe.json")]
    return sorted(found, key=lambda run: max(p.stat().st_mtime for p in (run.recipe, run.journal) if p.exists()), reverse=True)


def accepted_digests(recipe: Recipe, journal: Journal) -> set[str]:
    """Digests that a finished stage may carry: today's recipe and those that it was changed from with --accept-changes."""
    return {recipe.digest()} | {row["recipe_digest"] for row in journal.rows if row["event"] == "run"}


@dataclass(frozen=True)
class Difference:
    """One key that two recipes disagree on; a missing key is ABSENT."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {_short(self.old)} -> {_short(self.new)}"


ABSENT = "(absent)"


def _short(value: Any) -> str:
    text = value if value is ABSENT else json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[Difference]:
    """Leaves at which two nested dictionaries differ, in the order of their keys."""
    found = []
    for key in [*old, *(k for k in new if k not in old)]:
        a, b = old.get(key, ABSENT), new.get(key, ABSENT)
        if a == b and type(a) is type(b):
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        else:
            found.append(Difference(f"{prefix}{key}", a, b))
    return found


def check_change(run: RunFolder, old: Recipe, new: Recipe, finished: set[str], *, accept: bool) -> list[Difference]:
    """What `new` changes; LaunchError unless nothing differs, or the user accepts changes that leave finished stages as they are."""
    found = differences(old.model_dump(mode="json"), new.model_dump(mode="json"))
    if not found:
        return []
    listed = "\n".join(f"  {d}" for d in found)
    if not accept:
        raise LaunchError(
            f"run '{run.name}' exists with another recipe ({run.recipe}); the keys that differ:\n{listed}\n"
            f"Start a new run with --run NAME; or go on with the old values: quarry launch --continue {run.name}; or, if no finished stage is "
            f"touched by it, go on with the new ones: --accept-changes."
        )
    refused = [d for d in found if not _leaves_finished(d, old, new, finished)]
    if refused:
        raise LaunchError(
            f"--accept-changes refuses what finished stages of run '{run.name}' were trained with:\n"
            + "\n".join(f"  {d}" for d in refused)
            + "\nStart a new run with --run NAME."
        )
    return found


def _leaves_finished(difference: Difference, old: Recipe, new: Recipe, finished: set[str]) -> bool:
    head, *rest = difference.key.split(".")
    if head in HARMLESS_KEYS:
        return True
    if head == "stages":
        return old.stages[: len(finished)] == new.stages[: len(finished)]
    if head in ("phase", "merge", "sft", "grpo", "ab", "export"):
        return bool(rest) and rest[0] not in finished
    return not finished
