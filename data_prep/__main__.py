"""`python -m data_prep --recipe recipe.json`: prepares the data of a resolved recipe; what a job or the launcher starts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from data_prep.errors import FULL, DataError, machine_says
from data_prep.progress import Shown
from data_prep.whole import prepare_everything
from recipes.schema import Recipe, RecipeError

EXIT_REFUSED = 78
"""Configuration or data that a person has to change (as the stages use it)."""
EXIT_DISK_FULL = 74


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_prep", description="Prepare the data of a resolved recipe.")
    parser.add_argument("--recipe", type=Path, required=True, help="recipe.json as `quarry launch` writes it")
    parser.add_argument("--last", metavar="STAGE", help="the last stage that is to run now (default: all)")
    args = parser.parse_args(arguments)
    try:
        recipe = Recipe.read(args.recipe)
        if args.last is not None:
            recipe.stage_kind(args.last)
        prepare_everything(recipe, last=args.last, progress=Shown())
    except (DataError, RecipeError) as error:
        print(f"refused: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except OSError as error:
        said = machine_says(error)
        if said is None:
            raise
        full = error.errno in FULL
        print(f"{'disk full' if full else 'refused'}: {said}", file=sys.stderr)
        return EXIT_DISK_FULL if full else EXIT_REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
