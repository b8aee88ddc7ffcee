"""The real stage command on one GPU with Transformer Engine: bf16, every FP8 recipe and optimizers with small state train and hand off; so do
GPU and CPU to each other.

Unproven on hardware so far: written against the sources of megatron-core 0.19.2 and Transformer Engine 2.17.
"""

import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.gpu.stages import NO_GPU, WIDER, rows, run_stage
from tests.training.factory import make_recipe

PRECISIONS = {
    "bf16": {"name": "bf16", "dtype": "bf16"},
    "tensorwise": {"name": "tensorwise", "dtype": "bf16", "fp8": "tensorwise", "fp8_format": "hybrid"},
    "delayed": {"name": "delayed", "dtype": "bf16", "fp8": "delayed", "fp8_format": "hybrid"},
    "blockwise": {"name": "blockwise", "dtype": "bf16", "fp8": "blockwise", "fp8_format": "e4m3"},
    "tensorwise_gather": {
        "name": "tensorwise_gather",
        "dtype": "bf16",
        "fp8": "tensorwise",
        "fp8_format": "hybrid",
        "fp8_param_gather": True,
        "bf16_layers_at_start": 1,
        "bf16_layers_at_end": 1,
    },
    "small": {"name": "small", "dtype": "bf16", "gradients_dtype": "bf16"},
    "small_fp16": {"name": "small_fp16", "dtype": "bf16", "gradients_dtype": "bf16"},
    "small_tensorwise": {
        "name": "small_tensorwise",
        "dtype": "bf16",
        "fp8": "tensorwise",
        "fp8_format": "hybrid",
        "fp8_param_gather": True,
        "gradients_dtype": "bf16",
    },
}
BF16_MOMENTS = {"precision_aware": True, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
OPTIMIZERS = {
    "small": BF16_MOMENTS,
    "small_fp16": {**BF16_MOMENTS, "main_params_dtype": "fp16"},
    "small_tensorwise": BF16_MOMENTS,
}
"""Of the phases in some of PRECISIONS, what is not the recipe's."""
RUNS = {name: ((name, False), (name, False)) for name in PRECISIONS} | {
    "gpu then cpu": (("bf16", False), ("bf16", True)),
    "cpu then gpu": (("bf16", True), ("bf16", False)),
    "bf16 then delayed": (("bf16", False), ("delayed", False)),
    "bf16 then small": (("bf16", False), ("small", False)),
    "small then bf16": (("small", False), ("bf16", False)),
}
"""Name -> (precision, on the CPU) of the first and the second phase."""
FP8_SHARE = 0.02
"""Of bf16's mean loss, what FP8 may differ over a phase of a model that learns fast."""


def recipe_of(data_root, phases):
    recipe = make_recipe(data_root, {"gpus": 1}, "single")
    values = recipe.model_dump(mode="json")
    values["model"].update(WIDER, attention_multiplier=1 / 64)
    for phase, (precision, _) in zip(values["phase"].values(), phases, strict=True):
        phase["precision"] = PRECISIONS[precision]
        phase["optimizer"] = values["optimizer"] | OPTIMIZERS.get(precision, {})
    return type(recipe).model_validate(values)


def on(recipe, gpu):
    return recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update={"gpu": gpu})})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Name -> (run folder, why it failed or None); all are trained at the same time, for their start-up is most of it."""
    root = tmp_path_factory.mktemp("phases")
    # make_data has Megatron build index caches, on the CPU
    program = "import pathlib, sys; from tests.training.factory import make_data; make_data(pathlib.Path(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(root / "data")], check=True, env={**os.environ, **NO_GPU}
    )

    def train(name):
        run = root / name.replace(" ", "_")
        run.mkdir()
        recipe = recipe_of(root / "data", RUNS[name])
        for stage, (_, cpu) in zip(("first", "second"), RUNS[name], strict=True):
            on(recipe, "cpu" if cpu else "h100").write(run / "recipe.json")
            code, output = run_stage(run, stage, cpu=cpu)
            if code:
                return run, f"{stage} ended with {code}:\n{output}"
        return run, None

    with ThreadPoolExecutor(len(RUNS)) as pool:
        return dict(zip(RUNS, pool.map(train, RUNS), strict=True))


@pytest.mark.parametrize("name", list(RUNS))
def test_two_phases_with_a_handoff(runs, name):
    """The hand-off's gate, which compares held-out losses before and after, has passed where the second phase runs at all."""
    run, failure = runs[name]
    assert failure is None, failure
    first, second = rows(run, "first"), rows(run, "second")
    assert second[-1]["loss"] < second[0]["loss"] < first[0]["loss"]


@pytest.mark.parametrize("name", [name for name in RUNS if name != "bf16"])
def test_losses_are_bf16s(runs, name):
    """Same data, same seed: the mean over a phase is within a share of what bf16 on the GPU has."""
    (reference, failed), (run, failure) = runs["bf16"], runs[name]
    assert failed is None
    assert failure is None
    for stage in ("first", "second"):
        expected, found = (statistics.mean(row["loss"] for row in rows(r, stage)) for r in (reference, run))
        assert found == pytest.approx(expected, rel=FP8_SHARE)
