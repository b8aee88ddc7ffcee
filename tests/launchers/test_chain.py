"""The chain through nemo-run's real LocalExecutor, with stages that only pretend to train."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launchers import processes
from launchers.chain import Launch
from launchers.errors import LaunchError
from recipes.schema import Recipe

STAGES = ["a", "b", "merged", "c", "hf"]


def eventually(condition: Callable[[], object], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)


def when(condition: Callable[[], object], action: Callable[[], object]) -> threading.Thread:
    """Do something from another thread as soon as a condition holds (the launch holds the main thread)."""

    def watch() -> None:
        eventually(condition, "the moment to act")
        action()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_runs_every_stage_in_order_and_a_second_launch_starts_nothing(harness: Any) -> None:
    assert harness.launch() == 0
    assert [row["stage"] for row in harness.journal(event="outcome", exit_code=0)] == ["data", *STAGES]
    assert all(harness.starts(s) == 1 for s in STAGES)
    assert "web" in harness.output
    assert str(harness.run_dir / "stages" / "hf" / "hf") in harness.output
    # Intent is on disk before the submission, and the submission before the outcome.
    events = [row["event"] for row in harness.journal(stage="b")]
    assert events.index("intent") < events.index("submitted") < events.index("outcome") < events.index("decision")
    submitted = harness.journal(event="submitted", stage="b")[0]
    assert submitted["job"].startswith("local_persistent://nemo_run/b-")
    assert (harness.run_dir / ".nemo-run" / "experiments" / "b").is_dir()

    rows = len(harness.journal())
    begun = time.monotonic()
    assert harness.launch() == 0
    assert time.monotonic() - begun < 1
    assert "nothing to start" in harness.output
    assert len(harness.journal()) == rows
    assert all(harness.starts(s) == 1 for s in STAGES)


def test_stage_overhead_of_the_launcher_is_small(harness: Any) -> None:
    assert harness.launch() == 0
    outcomes = [row for row in harness.journal(event="outcome") if row["stage"] in STAGES]
    times = [json.loads(line) for line in (harness.run_dir / "journal.jsonl").read_text().splitlines()]
    from launchers.journal import seconds_between

    first = next(row for row in times if row["event"] == "intent" and row["stage"] == "a")
    last = next(row for row in times if row["event"] == "decision" and row["stage"] == "hf")
    overhead = (seconds_between(first, last) - sum(row["seconds"] for row in outcomes)) / len(STAGES)
    assert overhead < 1.0


def test_failed_stage_stops_the_chain_with_its_last_lines_and_a_remedy(harness: Any) -> None:
    harness.faults(b={"exit": 3})
    assert harness.launch() == 3
    assert [harness.starts(s) for s in STAGES] == [1, 1, 0, 0, 0]
    assert "<b>refusing</b> [bold]with[/bold] 3" in harness.output
    assert "not started: merged, c, hf" in harness.output
    assert "what to do:" in harness.output
    assert harness.journal(event="decision", stage="b")[0]["decision"] == "stop"
    assert harness.journal(event="end")[0]["exit_code"] == 3

    harness.faults()
    assert harness.launch() == 0
    assert [harness.starts(s) for s in STAGES] == [1, 2, 1, 1, 1]


def test_refusal_is_not_retried(harness: Any) -> None:
    harness.faults(b={"exit": 78})
    assert harness.launch() == 78
    assert harness.starts("b") == 1
    assert "refused its configuration" in harness.output


def test_75_starts_the_stage_again_from_its_checkpoint(harness: Any) -> None:
    harness.faults(b={"exit": 75, "at_step": 3, "times": 1})
    assert harness.launch() == 0
    assert harness.starts("b") == 2
    assert harness.steps("b") == [1, 2, 3, 4]
    decisions = [row["decision"] for row in harness.journal(event="decision", stage="b")]
    assert decisions == ["again", "next"]
    assert "==== attempt 2" in (harness.run_dir / "stages" / "b" / "log.txt").read_text()


def test_75_without_progress_stops(harness: Any) -> None:
    harness.faults(b={"exit": 75, "at_step": 1, "no_save": True})
    assert harness.launch() == 75
    assert harness.starts("b") == 1
    assert "without a step of progress" in harness.output


def test_end_with_0_but_without_handoff_stops(harness: Any) -> None:
    harness.faults(b={"no_handoff": True})
    assert harness.launch() == 1
    assert "left no hand-off" in harness.output
    assert harness.starts("merged") == 0


def test_killed_stage_stops_the_chain_and_the_same_command_continues_it(harness: Any) -> None:
    harness.faults(b={"exit": -9, "at_step": 3, "times": 1})
    assert harness.launch() == 128 + signal.SIGKILL
    assert "killed by SIGKILL" in harness.output
    assert harness.starts("merged") == 0
    assert harness.launch() == 0
    assert harness.starts("b") == 2
    assert harness.starts("a") == 1
    assert harness.steps("b") == [1, 2, 3, 4]


def test_killed_wrapper_makes_the_stage_save_and_stops_the_chain(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.3")

    def wrapper() -> int:
        return harness.journal(event="started", stage="a")[0]["pid"]

    metrics = harness.run_dir / "stages" / "a" / "metrics.jsonl"
    when(lambda: metrics.exists() and metrics.read_text().count("\n") >= 1, lambda: os.kill(wrapper(), signal.SIGKILL))
    assert harness.launch() == 1
    assert "without a trace" in harness.output
    assert not processes.stage_processes(harness.run_dir / "stages" / "a")
    saved = int((harness.run_dir / "stages" / "a" / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert 1 <= saved < 4
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.002")
    assert harness.launch() == 0
    assert harness.steps("a") == [1, 2, 3, 4]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_makes_the_stage_save_and_stops_the_chain(
    harness: Any, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.3")
    metrics = harness.run_dir / "stages" / "b" / "metrics.jsonl"
    when(lambda: metrics.exists() and metrics.read_text().count("\n") >= 1, lambda: os.kill(os.getpid(), number))
    assert harness.launch() == code
    assert harness.journal(event="signal", stage="b")[0]["signal"] == number.name
    assert harness.journal(event="outcome", stage="b")[0]["exit_code"] == 75
    assert harness.journal(event="end")[0]["exit_code"] == code
    assert harness.starts("merged") == 0
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.002")
    assert harness.launch() == 0
    assert harness.steps("b") == [1, 2, 3, 4]
    assert harness.starts("a") == 1


def test_second_signal_kills_a_stage_that_does_not_stop(harness: Any) -> None:
    harness.faults(b={"hang": True, "at_step": 2, "times": 1})
    metrics = harness.run_dir / "stages" / "b" / "metrics.jsonl"

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        eventually(lambda: harness.journal(event="signal"), "the first signal")
        os.kill(os.getpid(), signal.SIGINT)

    when(lambda: metrics.exists() and metrics.read_text().count("\n") == 2, twice)
    assert harness.launch() == 130
    assert len(harness.journal(event="signal", stage="b")) == 2
    assert not processes.stage_processes(harness.run_dir / "stages" / "b")


def test_killed_launcher_leaves_a_stage_that_the_next_one_waits_for(harness: Any) -> None:
    environment = {**os.environ, "FAKE_STEP_SECONDS": "1.0", "COLUMNS": "160"}
    drive = [sys.executable, str(Path(__file__).with_name("drive.py")), str(harness.root)]
    first = subprocess.Popen(drive, env=environment, stdout=subprocess.DEVNULL)
    metrics = harness.run_dir / "stages" / "a" / "metrics.jsonl"
    try:
        eventually(lambda: metrics.exists() and metrics.read_text().count("\n") >= 1, "the first step", 60)
        with pytest.raises(LaunchError, match=f"launched already.*process {first.pid}"):
            harness.launch()
    finally:
        first.kill()
        first.wait()
    assert processes.stage_processes(harness.run_dir / "stages" / "a"), "the stage ended with its launcher"
    assert harness.launch() == 0
    assert "still runs" in harness.output
    assert harness.starts("a") == 1
    assert harness.steps("a") == [1, 2, 3, 4]
    assert [row["attempt"] for row in harness.journal(event="attached", stage="a")] == [1]
    assert harness.journal(event="outcome", stage="a")[0]["exit_code"] == 0
    assert [harness.starts(s) for s in STAGES] == [1, 1, 1, 1, 1]


def test_stage_that_still_saves_without_launcher_and_wrapper_is_waited_for(harness: Any) -> None:
    harness.faults(a={"save_seconds": 2.0, "times": 1})
    environment = {**os.environ, "FAKE_STEP_SECONDS": "0.5"}
    drive = [sys.executable, str(Path(__file__).with_name("drive.py")), str(harness.root)]
    first = subprocess.Popen(drive, env=environment, stdout=subprocess.DEVNULL)
    metrics = harness.run_dir / "stages" / "a" / "metrics.jsonl"
    try:
        eventually(lambda: metrics.exists() and metrics.read_text().count("\n") >= 1, "the first step", 60)
    finally:
        first.kill()
        first.wait()
    started = harness.journal(event="started", stage="a")[0]
    os.kill(started["pid"], signal.SIGKILL)
    eventually(lambda: not processes.is_alive(started["pid"], started["process_started"]), "the wrapper's end")
    assert harness.launch() == 0
    assert "still runs" in harness.output
    assert harness.starts("a") == 2
    assert harness.steps("a") == [1, 2, 3, 4]
    assert [row["decision"] for row in harness.journal(event="decision", stage="a")] == ["again", "next"]


def test_data_that_cannot_be_prepared_starts_no_stage(harness: Any) -> None:
    command = (sys.executable, "-c", "import sys; print('no disk'); sys.exit(5)")
    assert harness.launch(data_command=command) == 5
    assert "[data] no disk" in harness.output
    assert harness.starts("a") == 0


def test_from_and_to(harness: Any) -> None:
    assert harness.launch(last="b") == 0
    assert [harness.starts(s) for s in STAGES] == [1, 1, 0, 0, 0]
    assert "finished up to b; not yet: merged, c, hf" in harness.output
    assert harness.launch(last="b") == 0
    assert "nothing to start" in harness.output
    with pytest.raises(LaunchError, match="--from c: stage 'merged' before it is not finished"):
        harness.launch(first="c")
    assert harness.launch(first="merged", last="merged") == 0
    assert harness.launch(first="c") == 0
    assert all(harness.starts(s) == 1 for s in STAGES)
    with pytest.raises(LaunchError, match="--to nowhere: no such stage; stages: a, b"):
        Launch(recipe=harness.recipe, last="nowhere")
    with pytest.raises(LaunchError, match="--from c lies behind --to a"):
        Launch(recipe=harness.recipe, first="c", last="a")


def test_changed_recipe_is_refused_with_the_keys_that_differ(harness: Any) -> None:
    assert harness.launch(last="a") == 0
    changed = harness.dict(seed=2)
    changed["optimizer"] = {**changed["optimizer"], "beta2": 0.99}
    with pytest.raises(LaunchError) as error:
        harness.launch(Recipe.model_validate(changed))
    assert "optimizer.beta2: 0.95 -> 0.99" in str(error.value)
    assert "seed: 1 -> 2" in str(error.value)
    assert "--run NAME" in str(error.value)
    assert harness.launch(Recipe.model_validate(changed), run_name="other", last="a") == 0
    assert (harness.root / "other" / "recipe.json").exists()


def test_recipe_may_change_before_the_first_stage(harness: Any) -> None:
    failing = (sys.executable, "-c", "import sys; sys.exit(1)")
    assert harness.launch(data_command=failing) == 1
    assert harness.launch(Recipe.model_validate(harness.dict(seed=2)), last="a") == 0
    assert "recipe changed: seed: 1 -> 2" in harness.output


def test_accepted_changes_touch_unfinished_stages_only(harness: Any) -> None:
    assert harness.launch(last="a") == 0
    changed = harness.dict()
    changed["phase"]["b"] = {**changed["phase"]["b"], "save_interval_steps": 1}
    harness.recipe = Recipe.model_validate(changed)
    assert harness.launch(accept_changes=True) == 0
    assert harness.starts("a") == 1
    assert harness.journal(event="run")[-1]["changes"] == ["phase.b.save_interval_steps: 2 -> 1"]
    changed["phase"]["a"] = {**changed["phase"]["a"], "rope_base": 5e4}
    with pytest.raises(LaunchError, match=r"--accept-changes refuses .*\n  phase.a.rope_base: 10000.0 -> 50000.0"):
        harness.launch(Recipe.model_validate(changed), accept_changes=True)


def test_handoff_of_another_recipe_is_refused(harness: Any) -> None:
    assert harness.launch(last="a") == 0
    path = harness.run_dir / "stages" / "a" / "handoff.json"
    value = json.loads(path.read_text())
    for key, bad in (("recipe_digest", "0" * 64), ("format", "quarry.handoff/9"), ("stage", "b")):
        path.write_text(json.dumps({**value, key: bad}))
        with pytest.raises(LaunchError, match=key):
            harness.launch()
    path.write_text('{"format": ')
    with pytest.raises(LaunchError, match=r"handoff.json is damaged"):
        harness.launch()
    assert harness.starts("b") == 0


def test_stage_finished_behind_an_unfinished_one_is_refused(harness: Any) -> None:
    assert harness.launch(last="b") == 0
    shutil.rmtree(harness.run_dir / "stages" / "a")
    with pytest.raises(LaunchError, match="stage 'b' is finished but 'a' before it is not"):
        harness.launch()


def test_lock_of_a_dead_launcher_does_not_block(harness: Any) -> None:
    harness.run_dir.mkdir(parents=True)
    (harness.run_dir / "lock").write_text("process 1 on elsewhere\n")
    assert harness.launch(last="a") == 0


def test_docker_without_an_image_is_refused_by_key(harness: Any) -> None:
    cluster = {**harness.dict()["cluster"], "kind": "docker"}
    with pytest.raises(LaunchError, match="cluster.options.container_image is not set.*docker build --target cpu"):
        Launch(recipe=Recipe.model_validate(harness.dict(cluster=cluster)))


def test_dryrun_shows_commands_and_touches_nothing(harness: Any) -> None:
    import io

    from rich.console import Console

    stream = io.StringIO()
    console = Console(file=stream, width=200, highlight=False, markup=False)
    launch = Launch(recipe=harness.recipe, console=console, stage_command=harness.fake_stage)
    assert launch.dryrun() == 0
    assert "--stage merged" in stream.getvalue()
    assert "OMP_NUM_THREADS=1" in stream.getvalue()
    assert not harness.root.exists()


@pytest.mark.parametrize("name", ["../x", "a b", "$(touch x)", "-x", "x" * 101, ".hidden"])
def test_run_names_that_are_no_folder_names_are_refused(harness: Any, name: str) -> None:
    with pytest.raises(LaunchError, match="run name"):
        Launch(recipe=harness.recipe, run_name=name)
