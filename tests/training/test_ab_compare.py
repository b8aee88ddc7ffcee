"""The verdict of a gate from made-up losses: what passes, what fails, and that nothing passes that was not wholly measured."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.ab_compare import ArmRun, DifferentSamples, compare, curves, faults, read_arm, same_samples

STEPS = 8
LIMITS = {"tolerance_percent": 0.25, "step_tolerance_percent": 2.5}
losses = st.lists(st.floats(0.5, 12), min_size=STEPS, max_size=STEPS)


def arm(name, values=None, *, heldout=3.0, steps=STEPS):
    values = [4.0 - 0.1 * i for i in range(steps)] if values is None else values
    return ArmRun(
        name=name,
        losses=dict(enumerate(values, 1)),
        grad_norms=dict.fromkeys(range(1, steps + 1), 1.0),
        heldout={"start": {"web": 5.0, "code": 4.0}, "end": {"web": heldout, "code": 2.0}},
        samples={step: [(0, f"{step}-{i}") for i in range(4)] for step in range(1, steps + 1)},
    )


def verdict(a, b, **limits):
    return compare(a, b, STEPS, **(LIMITS | limits))


def test_equal_arms_differ_by_nothing_and_pass():
    found = verdict(arm("a"), arm("b"), tolerance_percent=1e-12, step_tolerance_percent=1e-12)
    assert found["verdict"] == "pass"
    assert found["reasons"] == []
    assert [c["relative_percent"] for c in found["criteria"]] == [0, 0, 0]
    assert found["statistics"]["max_absolute_difference_nats"] == 0


@settings(max_examples=60, deadline=None)
@given(losses, losses, st.floats(0.5, 5), st.floats(0.01, 20))
def test_the_verdict_is_that_of_the_definition(values_a, values_b, heldout_b, tolerance):
    found = verdict(arm("a", values_a), arm("b", values_b, heldout=heldout_b), tolerance_percent=tolerance)
    a, b = np.array(values_a), np.array(values_b)
    last = abs(b[-2:].mean() / a[-2:].mean() - 1) * 100
    held = abs((heldout_b + 2.0) / (3.0 + 2.0) - 1) * 100
    step = (abs(b - a) / a).max() * 100
    shown = [abs(c["relative_percent"]) for c in found["criteria"]]
    assert shown == pytest.approx([last, held, step], abs=1e-9)
    if min(abs(last - tolerance), abs(held - tolerance), abs(step - 2.5)) > 1e-9:
        assert (found["verdict"] == "pass") == (last <= tolerance and held <= tolerance and step <= 2.5)
    assert found["statistics"]["max_absolute_difference_nats"] == pytest.approx(abs(b - a).max())
    assert bool(found["reasons"]) == (found["verdict"] == "fail")


def without(run, step):
    return dataclasses.replace(run, losses={k: v for k, v in run.losses.items() if k != step})


FAULTS = {
    "NaN": (lambda run: dataclasses.replace(run, losses={**run.losses, 3: math.nan}), "arm b: the loss is nan at step 3"),
    "infinite": (lambda run: dataclasses.replace(run, losses={**run.losses, 8: math.inf}), "the loss is inf at step 8"),
    "missing": (lambda run: without(run, 5), "arm b: step 5 of 8 missing"),
    "cut": (lambda run: without(without(run, 8), 7), "arm b: steps 7 to 8 of 8 missing"),
    "nothing": (lambda run: dataclasses.replace(run, losses={}, heldout={}), "steps 1 to 8 of 8 missing"),
    "too many": (lambda run: dataclasses.replace(run, losses={**run.losses, 9: 3.0}), "step 9 beyond the 8"),
    "gradient": (lambda run: dataclasses.replace(run, grad_norms={**run.grad_norms, 2: math.nan}), "gradient norm is nan at step 2"),
    "skipped": (lambda run: dataclasses.replace(run, skipped=[4]), "the optimizer skipped step 4"),
    "no held-out": (lambda run: dataclasses.replace(run, heldout={"start": run.heldout["start"]}), "no held-out loss at the end"),
    "held-out NaN": (
        lambda run: dataclasses.replace(run, heldout={**run.heldout, "end": {"web": math.nan, "code": 2.0}}),
        "held-out loss of web is nan at the end",
    ),
    "category": (
        lambda run: dataclasses.replace(run, heldout={**run.heldout, "end": {"web": 3.0}}),
        "held-out losses of different categories at the end",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(FAULTS))
def test_an_arm_that_was_not_wholly_measured_never_passes(name):
    break_it, said = FAULTS[name]
    for limits in ({}, {"tolerance_percent": 1e9, "step_tolerance_percent": 1e9}):
        found = verdict(arm("a"), break_it(arm("b")), **limits)
        assert found["verdict"] == "fail"
        assert any(said in reason for reason in found["reasons"]), found["reasons"]
        json.dumps(found, allow_nan=False)
    json.dumps(curves(break_it(arm("b"))), allow_nan=False)


def test_one_bad_step_in_the_middle_fails_though_the_end_agrees():
    values = [4.0 - 0.1 * i for i in range(STEPS)]
    values[3] *= 1.03
    found = verdict(arm("a"), arm("b", values))
    assert found["verdict"] == "fail"
    assert "step 4, the worst" in found["reasons"][0]
    assert [c["passed"] for c in found["criteria"]] == [True, True, False]


def test_samples_must_be_the_same_in_the_same_order():
    assert same_samples(arm("a"), arm("b"), STEPS)["samples"] == 4 * STEPS
    swapped = dataclasses.replace(arm("b"), samples={**arm("b").samples, 6: arm("b").samples[6][::-1]})
    with pytest.raises(DifferentSamples, match="from step 6 on"):
        same_samples(arm("a"), swapped, STEPS)
    short = dataclasses.replace(arm("b"), samples={k: v for k, v in arm("b").samples.items() if k < 8})
    with pytest.raises(DifferentSamples, match="arm b recorded the samples of 7 steps"):
        same_samples(arm("a"), short, STEPS)


def test_an_arm_is_read_as_the_hooks_write_it(tmp_path):
    rows = [{"step": s, "loss": 4.0 / s, "grad_norm": 1.5, "seconds": 2.0, "skipped": s == 2} for s in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "lo')
    (tmp_path / "heldout.jsonl").write_text(json.dumps({"when": "start", "step": 0, "losses": {"web": 5.0}}) + "\n")
    (tmp_path / "samples").mkdir()
    line = {"step": 1, "ranks": 2, "skipped": False, "micro_batches": [[[0, "x"]]]}
    (tmp_path / "samples" / "from_0000000_rank_00000.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(DifferentSamples, match=r"step 1 was recorded by ranks \[0\] of 2"):
        read_arm("a", tmp_path)
    run = read_arm("a", tmp_path, with_samples=False)
    assert run.losses == {1: 4.0, 2: 2.0, 3: 4.0 / 3}
    assert run.seconds == 6.0
    assert faults(run, 4) == [
        "arm a: step 4 of 4 missing",
        "arm a: the optimizer skipped step 2",
        "arm a: no held-out loss at the end",
    ]
