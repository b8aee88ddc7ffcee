"""`quarry plan`: show what a recipe would do, before anything is prepared or started."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.recipe_arguments import add_recipe_arguments
from recipes.gpus import GPUS

if TYPE_CHECKING:
    from recipes.estimates import StageEstimate
    from recipes.schema import Recipe

EPILOG = """examples:
  quarry plan                                            the default curriculum, five_phase, for the 8B
  quarry plan curriculum=granite_4_1 model=granite_4_1_3b precision=fp8_tensorwise
  quarry plan phase.foundation.tokens=1e11 precision@phase.foundation.precision=bf16
  quarry plan --plot plan.png                            learning rate, length and mixture over tokens
  quarry plan --cfg                                      the composed recipe as YAML
  quarry plan --gpu h200 --price-per-gpu-hour 2.2        time and cost on other GPUs
  quarry plan --search --gpus 512 --gpu h100             the best layouts of the first phase, and why others fail
  quarry plan --search --stage long_128k --seq-length 64K 256K
  quarry plan curriculum=smoke --args foundation         the exact Megatron arguments of one stage
  quarry plan --config-dir ../our-recipes mixture@phase.foundation.mixture=ours

Groups: curriculum, model, precision, data, cluster, optimizer for the whole; phase, mixture, schedule, parallel, precision per phase
(GROUP@phase.NAME.GROUP=CHOICE). Exit code 2: the recipe is refused, with every problem and a value that would pass.
"""
PLOT_FORMATS = ("png", "svg", "pdf")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "plan",
        help="show a curriculum as a table and a picture, or a stage's exact arguments",
        description="Compose a recipe, check it and show the whole curriculum.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_recipe_arguments(parser, "model=granite_4_1_3b")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help=f"also draw the curriculum into FILE ({', '.join(PLOT_FORMATS)})"
    )
    parser.add_argument("--gpu", choices=sorted(GPUS), help="plan for these GPUs; the same as cluster.gpu=GPU")
    parser.add_argument(
        "--price-per-gpu-hour", type=_price, metavar="DOLLARS", help="what a GPU-hour costs you (default: recipes/gpus.py)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print memory, speed, time and cost, or the search, as JSON and nothing else"
    )
    search = parser.add_argument_group("layouts")
    search.add_argument("--stage", metavar="STAGE", help="phase to search for (default: the first)")
    search.add_argument("--gpus", type=int, metavar="N", help="GPUs to lay it over (default: those of its layout)")
    search.add_argument(
        "--seq-length", type=_length, nargs="+", metavar="TOKENS", help="lengths in its place, such as 8192 or 64K"
    )
    search.add_argument(
        "--offload", action="store_true", help="also keep activations on the host, at speeds that only data sheets say"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--search", action="store_true", help="rank all valid layouts of a phase by predicted speed, and say why others fail"
    )
    what.add_argument("--cfg", action="store_true", help="print the composed recipe as YAML and nothing else")
    what.add_argument(
        "--args", metavar="STAGE", dest="arguments_of", help="print the Megatron arguments of STAGE, one per line"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Returns 0, or the exit code of `training.arguments` with --args. RecipeError (exit code 2) when the recipe is refused."""
    from recipes.compose import compose, composed_yaml
    from recipes.lint import check
    from recipes.schema import RecipeError

    if args.plot and args.plot.suffix.lstrip(".") not in PLOT_FORMATS:
        raise RecipeError(f"--plot {args.plot}: unknown kind of picture; end the name in one of .{', .'.join(PLOT_FORMATS)}")
    for name in ("stage", "gpus", "seq_length", "offload"):
        if getattr(args, name) not in (None, False) and not args.search:
            option = "--" + name.replace("_", "-")
            raise RecipeError(f"{option}: it says what layouts are searched for; add --search, or leave it out")
    overrides = [*args.overrides, *([f"cluster.gpu={args.gpu}"] if args.gpu else [])]
    if args.cfg:
        print(composed_yaml(overrides, args.config_dir), end="")
        return 0
    recipe = compose(overrides, args.config_dir)
    if args.search:
        return _search(recipe, args)
    check(recipe)
    if args.arguments_of:
        return _print_arguments(recipe, args.arguments_of)
    every = _estimates(recipe, args.price_per_gpu_hour)
    if args.json:
        from recipes.estimates import as_data

        print(json.dumps(as_data(recipe, every, args.price_per_gpu_hour), indent=1))
        return 0
    _print_table(recipe, every, args.price_per_gpu_hour)
    if args.plot:
        from recipes.plot import draw_curriculum

        draw_curriculum(recipe, args.plot)
        print(f"picture: {args.plot}")
    return 0


def _search(recipe: Recipe, args: argparse.Namespace) -> int:
    """The recipe itself need not pass the linter: a layout that it refuses is why one searches."""
    from rich.console import Console

    from launchers.document_lengths import known_lengths
    from recipes.search import search, with_stage
    from recipes.search_text import as_data, print_search

    stage = args.stage or next((s for s in recipe.stages if s in recipe.phase), "")
    gpus = args.gpus if args.gpus is not None else recipe.phase[stage].parallel.gpus if stage in recipe.phase else 1
    asked = [with_stage(recipe, stage, gpus=gpus, seq_length_tokens=length) for length in args.seq_length or [None]]
    lengths = known_lengths(recipe, [stage]).get(stage)
    results = [search(each, stage, offload=args.offload, lengths=lengths) for each in asked]
    if args.json:
        print(json.dumps([as_data(result) for result in results], indent=1))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 120)
    for result in results:
        print_search(result, console)
    return 0


def _length(text: str) -> int:
    """8192 or 8K, in units of 1024."""
    digits = text.removesuffix("K").removesuffix("k")
    if not digits.isdecimal() or int(digits) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no length; give tokens, e.g. 8192 or 64K")
    return int(digits) * (1 if digits == text else 1024)


def _price(text: str) -> float:
    try:
        dollars = float(text)
    except ValueError:
        dollars = -1.0
    if not 0 <= dollars < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no price; give dollars, e.g. 2.5")
    return dollars


def _estimates(recipe: Recipe, price_per_gpu_hour: float | None) -> list[StageEstimate]:
    """With the steps of fine-tuning stages whose data are there already, and the lengths of documents where they stay apart."""
    from launchers.document_lengths import known_lengths
    from launchers.steps import sft_steps
    from recipes.estimates import estimates

    steps = {}
    for stage in recipe.stages:
        if sft := recipe.sft.get(stage):
            steps[stage] = sft_steps(
                Path(recipe.data.root), stage, epochs=sft.epochs, batch_sequences=sft.global_batch_sequences
            )
    known = {stage: count for stage, count in steps.items() if count}
    lengths = known_lengths(recipe, recipe.stages)
    return estimates(recipe, price_per_gpu_hour=price_per_gpu_hour, sft_steps=known, lengths=lengths)


def _print_table(recipe: Recipe, every: list[StageEstimate], price_per_gpu_hour: float | None) -> None:
    from rich.console import Console

    from recipes.plan import PLAN_WIDTH_COLUMNS, print_plan

    console = Console(width=None if sys.stdout.isatty() else PLAN_WIDTH_COLUMNS)
    print_plan(recipe, console, every, price_per_gpu_hour)


def _print_arguments(recipe: Recipe, stage: str) -> int:
    """In a process of its own: launchers never import training."""
    with tempfile.TemporaryDirectory(prefix="quarry-plan-") as folder:
        file = Path(folder) / "recipe.json"
        recipe.write(file)
        # Flushed before the child writes to the same stream.
        sys.stdout.flush()
        return subprocess.run([sys.executable, "-m", "training.arguments", "--recipe", str(file), "--stage", stage]).returncode
