"""Learning rate as a function of tokens, for the trainer, the planner and the report alike; plain Python, no framework.

All rates are base rates: muP's division by the width multiplier comes later. Tokens count from the start of a phase (`stage_tokens`)
or of the curriculum (`n`, power schedule only).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from recipes.schema import Phase, Recipe, RecipeError

POWER_SEQUENCE_TOKENS = 4096
"""Length of the sequences in which the power schedule counts a batch: the one of all runs that its coefficients were fitted on."""


def power(n: float, *, amplitude: float, exponent: float, batch_sequences: float, max_lr: float) -> float:
    """min(max_lr, batch * amplitude * n^exponent): Shen et al. 2024 (arXiv 2408.13359), eq. 7. n tokens since the start; max_lr at n = 0."""
    if n <= 0:
        return max_lr
    return min(max_lr, batch_sequences * amplitude * n**exponent)


def exponential(tokens: float, *, horizon_tokens: float, start_lr: float, end_lr: float) -> float:
    """start_lr * (A exp(-x/T) + B), A = (1-r) e/(e-1), B = (r e - 1)/(e-1), r = end/start: lm-engine's form; exact at both ends."""
    if tokens <= 0:
        return start_lr
    if tokens >= horizon_tokens:
        return end_lr
    # (exp(1-x/T) - 1) / (e - 1), the share of the way that is left; expm1 keeps it accurate near the end.
    return end_lr + (start_lr - end_lr) * math.expm1(1 - tokens / horizon_tokens) / math.expm1(1)


def linear(tokens: float, *, horizon_tokens: float, start_lr: float, end_lr: float) -> float:
    """Straight line from start_lr to end_lr; exact at both ends."""
    if tokens <= 0:
        return start_lr
    if tokens >= horizon_tokens:
        return end_lr
    return end_lr + (start_lr - end_lr) * (1 - tokens / horizon_tokens)


def power_batch_sequences(phase: Phase) -> float:
    """The batch as the power schedule counts it: in sequences of 4096 tokens, whatever the phase's own length.

    The published coefficients were fitted with 4096-token sequences only. What the law relates to the learning rate is the tokens of
    a step, so a phase that keeps its tokens per step keeps its rate when its length changes.
    """
    return phase.tokens_per_step / POWER_SEQUENCE_TOKENS


def learning_rate_function(recipe: Recipe, stage: str) -> Callable[[int], float]:
    """f(stage_tokens) -> absolute base learning rate of the step that begins after `stage_tokens` tokens of the phase `stage`.

    Resolves everything that depends on the recipe once; a call costs a few arithmetic operations. f clamps to the phase's ends.
    Raises RecipeError when `stage` is no phase or its schedule lacks a value.
    """
    if recipe.stage_kind(stage) != "phase":
        raise RecipeError(f"stage '{stage}' is a {recipe.stage_kind(stage)} and has no learning rate")
    phase, schedule = recipe.phase[stage], recipe.phase[stage].schedule
    key = f"phase.{stage}.schedule"

    def required(name: str) -> float:
        value = getattr(schedule, name)
        if value is None:
            raise RecipeError(f"{key}.{name}: a schedule of kind {schedule.kind} needs it; give a number")
        return value

    horizon = schedule.horizon_tokens or phase.tokens
    base: Callable[[float], float]
    if schedule.kind == "power":
        amplitude, exponent, max_lr = required("power_amplitude"), required("power_exponent"), required("max_lr")
        batch, before = power_batch_sequences(phase), recipe.tokens_before(stage)

        def base(tokens: float) -> float:
            return power(before + tokens, amplitude=amplitude, exponent=exponent, batch_sequences=batch, max_lr=max_lr)
    else:
        start = schedule.start_lr if schedule.start_lr is not None else _last_of_previous(recipe, stage, key)
        if schedule.kind == "constant":

            def base(tokens: float) -> float:
                return start
        else:
            end, shape = required("end_lr"), exponential if schedule.kind == "exponential" else linear

            def base(tokens: float) -> float:
                return shape(tokens, horizon_tokens=horizon, start_lr=start, end_lr=end)

    warmup, total = schedule.warmup_tokens, phase.tokens
    if not warmup:
        return lambda tokens: base(min(max(tokens, 0), total))
    at_warmup = base(warmup)

    def warmed(tokens: int) -> float:
        """Linear from 0 to the value that the schedule has at the end of the warm-up (POWER eq. 8)."""
        tokens = min(max(tokens, 0), total)
        return tokens / warmup * at_warmup if tokens < warmup else base(tokens)

    return warmed


def learning_rate(recipe: Recipe, stage: str, stage_tokens: int) -> float:
    """Base learning rate after `stage_tokens` tokens of the phase `stage`. For many values take `learning_rate_function`."""
    return learning_rate_function(recipe, stage)(stage_tokens)


def first_peak_last(recipe: Recipe, stage: str) -> tuple[float, float, float]:
    """Learning rates at the start, at the highest point and at the end of a phase."""
    f, phase = learning_rate_function(recipe, stage), recipe.phase[stage]
    # Every schedule is monotone once it has warmed up, so the peak is at one of three places.
    first, warm, last = f(0), f(phase.schedule.warmup_tokens), f(phase.tokens)
    return first, max(first, warm, last), last


def previous_phase(recipe: Recipe, stage: str) -> str | None:
    """The nearest phase before `stage`, past any merges; None for the first."""
    before = recipe.stages[: recipe.stages.index(stage)]
    return next((s for s in reversed(before) if s in recipe.phase), None)


def _last_of_previous(recipe: Recipe, stage: str, key: str) -> float:
    previous = previous_phase(recipe, stage)
    if previous is None:
        raise RecipeError(
            f"{key}.start_lr: the first phase continues no other; give the learning rate to start from, e.g. {key}.start_lr=3e-4"
        )
    return learning_rate_function(recipe, previous)(recipe.phase[previous].tokens)
