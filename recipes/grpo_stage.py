"""A reinforcement-learning stage as the rest of a recipe sees it: a phase over rollouts; and its rules for the linter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from recipes.job_options import Optimizer, Parallel, Precision
from recipes.lint_layout import phase_layout_rules
from recipes.posttrain import Grpo
from recipes.problem import Problem
from recipes.schedules import previous_phase
from recipes.schema import Mixture, Phase, Recipe, RecipeError, Schedule


def settings(recipe: Recipe, stage: str) -> Grpo:
    """The stage's settings, its RoPE base taken from the phase before where it has none; RecipeError without either."""
    grpo = recipe.grpo[stage]
    base = grpo.rope_base
    if base is None:
        before = previous_phase(recipe, stage)
        if before is None:
            raise RecipeError(f"grpo.{stage}.rope_base: no phase comes before that it could be taken from; give the model's")
        base = recipe.phase[before].rope_base
    return grpo.settings(base)


def phase_of(grpo: Grpo, parallel: Parallel, precision: Precision, optimizer: Optimizer | None = None) -> Phase:
    """What Megatron's arguments, the hand-off and the layout's rules take. tokens counts places, were all rollouts of full length."""
    assert grpo.rope_base is not None, "resolved by settings"
    steps = grpo.steps * grpo.optimizer_steps_per_rollout
    return Phase(
        title=grpo.title,
        tokens=steps * grpo.samples_per_optimizer_step * grpo.seq_length_tokens,
        steps=steps,
        seq_length_tokens=grpo.seq_length_tokens,
        rope_base=grpo.rope_base,
        global_batch_samples=grpo.samples_per_optimizer_step,
        mixture=Mixture(name="rollouts", shares_percent={}),
        schedule=Schedule(kind="constant", start_lr=grpo.learning_rate, jump="reinforcement learning has a rate of its own"),
        parallel=parallel,
        precision=precision,
        optimizer=optimizer,
        save_interval_steps=grpo.save_interval_steps,
        keep_checkpoints=grpo.keep_checkpoints,
        exit_after_minutes=grpo.exit_after_minutes,
    )


def as_phase(recipe: Recipe, stage: str) -> Recipe:
    """`recipe` with `stage` as a phase."""
    own = recipe.grpo[stage]
    phase = phase_of(settings(recipe, stage), own.parallel, own.precision, own.optimizer)
    others = {name: s for name, s in recipe.grpo.items() if name != stage}
    return recipe.model_copy(update={"phase": {**recipe.phase, stage: phase}, "grpo": others})


def grpo_rules(recipe: Recipe, stage: str) -> Iterator[Problem]:
    """What the linter refuses of a reinforcement-learning stage; the layout's other rules are those of a phase."""
    key, grpo = f"grpo.{stage}", recipe.grpo[stage]
    layout = grpo.parallel
    if bool(grpo.prompts) == (grpo.builder is not None):
        rule = "there is nothing to answer" if not grpo.prompts else "a stage has either files or a builder"
        yield Problem(f"{key}.prompts", grpo.prompts, rule, f"e.g. {key}.prompts=[data/prompts.jsonl] and builder null")
    if (grpo.builder is None) != (grpo.max_prompts is None):
        rule = "a builder makes max_prompts prompts; files are read whole"
        yield Problem(f"{key}.max_prompts", grpo.max_prompts, rule, "a number with a builder, null with files")
    if not grpo.rewards:
        yield Problem(
            f"{key}.rewards",
            "{}",
            "nothing says what a good answer is",
            f"give {key}.rewards.domains, see training/rewards/plan.py",
        )
    yield from trainer_rules(grpo, layout, grpo.precision, key=key, parts=f"{key}.")
    try:
        seen = as_phase(recipe, stage)
    except RecipeError as error:
        yield Problem(f"{key}.rope_base", "null", str(error), "the model's")
        return
    for problem in phase_layout_rules(seen, stage, seen.phase[stage]):
        if problem.key.endswith("global_batch_samples"):
            continue  # said above, in prompts and samples
        yield replace(problem, key=_own(problem.key, stage), rule=_own(problem.rule, stage), remedy=_own(problem.remedy, stage))


def trainer_rules(grpo: Grpo, layout: Parallel, precision: Precision, *, key: str, parts: str) -> Iterator[Problem]:
    """What the trainer cannot do, in a recipe and in a job that was written without one.

    `key` is where the stage's settings lie, `parts` what stands before the keys of its layout and precision.
    """
    if layout.context > 1:
        yield Problem(
            f"{parts}parallel.context", layout.context, "inference keeps whole sequences", "1, with more tensor parallelism"
        )
    if layout.virtual_pipeline is not None:
        yield Problem(
            f"{parts}parallel.virtual_pipeline", layout.virtual_pipeline, "inference knows no interleaved schedule", "null"
        )
    if layout.overlap_param_gather:
        yield Problem(
            f"{parts}parallel.overlap_param_gather", True, "rollouts would read weights before they are gathered", "false"
        )
    if layout.loss_chunk_tokens is not None:
        rule = "the loss is computed from the logits of the responses, temperature and entropy included, not in chunks"
        yield Problem(f"{parts}parallel.loss_chunk_tokens", layout.loss_chunk_tokens, rule, "null")
    if precision.fp8_param_gather:
        yield Problem(
            f"{parts}precision.fp8_param_gather", True, "the reference's weights are swapped in as they are saved", "false"
        )
    if precision.fp8 is not None and grpo.rollout.engine == "megatron":
        rule = "single tokens are not decoded in FP8 here"
        yield Problem(f"{parts}precision.fp8", precision.fp8, rule, f"null, or {key}.rollout.engine=vllm with a server")
    if layout.gpus % layout.model_parallel:
        return  # a rule of every layout
    if grpo.prompts_per_step % layout.data:
        yield Problem(
            f"{key}.prompts_per_step",
            grpo.prompts_per_step,
            f"{layout.data} data-parallel ranks, which answer a share each, do not divide it",
            f"e.g. {layout.data * max(1, grpo.prompts_per_step // layout.data)}",
        )
    elif grpo.samples_per_optimizer_step % (layout.data * layout.micro_batch_samples):
        yield Problem(
            f"{parts}parallel.micro_batch_samples",
            layout.micro_batch_samples,
            f"x {layout.data} data-parallel ranks does not divide the {grpo.samples_per_optimizer_step} samples of an optimizer step",
            "e.g. 1",
        )


def _own(text: str, stage: str) -> str:
    """A message about the phase that stands for the stage, in the stage's own keys."""
    return text.replace(f"phase.{stage}.", f"grpo.{stage}.")
