"""Fine-tuning on GPUs with Transformer Engine's packed attention: the losses of packed samples are those of each alone in Hugging Face.

Unproven on hardware so far: written against the sources of megatron-core 0.19.2 and Transformer Engine 2.17.
"""

import json
import subprocess
import sys

import pytest
import torch

from data_prep.sft_manifest import PackedSequences, SampleStore, SftManifest, manifest_path
from tests.training.sft_factory import hugging_face_model, losses_alone, make_data, make_recipe

WIDER = {"hidden_size": 512, "ffn_hidden_size": 1024, "num_attention_heads": 8, "num_query_groups": 4, "head_dim": 64}
BF16_NATS = 2e-2
"""What bf16 leaves of a mean over hundreds of tokens, as the gate at a hand-off has it."""


@pytest.mark.parametrize(
    "layout", [{"gpus": 1}, {"gpus": 2, "context": 2}, {"gpus": 2, "tensor": 2, "sequence_parallel": True}], ids=str
)
def test_packed_losses_are_those_of_each_sample_alone(tmp_path, layout):
    if torch.cuda.device_count() < layout["gpus"]:
        pytest.skip(f"needs {layout['gpus']} GPUs")
    make_data(tmp_path)
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
        command = [sys.executable, "-m", "training.stage", "--run-dir", str(run), "--stage", stage]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    manifest = SftManifest.read(manifest_path(tmp_path / "data", "sft"))
    numbers = PackedSequences(manifest, tmp_path / "data", manifest.heldout["chat"]).samples
    rows = [json.loads(line) for line in (run / "stages" / "sft" / "heldout.jsonl").read_text().splitlines()]
    for stage, row in zip(("warm", "sft"), rows, strict=True):
        model = hugging_face_model(run / "stages" / stage, tmp_path / f"hf-{stage}")
        total, count = losses_alone(model, SampleStore(manifest, tmp_path / "data"), numbers)
        assert row["answers"]["chat"] == pytest.approx(total / count, abs=BF16_NATS)
    assert rows[1]["answers"]["chat"] < rows[0]["answers"]["chat"]
