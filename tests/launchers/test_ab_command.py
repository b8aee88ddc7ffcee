"""`quarry ab` from its words to its exit code, with a stage command that makes up the verdict; and a gate in a chain."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from launchers import ab_command
from launchers.cli import parse
from launchers.errors import LaunchError
from launchers.hang import _steps_of_phase
from launchers.stage_job import stage_job
from launchers.steps import checkpoint_step
from recipes.schema import Recipe, RecipeError
from tests.launchers.conftest import FAKE_DATA, Harness

GATE = {"title": "Gate", "phase": "b", "steps": 4}
FAKE_GATE = """
import json, os, pathlib, sys
stage_dir = pathlib.Path(sys.argv[2]) / "stages" / sys.argv[4]
code = int(os.environ["FAKE_CODE"])
arm = stage_dir / "arms" / "a" / "stages" / "b"
arm.mkdir(parents=True, exist_ok=True)
(arm / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.5}) + chr(10))
row = {"what": "fp32, DP1", "steps": [1], "losses": [2.5], "seconds": 1.0, "emulated": False}
criterion = {"name": "loss", "a": 2.5, "b": 2.6, "relative_percent": 4.0, "limit_percent": 0.25, "passed": code == 0}
verdict = {"stage": sys.argv[4], "phase": "b", "steps": 4, "start": "there", "criteria": [criterion], "statistics": None, "data": None,
           "verdict": "pass" if code == 0 else "fail", "final": True, "reasons": ["too far apart"] if code else [],
           "arms": {"a": row, "b": row}}
if code in (0, 17):
    (stage_dir / "ab.json").write_text(json.dumps(verdict))
if code == 17:
    print("SuspiciousResult: gate failed: too far apart")
if code == 78:
    print("refused: the data are gone")
sys.exit(code)
"""


def words(*given: str) -> argparse.Namespace:
    return parse(["ab", *given])


def arms(recipe: Recipe, *given: str) -> Any:
    return ab_command.with_gate(recipe, words("--stage", "b", "--steps", "4", *given))[0].ab["ab_b"]


def test_an_arm_says_what_differs_from_the_phase(harness: Harness) -> None:
    gate = arms(
        harness.recipe,
        *("--a", "precision=bf16", "--b", "precision=fp8_tensorwise", "--b", "precision.fp8_param_gather=true"),
        *("--b", "parallel.tensor=2", "--b", "transformer_impl=local", "--tolerance", "0.5"),
    )
    assert (gate.a.precision.name, gate.a.parallel) == ("bf16", None)
    assert (gate.b.precision.fp8, gate.b.precision.fp8_param_gather) == ("tensorwise", True)
    assert (gate.b.parallel.name, gate.b.parallel.tensor) == ("single", 2)
    assert gate.b.transformer_impl == "local"
    assert (gate.tolerance_percent, gate.step_tolerance_percent) == (0.5, 2.5)


def test_emulation_and_optimizer(harness: Harness) -> None:
    gate = arms(harness.recipe, "--a", "optimizer.beta2=0.99", "--b", "emulated_fp8=true", "--b", "emulated_fp8.scale_error=8")
    assert (gate.a.optimizer.beta1, gate.a.optimizer.beta2) == (0.9, 0.99)
    assert gate.b.emulated_fp8.scale_error == 8


def test_a_choice_in_a_folder_of_its_group(harness: Harness) -> None:
    assert arms(harness.recipe, "--b", "parallel=granite_4_1_8b/4k").b.parallel.name == "granite_4_1_8b/4k"


def test_every_stage_stays_because_phases_share_their_data(harness: Harness) -> None:
    recipe, name = ab_command.with_gate(harness.recipe, words("--stage", "b", "--steps", "4"))
    assert recipe.stages == ["a", name, "b", "merged", "c", "hf"]
    again, _ = ab_command.with_gate(recipe, words("--stage", "c", "--steps", "4"))
    assert again.stages == ["a", "b", "merged", "ab_c", "c", "hf"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--stage", "merged", "--steps", "4"], "--stage merged: is no phase of this curriculum; phases: a, b, c"),
        (["--stage", "b", "--steps", "4", "--b", "mixture=math"], "--b mixture=math: an arm cannot differ in it"),
        (["--stage", "b", "--steps", "4", "--b", "seq_length_tokens=8"], "an arm cannot differ in it"),
        (["--stage", "b", "--steps", "4", "--a", "bf16"], "--a bf16: is no KEY=VALUE"),
        (["--stage", "b", "--steps", "4", "--b", "precision=fp9"], "precision: no 'fp9'"),
        (["--stage", "b", "--steps", "4", "--b", "precision.fp9=1"], "b.precision.fp9: Extra inputs"),
        (["--stage", "b", "--steps", "0"], "steps: Input should be greater than 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(harness: Harness, given: list[str], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        ab_command.with_gate(harness.recipe, words(*given))
    assert said in str(caught.value)


def test_the_start_is_a_finished_stage(harness: Harness, tmp_path: Path) -> None:
    recipe, gate = ab_command.with_gate(harness.recipe, words("--stage", "b", "--steps", "4"))
    folder = tmp_path / "ab" / "x"
    with pytest.raises(LaunchError, match=r"'b' starts from the hand-off of 'a'.*--from-run RUN.*--checkpoint FOLDER"):
        ab_command.link_start(recipe, gate, folder, source=harness.run_dir, checkpoint=None)
    (harness.run_dir / "stages" / "a").mkdir(parents=True)
    (harness.run_dir / "stages" / "a" / "handoff.json").write_text("{}")
    ab_command.link_start(recipe, gate, folder, source=harness.run_dir, checkpoint=None)
    assert (folder / "stages" / "a").resolve() == harness.run_dir / "stages" / "a"
    first, gate = ab_command.with_gate(harness.recipe, words("--stage", "a", "--steps", "4"))
    ab_command.link_start(first, gate, folder, source=harness.run_dir, checkpoint=None)
    with pytest.raises(LaunchError, match="begins with random weights"):
        ab_command.link_start(first, gate, folder, source=harness.run_dir, checkpoint=tmp_path)


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        (0, "verdict: PASS"),
        (17, "too far apart"),
        (78, "refused its configuration or hand-off: the data are gone"),
        (1, "failed with exit code 1"),
    ],
)
def test_the_exit_code_is_the_gates(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int, shown: str
) -> None:
    monkeypatch.setenv("FAKE_CODE", str(code))
    recipe, gate = ab_command.with_gate(harness.recipe, words("--stage", "b", "--steps", "4"))
    command = (sys.executable, "-c", FAKE_GATE)
    assert ab_command.compare(recipe, gate, harness.root / "ab" / "x", stage_command=command, data_command=FAKE_DATA) == code
    printed = capsys.readouterr().out
    assert shown in printed
    assert ("verdict: FAIL" in printed) == (code == 17)


def test_a_verdict_of_an_earlier_attempt_is_not_shown_as_this_ones(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, gate = ab_command.with_gate(harness.recipe, words("--stage", "b", "--steps", "4"))
    folder, command = harness.root / "ab" / "x", (sys.executable, "-c", FAKE_GATE)
    monkeypatch.setenv("FAKE_CODE", "0")
    assert ab_command.compare(recipe, gate, folder, stage_command=command, data_command=FAKE_DATA) == 0
    os.utime(folder / "stages" / gate / "ab.json", (1e9, 1e9))
    capsys.readouterr()
    monkeypatch.setenv("FAKE_CODE", "1")
    assert ab_command.compare(recipe, gate, folder, stage_command=command, data_command=FAKE_DATA) == 1
    assert "PASS" not in capsys.readouterr().out


def test_a_failed_gate_stops_the_chain_and_the_same_command_goes_on(harness: Harness) -> None:
    recipe = Recipe.model_validate(harness.dict(stages=["a", "gate", "b", "hf"], ab={"gate": GATE}))
    harness.faults(gate={"exit": 17, "times": 1})
    assert harness.launch(recipe) == 17
    assert (harness.starts("a"), harness.starts("gate"), harness.starts("b")) == (1, 1, 0)
    assert "not started: b, hf" in harness.output
    assert "gate: 4 steps of b in two ways" in (harness.run_dir / "report.html").read_text()
    assert harness.launch(recipe) == 0
    assert (harness.starts("a"), harness.starts("gate"), harness.starts("b")) == (1, 2, 1)


def test_progress_of_a_gate_is_that_of_its_arms(harness: Harness) -> None:
    recipe = Recipe.model_validate(harness.dict(stages=["a", "gate", "b", "hf"], ab={"gate": GATE}))
    job = stage_job(recipe, harness.run_dir, "gate")
    stage_dir = Path(job.stage_dir)
    assert checkpoint_step(job) == 0
    for name, file, text in (
        ("a", "result.json", json.dumps({"steps": 4})),
        ("b", "checkpoints/latest_checkpointed_iteration.txt", "2"),
    ):
        path = stage_dir / "arms" / name / "stages" / "b" / file
        path.parent.mkdir(parents=True)
        path.write_text(text)
    assert checkpoint_step(job) == 6
    recipe.write(harness.run_dir / "recipe.json")
    assert _steps_of_phase(job) == 4  # of the arm that runs: the watch for hangs sees steps
