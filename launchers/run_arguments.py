"""Options of the commands that look at a run: which run, and where the runs lie. Imports nothing, so that `--help` answers at once."""

from __future__ import annotations

import argparse
from pathlib import Path

RUNS_ROOT = Path("runs")


def add_run(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """RUN, as `name`."""
    parser.add_argument("name", nargs="?" if optional else None, metavar="RUN", help="name of a run, or its folder")


def add_runs_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs-root", type=Path, default=RUNS_ROOT, metavar="DIR", help="folder of the runs (default: runs)")
