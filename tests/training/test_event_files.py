"""Event files, read back with TensorBoard's own reader."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow

from training.event_files import FOLDER, masked_crc32c
from training.metrics import MetricsLog, curves


def shown(stage_dir):
    """tag -> [(step, value)] as TensorBoard shows them; values are float32."""
    reader = EventAccumulator(str(stage_dir / FOLDER), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def logged(stage_dir, key):
    lines = [json.loads(line) for line in (stage_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines]


def train(log, steps, scale=1.0):
    for step in steps:
        log.append_step(
            step=step,
            total_tokens=10_000_000_000_000 + step,
            loss=scale / step,
            lr=1e-3 * step,
            grad_norm=None if step == 2 else 0.5,
            tokens_per_second=1e4,
            skipped=False,
            time=1.0,
        )


def test_curves_are_those_of_the_metrics_log(tmp_path):
    log = MetricsLog(tmp_path)
    log.start(0)
    log.append_heldout(when="start", step=0, total_tokens=0, losses={"web": 5.0, "code": 4.0})
    train(log, range(1, 6))
    log.append_heldout(when="end", step=5, total_tokens=50, losses={"web": 3.0, "code": 2.5}, answers={"chat": 1.5})
    found = shown(tmp_path)
    for key in ("loss", "lr", "tokens_per_second", "total_tokens"):
        assert found[key] == logged(tmp_path, key)
    assert [step for step, _ in found["grad_norm"]] == [1, 3, 4, 5]  # Megatron gave none at step 2
    assert found["heldout/web"] == [(0, 5.0), (5, 3.0)]
    assert found["answers/chat"] == [(5, 1.5)]
    assert not {"time", "step", "skipped"} & found.keys()


def test_a_resume_goes_on_in_the_same_folder_and_each_step_is_there_once(tmp_path):
    first = MetricsLog(tmp_path)
    first.start(0)
    train(first, range(1, 9))
    [cut] = (tmp_path / FOLDER).iterdir()
    with open(cut, "ab") as f:
        f.write(b"\x20\0\0\0\0\0\0\0\x01")  # the kill came within a record
    second = MetricsLog(tmp_path)
    second.start(5)
    train(second, range(6, 11), scale=2.0)  # other values, to tell which of the two are shown
    found = shown(tmp_path)
    assert [step for step, _ in found["loss"]] == list(range(1, 11))
    assert found["loss"] == logged(tmp_path, "loss")
    third = MetricsLog(tmp_path)  # a new first start, within the same second
    third.start(0)
    train(third, [1])
    assert shown(tmp_path)["loss"] == [(1, 1.0)]


def test_what_is_no_number_is_no_curve():
    line = {
        "step": 3,
        "loss": float("nan"),
        "name": "x",
        "skipped": True,
        "none": None,
        "worst": float("inf"),
        "a": {"b": {"c": 1}},
    }
    assert curves(line) == {"worst": float("inf"), "a/b/c": 1.0}


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=300))
def test_checksums_are_tensorboards(data):
    assert masked_crc32c(data) == pywrap_tensorflow.masked_crc32c(data)
