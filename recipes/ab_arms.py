"""A gate as the rest of a recipe sees it: two recipes, one for each arm, and the layout that its job needs."""

from __future__ import annotations

from typing import Literal

from recipes.ab_options import Arm
from recipes.job_options import Parallel
from recipes.schema import Phase, Recipe

ArmName = Literal["a", "b"]
ARMS: tuple[ArmName, ...] = ("a", "b")


def arm_of(recipe: Recipe, stage: str, name: ArmName) -> Arm:
    gate = recipe.ab[stage]
    return gate.a if name == "a" else gate.b


def arm_phase(recipe: Recipe, stage: str, name: ArmName) -> Phase:
    """The whole phase as the arm would train it; of which the arm takes the first steps."""
    arm = arm_of(recipe, stage, name)
    own = {key: getattr(arm, key) for key in ("precision", "parallel", "optimizer")}
    return recipe.phase[recipe.ab[stage].phase].model_copy(update={key: v for key, v in own.items() if v is not None})


def arm_recipe(recipe: Recipe, stage: str, name: ArmName) -> Recipe:
    """`recipe` up to the gate's phase, with that phase as the arm would train it and without gates."""
    phase = recipe.ab[stage].phase
    stages = [s for s in recipe.stages[: recipe.stages.index(phase) + 1] if s not in recipe.ab]
    phases = {**recipe.phase, phase: arm_phase(recipe, stage, name)}
    return recipe.model_copy(update={"stages": stages, "phase": phases, "ab": {}})


def shortened(recipe: Recipe, phase: str, steps: int) -> Recipe:
    """`recipe` with no more than the first `steps` of `phase`, each of them logged: for Megatron's arguments only. The learning rate and the
    data stay those of the whole phase."""
    whole = recipe.phase[phase]
    short = whole.model_copy(
        update={
            "steps": steps,
            "tokens": steps * whole.tokens_per_step,
            "log_interval_steps": 1,
            "keep_checkpoints": 1,
        }
    )
    return recipe.model_copy(update={"phase": {**recipe.phase, phase: short}})


def layout(recipe: Recipe, stage: str) -> Parallel:
    """The layout of the arm that needs more ranks: the gate's job has room for it, and runs the arms one after the other."""
    layouts = [arm_phase(recipe, stage, name).parallel for name in ARMS]
    return max(layouts, key=lambda one: one.gpus)
