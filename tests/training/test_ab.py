"""The gate on real ranks: equal arms, emulated FP8, a broken scale, a kill in an arm, and the hand-off that goes through unchanged."""

import json
import os
import shutil
import signal
import time

import pytest

from recipes.schema import Recipe
from tests.training.factory import make_data, make_recipe, start, start_stage
from training import cpu_backend
from training.handoff import Handoff

cpu_backend.install()

import torch  # noqa: E402

from training.fp8_emulation import BACKWARD, FORWARD, _Backward, _Forward, round_trip  # noqa: E402

pytestmark = pytest.mark.multirank

STEPS = 8
GATES = {
    "fresh": {"title": "Random weights", "phase": "first", "steps": 4},
    "gate": {"title": "Emulated FP8", "phase": "second", "steps": STEPS, "b": {"emulated_fp8": {}}},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of which everything but the second phase is finished: a gate, the first phase, another gate."""
    root = tmp_path_factory.mktemp("ab")
    make_data(root / "data")
    (root / "run").mkdir()
    write_recipe(root / "run")
    for stage in ("fresh", "first", "gate"):
        assert start_stage(root / "run", stage) == 0, (root / "run" / "log.txt").read_text()[-3000:]
    return root / "run"


def write_recipe(run, **gate):
    values = make_recipe(run.parent / "data", {"gpus": 1}, "single").model_dump(mode="json")
    gates = {**GATES, "gate": GATES["gate"] | gate}
    Recipe.model_validate({**values, "stages": ["fresh", "first", "gate", "second"], "ab": gates}).write(run / "recipe.json")


def fork(run, name, **gate):
    """A copy of the run whose gate has only its arm a, and another arm b to come."""
    other = run.parent / name
    shutil.copytree(run, other, symlinks=True)
    folder = other / "stages" / "gate"
    shutil.rmtree(folder / "arms" / "b")
    for left in ("handoff.json", "ab.json"):
        (folder / left).unlink()
    write_recipe(other, **gate)
    return other


def wait_for_steps(run, count, process):
    """Until arm b has logged so many steps."""
    metrics = run / "stages" / "gate" / "arms" / "b" / "stages" / "second" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and len(metrics.read_text().splitlines()) >= count):
        assert process.poll() is None, (run / "log.txt").read_text()[-3000:]
        time.sleep(0.01)


def verdict(run, gate="gate"):
    return json.loads((run / "stages" / gate / "ab.json").read_text())


def numbers(found):
    """All of a verdict but the clock and the digests of recipes that differ in nothing else."""
    arms = {name: {k: v for k, v in arm.items() if k != "seconds"} for name, arm in found["arms"].items()}
    return {**found, "arms": arms}


def test_equal_arms_on_random_weights_differ_by_exactly_nothing(run):
    found = verdict(run, "fresh")
    assert (found["verdict"], found["start"], found["checkpoint"]) == ("pass", "random weights of seed 7", None)
    assert found["arms"]["a"]["losses"] == found["arms"]["b"]["losses"]
    assert found["arms"]["a"]["grad_norms"] == found["arms"]["b"]["grad_norms"]
    assert found["arms"]["a"]["heldout"] == found["arms"]["b"]["heldout"]
    assert found["statistics"]["max_absolute_difference_nats"] == 0
    # and these are the first steps of the phase itself
    rows = [json.loads(line) for line in (run / "stages/first/metrics.jsonl").read_text().splitlines()]
    assert found["arms"]["a"]["losses"] == [row["loss"] for row in rows[:4]]
    assert found["arms"]["a"]["grad_norms"] == [row["grad_norm"] for row in rows[:4]]


def test_emulated_fp8_passes_near_but_not_at_the_other_arm(run):
    found = verdict(run)
    assert found["verdict"] == "pass"
    assert 0 < found["statistics"]["max_absolute_relative_percent"] < 0.25
    assert found["arms"]["b"]["emulated"]
    assert found["data"]["samples"] == STEPS * 8
    assert found["checkpoint"]["stage"] == "first"
    assert not list((run / "stages" / "gate").rglob("iter_*"))


def test_the_hand_off_goes_through_unchanged(run):
    before, after = (Handoff.read(run / "stages" / stage) for stage in ("first", "gate"))
    changed = {
        k for k, v in after.model_dump().items() if v != getattr(before, k) and k not in ("checkpoint_files", "model", "ledger")
    }
    assert changed == {"stage", "kind", "stage_tokens", "checkpoint"}
    assert (before.checkpoint_files, before.ledger, before.model) == (after.checkpoint_files, after.ledger, after.model)
    assert after.verify_files(run / "stages" / "gate") == []
    assert (run / "stages" / "gate" / str(after.checkpoint)).samefile(run / "stages" / "first" / str(before.checkpoint))


def test_a_gate_that_has_passed_is_not_run_again_but_not_believed_with_other_arms(run):
    assert start_stage(run, "gate") == 0
    assert "passed before" in (run / "log.txt").read_text()
    other = run.parent / "other_arms"
    shutil.copytree(run, other, symlinks=True)
    write_recipe(other, b={"emulated_fp8": {"scale_error": 2.0}})
    assert start_stage(other, "gate") == 78
    assert "has passed, but with other arms" in (other / "log.txt").read_text()


def test_a_broken_scale_stops_the_chain_and_leaves_no_hand_off(run):
    other = fork(run, "broken", b={"emulated_fp8": {"scale_error": 4096.0}})
    assert start_stage(other, "gate") == 17
    found = verdict(other)
    assert (found["verdict"], found["final"]) == ("fail", True)
    assert found["reasons"]
    assert found["arms"]["a"]["losses"] == verdict(run)["arms"]["a"]["losses"]
    assert not (other / "stages" / "gate" / "handoff.json").exists()
    log = (other / "log.txt").read_text()
    assert "arm a: has taken its 8 steps before" in log.split("arm b: ")[-2]
    assert "\nSuspiciousResult: gate 'gate' failed: training loss" in log
    assert start_stage(other, "second") == 78  # nothing behind it runs
    # A verdict that people loosen is made again from what was measured.
    write_recipe(other, b={"emulated_fp8": {"scale_error": 4096.0}}, tolerance_percent=99, step_tolerance_percent=99)
    assert start_stage(other, "gate") == 0


def test_an_arm_that_is_asked_to_stop_saves_and_goes_on_from_there(run):
    other = fork(run, "asked")
    process = start(other, "gate")
    wait_for_steps(other, 1, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert not (other / "stages" / "gate" / "ab.json").exists()
    assert list((other / "stages" / "gate" / "arms" / "b").rglob("iter_*"))
    assert start_stage(other, "gate") == 0
    assert "arm b: resume (own checkpoint of step" in (other / "log.txt").read_text()
    assert numbers(verdict(other)) == numbers(verdict(run))


def test_a_kill_in_an_arm_and_the_same_command_again_give_the_same_verdict(run):
    other = fork(run, "killed")
    process = start(other, "gate")
    wait_for_steps(other, 2, process)
    ranks = other / "stages" / "gate" / "ranks" / "rank-0.stacks.txt"
    os.kill(int(ranks.read_text().split("process ")[1].split()[0]), signal.SIGKILL)
    assert process.wait(timeout=60) == 128 + signal.SIGKILL
    found = verdict(other)
    assert (found["verdict"], found["final"]) == ("fail", False)
    assert "arm b ended with exit code 137" in found["reasons"][0]
    assert not (other / "stages" / "gate" / "handoff.json").exists()
    assert start_stage(other, "gate") == 0
    assert numbers(verdict(other)) == numbers(verdict(run))


def test_round_trips_are_those_of_the_formats():
    x = torch.linspace(-3, 5, 4001)
    for dtype, mantissa_bits in ((FORWARD, 3), (BACKWARD, 2)):
        y = round_trip(x, dtype)
        large = x.abs() > 0.05  # normal numbers after scaling: half a unit in the last place
        assert ((y - x).abs() / x.abs())[large].max() <= 2.0 ** -(mantissa_bits + 1) * (1 + 1e-6)
        assert y.max() == x.max()  # the largest value has the largest code
        assert torch.equal(round_trip(y, dtype), y)
    assert round_trip(x, FORWARD, scale_error=4.0).max() == pytest.approx(5 / 4)  # saturated
    assert torch.equal(round_trip(torch.zeros(3), FORWARD), torch.zeros(3))
    a = torch.randn(5, requires_grad=True)
    _Forward.apply(a, 1.0).mul(torch.arange(5.0)).sum().backward()
    assert torch.equal(a.grad, torch.arange(5.0))
    b = torch.randn(5, requires_grad=True)
    gradient = torch.randn(5)
    _Backward.apply(b, 1.0).mul(gradient).sum().backward()
    assert torch.equal(b.grad, round_trip(gradient, BACKWARD))
