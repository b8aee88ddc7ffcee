"""`quarry prep`: make the data that a curriculum needs, or show what would be drawn from where."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from launchers.recipe_arguments import add_recipe_arguments

if TYPE_CHECKING:
    from recipes.schema import Recipe

EPILOG = """examples:
  quarry prep curriculum=smoke                       corpus, tokenizer, tokens, held-out sets and views under data.root
  quarry prep curriculum=smoke --dry-run             what each phase would draw from each source; writes nothing
  quarry prep curriculum=smoke data.max_epochs=1     refuse to read anything twice

What is up to date is left alone; run it again after anything. Exit code 2: refused, with the reason and a remedy.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "prep",
        help="prepare the data that a curriculum needs",
        description="Compose a recipe, check it and prepare the data that its phases read.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_recipe_arguments(parser, "curriculum=smoke")
    parser.add_argument(
        "--dry-run", action="store_true", help="print tokens available and drawn, epochs and shares; write nothing"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Returns 0; RecipeError or DataError (exit code 2) when recipe or data are refused."""
    from recipes.compose import compose
    from recipes.lint import check

    recipe = compose(args.overrides, args.config_dir)
    check(recipe)
    if args.dry_run:
        _show_plan(recipe)
        return 0
    from data_prep.cache_job import build_caches
    from data_prep.prepare import prepare
    from data_prep.progress import Shown

    progress = Shown()
    prepare(recipe, progress=progress)
    build_caches(recipe, progress=progress)
    print(f"data of '{recipe.name}' is ready in {recipe.data.root}")
    return 0


def _show_plan(recipe: Recipe) -> None:
    from rich.console import Console
    from rich.table import Table

    from data_prep.preview import preview

    rows, estimated = preview(recipe)
    console = Console(width=None if Console().is_terminal else 140)
    table = Table(title=f"{recipe.name}: what each phase draws from each source", title_justify="left")
    for heading in ("phase", "category", "source"):
        table.add_column(heading, no_wrap=True)
    for heading in ("share planned %", "share by samples %", "tokens available", "tokens drawn", "epochs so far"):
        table.add_column(heading, justify="right")
    last = None
    for row in rows:
        mark = "~" if row.source in estimated else ""
        table.add_row(
            row.phase if row.phase != last else "",
            row.category,
            row.source,
            f"{row.share_planned_percent:.3f}",
            f"{row.share_drawn_percent:.3f}",
            f"{mark}{row.tokens_available:,}",
            f"{mark}{row.tokens_drawn:,}",
            f"{mark}{row.epochs:.2f}",
        )
        last = row.phase
    console.print(table)
    if estimated:
        console.print(
            f"~ estimated from the size of the text, not tokenized yet: {', '.join(sorted(estimated))}", soft_wrap=True
        )
