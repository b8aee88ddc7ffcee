"""Fine-tuning on GPUs with Transformer Engine's packed attention: the losses of packed samples are those of each alone in Hugging Face.

Unproven on hardware so far: written against the sources of megatron-core 0.19.2 and Transformer Engine 2.17.
"""

import os
import subprocess
import sys

import pytest
import torch

from data_prep.sft_manifest import PackedSequences, SampleStore, SftManifest, manifest_path
from tests.gpu.stages import NO_GPU, WIDER, rows, run_stage
from tests.training.sft_factory import hugging_face_model, losses_alone, make_recipe

BF16_NATS = 2e-2
"""What bf16 leaves of a mean over hundreds of tokens, as the gate at a hand-off has it."""


@pytest.mark.parametrize(
    "layout", [{"gpus": 1}, {"gpus": 2, "context": 2}, {"gpus": 2, "tensor": 2, "sequence_parallel": True}], ids=str
)
def test_packed_losses_are_those_of_each_sample_alone(tmp_path, layout):
    if torch.cuda.device_count() < layout["gpus"]:
        pytest.skip(f"needs {layout['gpus']} GPUs")
    program = "import pathlib, sys; from tests.training.sft_factory import make_data; make_data(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-W", "ignore", "-c", program, str(tmp_path)], check=True, env={**os.environ, **NO_GPU})
    recipe = make_recipe(tmp_path, layout)
    values = recipe.model_dump(mode="json")
    values["cluster"]["gpu"] = "h100"
    values["model"].update(WIDER, attention_multiplier=1 / 64)
    for sft in values["sft"].values():
        sft["precision"] = {"name": "bf16", "dtype": "bf16"}
    run = tmp_path / "run"
    run.mkdir()
    type(recipe).model_validate(values).write(run / "recipe.json")
    for stage in ("warm", "sft"):
        code, output = run_stage(run, stage)
        assert code == 0, output
    manifest = SftManifest.read(manifest_path(tmp_path / "data", "sft"))
    numbers = PackedSequences(manifest, tmp_path / "data", manifest.heldout["chat"]).samples
    heldout = rows(run, "sft", "heldout.jsonl")
    for stage, row in zip(("warm", "sft"), heldout, strict=True):
        model = hugging_face_model(run / "stages" / stage, tmp_path / f"hf-{stage}")
        total, count = losses_alone(model, SampleStore(manifest, tmp_path / "data"), numbers)
        assert row["answers"]["chat"] == pytest.approx(total / count, abs=BF16_NATS)
    assert heldout[1]["answers"]["chat"] < heldout[0]["answers"]["chat"]
