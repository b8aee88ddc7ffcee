"""`quarry logs`: what a stage printed, whole, of one attempt or of one rank, and on request what it prints from now on."""

from __future__ import annotations

import argparse
import collections
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launchers.errors import LaunchError
from launchers.run_arguments import add_run, add_runs_root

DEFAULT_LINES = 200
POLL_SECONDS = 0.2
LIVE_CHECK_SECONDS = 2.0
"""Between two looks whether the stage still runs: its last lines are printed in any case."""
EXIT_NOTHING = 1

MARK = re.compile(rb"==== attempt (\d+), ")
"""Begins the lines of an attempt, in the stage's log (launchers/wrapper.py) and in a rank's (training/stacks.py)."""

EPILOG = """examples:
  quarry logs smoke-tiny foundation               the last lines of all ranks, as they came
  quarry logs smoke-tiny foundation --follow      and what comes, until the stage ends
  quarry logs smoke-tiny foundation --rank 3      what rank 3 printed (C libraries such as NCCL are in the whole log only)
  quarry logs smoke-tiny data --attempt 2 --lines 0

exit codes: 0; 1 nothing was printed and nothing runs that would; 2 no such run, stage, rank or attempt.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "logs",
        help="show what a stage printed",
        description="Show the log of a stage of a run.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run(parser)
    parser.add_argument("stage", metavar="STAGE", help="a stage, or `data` for the preparation of the data")
    parser.add_argument("--rank", type=int, metavar="N", help="only what this rank printed")
    parser.add_argument("--attempt", type=int, metavar="N", help="only this start of the stage, from 1")
    parser.add_argument(
        "--lines", type=int, default=DEFAULT_LINES, metavar="N", help="the last N lines; 0: all (default: %(default)s)"
    )
    parser.add_argument("--follow", "-f", action="store_true", help="go on until the stage ends")
    add_runs_root(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from launchers.journal import Journal
    from launchers.runs import find_run
    from launchers.stage_job import DATA, LOG_FILE
    from recipes.schema import Recipe

    if args.lines < 0:
        raise LaunchError(f"--lines is {args.lines}: expected a number of lines, or 0 for all")
    folder = find_run(args.name, args.runs_root)
    stages = [DATA, *Recipe.read(folder.recipe).stages]
    if args.stage not in stages:
        raise LaunchError(f"run '{folder.name}' has no stage '{args.stage}'; its stages: {', '.join(stages)}")
    stage_dir = folder.path / DATA if args.stage == DATA else folder.stage(args.stage)
    path = stage_dir / LOG_FILE if args.rank is None else rank_file(stage_dir, args.rank, wait=args.follow)
    if not args.follow and not path.exists():
        print(f"stage '{args.stage}' of run '{folder.name}' has printed nothing yet: no {path}", file=sys.stderr)
        return EXIT_NOTHING
    text = LogText(path, args.attempt)
    lines = collections.deque(text.poll(), maxlen=args.lines or None)
    if args.attempt is not None and text.attempts and args.attempt not in text.attempts and not args.follow:
        raise LaunchError(f"{path} has no attempt {args.attempt}; attempts: {', '.join(map(str, text.attempts))}")
    _print(lines)
    if not args.follow:
        _print(text.rest())
        return 0
    journal = Journal.read(folder.journal)
    return follow(text, lambda: is_over(journal, args.stage, stage_dir))


def rank_file(stage_dir: Path, rank: int, *, wait: bool) -> Path:
    """File of what a rank printed; LaunchError with the known ranks unless it is there, or `wait` and no rank has begun yet."""
    path = stage_dir / "ranks" / f"rank-{rank}.txt"
    known = sorted(int(p.stem.removeprefix("rank-")) for p in stage_dir.glob("ranks/rank-*.txt") if p.stem[5:].isdigit())
    if path.exists() or (wait and not known):
        return path
    have = (
        f"ranks: {', '.join(map(str, known))}"
        if known
        else "none of its ranks has begun, or it has none (merges, exports, data)"
    )
    raise LaunchError(f"{stage_dir.name} has no output of a rank {rank}; {have}. Without --rank the whole log is shown")


class LogText:
    """Whole lines of a log, read on at each `poll`; with `attempt` only those between its mark and the next."""

    def __init__(self, path: Path, attempt: int | None = None) -> None:
        self.path = path
        self.attempts: list[int] = []
        """Seen so far."""
        self._wanted = attempt
        self._inside = attempt is None
        self._offset_bytes = 0
        self._cut = b""

    def poll(self) -> Iterator[bytes]:
        """Lines that are new since the last call, with their ends; none while the file does not exist."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as f:
            f.seek(self._offset_bytes)
            for line in f:
                self._offset_bytes += len(line)
                line, self._cut = self._cut + line, b""
                if not line.endswith(b"\n"):
                    self._cut = line
                    return
                mark = MARK.match(line)
                if mark:
                    self.attempts.append(int(mark[1]))
                    self._inside = self._wanted in (None, int(mark[1]))
                if self._inside:
                    yield line

    def rest(self) -> list[bytes]:
        """The line that was cut or is being written."""
        return [self._cut + b"\n"] if self._cut and self._inside else []


def follow(text: LogText, is_over: Callable[[], bool]) -> int:
    """Print what comes until the stage is over."""
    next_check = 0.0
    while True:
        over = False
        if time.monotonic() >= next_check:
            over = is_over()
            next_check = time.monotonic() + LIVE_CHECK_SECONDS
        _print(text.poll())  # after the check, so that nothing printed before the end is missed
        if over:
            _print(text.rest())
            if not text.attempts:
                print(f"nothing runs that would write {text.path}", file=sys.stderr)
                return EXIT_NOTHING
            return 0
        time.sleep(POLL_SECONDS)


def is_over(journal: Any, stage: str, stage_dir: Path) -> bool:
    """Whether no attempt of the stage runs and none is about to start."""
    from launchers.cancel_command import live_launcher
    from launchers.journal import attempts, last_outcome, stage_rows
    from launchers.processes import stage_processes

    journal.poll()
    rows = stage_rows(journal.rows, stage)
    outcome = last_outcome(rows, stage)
    after = rows[rows.index(outcome) :] if outcome is not None else []
    decided = next((row["decision"] for row in reversed(after) if row["event"] == "decision"), None)
    if decided in ("next", "stop"):
        return True
    if live_launcher(journal.rows) is not None:
        return stage == "data" and outcome is not None  # no decision follows on it
    if rows and any(row.get("executor") == "slurm" for row in rows):
        if decided == "again":
            return False  # its job is requeued
        return outcome is not None or rows[-1]["event"] == "cancel"
    return not (attempts(rows, stage) and stage_processes(stage_dir))


def _print(lines: Any) -> None:
    for line in lines:
        sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()
