"""`quarry plan`: show what a recipe would do, before anything is prepared or started."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.recipe_arguments import add_recipe_arguments

if TYPE_CHECKING:
    from recipes.schema import Recipe

EPILOG = """examples:
  quarry plan                                            the default curriculum, five_phase, for the 8B
  quarry plan curriculum=granite_4_1 model=granite_4_1_3b precision=fp8_tensorwise
  quarry plan phase.foundation.tokens=1e11 precision@phase.foundation.precision=bf16
  quarry plan --plot plan.png                            learning rate, length and mixture over tokens
  quarry plan --cfg                                      the composed recipe as YAML
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
    what = parser.add_mutually_exclusive_group()
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
    if args.cfg:
        print(composed_yaml(args.overrides, args.config_dir), end="")
        return 0
    recipe = compose(args.overrides, args.config_dir)
    check(recipe)
    if args.arguments_of:
        return _print_arguments(recipe, args.arguments_of)
    _print_table(recipe)
    if args.plot:
        from recipes.plot import draw_curriculum

        draw_curriculum(recipe, args.plot)
        print(f"picture: {args.plot}")
    return 0


def _print_table(recipe: Recipe) -> None:
    from rich.console import Console

    from recipes.plan import PLAN_WIDTH_COLUMNS, print_plan

    print_plan(recipe, Console(width=None if sys.stdout.isatty() else PLAN_WIDTH_COLUMNS))


def _print_arguments(recipe: Recipe, stage: str) -> int:
    """In a process of its own: launchers never import training."""
    with tempfile.TemporaryDirectory(prefix="quarry-plan-") as folder:
        file = Path(folder) / "recipe.json"
        recipe.write(file)
        # Flushed before the child writes to the same stream.
        sys.stdout.flush()
        return subprocess.run([sys.executable, "-m", "training.arguments", "--recipe", str(file), "--stage", stage]).returncode
