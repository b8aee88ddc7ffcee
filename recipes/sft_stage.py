"""An SFT stage as Megatron sees it, a phase over packed sequences; and its rules for the linter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from recipes.lint_layout import packed_rules, phase_layout_rules
from recipes.problem import Problem
from recipes.schedules import previous_phase
from recipes.schema import Mixture, Phase, Recipe, RecipeError, Schedule
from recipes.sft_options import Sft


def rope_base(recipe: Recipe, stage: str) -> float:
    """The stage's own RoPE base, else that of the phase before; RecipeError without either."""
    own = recipe.sft[stage].rope_base
    if own is not None:
        return own
    before = previous_phase(recipe, stage)
    if before is None:
        raise RecipeError(f"sft.{stage}.rope_base: no phase comes before that it could be taken from; give the model's")
    return recipe.phase[before].rope_base


def as_phase(recipe: Recipe, stage: str, sequences: int) -> Recipe:
    """`recipe` with `stage` as a phase of its packed sequences, `sequences` per epoch: what arguments, learning rate and hooks take.

    tokens counts places, padding included, as Megatron does. The mixture is empty.
    """
    sft = recipe.sft[stage]
    steps = sft.steps(sequences)
    per_step = sft.global_batch_sequences * sft.seq_length_tokens
    # Whole steps, so that the first step after the warm-up has the peak. Never all of them: the decay needs one.
    warmup_steps = min(math.ceil(sft.warmup_percent / 100 * steps), steps - 1)
    phase = Phase(
        title=sft.title,
        tokens=steps * per_step,
        steps=steps,
        seq_length_tokens=sft.seq_length_tokens,
        rope_base=rope_base(recipe, stage),
        global_batch_samples=sft.global_batch_sequences,
        mixture=Mixture(name="sft", shares_percent={}),
        schedule=_schedule(sft, steps, warmup_steps, per_step),
        parallel=sft.parallel,
        precision=sft.precision,
        optimizer=sft.optimizer,
        save_interval_steps=sft.save_interval_steps,
        keep_checkpoints=sft.keep_checkpoints,
        log_interval_steps=sft.log_interval_steps,
        exit_after_minutes=sft.exit_after_minutes,
    )
    others = {name: s for name, s in recipe.sft.items() if name != stage}
    return recipe.model_copy(update={"phase": {**recipe.phase, stage: phase}, "sft": others})


def _schedule(sft: Sft, steps: int, warmup_steps: int, per_step: int) -> Schedule:
    """Warm-up to peak_lr, then a straight line to end_lr at the end.

    The line of recipes.schedules begins at the stage's first token, so that its start lies above the peak by the share of the warm-up.
    """
    share = warmup_steps / steps
    start = sft.end_lr + (sft.peak_lr - sft.end_lr) / (1 - share)
    return Schedule(
        kind="linear",
        start_lr=start,
        end_lr=sft.end_lr,
        warmup_tokens=warmup_steps * per_step,
        jump="fine-tuning has a rate of its own",
    )


def sft_rules(recipe: Recipe, stage: str) -> Iterator[Problem]:
    """What the linter refuses of an SFT stage; the layout's rules are those of a phase."""
    key, sft = f"sft.{stage}", recipe.sft[stage]
    if not sft.sources:
        yield Problem(
            f"{key}.sources", "{}", "there is nothing to learn from", f"e.g. +{key}.sources.chat.paths=[data/chat/*.jsonl]"
        )
    for name, source in sft.sources.items():
        where = f"{key}.sources.{name}"
        if bool(source.paths) == (source.builder is not None):
            rule = "a source has either files or a builder"
            yield Problem(f"{where}.paths", source.paths, rule, "e.g. [data/chat/*.jsonl] and builder null")
        if (source.builder is None) != (source.max_samples is None):
            rule = "says how many samples a builder makes, and nothing else"
            yield Problem(f"{where}.max_samples", source.max_samples, rule, "e.g. 1000 with a builder, null with paths")
    if sft.warmup_percent >= 100:
        yield Problem(f"{key}.warmup_percent", sft.warmup_percent, "the warm-up would not be over when the stage is", "e.g. 3")
    if sft.end_lr > sft.peak_lr:
        yield Problem(f"{key}.end_lr", sft.end_lr, f"the learning rate would rise from peak_lr {sft.peak_lr:g}", "e.g. 0")
    for name in ("heldout_percent", "max_refused_percent"):
        if getattr(sft, name) > 100:
            yield Problem(f"{key}.{name}", getattr(sft, name), "is more than all samples", "at most 100")
    if sft.parallel.micro_batch_samples != 1:
        rule = "samples are packed into one sequence per micro batch"
        remedy = f"set it to 1; a longer {key}.seq_length_tokens does what a larger micro batch would"
        yield Problem(f"{key}.parallel.micro_batch_samples", sft.parallel.micro_batch_samples, rule, remedy)
    pieces = 2 * sft.parallel.context if sft.parallel.context > 1 else 1
    if sft.multiple_tokens % pieces:
        rule = f"context parallelism cuts every sample into 2 x context {sft.parallel.context} pieces"
        near = -(-sft.multiple_tokens // pieces) * pieces
        yield Problem(f"{key}.pack_multiple_tokens", sft.multiple_tokens, rule, f"set it to {near}, or to null")
    if sft.seq_length_tokens % sft.multiple_tokens:
        rule = f"is no multiple of what a sample takes up, {sft.multiple_tokens} tokens (pack_multiple_tokens)"
        near = -(-sft.seq_length_tokens // sft.multiple_tokens) * sft.multiple_tokens
        yield Problem(f"{key}.seq_length_tokens", sft.seq_length_tokens, rule, f"e.g. {near}")
    yield from packed_rules(recipe, f"{key}.parallel", sft.parallel)
    before = previous_phase(recipe, stage)
    if sft.rope_base is not None:
        if sft.rope_base != int(sft.rope_base):
            yield Problem(
                f"{key}.rope_base",
                sft.rope_base,
                "Megatron's --rotary-base takes whole numbers",
                f"set it to {round(sft.rope_base)}",
            )
        if before and sft.rope_base < recipe.phase[before].rope_base:
            rule = f"falls from {recipe.phase[before].rope_base:g} in {before}: positions learned there break"
            yield Problem(f"{key}.rope_base", f"{sft.rope_base:g}", rule, "set it to null: that of the phase before")
    elif before is None:
        yield Problem(f"{key}.rope_base", None, "no phase comes before that it could be taken from", "give the model's")
    later = [s for s in recipe.stages[recipe.stages.index(stage) + 1 :] if s in recipe.phase or s in recipe.merge]
    if later:
        rule = f"pre-training would go on after fine-tuning, with {', '.join(later)}"
        yield Problem("stages", f"[{', '.join(recipe.stages)}]", rule, f"put {stage} behind {later[-1]}")
    if (sft.rope_base is None and before is None) or sft.end_lr > sft.peak_lr:
        return  # no phase can be made of it; what its layout breaks is said once this is mended
    seen = as_phase(recipe, stage, sequences=sft.global_batch_sequences)
    for problem in phase_layout_rules(seen, stage, seen.phase[stage]):
        yield replace(problem, key=_own(problem.key, stage), rule=_own(problem.rule, stage), remedy=_own(problem.remedy, stage))


def _own(text: str, stage: str) -> str:
    """A message about the phase that stands for the stage, in the stage's own keys."""
    return text.replace(f"phase.{stage}.", f"sft.{stage}.").replace("global_batch_samples", "global_batch_sequences")
