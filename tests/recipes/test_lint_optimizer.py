"""One test per rule about the dtypes of gradients and of the optimizer's state, as in test_lint."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from recipes.lint import lint
from recipes.schema import Recipe
from tests.recipes.conftest import Rule

P = "phase.foundation.precision"
AWARE = {"optimizer.precision_aware": True}
FP16 = {"optimizer.main_params_dtype": "fp16"}

RULES: dict[str, Rule] = {
    "gradients of fp32 weights": (
        "smoke",
        {f"{P}.gradients_dtype": "bf16"},
        f"{P}.gradients_dtype",
        "bf16",
        "Megatron takes the dtype of the weights",
        f"fp32, or {P}.dtype=bf16",
    ),
    "main weights without the optimizer for it": (
        "five_phase",
        FP16,
        "optimizer.main_params_dtype",
        "fp16",
        "only the precision-aware",
        "optimizer.precision_aware=true",
    ),
    "a moment without the optimizer for it": (
        "five_phase",
        {"optimizer.exp_avg_sq_dtype": "bf16"},
        "optimizer.exp_avg_sq_dtype",
        "bf16",
        "only the precision-aware",
        "fp32, or optimizer.precision_aware=true",
    ),
    "a CPU": ("smoke", AWARE, "optimizer.precision_aware", "True", "ranks run on CPU", "cluster.gpu=h100"),
    "fp32 weights": (
        "five_phase",
        AWARE | {f"{P}.dtype": "fp32"},
        "optimizer.precision_aware",
        "True",
        "the same weights again",
        "precision=bf16",
    ),
    "fp16 moments beside fp32 weights of Megatron's": (
        "fp8",
        AWARE | {"optimizer.exp_avg_dtype": "fp16"},
        "optimizer.exp_avg_dtype",
        "fp16",
        "without its scale",
        "bf16",
    ),
    "fp16 weights behind fp8 ones": (
        "fp8",
        AWARE | FP16 | {f"{P}.fp8_param_gather": True},
        "optimizer.main_params_dtype",
        "fp16",
        "no part that it could keep",
        f"{P}.fp8_param_gather=false",
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_refuses(refused: Callable[[Rule], None], name: str) -> None:
    refused(RULES[name])


def test_of_the_recipes_optimizer_it_is_said_once(smoke: Recipe, changed: Callable[..., Recipe]) -> None:
    problems = lint(changed(smoke, **AWARE))
    assert [p.key for p in problems].count("optimizer.precision_aware") == 2  # on a CPU, beside fp32 weights
    [own] = [
        p
        for p in lint(changed(smoke, **{"phase.annealing.optimizer": smoke.optimizer.model_dump() | {"exp_avg_dtype": "bf16"}}))
    ]
    assert own.key == "phase.annealing.optimizer.exp_avg_dtype"


@pytest.mark.parametrize(
    "values",
    [
        {f"{P}.gradients_dtype": "bf16"},
        AWARE,
        AWARE | FP16 | {"optimizer.exp_avg_dtype": "fp16"},
        {**AWARE, "optimizer.exp_avg_dtype": "bf16", f"{P}.fp8": "tensorwise", f"{P}.fp8_param_gather": True},
        {**AWARE, **FP16, f"{P}.fp8": "delayed", f"{P}.fp8_param_gather": True},
        {**AWARE, **FP16, f"{P}.fp8": "tensorwise", "optimizer.exp_avg_dtype": "fp16"},
    ],
)
def test_takes_what_megatron_takes(five_phase: Recipe, changed: Callable[..., Recipe], values: dict[str, object]) -> None:
    assert lint(changed(five_phase, **values)) == []
