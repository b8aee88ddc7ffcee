"""The linter's rules about the dtypes of gradients and of the optimizer's state.

Sources: megatron-core 0.19.2 (megatron/training/arguments.py, core/optimizer/optimizer_config.py, core/optimizer/distrib_optimizer.py) and
Transformer Engine 2.17.1 (pytorch/optimizers/fused_adam.py). What Megatron asserts, ignores, or saves so that no job can go on from it.
"""

from __future__ import annotations

from collections.abc import Iterator

from recipes.job_options import Optimizer, Precision
from recipes.memory import optimizer_holds_weights
from recipes.problem import Problem
from recipes.schema import Phase, Recipe

STATES = ("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
MOMENTS = STATES[1:]


def optimizer_rules(recipe: Recipe, stage: str, phase: Phase) -> Iterator[Problem]:
    """What is refused of the optimizer and the gradients of a phase; of the recipe's optimizer in the same words for every phase."""
    key = "optimizer" if phase.optimizer is None else f"phase.{stage}.optimizer"
    optimizer = recipe.optimizer if phase.optimizer is None else phase.optimizer
    yield from dtype_rules(optimizer, phase.precision, recipe.cluster.gpu, key=key, precision_key=f"phase.{stage}.precision")


def dtype_rules(optimizer: Optimizer, precision: Precision, gpu: str, *, key: str, precision_key: str) -> Iterator[Problem]:
    """What is refused of `optimizer` (at `key` of the recipe) with `precision` (at `precision_key`) on `gpu` (as Cluster.gpu)."""
    if precision.gradients_dtype == "bf16" and precision.dtype != "bf16":
        rule = f"gradients of {precision.dtype} weights are {precision.dtype}: Megatron takes the dtype of the weights, whatever is asked for"
        yield Problem(f"{precision_key}.gradients_dtype", "bf16", rule, f"fp32, or {precision_key}.dtype=bf16")
    if not optimizer.precision_aware:
        for name in STATES:
            if (value := getattr(optimizer, name)) != "fp32":
                rule = "only the precision-aware optimizer keeps its state in anything but fp32"
                yield Problem(f"{key}.{name}", value, rule, f"fp32, or {key}.precision_aware=true")
        return
    where = f"{key}.precision_aware"
    if gpu == "cpu":
        rule = "Transformer Engine's FusedAdam runs on GPUs, and ranks run on CPU here (cluster.gpu=cpu)"
        yield Problem(where, True, rule, f"{where}=false, or name the GPU, e.g. cluster.gpu=h100")
    if precision.dtype != "bf16":
        rule = f"beside {precision.dtype} weights FusedAdam would keep the same weights again"
        yield Problem(where, True, rule, f"{where}=false, or precision=bf16")
    if not optimizer_holds_weights(precision, optimizer):
        for name in (n for n in MOMENTS if getattr(optimizer, n) == "fp16"):
            rule = f"with FP8 {precision.fp8} and main weights in fp32 Megatron saves a moment in fp16 without its scale: no job could go on"
            yield Problem(f"{key}.{name}", "fp16", rule, "bf16, which has no scale, or fp32")
    elif precision.fp8_param_gather and precision.fp8 != "delayed":
        rule = f"of weights in FP8 {precision.fp8} Megatron gives FusedAdam no part that it could keep in fp16"
        yield Problem(
            f"{key}.main_params_dtype", optimizer.main_params_dtype, rule, f"fp32, or {precision_key}.fp8_param_gather=false"
        )
