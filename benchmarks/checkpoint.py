"""What checkpoints cost a stage per save, from its own log: seconds beyond the median step, spread over its saves.

The time of a save after step n is in the seconds of step n + 1; an asynchronous one slows the steps after that, too, so that all steps count
but the first, which warms up. The last save of a stage comes behind its last step and is in none. Give stages of the same recipe with
phase.NAME.async_saves false and true.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

EPILOG = """example:
  quarry launch curriculum=smoke cluster=local --to foundation --run sync
  quarry launch curriculum=smoke cluster=local --to foundation --run async phase.foundation.async_saves=true
  python -m benchmarks.checkpoint runs/sync/stages/foundation runs/async/stages/foundation
"""


@dataclass(frozen=True)
class Cost:
    stage: str
    asynchronous: bool
    steps: int
    saves: int
    checkpoint_bytes: int
    step_seconds: float
    """Median."""
    seconds_per_save: float
    blocked_seconds: float | None
    """Median of Megatron's own timer around a save: what the ranks waited. None: there is no log."""


def cost(stage_dir: Path) -> Cost:
    """ValueError if there is nothing to tell a save by."""
    rows = [json.loads(line) for line in (stage_dir / "metrics.jsonl").read_text().splitlines()]
    words = (stage_dir / "args.txt").read_text().split("\n")
    interval = int(words[words.index("--save-interval") + 1])
    seconds = [row["seconds"] for row in rows if row["step"] > 1]
    saves = sum(row["step"] % interval == 0 for row in rows[:-1])
    if any(after["step"] - before["step"] != 1 for before, after in itertools.pairwise(rows)):
        raise ValueError(f"{stage_dir}: not every step is logged; set log_interval_steps=1")
    if not saves or len(rows) < 3:
        raise ValueError(
            f"{stage_dir}: {len(rows)} logged steps and a save every {interval}: no step comes after a save; train more"
        )
    median = statistics.median(seconds)
    newest = max((stage_dir / "checkpoints").glob("iter_*"))
    return Cost(
        stage=str(stage_dir),
        asynchronous="--async-save" in words,
        steps=len(rows),
        saves=saves,
        checkpoint_bytes=sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()),
        step_seconds=median,
        seconds_per_save=(sum(seconds) - median * len(seconds)) / saves,
        blocked_seconds=blocked(stage_dir / "log.txt"),
    )


def blocked(log: Path) -> float | None:
    """Median of the `save-checkpoint ...: (min, max)` milliseconds of a stage's log, in seconds."""
    found = re.findall(r"save-checkpoint \.+: \([\d.]+, ([\d.]+)\)", log.read_text(errors="replace")) if log.exists() else []
    return statistics.median(map(float, found)) / 1e3 if found else None


def table(costs: Sequence[Cost]) -> str:
    lines = [
        "| stage | saves | checkpoint | steps | step, median | ranks wait per save | beyond the median step, per save |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {c.stage} | {c.saves} {'asynchronous' if c.asynchronous else 'synchronous'} | {c.checkpoint_bytes / 1e6:,.0f} MB "
        f"| {c.steps} | {c.step_seconds:.3f} s | {'' if c.blocked_seconds is None else f'{c.blocked_seconds:.2f} s'} "
        f"| {c.seconds_per_save:.2f} s |"
        for c in costs
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoint",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stages", type=Path, nargs="+", help="folders of finished stages")
    options = parser.parse_args(argv)
    try:
        print(table([cost(stage) for stage in options.stages]))
    except (OSError, ValueError) as error:
        print(f"benchmarks.checkpoint: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
