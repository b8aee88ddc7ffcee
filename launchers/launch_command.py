"""`quarry launch`: compose a recipe, check it, prepare its data, run its stages."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

EPILOG = """examples:
  quarry launch curriculum=smoke cluster=local              train the smoke curriculum here; the same command continues it
  quarry launch curriculum=smoke cluster=local --dryrun     show what would be started
  quarry launch curriculum=smoke cluster=local --run second phase.foundation.steps=200
                                                            another run, beside the first

exit codes: 0 finished; 2 the command or recipe is wrong; 78 a stage refused its configuration or hand-off; 130/143 stopped by
Ctrl-C/SIGTERM after saving; otherwise the failed stage's own code (128 + n if signal n ended it).
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "launch",
        help="run a curriculum, or go on with it where it stopped",
        description="Compose a recipe, check it, prepare its data and run its stages one after another.\n"
        "A finished stage is skipped; a stage that was stopped goes on from its last checkpoint.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="override", help="Hydra override, such as model=tiny or phase.foundation.steps=50"
    )
    parser.add_argument("--run", dest="run_name", metavar="NAME", help="name of the run (default: from curriculum and model)")
    parser.add_argument(
        "--config-dir",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="folder with recipes of your own, put on Hydra's search path; may be given several times",
    )
    parser.add_argument("--from", dest="first", metavar="STAGE", help="begin with this stage; those before it must be finished")
    parser.add_argument("--to", dest="last", metavar="STAGE", help="stop after this stage")
    parser.add_argument("--dryrun", action="store_true", help="print the commands of the stages and start nothing")
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="go on with a run whose recipe changed, if no finished stage is touched by it",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    from launchers.chain import Launch
    from recipes.compose import compose
    from recipes.lint import check

    recipe = compose(args.overrides, config_dirs=args.config_dir)
    check(recipe)
    launch = Launch(recipe=recipe, run_name=args.run_name, first=args.first, last=args.last, accept_changes=args.accept_changes)
    return launch.dryrun() if args.dryrun else launch.start()
