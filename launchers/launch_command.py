"""`quarry launch`: compose a recipe, check it, prepare its data, run its stages."""

from __future__ import annotations

import argparse
from typing import Any

from launchers.recipe_arguments import add_recipe_arguments

EPILOG = """examples:
  quarry launch curriculum=smoke cluster=local              train the smoke curriculum here; the same command continues it
  quarry launch cluster=slurm cluster.options.account=A cluster.options.partition=P
                                                            submit every stage, each after the one before; again: only what is missing
  quarry launch curriculum=smoke cluster=local --dryrun     show what would be started
  quarry launch --continue smoke-tiny                       go on with a run as recorded, also after the recipes have changed
  quarry launch curriculum=smoke cluster=local --run second phase.foundation.tokens=1e5
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
    add_recipe_arguments(parser, "model=tiny or phase.foundation.tokens=1e5")
    parser.add_argument(
        "--continue",
        dest="continued",
        metavar="RUN",
        help="go on with this run (a name under runs/, or a folder) as it was recorded, whatever the recipes say by now",
    )
    parser.add_argument("--run", dest="run_name", metavar="NAME", help="name of the run (default: from curriculum and model)")
    parser.add_argument("--from", dest="first", metavar="STAGE", help="begin with this stage; those before it must be finished")
    parser.add_argument("--to", dest="last", metavar="STAGE", help="stop after this stage")
    parser.add_argument(
        "--dryrun",
        "--dry-run",
        action="store_true",
        help="print the commands of the stages (Slurm: the batch scripts, also written to RUN/scripts) and start nothing",
    )
    parser.add_argument(
        "--watch", action="store_true", help="Slurm: follow the run after submitting (Ctrl-C ends the watching only)"
    )
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="go on with a run whose recipe changed, if no finished stage is touched by it",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    from launchers.chain import Launch
    from launchers.errors import LaunchError
    from launchers.run_arguments import RUNS_ROOT
    from launchers.runs import find_run
    from recipes.compose import compose
    from recipes.lint import check
    from recipes.logging_options import missing_package
    from recipes.schema import Recipe

    folder = None
    if args.continued:
        given = list(args.overrides)
        given += ["--run"] if args.run_name else []
        given += ["--accept-changes"] if args.accept_changes else []
        if given:
            raise LaunchError(
                f"--continue takes the recipe of run '{args.continued}' as it is; leave out {' '.join(given)}, or leave out --continue"
            )
        folder = find_run(args.continued, RUNS_ROOT).path
        recipe = Recipe.read(folder / "recipe.json")
    else:
        recipe = compose(args.overrides, config_dirs=args.config_dir)
    check(recipe)
    # Elsewhere the nodes have a Python of their own: the job refuses.
    if recipe.cluster.kind == "local" and (missing := missing_package(recipe.logging)):
        raise LaunchError(missing)
    launch = Launch(
        recipe=recipe,
        run_name=args.run_name,
        folder=folder,
        first=args.first,
        last=args.last,
        accept_changes=args.accept_changes,
    )
    if args.dryrun:
        return launch.dryrun()
    code = launch.start()
    if code == 0 and args.watch and recipe.cluster.kind == "slurm":  # elsewhere a launch shows its run anyway
        from launchers.status import watch_run
        from launchers.view import terminal

        return watch_run(terminal(), str(launch.run.path), RUNS_ROOT)
    return code
