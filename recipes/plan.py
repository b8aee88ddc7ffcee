"""What a recipe will cost and do, stage by stage, before anything is started: the numbers and the table of `quarry plan`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recipes.flops import flops_per_token, parameters
from recipes.gpus import PEAK_BF16_FLOPS
from recipes.grpo_stage import settings
from recipes.posttrain import GrpoStage
from recipes.schedules import first_peak_last
from recipes.schema import Phase, Recipe
from recipes.sft_options import Sft
from recipes.sft_stage import rope_base

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

ASSUMED_MFU = 0.40
"""Model FLOPs utilisation behind the times: Megatron-LM reports 41-48% for 2B to 462B on H100; a plan should not be beaten by weather."""
PLAN_WIDTH_COLUMNS = 120
"""Width of the table where there is no terminal to ask."""


@dataclass(frozen=True)
class PhasePlan:
    """What one phase computes."""

    first_lr: float
    peak_lr: float
    last_lr: float
    flops: float
    """Model FLOPs of the whole phase."""
    hours: float | None
    """Wall time at ASSUMED_MFU; None where the peak of a rank is not known (CPU)."""
    gpu_hours: float | None


def plan_phase(recipe: Recipe, stage: str) -> PhasePlan:
    """Learning rates, FLOPs and time of the phase `stage`."""
    phase = recipe.phase[stage]
    flops = phase.tokens * flops_per_token(recipe.model, phase.seq_length_tokens)
    peak = PEAK_BF16_FLOPS.get(recipe.cluster.gpu)
    gpu_hours = None if peak is None else flops / (peak * ASSUMED_MFU) / 3600
    hours = None if gpu_hours is None else gpu_hours / phase.parallel.gpus
    return PhasePlan(*first_peak_last(recipe, stage), flops=flops, hours=hours, gpu_hours=gpu_hours)


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


def layout_text(phase: Phase | Sft | GrpoStage) -> str:
    """'TP2+SP CP4 DP64': the dimensions that are not 1, data parallelism always."""
    layout = phase.parallel
    sizes = {"TP": layout.tensor, "PP": layout.pipeline, "VP": layout.virtual_pipeline or 1, "CP": layout.context}
    parts = {name: f"{name}{size}" for name, size in sizes.items() if size > 1}
    if layout.sequence_parallel and "TP" in parts:
        parts["TP"] += "+SP"
    recompute = [f"recompute {layout.recompute}"] if layout.recompute != "none" else []
    return " ".join([*parts.values(), f"DP{layout.data}", *recompute])


def lr_text(plan: PhasePlan) -> str:
    """First, peak where it is neither end, last: '0 → 2.00e-2 → 9.60e-4'."""
    values = [plan.first_lr, plan.peak_lr, plan.last_lr]
    if plan.peak_lr in (plan.first_lr, plan.last_lr):
        values = [plan.first_lr, plan.last_lr]
    return " → ".join(human_lr(v) for v in values)


def curriculum_table(recipe: Recipe) -> Table:
    """The whole curriculum, two lines per phase, one per merge and export. Needs a recipe that the linter has passed."""
    from rich import box
    from rich.table import Table

    on_gpu = recipe.cluster.gpu in PEAK_BF16_FLOPS
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, header_style="bold")
    table.add_column("stage", no_wrap=True)
    table.add_column("tokens\nsteps", justify="right", no_wrap=True)
    table.add_column("batch x length\nRoPE base", justify="right", no_wrap=True)
    table.add_column("schedule\nfirst, peak, last LR", no_wrap=True)
    table.add_column("mixture\nprecision", overflow="fold")
    table.add_column(f"layout\n{'GPUs' if on_gpu else 'ranks'}")
    table.add_column("FLOPs\ntime" if on_gpu else "FLOPs", justify="right", no_wrap=True)
    for stage in recipe.stages:
        kind = recipe.stage_kind(stage)
        if kind == "merge":
            inputs = "\n+ ".join(f"{weight:g} {name}" for name, weight in recipe.merge[stage].inputs.items())
            table.add_row(f"[dim]{stage}[/]", "", "", f"[dim]{inputs}[/]", "", "", "")
        elif kind == "sft":
            sft = recipe.sft[stage]
            table.add_row(
                f"[bold]{stage}[/]",
                f"{sft.epochs} epochs",
                f"{sft.global_batch_sequences} x {human_length(sft.seq_length_tokens)}\n{human_base(rope_base(recipe, stage))}",
                f"linear\n0 → {human_lr(sft.peak_lr)} → {human_lr(sft.end_lr)}",
                f"{len(sft.sources)} sources\n{sft.precision.name}",
                f"{layout_text(sft)}\n{sft.parallel.gpus}",
                "",
            )
        elif kind == "grpo":
            grpo = recipe.grpo[stage]
            base = settings(recipe, stage).rope_base
            table.add_row(
                f"[bold]{stage}[/]",
                f"{grpo.prompts_per_step} prompts\n{grpo.steps:,}",
                f"{grpo.samples_per_step} x {human_length(grpo.seq_length_tokens)}\n{human_base(base)}",
                f"constant\n{human_lr(grpo.learning_rate)}",
                f"rollouts ({grpo.rollout.engine})\n{grpo.precision.name}",
                f"{layout_text(grpo)}\n{grpo.parallel.gpus}",
                "",
            )
        elif kind == "export":
            table.add_row(f"[dim]{stage}[/]", "", "", "[dim]Hugging Face folder[/]", "", "", "")
        else:
            phase, plan = recipe.phase[stage], plan_phase(recipe, stage)
            jump = " [yellow](jump)[/]" if phase.schedule.jump else ""
            table.add_row(
                f"[bold]{stage}[/]",
                f"[bold]{human_tokens(phase.tokens_requested or phase.tokens)}[/]\n{phase.steps:,}",
                f"{phase.global_batch_samples} x {human_length(phase.seq_length_tokens)}\n{human_base(phase.rope_base)}",
                f"{phase.schedule.kind}{jump}\n{lr_text(plan)}",
                f"{phase.mixture.name}\n{phase.precision.name}",
                f"{layout_text(phase)}\n{phase.parallel.gpus}",
                f"{plan.flops:.1e}".replace("e+", "e") + (f"\n{human_hours(plan.hours)}" if on_gpu else ""),
            )
    return table


def mixture_table(recipe: Recipe) -> Table:
    """Percent of tokens per category and mixture; a mixture that several phases share is one column."""
    from rich import box
    from rich.table import Table

    columns: list[tuple[str, dict[str, float], list[str]]] = []
    for stage in recipe.stages:
        if stage in recipe.phase:
            mixture = recipe.phase[stage].mixture
            same = [stages for name, shares, stages in columns if (name, shares) == (mixture.name, mixture.shares_percent)]
            if same:
                same[0].append(stage)
            else:
                columns.append((mixture.name, mixture.shares_percent, [stage]))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, header_style="bold")
    table.add_column("percent of tokens")
    names = [name for name, _, _ in columns]
    for name, _, stages in columns:
        # Phases may change a mixture in different ways; then its columns say whose they are.
        table.add_column(name if names.count(name) == 1 else f"{name}\nin {', '.join(stages)}", justify="right")
    for category in categories(recipe):
        shares = [m.get(category, 0) for _, m, _ in columns]
        table.add_row(category, *(f"{round(s, 2):g}" if s else "[dim]·[/]" for s in shares))
    return table


def categories(recipe: Recipe) -> list[str]:
    """Categories that the curriculum draws, in the order in which phases introduce them."""
    names: dict[str, None] = {}
    for stage in recipe.stages:
        if stage in recipe.phase:
            names.update(dict.fromkeys(c for c, share in recipe.phase[stage].mixture.shares_percent.items() if share > 0))
    return list(names)


def notes(recipe: Recipe) -> Iterable[str]:
    """What the table cannot say: totals, assumptions, marked jumps, definitions that no stage uses."""
    plans = {s: plan_phase(recipe, s) for s in recipe.stages if s in recipe.phase}
    flops = sum(p.flops for p in plans.values())
    total = f"total: {human_tokens(recipe.total_tokens)} tokens, {flops:.2e} FLOPs".replace("e+", "e")
    if all(p.gpu_hours is not None for p in plans.values()):
        hours = sum(p.hours or 0 for p in plans.values())
        gpu_hours = sum(p.gpu_hours or 0 for p in plans.values())
        total += f", {human_hours(hours)}, {gpu_hours:,.0f} GPU-hours"
        yield total
        yield (
            f"times assume {ASSUMED_MFU:.0%} of the {recipe.cluster.gpu.upper()}'s {PEAK_BF16_FLOPS[recipe.cluster.gpu] / 1e12:.0f} dense bf16 "
            "TFLOP/s (no gain from FP8 counted) and no restarts; FLOPs are 6 N + causal attention per token, without recomputation"
        )
    else:
        yield total
    if recipe.model.mup_base_hidden_size:
        width = recipe.model.hidden_size / recipe.model.mup_base_hidden_size
        yield f"learning rates are base rates: muP divides them by {width:g} for the matrices inside the layers"
    for stage in plans:
        if jump := recipe.phase[stage].schedule.jump:
            yield f"{stage}: learning rate jumps: {jump}"
    unused = [s for s in [*recipe.phase, *recipe.merge, *recipe.sft, *recipe.grpo, *recipe.export] if s not in recipe.stages]
    if unused:
        yield f"defined but not in stages, so not run: {', '.join(unused)}"


def print_plan(recipe: Recipe, console: Console) -> None:
    """Print title, table, mixtures and notes of a linted recipe."""
    size = human_tokens(parameters(recipe.model))
    seconds = f"{recipe.model.name} ({size} parameters), data {recipe.data.name}, cluster {recipe.cluster.name} ({recipe.cluster.gpu})"
    console.print(f"[bold]{recipe.name}[/]: {seconds}", highlight=False)
    console.print(curriculum_table(recipe), highlight=False)
    console.print(mixture_table(recipe), highlight=False)
    for note in notes(recipe):
        console.print(f"- {note}", highlight=False)
