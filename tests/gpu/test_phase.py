"""The real stage command on one GPU with Transformer Engine: bf16 and every FP8 recipe that the GPU has train, hand off and resume.

Unproven on hardware so far: written against the sources of megatron-core 0.19.2 and Transformer Engine 2.17.
"""

import json

import pytest

from tests.training.factory import make_data, make_recipe, start_stage

# FP8 needs dimensions divisible by 16 and, for blockwise scaling, by 128.
WIDER = {
    "hidden_size": 512,
    "ffn_hidden_size": 1024,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "head_dim": 64,
    "num_layers": 4,
}
PRECISIONS = {
    "bf16": {"name": "bf16", "dtype": "bf16"},
    "tensorwise": {"name": "tensorwise", "dtype": "bf16", "fp8": "tensorwise", "fp8_format": "hybrid"},
    "delayed": {"name": "delayed", "dtype": "bf16", "fp8": "delayed", "fp8_format": "hybrid"},
    "blockwise": {"name": "blockwise", "dtype": "bf16", "fp8": "blockwise", "fp8_format": "e4m3"},
}


def gpu_recipe(data_root, precision):
    recipe = make_recipe(data_root, {"gpus": 1}, "single")
    values = recipe.model_dump(mode="json")
    values["cluster"]["gpu"] = "h100"
    values["model"].update(WIDER, attention_multiplier=1 / 64)
    for phase in values["phase"].values():
        phase["precision"] = PRECISIONS[precision]
    return type(recipe).model_validate(values)


@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_two_phases_with_a_handoff(tmp_path, precision):
    make_data(tmp_path / "data")
    run = tmp_path / "run"
    run.mkdir()
    gpu_recipe(tmp_path / "data", precision).write(run / "recipe.json")
    for stage in ("first", "second"):
        assert start_stage(run, stage) == 0, (run / "log.txt").read_text()[-5000:]
    rows = [json.loads(line) for line in (run / "stages/second/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]
    first = json.loads((run / "stages/first/metrics.jsonl").read_text().splitlines()[0])
    assert rows[0]["loss"] < first["loss"]


def test_fp8_stays_near_bf16(tmp_path):
    """Same data, same seed: after 20 steps the losses of every FP8 recipe are within 2% of bf16's."""
    make_data(tmp_path / "data")
    last = {}
    for precision in PRECISIONS:
        run = tmp_path / precision
        run.mkdir()
        gpu_recipe(tmp_path / "data", precision).write(run / "recipe.json")
        for stage in ("first", "second"):
            assert start_stage(run, stage) == 0, (run / "log.txt").read_text()[-5000:]
        last[precision] = json.loads((run / "stages/second/metrics.jsonl").read_text().splitlines()[-1])["loss"]
    for loss in last.values():
        assert abs(loss - last["bf16"]) < 0.02 * last["bf16"], last
