"""What a recipe will cost and do, stage by stage, before anything is started: the numbers and the table of `quarry plan`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recipes.ab_arms import ARMS, arm_phase
from recipes.estimates import StageEstimate, estimates, gpu_of, stage_phase, total
from recipes.flops import flops_per_token, parameters
from recipes.schedules import first_peak_last
from recipes.schema import Phase, Recipe

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PLAN_WIDTH_COLUMNS = 120
"""Width of the table where there is no terminal to ask."""
SCHEDULES = {"power": "power", "exponential": "exp", "linear": "linear", "constant": "const"}


@dataclass(frozen=True)
class PhasePlan:
    """What one phase computes."""

    first_lr: float
    peak_lr: float
    last_lr: float
    flops: float
    """Model FLOPs of the whole phase."""


def plan_phase(recipe: Recipe, stage: str) -> PhasePlan:
    """Learning rates and FLOPs of the phase `stage`."""
    phase = recipe.phase[stage]
    return PhasePlan(
        *first_peak_last(recipe, stage), flops=phase.tokens * flops_per_token(recipe.model, phase.seq_length_tokens)
    )


def human_tokens(tokens: float, digits: int = 3) -> str:
    """10_000_000_876_544 -> '10T', 245_760 -> '246K'."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if tokens >= unit * 0.9995:
            return f"{tokens / unit:.{digits}g}{name}"
    return f"{tokens:.0f}"


def human_length(tokens: int) -> str:
    """Sequence lengths in units of 1024 where they are whole: 131072 -> '128K', 128 -> '128'."""
    return f"{tokens // 1024}K" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def human_base(base: float) -> str:
    return human_tokens(base)


def human_lr(lr: float) -> str:
    """0.0009602 -> '9.60e-4', 0 -> '0'."""
    if lr == 0:
        return "0"
    mantissa, exponent = f"{lr:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def human_hours(hours: float | None) -> str:
    if hours is None:
        return "-"
    return f"{hours / 24:.1f} d" if hours >= 48 else f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.0f} min"


def human_dollars(dollars: float) -> str:
    """1_738_541 -> '$1.74M', 90 -> '$90'."""
    return f"${human_tokens(dollars)}"


def layout_text(phase: Phase) -> str:
    """'TP2+SP CP4 DP64 mb2': the dimensions that are not 1, data parallelism always; then what of the layers is computed again."""
    layout = phase.parallel
    sizes = {"TP": layout.tensor, "PP": layout.pipeline, "VP": layout.virtual_pipeline or 1, "CP": layout.context}
    parts = {name: f"{name}{size}" for name, size in sizes.items() if size > 1}
    if layout.sequence_parallel and "TP" in parts:
        parts["TP"] += "+SP"
    micro = [f"mb{layout.micro_batch_samples}"] if layout.micro_batch_samples > 1 else []
    recompute = [f"rc {layout.recompute}"] if layout.recompute != "none" else []
    return " ".join([*parts.values(), f"DP{layout.data}", *micro, *recompute])


def lr_text(plan: PhasePlan) -> str:
    """First, peak where it is neither end, last: '0→2.00e-2→9.60e-4'."""
    values = [plan.first_lr, plan.peak_lr, plan.last_lr]
    if plan.peak_lr in (plan.first_lr, plan.last_lr):
        values = [plan.first_lr, plan.last_lr]
    return "→".join(human_lr(v) for v in values)


def curriculum_table(recipe: Recipe, every: Sequence[StageEstimate]) -> Table:
    """One line per stage that trains, and their sum. Needs a recipe that the linter has passed."""
    from rich.table import Table

    gpu, sums = gpu_of(recipe), total(list(every))
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("stage\n", no_wrap=True)
    for name in ("tokens\n", "batch x\nlength", "RoPE\nbase"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("schedule\nfirst, peak, last LR", overflow="fold")
    table.add_column("layout\n", overflow="fold")
    table.add_column("GPUs\n" if gpu else "ranks\n", justify="right", no_wrap=True)
    memory = f"GB of\n{gpu.memory_bytes / 1e9:.0f}" if gpu else ""
    columns = [memory, "GFLOP\n/token", "tok/s\n/GPU", "MFU\n", "time\n", "GPU-h\n", "cost\n"] if gpu else ["GFLOP\n/token"]
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for each in every:
        phase = stage_phase(recipe, each.stage)
        if phase is None:
            continue
        cells = [
            f"[bold]{each.stage}[/]",
            "-"
            if each.tokens is None
            else f"[bold]{human_tokens((each.kind == 'phase' and phase.tokens_requested) or each.tokens)}[/]",
            f"{phase.global_batch_samples}x{human_length(phase.seq_length_tokens)}",
            human_base(phase.rope_base),
            _schedule_text(recipe, each),
            layout_text(phase),
            f"{phase.parallel.gpus}",
        ]
        table.add_row(*cells, *(_figures(each) if gpu else _figures(each)[1:2]))
    if sums:
        blank = [""] * 9
        figures = [human_hours(sums.hours), human_tokens(sums.gpu_hours), human_dollars(sums.cost)]
        table.add_row("total", human_tokens(recipe.total_tokens), *blank, *figures, style="bold")
    return table


def _schedule_text(recipe: Recipe, each: StageEstimate) -> str:
    """'power 0→2.00e-2→9.60e-4'"""
    if each.kind == "phase":
        schedule = recipe.phase[each.stage].schedule
        jump = " [yellow]jump[/]" if schedule.jump else ""
        return f"{SCHEDULES[schedule.kind]} {lr_text(plan_phase(recipe, each.stage))}{jump}"
    if each.kind == "sft":
        sft = recipe.sft[each.stage]
        return f"linear 0→{human_lr(sft.peak_lr)}→{human_lr(sft.end_lr)}"
    if each.kind == "ab":
        return f"gate, {recipe.ab[each.stage].steps:,} steps twice"
    return f"const {human_lr(recipe.grpo[each.stage].learning_rate)}"


def _figures(each: StageEstimate) -> list[str]:
    """Memory, FLOPs per token, speed, MFU, time, GPU-hours and cost; '-' for what is not known."""

    def text(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    return [
        text(None if each.memory_bytes is None else each.memory_bytes / 1e9, "{:.0f}"),
        text(None if each.flops_per_token is None else each.flops_per_token / 1e9, "{:.3g}"),
        text(each.tokens_per_second_per_gpu, "{:,.0f}"),
        text(each.mfu, "{:.0%}"),
        human_hours(each.hours),
        "-" if each.gpu_hours is None else human_tokens(each.gpu_hours),
        "-" if each.cost is None else human_dollars(each.cost),
    ]


def mixtures(recipe: Recipe) -> Iterable[tuple[list[str], str, dict[str, float]]]:
    """(phases, name, percent per category) of each mixture; phases that share one are listed together."""
    found: list[tuple[list[str], str, dict[str, float]]] = []
    for stage in recipe.stages:
        if stage in recipe.phase:
            mixture = recipe.phase[stage].mixture
            same = [stages for stages, name, shares in found if (name, shares) == (mixture.name, mixture.shares_percent)]
            if same:
                same[0].append(stage)
            else:
                found.append(([stage], mixture.name, mixture.shares_percent))
    return found


def mixture_lines(recipe: Recipe) -> Iterable[str]:
    """'foundation: web 59, code 20, ...': percent of tokens, largest first; the phases that draw it where they are not of its name."""
    for stages, name, shares in mixtures(recipe):
        parts = [f"{category} {round(share, 2):g}" for category, share in sorted(shares.items(), key=lambda s: -s[1]) if share]
        users = "" if stages == [name] else f" (in {', '.join(stages)})"
        yield f"[bold]{name}[/]{users}: {', '.join(parts)}"


def categories(recipe: Recipe) -> list[str]:
    """Categories that the curriculum draws, in the order in which phases introduce them."""
    names: dict[str, None] = {}
    for stage in recipe.stages:
        if stage in recipe.phase:
            names.update(dict.fromkeys(c for c, share in recipe.phase[stage].mixture.shares_percent.items() if share > 0))
    return list(names)


def notes(recipe: Recipe, every: Sequence[StageEstimate] | None = None) -> Iterable[str]:
    """What the table cannot say: what is not counted, precisions, merges, marked jumps, definitions that no stage uses."""
    every = estimates(recipe) if every is None else every
    gpu, sums = gpu_of(recipe), total(list(every))
    flops = sum(e.flops for e in every if e.kind == "phase" and e.flops)
    yield f"phases: {human_tokens(recipe.total_tokens)} tokens, {flops:.2e} FLOPs (6 N + causal attention)".replace("e+", "e")
    if gpu and sums:
        yield (
            f"times: recipes/throughput.py, fitted on published runs, off by 3% on those and 5% on others (docs/planning.md); MFU of "
            f"{gpu.peak_bf16_flops / 1e12:.0f} dense bf16 TFLOP/s; no saves, start-up or restarts"
        )
    reasons: dict[str, list[str]] = {}
    for each in every:
        if each.unknown and each.kind in ("sft", "grpo"):
            reasons.setdefault(each.unknown, []).append(each.stage)
    if reasons:
        yield f"not in the total: {'; '.join(f'{", ".join(stages)} ({reason})' for reason, stages in reasons.items())}"
    apart = [s for s in recipe.stages if s in recipe.sft or (s in recipe.phase and recipe.phase[s].documents_apart)]
    if apart:
        yield from _documents_notes(apart, every)
    yield from _post_training_notes(recipe)
    precisions: dict[str, list[str]] = {}
    for stage in recipe.stages:
        if phase := stage_phase(recipe, stage):
            precisions.setdefault(phase.precision.name, []).append(stage)
    texts = [name if len(precisions) == 1 else f"{name} in {', '.join(stages)}" for name, stages in precisions.items()]
    yield f"precision: {'; '.join(texts)}"
    for stage in (s for s in recipe.stages if s in recipe.ab):
        gate = recipe.ab[stage]
        phases = [arm_phase(recipe, stage, name) for name in ARMS]
        arms = " and with ".join(f"{phase.precision.name} {layout_text(phase)}" for phase in phases)
        yield f"{stage}: gate, {gate.steps:,} steps of {gate.phase} with {arms}, apart by at most {gate.tolerance_percent:g}%"
    merges = [s for s in recipe.stages if s in recipe.merge]
    inputs = {s: " + ".join(f"{w:g} {name}" for name, w in recipe.merge[s].inputs.items()) for s in merges}
    parts = [
        *(f"{s} = {text}" for s, text in inputs.items()),
        *(f"{s} (Hugging Face)" for s in recipe.stages if s in recipe.export),
    ]
    if parts:
        yield f"minutes on one node: {'; '.join(parts)}"
    if recipe.model.mup_base_hidden_size:
        width = recipe.model.hidden_size / recipe.model.mup_base_hidden_size
        yield f"learning rates are base rates: muP divides them by {width:g} for the matrices inside the layers"
    for stage in recipe.stages:
        if stage in recipe.phase and (jump := recipe.phase[stage].schedule.jump):
            yield f"{stage}: learning rate jumps: {jump}"
    unused = [
        s
        for s in [*recipe.phase, *recipe.merge, *recipe.sft, *recipe.grpo, *recipe.ab, *recipe.export]
        if s not in recipe.stages
    ]
    if unused:
        yield f"defined but not in stages, so not run: {', '.join(unused)}"


def _documents_notes(apart: Sequence[str], every: Sequence[StageEstimate]) -> Iterable[str]:
    """How the documents of the phases in `apart` are counted."""
    counted = {e.stage: e for e in every if e.stage in apart and e.attended_tokens is not None}
    if counted:
        each = [f"{s} {human_tokens(e.attended_tokens or 0)} + {e.padding_share:.1%} padding" for s, e in counted.items()]
        yield f"documents stay apart, counted by their own lengths; mean length around a token: {', '.join(each)}"
    reasons: dict[str, list[str]] = {}
    for each in every:
        if each.stage in apart and each.lengths_unknown:
            reasons.setdefault(each.lengths_unknown, []).append(each.stage)
    for reason, stages in reasons.items():
        yield (
            f"documents stay apart in {', '.join(stages)}, attention is counted over whole samples ({reason}): FLOPs, time and cost are "
            "upper bounds"
        )


def _post_training_notes(recipe: Recipe) -> Iterable[str]:
    parts = []
    rounds: dict[str, list[str]] = {}
    for stage in recipe.stages:
        if stage in recipe.sft:
            sft = recipe.sft[stage]
            parts.append(f"{stage} {sft.epochs} epochs of {len(sft.sources)} source{'s' * (len(sft.sources) != 1)}")
        elif stage in recipe.grpo:
            grpo = recipe.grpo[stage]
            what = f"steps of {grpo.prompts_per_step} prompts x {grpo.samples_per_prompt}, rollouts ({grpo.rollout.engine})"
            rounds.setdefault(what, []).append(f"{stage} {grpo.steps:,}")
    parts += [f"{', '.join(stages)} {what}" for what, stages in rounds.items()]
    if parts:
        yield f"post-training: {'; '.join(parts)}"


def print_plan(
    recipe: Recipe, console: Console, every: Sequence[StageEstimate] | None = None, price_per_gpu_hour: float | None = None
) -> None:
    """Print title, table, mixtures and notes of a linted recipe."""
    every = estimates(recipe, price_per_gpu_hour=price_per_gpu_hour) if every is None else every
    size, gpu = human_tokens(parameters(recipe.model)), gpu_of(recipe)
    price = (gpu.price_per_hour if price_per_gpu_hour is None else price_per_gpu_hour) if gpu else None
    where = f"cluster {recipe.cluster.name} ({recipe.cluster.gpu}" + (f", ${price:.2f} an hour)" if price is not None else ")")
    console.print(
        f"[bold]{recipe.name}[/]: {recipe.model.name} ({size} parameters), data {recipe.data.name}, {where}", highlight=False
    )
    console.print(curriculum_table(recipe, every), highlight=False)
    console.print("percent of tokens:", highlight=False)
    for line in mixture_lines(recipe):
        console.print(line, highlight=False)
    for note in notes(recipe, every):
        console.print(f"- {note}", highlight=False)
