"""The arguments of every command that composes a recipe, written once."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_recipe_arguments(parser: argparse.ArgumentParser, example: str) -> None:
    """Positional Hydra overrides (`example` is shown in the help) and repeatable --config-dir."""
    parser.add_argument("overrides", nargs="*", metavar="override", help=f"Hydra override, such as {example}")
    parser.add_argument(
        "--config-dir",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="folder with recipes of your own, put first on Hydra's search path; may be given several times",
    )
