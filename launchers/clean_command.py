"""`quarry clean`: clean the text of a recipe's sources and show what each step took."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.recipe_arguments import add_recipe_arguments

if TYPE_CHECKING:
    from data_prep.clean.slurm import Slurm
    from recipes.schema import Recipe

EPILOG = """examples:
  quarry clean curriculum=smoke                                  clean the built-in corpus below data.root, print the funnel
  quarry clean data/cleaning=granite_4_1                         another configuration of recipes/data/cleaning
  quarry clean data.cleaning.filters.web.c4=null                 without one filter
  quarry clean data.cleaning.near_duplicates.buckets=20          more hashes, a lower threshold
  quarry clean --tokenizer data/tokenizer/granite-4.1            count tokens too, with a tokenizer that exists
  quarry clean --slurm cluster=slurm cluster.options.partition=cpu    submit it as array jobs; run it again when they are done

Only what a changed text or configuration makes necessary is done again; run it again after anything. `quarry prep` cleans too.
The report is <data.root>/clean/funnel.md, .json and .png; what was removed lies beside it, with its reason.
Exit code 2: refused, with the reason and a remedy.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "clean",
        help="clean the text of a recipe's sources, and show what each step took",
        description="Filter, decontaminate, mask and deduplicate the text of all sources of a recipe.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_recipe_arguments(parser, "curriculum=smoke")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes (default: all cores); the output does not depend on it"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="count tokens with this .model file or tokenizer folder (default: data.tokenizer.path, or the one trained in data.root)",
    )
    parser.add_argument(
        "--slurm", action="store_true", help="submit the stages as Slurm array jobs instead of running them here"
    )
    parser.add_argument("--memory-gb", type=int, default=8, metavar="GB", help="memory of a Slurm task (default: 8)")
    parser.add_argument("--tasks-at-once", type=int, default=256, metavar="N", help="Slurm tasks at a time (default: 256)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Returns 0; RecipeError or DataError (exit code 2) when recipe or data are refused."""
    from data_prep.clean.cleaner import clean
    from data_prep.clean.inputs import source_texts
    from data_prep.clean.submitted import refuse_while_jobs_run
    from data_prep.errors import DataError
    from data_prep.files import exclusive_lock, remove_leftovers
    from data_prep.progress import Shown
    from data_prep.sources import threads
    from recipes.compose import compose

    for option in ("workers", "memory_gb", "tasks_at_once"):
        value = getattr(args, option)
        if value is not None and not value > 0:
            raise DataError(f"--{option.replace('_', '-')} is {value}; give a number above 0")
    given = None if args.tokenizer is None else _given_tokenizer(args.tokenizer)  # before hours of cleaning, not behind them
    recipe = compose(args.overrides, args.config_dir)
    slurm = _slurm(args, recipe) if args.slurm else None
    root, progress = Path(recipe.data.root), Shown()
    workers = args.workers or threads()
    with exclusive_lock(
        root / ".lock", lambda holder: progress.message(f"waiting for process {holder}, which prepares {root}")
    ):
        refuse_while_jobs_run(root)
        remove_leftovers(root)
        inputs = source_texts(recipe, root, progress)
        if slurm is not None and _submitted(slurm, recipe, root, inputs):
            return 0
        clean(recipe, root, inputs, progress, workers)
        _show(recipe, root, given, workers)
    return 0


def _slurm(args: argparse.Namespace, recipe: Recipe) -> Slurm:
    """What the jobs ask for; DataError for a recipe of another cluster, or with options that Slurm would misread."""
    from pydantic import ValidationError

    from data_prep.clean.slurm import Slurm
    from data_prep.errors import DataError
    from recipes.slurm_options import slurm_options

    if recipe.cluster.kind != "slurm":
        raise DataError(
            f"--slurm with cluster '{recipe.cluster.name}', which is no Slurm; add cluster=slurm cluster.options.partition=NAME"
        )
    try:
        options = slurm_options(recipe.cluster.options)
    except ValidationError as error:
        raise DataError(
            "\n".join(f"cluster.options.{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        ) from None
    return Slurm(
        partition=options.partition,
        account=options.account,
        qos=options.qos,
        reservation=options.reservation,
        constraint=options.constraint,
        time=options.time,
        tasks_at_once=args.tasks_at_once,
        memory_gb=args.memory_gb,
    )


def _submitted(slurm: Slurm, recipe: Recipe, root: Path, inputs: Any) -> bool:
    """Submit what is missing and say so; False when nothing is."""
    from data_prep.clean.slurm import submit

    jobs = submit(recipe, root, inputs, slurm)
    for stage, job in jobs:
        print(f"{stage:<10} job {job}")
    if jobs:
        print(
            f"logs       {root / 'clean' / '.work'}/*/STAGE/slurm_logs\n"
            "submitted; run the same command again when the last job is done: it writes the records and the report, or submits what failed"
        )
    return bool(jobs)


def _show(recipe: Recipe, root: Path, tokenizer: Any, threads: int) -> None:
    """Write the report and print its table."""
    from rich.console import Console
    from rich.table import Table

    from data_prep.clean.funnel import funnel_rows, write_funnel

    paths = write_funnel(recipe, root, tokenizer or _tokenizer(recipe, root), threads=threads)
    headings, rows = funnel_rows(paths["json"])
    table = Table(title=f"{recipe.data.cleaning.name}: documents in, removed by each step, and out", title_justify="left")
    for heading in headings:
        table.add_column(
            heading.replace("_", " "), justify="left" if heading == "source" else "right", no_wrap=heading == "source"
        )
    for row in rows[:-1]:
        table.add_row(*row)
    table.add_section()
    table.add_row(*rows[-1])
    Console(width=None if Console().is_terminal else 160).print(table)
    print(f"report    {paths['md']}\npicture   {paths['png']}")


def _given_tokenizer(path: Path) -> Any:
    from data_prep.errors import DataError
    from data_prep.tokenizer import load_tokenizer

    if not path.exists():
        raise DataError(
            f"--tokenizer: {path} does not exist; name a folder with tokenizer.json, or a SentencePiece .model file"
        )
    return load_tokenizer(path, "huggingface" if path.is_dir() else "sentencepiece")


def _tokenizer(recipe: Recipe, root: Path) -> Any:
    """The recipe's tokenizer to count with, or None where there is none yet."""
    from data_prep.tokenizer import load_tokenizer

    spec = recipe.data.tokenizer
    trained = root / "tokenizer" / "tokenizer.model" if spec.kind == "sentencepiece" else root / "tokenizer"
    path = Path(spec.path) if spec.path is not None else trained
    return load_tokenizer(path, spec.kind) if path.exists() else None
