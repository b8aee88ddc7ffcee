"""The planner's memory is Megatron's: buffers and optimizer to the byte, activations against what autograd saves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from recipes import memory
from recipes.job_options import Parallel, Precision
from recipes.schema import Model, Recipe

REPOSITORY = Path(__file__).parents[2]
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
FP8_PARAMETERS = {"fp8": "tensorwise", "fp8_format": "hybrid", "fp8_param_gather": True}
ONE_EACH_END = {"bf16_layers_at_start": 1, "bf16_layers_at_end": 1}

STATES: dict[str, tuple[str, int, bool, dict[str, Any], dict[str, Any]]] = {
    # name: model, rank, layers as Transformer Engine's, layout, precision
    "3b dp": ("3b", 3, True, {"gpus": 256, "micro_batch_samples": 2, **OVERLAP}, {}),
    "3b pp2, no overlap": ("3b", 4, True, {"gpus": 8, "pipeline": 2}, {}),
    "8b 4k": ("8b", 0, True, {"gpus": 512, "tensor": 2, "sequence_parallel": True, **OVERLAP}, {}),
    "8b 4k, plain torch": ("8b", 511, False, {"gpus": 512, "tensor": 2, "sequence_parallel": True, **OVERLAP}, {}),
    "8b 512k": ("8b", 200, True, {"gpus": 512, "tensor": 4, "context": 32, "sequence_parallel": True, **OVERLAP}, {}),
    "8b fp32": ("8b", 0, False, {"gpus": 24, "tensor": 2, "context": 3}, {"dtype": "fp32"}),
    "8b pp4 first": ("8b", 0, True, {"gpus": 64, "tensor": 2, "pipeline": 4, "sequence_parallel": True, **OVERLAP}, {}),
    "8b pp4 inside": ("8b", 17, True, {"gpus": 64, "tensor": 2, "pipeline": 4, "sequence_parallel": True, **OVERLAP}, {}),
    "8b vpp": ("8b", 63, True, {"gpus": 64, "pipeline": 2, "virtual_pipeline": 4, **OVERLAP}, {}),
    "8b fp8": ("8b", 0, True, {"gpus": 512, "tensor": 2, "sequence_parallel": True, **OVERLAP}, FP8_PARAMETERS | ONE_EACH_END),
    "8b fp8 pp2": ("8b", 63, True, {"gpus": 64, "tensor": 2, "pipeline": 2, **OVERLAP}, FP8_PARAMETERS),
    "30b 4k first": ("30b", 0, True, {"gpus": 1024, "tensor": 4, "pipeline": 4, "virtual_pipeline": 4, **OVERLAP}, {}),
    "30b 4k last": ("30b", 1023, True, {"gpus": 1024, "tensor": 4, "pipeline": 4, "virtual_pipeline": 4, **OVERLAP}, {}),
    "30b 32k": ("30b", 7, True, {"gpus": 1024, "tensor": 8, "context": 4, "sequence_parallel": True, **OVERLAP}, {}),
    "30b odd dp": ("30b", 95, True, {"gpus": 96, "tensor": 8, "pipeline": 4, "sequence_parallel": True, **OVERLAP}, {}),
    "8b untied pp2": ("8b untied", 9, True, {"gpus": 12, "pipeline": 2, **OVERLAP}, {}),
}


def model_of(name: str) -> Model:
    size, *untied = name.split()
    fields = yaml.safe_load((REPOSITORY / f"recipes/model/granite_4_1_{size}.yaml").read_text())
    return Model.model_validate(fields | ({"tied_embeddings": False} if untied else {}))


def recipe_with(recipe: Recipe, model: Model, layout: dict[str, Any], precision: dict[str, Any], **phase: Any) -> Recipe:
    """The recipe's first phase on CPU with another model, layout and precision."""
    raw = recipe.model_dump(mode="json")
    stage = recipe.stages[0]
    raw["model"] = model.model_dump(mode="json")
    raw["cluster"]["gpu"] = "cpu"
    raw["phase"][stage]["parallel"] = {"name": "test", **layout}
    raw["phase"][stage]["precision"] = {"name": "test", "dtype": "bf16", **precision}
    raw["phase"][stage] |= phase
    sizes = Parallel(name="test", **layout)
    raw["phase"][stage]["global_batch_samples"] = sizes.data * sizes.micro_batch_samples * 8
    return Recipe.model_validate(raw)


def run_worker(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.recipes.slice_worker"],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def slices(smoke: Recipe) -> dict[str, dict[str, Any]]:
    jobs = []
    for size, rank, engine, layout, precision in STATES.values():
        fp8 = Precision(name="test", dtype="bf16", **precision) if precision.get("fp8") else None
        # Megatron takes no FP8 arguments without Transformer Engine: the worker marks the parameters.
        recipe = recipe_with(smoke, model_of(size), layout, {} if fp8 else precision, seq_length_tokens=6144)
        jobs.append(
            {
                "kind": "state",
                "recipe": recipe.model_dump(mode="json"),
                "stage": recipe.stages[0],
                "rank": rank,
                "transformer_engine": engine,
                "fp8_parameters": fp8 and [fp8.bf16_layers_at_start, fp8.bf16_layers_at_end],
            }
        )
    return dict(zip(STATES, run_worker(jobs), strict=True))


@pytest.mark.parametrize("name", STATES)
def test_state_of_a_rank_is_megatrons_to_the_byte(slices: dict[str, dict[str, Any]], name: str) -> None:
    size, _, engine, layout, precision = STATES[name]
    real, model = slices[name], model_of(size)
    parallel, exact = Parallel(name="test", **layout), Precision(name="test", **{"dtype": "bf16"} | precision)
    state = memory.state_bytes(
        model, parallel, exact, real["pipeline_rank"], data_rank=real["data_rank"], transformer_engine=engine
    )
    assert real["outside_bytes"] == 0  # every parameter lies in a buffer
    assert state == (real["parameters_bytes"], real["gradients_bytes"], real["optimizer_bytes"])
    worst = memory.state_bytes(model, parallel, exact, real["pipeline_rank"], transformer_engine=engine)
    assert worst[:2] == state[:2]
    assert worst[2] >= state[2]
    in_fp8 = sum(memory.fp8_layers(model, exact)[i] for c in range(parallel.virtual_pipeline or 1)
                 for i in memory.chunk_layers(model, parallel, real["pipeline_rank"], c)) if exact.fp8_param_gather else 0  # fmt: skip
    assert real["fp8_tensors"] == 4 * in_fp8


def test_the_layouts_cover_what_moves_bytes(slices: dict[str, dict[str, Any]]) -> None:
    assert len(STATES) >= 12
    buckets = {real["buckets"] for real in slices.values()}
    assert min(buckets) == 1
    assert max(buckets) > 12
    assert {real["pipeline_rank"] for real in slices.values()} == {0, 1, 2, 3}


@given(
    st.lists(st.tuples(st.integers(1, 5000), st.booleans()), min_size=1, max_size=8),
    st.one_of(st.none(), st.integers(1, 9000)),
    st.integers(1, 40),
)
def test_every_parameter_has_one_owner_per_element(sizes: list[tuple[int, bool]], bucket: int | None, ranks: int) -> None:
    weights = [memory.Weight(numel, shared_embedding=shared) for numel, shared in sizes]
    made = memory.buckets(weights, bucket, ranks)
    assert all(b.size % ranks == 0 and b.size % 128 == 0 for b in made)
    assert sum(len(b.ranges) for b in made) == len(weights)
    owned = [memory.owned_elements(made, ranks, rank) for rank in range(ranks)]
    assert sum(owned) == sum(w.numel for w in weights)
    assert memory.most_owned_elements(made, ranks) == max(owned)
