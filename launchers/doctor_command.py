"""`quarry doctor`: what this machine has, and where the recipe asked for can run from here."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launchers.doctor import SETUP, Findings, Gpu, Machine, examine
from launchers.recipe_arguments import add_recipe_arguments

if TYPE_CHECKING:
    from recipes.schema import Precision, Recipe

EPILOG = """examples:
  quarry doctor                                                     can the smoke curriculum train here, on CPU?
  quarry doctor cluster=local cluster.gpu=h100                      and on this machine's GPUs?
  quarry doctor curriculum=five_phase cluster=slurm                 can this login node submit the five phases?
  quarry doctor curriculum=five_phase model=granite_4_1_3b precision=fp8_tensorwise cluster=slurm
  quarry doctor --json > machine.json                               to attach to a report

Without a curriculum it asks about curriculum=smoke (cluster=local). The other ways to run the same recipe are judged too.
"missing" is absent or unusable, and matters if the recipe needs it; "warning" never keeps a recipe from running.
Nothing is changed, no package is imported, and no command is waited for longer than 10 s.

exit codes: 0 the recipe can run as asked; 1 it cannot, and the lines say why; 2 the recipe or the command is wrong.
"""
EXIT_CANNOT = 1
JSON_FORMAT = "quarry.doctor/1"
DEFAULT_CURRICULUM = "curriculum=smoke"

Kind = Literal["local CPU", "local GPU", "docker", "slurm"]
INSTALLED = ("python", "torch", "megatron-core", "nemo-run", "leptonai", "other packages")
FOLDERS = ("disk runs", "disk data")
NEEDS: dict[Kind, tuple[str, ...]] = {
    "local CPU": (*INSTALLED, *FOLDERS),
    "local GPU": (*INSTALLED, *FOLDERS, "transformer-engine", "driver", "gpus"),
    "docker": (*INSTALLED, *FOLDERS, "driver", "gpus", "docker"),
    "slurm": (*INSTALLED, *FOLDERS, "slurm client", "munge"),
}
"""The lines that must not be "missing". A login node needs no GPU, and the image of a container brings Transformer Engine along."""
ON_GPUS = ("driver", "gpus")
"""What of these the ranks' GPUs need: nothing of it with cluster.gpu=cpu."""
LEAST_CAPABILITY = {"bf16": (8, 0), "fp8": (9, 0), "mxfp8": (10, 0)}
"""Compute capability that a precision needs: Ampere, Hopper, Blackwell. FP8 on Ada (8.9) is not counted: no recipe is meant for it."""
CPU_BYTES_PER_PARAMETER = 16
"""fp32 weights, gradients and two moments of Adam."""
MAX_REASONS = 3
"""Shown of one verdict: a layout that does not fit is refused once per phase, and three of these say it."""
COLORS = {"ok": "32", "warning": "33", "missing": "31"}


@dataclass(frozen=True)
class Verdict:
    """Whether a recipe can run in one way."""

    kind: Kind
    asked: bool
    missing: list[str]
    """Names of lines."""
    reasons: list[str]
    """What else is in the way, each with its remedy."""

    @property
    def can_run(self) -> bool:
        return not self.missing and not self.reasons


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "doctor",
        help="what this machine has and lacks, and whether a recipe can run here",
        description="Look at this machine and say whether a recipe can run on it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_recipe_arguments(parser, "curriculum=five_phase or cluster=slurm")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    return parser


def run(args: argparse.Namespace, machine: Machine | None = None) -> int:
    """Returns 0 or EXIT_CANNOT; RecipeError (exit code 2) for overrides that do not compose."""
    overrides = list(args.overrides)
    if not any(o.lstrip("+").startswith("curriculum=") for o in overrides):
        overrides.insert(0, DEFAULT_CURRICULUM)
    try:
        from recipes.compose import compose

        recipe = compose(overrides, args.config_dir)
        findings = examine(machine or Machine(), Path(recipe.cluster.runs_root), Path(recipe.data.root))
        verdicts = judge(recipe, findings)
    except ImportError as error:  # the environment that a doctor is called for
        print(f"quarry: {error}; {SETUP}", file=sys.stderr)
        return EXIT_CANNOT
    asked = next(v for v in verdicts if v.asked)
    if args.json:
        print(json.dumps(as_json(recipe, findings, verdicts), indent=1))
    else:
        show(recipe, findings, verdicts)
    return 0 if asked.can_run else EXIT_CANNOT


def kind_of(recipe: Recipe) -> Kind:
    if recipe.cluster.kind == "local":
        return "local CPU" if recipe.cluster.gpu == "cpu" else "local GPU"
    return recipe.cluster.kind


def judge(recipe: Recipe, findings: Findings) -> list[Verdict]:
    """One verdict per kind of cluster; the one that the recipe asks for is marked."""
    from recipes.lint import lint

    verdicts = []
    for kind in NEEDS:
        asked = kind == kind_of(recipe)
        there = recipe if asked else _moved(recipe, kind, findings.gpus)
        needed = [name for name in NEEDS[kind] if kind != "docker" or there.cluster.gpu != "cpu" or name not in ON_GPUS]
        missing = [name for name in needed if findings.line(name).state == "missing"]
        reasons: list[str] = []
        options = recipe.cluster.options if asked else {}
        if kind == "local CPU":
            reasons += _cpu_reasons(there, findings)
        if kind in ("local GPU", "docker") and there.cluster.gpu != "cpu" and findings.gpus:
            reasons += _gpu_reasons(there, findings.gpus)
        if kind == "docker" and asked and not options.get("container_image"):
            target = "cpu" if recipe.cluster.gpu == "cpu" else "gpu"
            build = f"docker build --target {target} -t quarry:{target} ."
            reasons.append(f"cluster.options.container_image = null: no image; `{build}`, then set it to quarry:{target}")
        if kind == "slurm" and options.get("container_image") and findings.line("pyxis").state == "missing":
            missing.append("pyxis")
        reasons += [str(problem) for problem in lint(there)]
        verdicts.append(Verdict(kind, asked, missing, reasons))
    return verdicts


def _moved(recipe: Recipe, kind: Kind, gpus: list[Gpu]) -> Recipe:
    """The recipe on the published cluster of another kind, with the GPUs of this machine if it is a local one."""
    import yaml

    from recipes.compose import TREE
    from recipes.schema import Cluster

    name = kind.split()[0]
    cluster = Cluster.model_validate(yaml.safe_load((TREE / "cluster" / f"{name}.yaml").read_text(encoding="utf-8")))
    if kind == "local GPU":
        present = gpus[0].name.lower() if gpus else ""
        known = next((gpu for gpu in ("gb200", "b200", "h200", "h100") if gpu in present), "h100")
        cluster = cluster.model_copy(update={"gpu": known, "gpus_per_node": len(gpus) or cluster.gpus_per_node})
    return recipe.model_copy(update={"cluster": cluster})


def _cpu_reasons(recipe: Recipe, findings: Findings) -> list[str]:
    from recipes.flops import parameters

    needed_gb = parameters(recipe.model) * CPU_BYTES_PER_PARAMETER / 1e9
    if needed_gb <= findings.memory_gb:
        return []
    return [
        f"model = {recipe.model.name}: weights, gradients and moments take {needed_gb:.0f} GB, and there are {findings.memory_gb:.0f} GB; "
        "take model=tiny"
    ]


def _gpu_reasons(recipe: Recipe, gpus: list[Gpu]) -> list[str]:
    reasons = []
    phases = {stage: recipe.phase[stage] for stage in recipe.stages if stage in recipe.phase}
    ranks = {stage: phase.parallel.gpus for stage, phase in phases.items()}
    largest = max(ranks, key=ranks.__getitem__, default=None)  # no phase: the linter says it
    if largest and ranks[largest] > len(gpus):
        reasons.append(
            f"phase.{largest}.parallel.gpus = {ranks[largest]}: {len(gpus)} here; "
            f"a smaller layout (parallel@phase.{largest}.parallel=single), or cluster=slurm"
        )
    weakest = min(gpus, key=lambda gpu: gpu.capability)
    for name, stages in _by_precision(phases).items():
        least = _least_capability(phases[stages[0]].precision)
        if weakest.capability < least:
            found = ".".join(map(str, weakest.capability))
            reasons.append(
                f"precision = {name} ({', '.join(stages)}): needs compute capability {least[0]}.{least[1]}, {weakest.name} has {found}; "
                f"take precision={'bf16' if weakest.capability >= LEAST_CAPABILITY['bf16'] else 'fp32'}"
            )
    return reasons


def _by_precision(phases: dict[str, Any]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for stage, phase in phases.items():
        names.setdefault(phase.precision.name, []).append(stage)
    return names


def _least_capability(precision: Precision) -> tuple[int, int]:
    if precision.fp8 is not None:
        return LEAST_CAPABILITY["mxfp8" if precision.fp8 == "mxfp8" else "fp8"]
    return LEAST_CAPABILITY["bf16"] if precision.dtype == "bf16" else (0, 0)


def as_json(recipe: Recipe, findings: Findings, verdicts: list[Verdict]) -> dict[str, Any]:
    return {
        "format": JSON_FORMAT,
        "recipe": _called(recipe),
        "can_run": next(v.can_run for v in verdicts if v.asked),
        "lines": [asdict(line) for line in findings.lines],
        "verdicts": [{**asdict(v), "can_run": v.can_run} for v in verdicts],
    }


def _called(recipe: Recipe) -> str:
    precisions = _by_precision({s: recipe.phase[s] for s in recipe.stages if s in recipe.phase})
    return f"curriculum={recipe.name} model={recipe.model.name} precision={','.join(precisions)} cluster={recipe.cluster.name}"


def show(recipe: Recipe, findings: Findings, verdicts: list[Verdict]) -> None:
    """The lines, those that the recipe does not need dimmed; then one verdict per kind of cluster."""
    asked = next(v for v in verdicts if v.asked)
    # No rich: a doctor should need as little of the environment as it can.
    colored = sys.stdout.isatty()

    def paint(text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if colored else text

    width = max(len(line.name) for line in findings.lines)
    for line in findings.lines:
        idle = line.state == "missing" and line.name not in asked.missing
        head = f"{line.state:<8} {line.name:<{width}}  {line.found}"
        if idle:
            print(paint(f"{head}  (not needed: {asked.kind})", "2"))
        else:
            print(paint(line.state.ljust(8), COLORS[line.state]) + head[8:])
        if line.state != "ok" and line.remedy:
            print(
                paint(f"{'':<8} {'':<{width}}  -> {line.remedy}", "2") if idle else f"{'':<8} {'':<{width}}  -> {line.remedy}"
            )
    print(f"\n{_called(recipe)}")
    for verdict in verdicts:
        word = paint("can run   ", "32") if verdict.can_run else paint("cannot run", "31")
        missing = f"missing: {', '.join(verdict.missing)}" if verdict.missing else ""
        print(f"{word}  {verdict.kind + ' (asked)' * verdict.asked:<18}{missing}".rstrip())
        for reason in verdict.reasons[:MAX_REASONS]:
            print(f"            {reason}")
        if (more := len(verdict.reasons) - MAX_REASONS) > 0:
            print(f"            and {more} more (--json has all)")
