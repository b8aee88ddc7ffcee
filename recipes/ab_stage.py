"""The linter's rules about a gate: where it stands, how many steps it takes, and what its arms may be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from recipes.ab_arms import ARMS, ArmName, arm_of, arm_phase
from recipes.lint_layout import phase_layout_rules
from recipes.problem import Problem
from recipes.schema import Phase, Recipe

MIN_STEPS = 4
"""The verdict is of the last quarter of the steps."""


def ab_rules(recipe: Recipe, stage: str) -> Iterator[Problem]:
    """What the linter refuses of a gate; the rules of an arm's layout and precision are those of a phase."""
    key, gate = f"ab.{stage}", recipe.ab[stage]
    after = next((s for s in recipe.stages[recipe.stages.index(stage) + 1 :] if s not in recipe.ab), None)
    if gate.phase not in recipe.phase or gate.phase != after:
        rule = "a gate stands directly in front of the phase that it tries"
        after_text = f"the stage after it is {after}" if after else "nothing comes after it"
        remedy = f"{after_text}: " + (f"set {key}.phase={after}" if after in recipe.phase else f"move {stage} in stages")
        yield Problem(f"{key}.phase", gate.phase, rule, remedy)
        return
    phase = recipe.phase[gate.phase]
    if not MIN_STEPS <= gate.steps <= phase.steps:
        rule = f"the last quarter of the steps is compared, and {gate.phase} has {phase.steps}"
        yield Problem(f"{key}.steps", gate.steps, rule, f"from {MIN_STEPS} to {phase.steps}")
    phases = {name: arm_phase(recipe, stage, name) for name in ARMS}
    for name in ARMS:
        yield from _arm_rules(recipe, stage, name, phases[name])
    a, b = (phases[name].parallel for name in ARMS)
    if a.gpus != b.gpus and max(a.gpus, b.gpus) > recipe.cluster.gpus_per_node:
        rule = f"arm a has {a.gpus}: both run in one job, on all of its nodes"
        yield Problem(f"{key}.b.parallel.gpus", b.gpus, rule, f"set it to {a.gpus}")
    drawn = ("tensor", "pipeline", "virtual_pipeline")
    if recipe.previous(gate.phase) is None and recipe.cluster.gpu != "cpu":
        for name in (n for n in drawn if getattr(a, n) != getattr(b, n)):
            rule = f"arm a has {getattr(a, name)}: on GPUs the random weights of a first phase depend on it, and would not be the same"
            yield Problem(f"{key}.b.parallel.{name}", getattr(b, name), rule, f"set it to {getattr(a, name)}")


def _arm_rules(recipe: Recipe, stage: str, name: ArmName, phase: Phase) -> Iterator[Problem]:
    key, arm, on_cpu = f"ab.{stage}.{name}", arm_of(recipe, stage, name), recipe.cluster.gpu == "cpu"
    if arm.emulated_fp8 is not None and not on_cpu:
        rule = f"the emulation is for ranks on CPU; {recipe.cluster.gpu} has FP8"
        yield Problem(f"{key}.emulated_fp8", "set", rule, f"null, and {key}.precision with an fp8 recipe")
    if arm.transformer_impl == "transformer_engine" and on_cpu:
        yield Problem(f"{key}.transformer_impl", arm.transformer_impl, "Transformer Engine needs a GPU", "null")
    if arm.transformer_impl == "local" and phase.precision.fp8 is not None:
        rule = f"precision {phase.precision.name} is Transformer Engine's"
        yield Problem(f"{key}.transformer_impl", arm.transformer_impl, rule, f"null, or {key}.precision with bf16")
    if arm.precision is None and arm.parallel is None and arm.optimizer is None:
        return  # the phase's own values, which are linted as such
    seen = recipe.model_copy(update={"phase": {**recipe.phase, recipe.ab[stage].phase: phase}})
    for problem in phase_layout_rules(seen, recipe.ab[stage].phase, phase):
        yield replace(problem, **{k: _own(recipe, stage, name, getattr(problem, k)) for k in ("key", "rule", "remedy")})


def _own(recipe: Recipe, stage: str, name: ArmName, text: str) -> str:
    """A message about the phase as the arm has it, in the keys that change the arm."""
    for part in ("precision", "parallel", "optimizer"):
        text = text.replace(f"phase.{recipe.ab[stage].phase}.{part}", f"ab.{stage}.{name}.{part}")
    return text
