"""Refuses a recipe that would waste GPU-days: every rule that needs neither data nor a GPU, each with a value that would pass.

What is no rule: hidden_size = num_attention_heads * head_dim. Megatron and Hugging Face both take any head size.
The layout and FP8 rules are in `recipes.lint_layout`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from recipes.ab_stage import ab_rules
from recipes.grpo_stage import grpo_rules
from recipes.lint_layout import cluster_rules, model_rules, phase_layout_rules
from recipes.lint_memory import memory_rules
from recipes.problem import Problem
from recipes.schedules import first_peak_last, previous_phase
from recipes.schema import Phase, Recipe, RecipeError, initial_model
from recipes.sft_stage import sft_rules

SHARE_TOLERANCE_PERCENT = 1e-6
"""Slack on a sum of shares: binary floating point cannot add 16.6667 exactly."""
JUMP_TOLERANCE = 0.01
"""Relative step of the learning rate at a boundary that needs no mark: rounding of published values, not a decision."""


def lint(recipe: Recipe) -> list[Problem]:
    """All problems of a recipe, in the order of its stages; empty: it can be trained. Looks only at what `stages` names."""
    problems = [*stage_rules(recipe), *data_rules(recipe), *model_rules(recipe), *cluster_rules(recipe)]
    for stage in recipe.stages:
        if stage in recipe.phase:
            for rules in PHASE_RULES:
                problems += rules(recipe, stage, recipe.phase[stage])
            problems += phase_layout_rules(recipe, stage, recipe.phase[stage])
        elif stage in recipe.merge:
            problems += merge_rules(recipe, stage)
        elif stage in recipe.sft:
            problems += [*initial_rules(recipe, stage), *sft_rules(recipe, stage)]
        elif stage in recipe.grpo:
            problems += [*initial_rules(recipe, stage), *grpo_rules(recipe, stage)]
        elif stage in recipe.ab:
            problems += ab_rules(recipe, stage)
    told = {str(problem): problem for problem in problems}  # of what all stages share every one of them says the same
    return list(told.values()) or list(memory_rules(recipe))  # which counts on a layout that divides


def check(recipe: Recipe) -> None:
    """Raise RecipeError with all problems of `recipe`, one per line."""
    if problems := lint(recipe):
        lines = "\n".join(f"  {p}" for p in problems)
        raise RecipeError(f"recipe '{recipe.name}' is refused, {len(problems)} problem{'s' * (len(problems) > 1)}:\n{lines}")


def stage_rules(recipe: Recipe) -> Iterator[Problem]:
    listed = f"[{', '.join(recipe.stages)}]"
    if not recipe.stages:
        yield Problem(
            "stages", listed, "there is nothing to do", f"name stages, e.g. stages=[{','.join(recipe.phase) or 'foundation'}]"
        )
        return
    first = next((s for s in recipe.stages if s not in recipe.ab), recipe.stages[0])
    if first not in recipe.phase and initial_model(recipe, first) is None:
        remedy = "put a phase first"
        if first in recipe.sft or first in recipe.grpo:
            remedy += f", or give {recipe.stage_kind(first)}.{first}.initial, the folder of a model"
        yield Problem("stages", listed, f"the first stage, {first}, has no model to start from", remedy)
    for index, stage in enumerate(recipe.stages):
        if stage in recipe.export and index != len(recipe.stages) - 1:
            last = [s for s in recipe.stages if s != stage]
            yield Problem(
                "stages",
                listed,
                f"nothing can start from the export {stage}",
                f"put it last: stages=[{','.join([*last, stage])}]",
            )


def initial_rules(recipe: Recipe, stage: str) -> Iterator[Problem]:
    before, given = recipe.previous(stage), initial_model(recipe, stage)
    if before is not None and given is not None:
        rule = f"the stage starts from the model that {before} hands on"
        remedy = f"set it to null, or leave out the stages before {stage}"
        yield Problem(f"{recipe.stage_kind(stage)}.{stage}.initial", given, rule, remedy)


def tokens_rules(recipe: Recipe, stage: str, phase: Phase) -> Iterator[Problem]:
    key, per_step = f"phase.{stage}", phase.tokens_per_step
    exact = phase.steps * per_step
    product = f"{phase.steps} steps x {phase.global_batch_samples} samples x {phase.seq_length_tokens} tokens"
    if phase.tokens != exact:
        yield Problem(
            f"{key}.tokens", phase.tokens, f"is not {product} = {exact}", f"set {key}.steps=null, or {key}.tokens={exact}"
        )
    if phase.tokens_requested is not None and phase.tokens_requested < per_step:
        yield Problem(
            f"{key}.tokens",
            phase.tokens_requested,
            f"is less than one step of {per_step} tokens",
            f"ask for at least {per_step}",
        )


def schedule_rules(recipe: Recipe, stage: str, phase: Phase) -> Iterator[Problem]:
    key, schedule = f"phase.{stage}.schedule", phase.schedule
    if schedule.horizon_tokens is not None and schedule.horizon_tokens != phase.tokens:
        rule = f"the schedule would run over another number of tokens than the phase's {phase.tokens}"
        yield Problem(f"{key}.horizon_tokens", schedule.horizon_tokens, rule, f"set it to null or to {phase.tokens}")
    if schedule.warmup_tokens >= phase.tokens:
        rule = f"the warm-up is not over when the phase is ({phase.tokens} tokens)"
        yield Problem(
            f"{key}.warmup_tokens", schedule.warmup_tokens, rule, f"at most {phase.tokens // 10} would be a tenth of it"
        )
    uses = {
        "power": ({"power_amplitude", "power_exponent", "max_lr"}, set()),
        "exponential": ({"end_lr"}, {"start_lr"}),
        "linear": ({"end_lr"}, {"start_lr"}),
        "constant": (set(), {"start_lr"}),
    }
    needed, optional = uses[schedule.kind]
    missing = sorted(n for n in needed if getattr(schedule, n) is None)
    for name in missing:
        yield Problem(f"{key}.{name}", None, f"a {schedule.kind} schedule needs it", "give a number")
    for name in ("start_lr", "end_lr", "power_amplitude", "power_exponent", "max_lr"):
        value = getattr(schedule, name)
        if value is not None and name not in needed | optional:
            yield Problem(f"{key}.{name}", value, f"a {schedule.kind} schedule does not use it", f"set {key}.{name}=null")
    if schedule.power_exponent is not None and schedule.power_exponent >= 0:
        yield Problem(
            f"{key}.power_exponent", schedule.power_exponent, "the learning rate would not fall", "POWER's value is -0.51"
        )
    if missing:
        return
    try:
        first, peak, _ = first_peak_last(recipe, stage)
        before = previous_phase(recipe, stage)
        previous_last = first_peak_last(recipe, before)[2] if before else None
    except RecipeError as error:  # this or an earlier phase lacks a value; the earlier one's own turn names it
        if str(error).startswith(f"{key}."):
            where, _, why = str(error).partition(": ")
            rule, _, remedy = why.partition("; ")
            yield Problem(where, None, rule, remedy)
        return
    if peak == 0:
        rule = "the learning rate is zero over the whole phase"
        yield Problem(f"{key}.start_lr", schedule.start_lr, rule, f"give one above zero, and {key}.jump='REASON'")
        return
    jumps = previous_last is not None and abs(first - previous_last) > JUMP_TOLERANCE * max(first, previous_last)
    if jumps and not schedule.jump:
        rule = f"the learning rate jumps from {previous_last:.4g} (end of {before}) to {first:.4g} without a mark"
        remedy = f"continue with start_lr=null and warmup_tokens=0, or say why: {key}.jump='REASON'"
        if schedule.kind == "power":
            remedy = f"keep the tokens per step and the power schedule of the phase before, or say why: {key}.jump='REASON'"
        value = f"{first:.4g} at the first step" if schedule.warmup_tokens == 0 else f"{first:.4g} at the start of the warm-up"
        yield Problem(f"{key}.start_lr" if schedule.kind != "power" else key, value, rule, remedy)


def rope_rules(recipe: Recipe, stage: str, phase: Phase) -> Iterator[Problem]:
    key = f"phase.{stage}.rope_base"
    if phase.rope_base != int(phase.rope_base):
        rule = "Megatron's --rotary-base takes whole numbers"
        yield Problem(key, phase.rope_base, rule, f"set {key}={round(phase.rope_base)}")
    before = previous_phase(recipe, stage)
    if before and phase.rope_base < recipe.phase[before].rope_base:
        longer = phase.seq_length_tokens > recipe.phase[before].seq_length_tokens
        rule = f"falls from {recipe.phase[before].rope_base:g} in {before}{' while the length grows' * longer}: positions learned there break"
        yield Problem(key, f"{phase.rope_base:g}", rule, f"set {key}={recipe.phase[before].rope_base:.0f} or higher")


def mixture_rules(recipe: Recipe, stage: str, phase: Phase) -> Iterator[Problem]:
    key = f"phase.{stage}.mixture.shares_percent"
    shares = phase.mixture.shares_percent
    total = math.fsum(shares.values())
    if abs(total - 100) > SHARE_TOLERANCE_PERCENT:
        largest = max(shares, key=shares.__getitem__, default=None)
        fixed = round(shares[largest] + 100 - total, 6) if largest else None
        remedy = f"e.g. {key}.{largest}={fixed:g}" if fixed and fixed > 0 else "rescale the shares"
        yield Problem(key, f"{total:.10g} in total", f"the shares of mixture {phase.mixture.name} must sum to 100", remedy)
    for category, share in shares.items():
        sources = {n: s for n, s in recipe.data.sources.items() if s.category == category}
        if share > 0 and not sources:
            known = ", ".join(sorted({s.category for s in recipe.data.sources.values()}))
            rule = f"no source of data '{recipe.data.name}' has the category"
            yield Problem(f"{key}.{category}", share, rule, f"add one under data.sources, or use another category: {known}")
        weights = sum(s.weight for s in sources.values())
        for name, source in sources.items():
            samples = share / 100 * source.weight / weights * phase.samples
            if share > 0 and samples < 1:
                least = math.ceil(phase.steps / samples) if samples else phase.steps
                rule = f"source {name} gets {samples:.3g} of {phase.samples} samples, which rounds to none"
                yield Problem(
                    f"{key}.{category}",
                    share,
                    rule,
                    f"at least {least} steps would give it one sample; or drop the category or the source",
                )


def documents_rules(recipe: Recipe, stage: str, phase: Phase) -> Iterator[Problem]:
    if phase.restart_positions and not phase.documents_apart:
        key = f"phase.{stage}.restart_positions"
        rule = "where documents see each other Megatron's RoPE has one count of positions per sample, so that it has no effect"
        yield Problem(key, True, rule, f"set {key}=false, or phase.{stage}.documents_apart=true")


PHASE_RULES: list[Callable[[Recipe, str, Phase], Iterator[Problem]]] = [
    tokens_rules,
    schedule_rules,
    rope_rules,
    mixture_rules,
    documents_rules,
]


def merge_rules(recipe: Recipe, stage: str) -> Iterator[Problem]:
    key, inputs = f"merge.{stage}.inputs", recipe.merge[stage].inputs
    before = [s for s in recipe.stages[: recipe.stages.index(stage)] if s not in recipe.export]
    total = math.fsum(inputs.values())
    if abs(total - 1) > 1e-9:
        scaled = ", ".join(f"{n}: {w / total:.6g}" for n, w in inputs.items())
        yield Problem(key, f"{total:.10g} in total", "the weights of a merge must sum to 1", f"e.g. {{{scaled}}}")
    wrong = [name for name in inputs if name not in before]
    for name in wrong:
        rule = "an input of a merge must be an earlier phase or merge of this curriculum"
        yield Problem(f"{key}.{name}", inputs[name], rule, f"earlier stages: {', '.join(before) or 'none'}")
    if len(inputs) < 2:
        yield Problem(key, dict(inputs), "a merge needs two inputs at least", "add one, or drop the merge from stages")
    elif not wrong and max(inputs, key=before.index) != list(inputs)[-1]:
        newest = max(inputs, key=before.index)
        rule = "Adam's moments are taken from the last input, which must be the newest model"
        yield Problem(key, f"[{', '.join(inputs)}]", rule, f"name {newest} last")


def data_rules(recipe: Recipe) -> Iterator[Problem]:
    data = recipe.data
    if data.tokenizer.vocab_size > recipe.model.vocab_size:
        rule = f"the tokenizer has more entries than model {recipe.model.name} has embedding rows ({recipe.model.vocab_size})"
        yield Problem("data.tokenizer.vocab_size", data.tokenizer.vocab_size, rule, f"at most {recipe.model.vocab_size}")
    if data.tokenizer.path is None and data.tokenizer.train_max_bytes is None:
        rule = "without a path a tokenizer is trained, on this much text"
        yield Problem("data.tokenizer.train_max_bytes", None, rule, "e.g. 1000000000, or set data.tokenizer.path")
    for name, source in data.sources.items():
        needs = "builder" if source.kind == "builtin" else "paths"
        if not getattr(source, needs):
            example = "e.g. stdlib_code" if needs == "builder" else "e.g. [data/raw/NAME/*.jsonl]"
            yield Problem(
                f"data.sources.{name}.{needs}", getattr(source, needs), f"a source of kind {source.kind} needs it", example
            )
