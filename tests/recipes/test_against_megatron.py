"""What the planner counts is what Megatron allocates, saves and counts: one process builds ranks of many layouts (slice_worker.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes import activations, memory
from recipes.flops import document_flops, flops_per_token
from recipes.job_options import Optimizer, Parallel, Precision
from recipes.schema import Model, Recipe

REPOSITORY = Path(__file__).parents[2]
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
FP8_PARAMETERS = {"fp8": "tensorwise", "fp8_format": "hybrid", "fp8_param_gather": True}
ONE_EACH_END = {"bf16_layers_at_start": 1, "bf16_layers_at_end": 1}

BF16_GRADIENTS = {"gradients_dtype": "bf16"}
AWARE = {"precision_aware": True}
BF16_MOMENTS = {"optimizer": AWARE | {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}}

STATES: dict[str, tuple[str, int, bool, dict[str, Any], dict[str, Any]]] = {
    # name: model, rank, layers as Transformer Engine's, layout, precision (and optimizer)
    "3b dp": ("3b", 3, True, {"gpus": 64, "micro_batch_samples": 2, **OVERLAP}, {}),
    "8b 4k": ("8b", 0, True, {"gpus": 128, "tensor": 2, "sequence_parallel": True, **OVERLAP}, {}),
    "8b 4k plain torch": ("8b", 127, False, {"gpus": 128, "tensor": 2, "sequence_parallel": True, **OVERLAP}, {}),
    "8b 512k": ("8b", 200, True, {"gpus": 512, "tensor": 4, "context": 32, "sequence_parallel": True, **OVERLAP}, {}),
    "8b fp32": ("8b", 0, False, {"gpus": 24, "tensor": 2, "context": 3}, {"dtype": "fp32"}),
    "8b pp4 first": ("8b", 0, True, {"gpus": 64, "tensor": 2, "pipeline": 4, "sequence_parallel": True, **OVERLAP}, {}),
    "8b pp4 inside": ("8b", 17, True, {"gpus": 64, "tensor": 2, "pipeline": 4, "sequence_parallel": True}, {}),
    "8b vpp": ("8b", 63, True, {"gpus": 64, "pipeline": 2, "virtual_pipeline": 4, **OVERLAP}, {}),
    "8b fp8": ("8b", 0, True, {"gpus": 64, "tensor": 2, "sequence_parallel": True, **OVERLAP}, FP8_PARAMETERS | ONE_EACH_END),
    "8b untied pp2": ("8b untied", 9, True, {"gpus": 12, "pipeline": 2, **OVERLAP}, {}),
    "30b vpp first": ("30b", 0, True, {"gpus": 128, "tensor": 4, "pipeline": 4, "virtual_pipeline": 4, **OVERLAP}, {}),
    "30b vpp last": ("30b", 127, True, {"gpus": 128, "tensor": 4, "pipeline": 4, "virtual_pipeline": 4, **OVERLAP}, {}),
    "30b 32k": ("30b", 7, True, {"gpus": 64, "tensor": 8, "context": 4, "sequence_parallel": True, **OVERLAP}, {}),
    "30b odd dp": (
        "30b",
        95,
        True,
        {"gpus": 96, "tensor": 8, "pipeline": 4, "sequence_parallel": True, **OVERLAP},
        FP8_PARAMETERS,
    ),
    "8b bf16 gradients": ("8b", 5, True, {"gpus": 8, "context": 2, **OVERLAP}, BF16_GRADIENTS),
    "8b bf16 gradients plain torch": ("8b", 60, False, {"gpus": 64, "tensor": 2, "sequence_parallel": True}, BF16_GRADIENTS),
    "8b bf16 gradients vpp": ("8b", 0, True, {"gpus": 64, "pipeline": 2, "virtual_pipeline": 4, **OVERLAP}, BF16_GRADIENTS),
    "8b bf16 gradients fp8": ("8b", 0, True, {"gpus": 8, **OVERLAP}, BF16_GRADIENTS | FP8_PARAMETERS | ONE_EACH_END),
    "30b bf16 gradients": (
        "30b",
        7,
        True,
        {"gpus": 64, "tensor": 8, "context": 4, "sequence_parallel": True, **OVERLAP},
        BF16_GRADIENTS,
    ),
    "8b fp32 state": ("8b", 3, True, {"gpus": 8, **OVERLAP}, {"optimizer": AWARE}),
    "8b bf16 moments": (
        "8b",
        1,
        True,
        {"gpus": 64, "tensor": 2, "sequence_parallel": True, **OVERLAP},
        BF16_GRADIENTS | BF16_MOMENTS,
    ),
    "8b fp16 weights": ("8b", 0, True, {"gpus": 2}, BF16_GRADIENTS | {"optimizer": AWARE | {"main_params_dtype": "fp16"}}),
    "8b one fp16 moment": ("8b", 7, True, {"gpus": 8}, {"optimizer": AWARE | {"exp_avg_dtype": "fp16"}}),
    "30b bf16 moments fp8": (
        "30b",
        40,
        True,
        {"gpus": 64, "tensor": 4, **OVERLAP},
        BF16_GRADIENTS | BF16_MOMENTS | FP8_PARAMETERS,
    ),
}

HANDED: dict[str, tuple[dict[str, str], str | None, float]] = {
    # name: dtypes of the optimizer's state, FP8 recipe, what rounding loses of a value
    "fp32": ({}, None, 0.0),
    "bf16 moments": ({"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}, None, 2**-8),
    "all in fp16": ({"main_params_dtype": "fp16", "exp_avg_dtype": "fp16", "exp_avg_sq_dtype": "fp16"}, None, 2**-11),
    "bf16 moments beside Megatron's weights": ({"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}, "tensorwise", 2**-8),
}

TINY = {"num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 384, "num_attention_heads": 8, "num_query_groups": 4, "head_dim": 16,
        "vocab_size": 512}  # fmt: skip
TINY_TOKENS = 256
BF16, FP32 = {"dtype": "bf16"}, {"dtype": "fp32"}
SAVED: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    # name: rank, precision, layout beside 8 ranks and two samples per micro batch
    "fp32": (0, FP32, {}),
    "bf16": (0, BF16, {}),
    "tensor": (0, FP32, {"tensor": 2}),
    "sequence parallel": (0, BF16, {"tensor": 4, "sequence_parallel": True}),
    "core attention again": (0, FP32, {"recompute": "selective"}),
    "mlp again": (0, FP32, {"recompute": "selective", "recompute_modules": ["mlp"]}),
    "both again": (0, BF16, {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]}),
    "full": (0, FP32, {"recompute": "full"}),
    "full by two": (0, BF16, {"recompute": "full", "recompute_num_layers": 2}),
    "block of two": (0, FP32, {"recompute": "full", "recompute_num_layers": 2, "recompute_method": "block"}),
    "first stage": (0, FP32, {"pipeline": 2}),
    "last stage": (7, FP32, {"pipeline": 2}),
    "chunked loss": (0, FP32, {"loss_chunk_tokens": 64}),
    "context": (1, FP32, {"context": 2}),
    "context and tensor": (3, BF16, {"context": 2, "tensor": 2, "sequence_parallel": True}),
}
SCHEDULES: dict[str, tuple[int, int, dict[str, Any]]] = {
    # name: rank, micro batches, layout
    "1f1b first": (0, 8, {"gpus": 4, "pipeline": 4}),
    "1f1b inside": (2, 8, {"gpus": 4, "pipeline": 4}),
    "1f1b last": (3, 8, {"gpus": 4, "pipeline": 4}),
    "1f1b few": (0, 2, {"gpus": 4, "pipeline": 4}),
    "interleaved first": (0, 8, {"gpus": 2, "pipeline": 2, "virtual_pipeline": 4}),
    "interleaved last": (1, 8, {"gpus": 2, "pipeline": 2, "virtual_pipeline": 4}),
    "interleaved few": (3, 4, {"gpus": 4, "pipeline": 4, "virtual_pipeline": 2}),
}
DOCUMENTS_TOKENS = [4096, 1, 700, 700, 2599]
FLOPS = [("3b", 4096), ("8b", 524288), ("30b", 4096), ("8b untied", 131072)]


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


def dtypes_of(smoke: Recipe, name: str) -> tuple[Precision, Optimizer]:
    """Precision and optimizer of one of STATES."""
    given = {"name": "test", "dtype": "bf16"} | STATES[name][4]
    own = given.pop("optimizer", {})
    return Precision.model_validate(given), Optimizer.model_validate(smoke.optimizer.model_dump() | own)


def saved_recipe(smoke: Recipe, name: str) -> Recipe:
    _, precision, layout = SAVED[name]
    model = smoke.model.model_copy(update=TINY)
    return recipe_with(smoke, model, {"gpus": 8, "micro_batch_samples": 2, **layout}, precision, seq_length_tokens=TINY_TOKENS)


def schedule_recipe(smoke: Recipe, name: str) -> Recipe:
    _, micro_batches, layout = SCHEDULES[name]
    recipe = recipe_with(smoke, smoke.model.model_copy(update=TINY | {"num_layers": 8}), layout, FP32, seq_length_tokens=32)
    phase = recipe.phase[recipe.stages[0]].model_copy(update={"global_batch_samples": micro_batches})
    return recipe.model_copy(update={"phase": recipe.phase | {recipe.stages[0]: phase}})


def flops_recipe(smoke: Recipe, size: str, length: int) -> Recipe:
    return recipe_with(smoke, model_of(size), {"gpus": 8}, {}, seq_length_tokens=length)


@pytest.fixture(scope="module")
def real(smoke: Recipe) -> dict[Any, dict[str, Any]]:
    """What Megatron did, by name of STATES, SAVED and SCHEDULES and by element of FLOPS."""
    jobs: dict[Any, dict[str, Any]] = {}
    for name, (size, rank, engine, layout, _) in STATES.items():
        precision, optimizer = dtypes_of(smoke, name)
        # Megatron takes no FP8 arguments without Transformer Engine: the worker marks the parameters.
        plain = {"dtype": precision.dtype, "gradients_dtype": precision.gradients_dtype}
        recipe = recipe_with(smoke, model_of(size), layout, plain, seq_length_tokens=6144)
        recipe = recipe.model_copy(update={"optimizer": optimizer})
        marked = [precision.bf16_layers_at_start, precision.bf16_layers_at_end] if precision.fp8 else None
        jobs[name] = {"kind": "state", "recipe": recipe, "rank": rank, "transformer_engine": engine, "fp8_parameters": marked}
        jobs[name]["fp8"] = precision.fp8
    for name, (dtypes, fp8, _) in HANDED.items():
        recipe = recipe_with(smoke, smoke.model.model_copy(update=TINY), {"gpus": 1}, {}, seq_length_tokens=64)
        optimizer = recipe.optimizer.model_copy(update=AWARE | dtypes)
        jobs["handed", name] = {
            "kind": "handed",
            "recipe": recipe.model_copy(update={"optimizer": optimizer}),
            "rank": 0,
            "fp8": fp8,
        }
    for name, (rank, _, _) in SAVED.items():
        jobs[name] = {"kind": "saved", "recipe": saved_recipe(smoke, name), "rank": rank}
    for name, (rank, _, _) in SCHEDULES.items():
        jobs[name] = {"kind": "schedule", "recipe": schedule_recipe(smoke, name), "rank": rank}
    for size, length in FLOPS:
        recipe = flops_recipe(smoke, size, length)
        jobs[size, length] = {"kind": "flops", "recipe": recipe, "rank": 0, "documents_tokens": DOCUMENTS_TOKENS}
    sent = [job | {"recipe": job["recipe"].model_dump(mode="json"), "stage": smoke.stages[0]} for job in jobs.values()]
    done = subprocess.run(
        [sys.executable, "-m", "tests.recipes.slice_worker"],
        input=json.dumps(sent),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(jobs, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("name", STATES)
def test_state_of_a_rank_is_megatrons_to_the_byte(real: dict[Any, dict[str, Any]], smoke: Recipe, name: str) -> None:
    size, _, engine, layout, _ = STATES[name]
    built, model = real[name], model_of(size)
    parallel = Parallel(name="test", **layout)
    exact, optimizer = dtypes_of(smoke, name)
    stage, rank = built["pipeline_rank"], built["data_rank"]
    state = memory.state_bytes(model, parallel, exact, optimizer, stage, data_rank=rank, transformer_engine=engine)
    assert built["outside_bytes"] == 0  # every parameter lies in a buffer
    assert (state.parameters, state.gradients) == (built["parameters_bytes"], built["gradients_bytes"])
    assert state.optimizer == built["optimizer_bytes"]
    if optimizer.main_params_dtype == "fp32":
        # Of the gradients. Copies of states are FusedAdam's own, which no stand-in can show.
        plain = optimizer.model_copy(update={"exp_avg_dtype": "fp32", "exp_avg_sq_dtype": "fp32"})
        copies = memory.state_bytes(model, parallel, exact, plain, stage, data_rank=rank, transformer_engine=engine)
        assert copies.optimizer_step == built["gradient_copies_bytes"]
    worst = memory.state_bytes(model, parallel, exact, optimizer, stage, transformer_engine=engine)
    assert (worst.parameters, worst.gradients) == (state.parameters, state.gradients)
    assert worst.optimizer >= state.optimizer
    layers = [i for c in range(parallel.virtual_pipeline or 1) for i in memory.chunk_layers(model, parallel, stage, c)]
    in_fp8 = sum(memory.fp8_layers(model, exact)[i] for i in layers) if exact.fp8_param_gather else 0
    assert built["fp8_tensors"] == 4 * in_fp8


@pytest.mark.parametrize("name", HANDED)
def test_stages_with_different_optimizer_dtypes_hand_on_to_each_other(real: dict[Any, dict[str, Any]], name: str) -> None:
    """By Megatron's own saving and loading, with Transformer Engine's optimizer as a stand-in: checkpoints are in fp32, so that nothing is
    lost on the way to an optimizer in fp32, and by rounding alone on the way back."""
    found = real["handed", name]
    assert found["keys"] > 20
    assert found["dtypes"] == ["torch.float32"]
    assert found["lost_on_the_way"] == 0
    assert found["lost_on_the_way_back"] <= HANDED[name][2]


def test_the_layouts_cover_what_moves_bytes(real: dict[Any, dict[str, Any]]) -> None:
    buckets = {real[name]["buckets"] for name in STATES}
    assert len(STATES) >= 12
    assert min(buckets) == 1
    assert max(buckets) > 12


@pytest.mark.parametrize("name", SAVED)
def test_saved_activations_are_autograds(real: dict[Any, dict[str, Any]], smoke: Recipe, name: str) -> None:
    """Within 2%: what is left out are ids, masks and positions. Within 10% with context parallelism, where plain torch keeps masks of its
    own and keys and values of all ranks; Transformer Engine does not."""
    recipe = saved_recipe(smoke, name)
    phase = recipe.phase[recipe.stages[0]]
    model, parallel, precision = recipe.model, phase.parallel, phase.precision
    tokens = activations.rank_tokens(parallel, TINY_TOKENS, parallel.micro_batch_samples)
    stage = parallel.pipeline - 1 if SAVED[name][0] == 7 else 0
    layers = [False] * len(memory.chunk_layers(model, parallel, stage, 0))
    expected, _ = activations.chunk_bytes(model, parallel, precision, tokens, layers, transformer_engine=False)
    if stage == parallel.pipeline - 1:
        expected += activations.head_bytes(model, parallel, precision, tokens, transformer_engine=False)
        expected += activations.logits_kept_bytes(model, parallel, tokens)
    assert expected == pytest.approx(real[name]["saved_bytes"], rel=0.1 if parallel.context > 1 else 0.02)


@pytest.mark.parametrize("name", SCHEDULES)
def test_micro_batches_in_flight_are_those_of_megatrons_schedule(real: dict[Any, dict[str, Any]], name: str) -> None:
    rank, micro_batches, layout = SCHEDULES[name]
    assert real[name] == {"in_flight": memory.in_flight_chunks(Parallel(name="test", **layout), rank, micro_batches), "left": 0}


@pytest.mark.parametrize(("size", "length"), FLOPS)
def test_flops_are_megatrons(real: dict[Any, dict[str, Any]], smoke: Recipe, size: str, length: int) -> None:
    """Megatron counts half the square for causal attention too, as NVIDIA does when it publishes; exactly equal, no tolerance."""
    recipe = flops_recipe(smoke, size, length)
    tokens = recipe.phase[recipe.stages[0]].tokens_per_step
    assert flops_per_token(recipe.model, length) * tokens == real[size, length]["batch"]
    assert document_flops(recipe.model, DOCUMENTS_TOKENS) == real[size, length]["documents"]
