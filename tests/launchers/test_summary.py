"""What `quarry launch` says at its end of fine-tuning and reinforcement learning."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from launchers.progress import RunProgress
from launchers.summary import print_summary
from tests.launchers.posttrain_run import make_run


def summary(run: Any) -> dict[str, list[str]]:
    """First word of a line -> its words."""
    progress = RunProgress(run)
    progress.refresh()
    stream = io.StringIO()
    print_summary(progress, Console(file=stream, width=160, highlight=False, markup=False))
    return {line.split("  ")[0].strip(): line.split("  ") for line in stream.getvalue().splitlines() if line}


def test_answers_before_and_after_and_rewards_first_and_last(harness: Any) -> None:
    seen = {name: [w.strip() for w in words if w.strip()][1:] for name, words in summary(make_run(harness)).items()}
    assert seen["chat"] == ["5.2500", "1.7500", "-3.5000"]
    assert seen["held-out answers, nats per token"] == ["before sft", "after sft", "change"]
    assert seen["rl: code"] == ["0.1100", "0.4100", "+0.3000"]
    assert seen["rl"] == ["0.1000", "0.4000", "+0.3000"]


def test_one_domain_has_no_line_of_its_own(harness: Any) -> None:
    assert not any(name.startswith("rl:") for name in summary(make_run(harness, domains=("math",))))
