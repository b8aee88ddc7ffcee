"""`quarry prep`: make the data that a curriculum needs, or show what would be drawn from where."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from launchers.recipe_arguments import add_recipe_arguments

if TYPE_CHECKING:
    from rich.table import Table

    from data_prep.preview import Preview
    from recipes.schema import Recipe

TABLE_WIDTH = 180
"""Where there is no terminal: numbers of 10T tokens in ten columns."""

EPILOG = """examples:
  quarry prep curriculum=smoke                       corpus, tokenizer, tokens, held-out sets and views under data.root
  quarry prep curriculum=smoke --dry-run             what each phase would draw from each source; writes nothing
  quarry prep curriculum=smoke data.max_epochs=1     refuse to read anything twice
  quarry prep --to final_annealing                   pre-training only: no samples or prompts of what follows

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
    parser.add_argument("--to", metavar="STAGE", help="the last stage whose samples or prompts are wanted now (default: all)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Returns 0; RecipeError or DataError (exit code 2) when recipe or data are refused."""
    from recipes.compose import compose
    from recipes.lint import check

    recipe = compose(args.overrides, args.config_dir)
    check(recipe)
    if args.dry_run:
        return _dry_run(recipe)
    from data_prep.progress import Shown
    from data_prep.whole import prepare_everything

    if args.to is not None:
        recipe.stage_kind(args.to)
    prepare_everything(recipe, last=args.to, progress=Shown())
    print(f"data of '{recipe.name}' is ready in {recipe.data.root}")
    return 0


def _dry_run(recipe: Recipe) -> int:
    """Print the plan; DataError with everything that `quarry prep` would refuse, behind what could be planned."""
    from rich.console import Console

    from data_prep.errors import DataError
    from data_prep.preview import preview
    from data_prep.sources import threads

    shown = preview(recipe, workers=threads())
    console = Console(width=None if Console().is_terminal else TABLE_WIDTH, highlight=False)
    console.print(_phase_table(recipe, shown))
    console.print(_source_table(recipe, shown))
    for note in _notes(shown):
        console.print(note, soft_wrap=True)
    if shown.problems:
        raise DataError("\n".join(shown.problems))
    return 0


def _phase_table(recipe: Recipe, shown: Preview) -> Table:
    """A row per phase and source, and the sum of each phase."""
    from rich.table import Table

    has_long = any(phase.min_document_tokens for phase in shown.phases.values())
    table = Table(title=f"{recipe.name}: what each phase draws from each source", title_justify="left")
    for heading in ("phase", "category", "source"):
        table.add_column(heading, no_wrap=True)
    headings = ["share planned %", "share by samples %", "tokens available", "tokens drawn", "epochs so far"]
    for heading in headings + ["long available", "long drawn %"] * has_long:
        table.add_column(heading, justify="right")
    for name, phase in shown.phases.items():
        rows = [row for row in shown.rows if row.phase == name]
        for number, row in enumerate(rows):
            mark = "~" if row.source in shown.estimated else ""
            draw = row.draw
            cells = [
                name if number == 0 else "",
                row.category,
                row.source,
                f"{row.share_planned_percent:.3f}",
                ("" if row.samples_given is not None else "=") + f"{row.share_given_percent:.3f}",
                *((f"{mark}{draw.source_tokens:,}", f"{mark}{draw.tokens:,}", f"{mark}{draw.epochs:.2f}") if draw else "???"),
            ]
            if has_long and phase.min_document_tokens and draw:
                only = "only " if draw.only_long else ""
                cells += [
                    f"{mark}{draw.long_source_tokens:,}",
                    f"{only}{mark}{100 * draw.long_tokens / max(1, draw.tokens):.1f}",
                ]
            table.add_row(*cells)
        by_samples = sum(row.share_given_percent for row in rows)
        total = [
            "",
            "",
            f"sum, trains {phase.tokens:,}",
            f"{sum(row.share_planned_percent for row in rows):.3f}",
            f"{by_samples:.3f}",
        ]
        total += ["", f"{phase.tokens_drawn:,}", ""]
        if phase.min_document_tokens:
            total += ["", f"{100 * phase.long_tokens / max(1, phase.tokens_drawn):.1f}"]
        table.add_row(*total, style="dim", end_section=True)
    return table


def _source_table(recipe: Recipe, shown: Preview) -> Table:
    """A row per source over the whole curriculum."""
    from rich.table import Table

    table = Table(title="the sources over the whole curriculum", title_justify="left")
    for heading in ("category", "source"):
        table.add_column(heading, no_wrap=True)
    for heading in ("documents", "tokens available", "tokens drawn", "epochs", "never read %"):
        table.add_column(heading, justify="right")
    for name in sorted(recipe.data.sources, key=lambda name: (recipe.data.sources[name].category, name)):
        plan, mark = shown.sources.get(name), "~" if name in shown.estimated else ""
        if plan is None:
            table.add_row(recipe.data.sources[name].category, name, *"?????")
            continue
        unread = 100 * max(0.0, 1 - plan.epochs)
        table.add_row(
            plan.category,
            name,
            f"{mark}{plan.documents:,}",
            f"{mark}{plan.tokens:,}",
            f"{mark}{plan.tokens_drawn:,}",
            f"{mark}{plan.epochs:.2f}",
            f"{mark}{unread:.0f}",
        )
    return table


def _notes(shown: Preview) -> Iterator[str]:
    if shown.estimated:
        yield (
            "~ estimated from a sample of the text as it is now (before cleaning, where that has not run): "
            f"{', '.join(sorted(shown.estimated))}"
        )
    if set(shown.sources) - shown.estimated:
        yield "without ~: as the last `quarry prep` counted in this data root; what has changed since is counted when it runs again"
    if any(row.draw and row.samples_given is None for row in shown.rows):
        yield "= as planned: the phase is too long to repeat Megatron's blend here, which gives a source at most one sample above its share"
    if long := [f"{name} {phase.min_document_tokens:,}" for name, phase in shown.phases.items() if phase.min_document_tokens]:
        yield (
            f"long: in documents of at least phase.min_document_tokens ({', '.join(long)}); they come first and shorter ones fill up, "
            f"except where phase.require_long_in names the category ('only')"
        )
    if any(row.draw is None for row in shown.rows):
        yield "? not known, or not to be drawn from; the reason follows"
