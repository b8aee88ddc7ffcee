"""What stages cost, and that the whole is the sum of its parts."""

from __future__ import annotations

import json

import pytest

from recipes.ab_options import Ab, Arm
from recipes.estimates import (
    PART_NAMES,
    as_data,
    estimate,
    estimates,
    job_memory_bytes,
    job_of,
    slowest_parts,
    stage_phase,
    total,
)
from recipes.gpus import GPUS
from recipes.job_options import Precision
from recipes.memory import rank_memory
from recipes.schema import Recipe
from recipes.throughput import step_time


def test_a_phase_is_its_steps_and_money_is_gpu_hours(five_phase: Recipe) -> None:
    phase, each = five_phase.phase["foundation"], estimate(five_phase, "foundation", price_per_gpu_hour=2.0)
    step = step_time(job_of(five_phase, phase, GPUS["h100"]))
    assert each.unknown is None
    assert each.hours == pytest.approx(phase.steps * step.total / 3600)
    assert each.gpu_hours == pytest.approx(each.hours * 512)
    assert each.cost == pytest.approx(2.0 * each.gpu_hours)
    assert each.tokens_per_second_per_gpu * each.gpu_hours * 3600 == pytest.approx(phase.tokens)
    assert estimate(five_phase, "foundation").cost == pytest.approx(GPUS["h100"].price_per_hour * each.gpu_hours)
    assert each.flops == each.tokens * each.flops_per_token
    assert sum(each.step_parts_seconds.values()) == pytest.approx(each.step_seconds)


@pytest.mark.parametrize("gpu", sorted(GPUS))
def test_the_total_is_the_sum_of_the_stages(five_phase: Recipe, changed, gpu: str) -> None:
    recipe = changed(five_phase, **{"cluster.gpu": gpu})
    every = estimates(recipe)
    assert [e.stage for e in every] == recipe.stages
    sums = total(every)
    for name in ("hours", "gpu_hours", "cost"):
        assert getattr(sums, name) == pytest.approx(sum(getattr(e, name) for e in every if getattr(e, name) is not None))
    assert sums.gpu_hours == pytest.approx(512 * sums.hours)  # every phase has 512 GPUs
    # What trains and is not in the sums is named.
    assert set(sums.missing) == {e.stage for e in every if e.kind in ("sft", "grpo")}


def test_what_is_not_modelled_says_why(five_phase: Recipe) -> None:
    for stage in five_phase.stages:
        each = estimate(five_phase, stage)
        assert (each.hours is None) == (each.unknown is not None), stage
        if each.kind in ("merge", "export"):
            assert each.memory_bytes is None
            assert "minutes" in each.unknown
        else:
            assert 0 < each.memory_bytes < 80e9
            assert 0.2 < each.mfu < 0.7
    assert "not prepared" in estimate(five_phase, "sft").unknown
    assert "rollouts" in estimate(five_phase, "math").unknown


def test_fine_tuning_has_a_time_once_its_steps_are_known(five_phase: Recipe) -> None:
    each = estimate(five_phase, "sft", sft_steps={"sft": 25_000})
    assert each.unknown is None
    assert each.steps == 25_000
    assert each.hours == pytest.approx(25_000 * each.step_seconds / 3600)
    assert each.tokens == 25_000 * 256 * 16384
    assert (
        total(estimates(five_phase, sft_steps={"sft": 25_000})).hours > total(estimates(five_phase)).hours + each.hours * 0.99
    )


def test_a_gate_is_the_steps_of_both_arms(five_phase: Recipe) -> None:
    gate = Ab(
        title="FP8", phase="capability", steps=100, b=Arm(precision=Precision(name="fp8", dtype="bf16", fp8="tensorwise"))
    )
    recipe = five_phase.model_copy(update={"ab": {"gate": gate}, "stages": ["foundation", "gate", "capability"]})
    each, phase = estimate(recipe, "gate"), recipe.phase["capability"]
    bf16 = step_time(job_of(recipe, phase, GPUS["h100"])).total
    fp8 = step_time(job_of(recipe, phase.model_copy(update={"precision": gate.b.precision}), GPUS["h100"])).total
    assert fp8 < bf16
    assert each.hours == pytest.approx(100 * (bf16 + fp8) / 3600)
    assert (each.steps, each.tokens) == (200, 200 * phase.tokens_per_step)
    assert total(estimates(recipe)).missing == []


def test_memory_is_that_of_the_fullest_rank(five_phase: Recipe, changed) -> None:
    values = {"pipeline": 4, "virtual_pipeline": 5, "tensor": 2}
    recipe = changed(five_phase, **{f"phase.foundation.parallel.{k}": v for k, v in values.items()})
    phase = recipe.phase["foundation"]
    fullest = rank_memory(
        recipe.model,
        phase.parallel,
        phase.precision,
        recipe.optimizer,
        seq_length_tokens=4096,
        micro_batches=phase.global_batch_samples // (phase.parallel.data * phase.parallel.micro_batch_samples),
    )
    assert job_memory_bytes(recipe, job_of(recipe, phase, GPUS["h100"])) == fullest.total_bytes


def test_on_cpu_only_flops_are_planned(smoke: Recipe) -> None:
    every = estimates(smoke)
    assert total(every) is None
    for each in every:
        assert each.hours is None
        assert each.unknown
        assert (each.flops_per_token is None) == (stage_phase(smoke, each.stage) is None)


def test_json_holds_every_stage_and_the_total(five_phase: Recipe, smoke: Recipe) -> None:
    every = estimates(five_phase, price_per_gpu_hour=1.5)
    data = json.loads(json.dumps(as_data(five_phase, every, 1.5)))
    assert data["format"] == "quarry.plan/1"
    assert data["price_per_gpu_hour"] == 1.5
    assert [stage["stage"] for stage in data["stages"]] == five_phase.stages
    assert data["total"]["cost"] == pytest.approx(sum(stage["cost"] or 0 for stage in data["stages"]))
    assert data["total"]["tokens"] == five_phase.total_tokens
    on_cpu = as_data(smoke, estimates(smoke))
    assert on_cpu["price_per_gpu_hour"] is None
    assert set(on_cpu["total"]) == {"tokens"}


def test_every_part_of_a_step_has_a_name(five_phase: Recipe) -> None:
    time = step_time(job_of(five_phase, five_phase.phase["long_128k"], GPUS["h100"]))
    assert set(PART_NAMES) == set(time.parts())
    assert slowest_parts(time).startswith("attention 7")
