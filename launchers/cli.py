"""The `quarry` command: one parser over the subcommands, which are imported only when they are asked for."""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

VERSION_OF = "quarry"
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

COMMANDS = {
    "plan": ("launchers.plan_command", "show a curriculum as a table and a picture, or a stage's exact arguments"),
    "clean": ("launchers.clean_command", "clean the text that a curriculum needs, and say what went and why"),
    "tokenize": ("launchers.tokenize_command", "text files to one Megatron indexed data set"),
    "judge": ("launchers.judge_command", "let rules and an LLM judge decide which samples are trained on"),
    "tokenizer": ("launchers.tokenizer_command", "train a tokenizer, or compare tokenizers on text"),
    "prep": ("launchers.prep_command", "prepare the data that a curriculum needs"),
    "verify": ("launchers.verify_command", "check prepared data to the last byte"),
    "doctor": ("launchers.doctor_command", "what this machine has and lacks, and whether a recipe can run here"),
    "launch": ("launchers.launch_command", "run a curriculum, or go on with it where it stopped"),
    "ab": ("launchers.ab_command", "train the first steps of a phase in two ways and compare"),
    "status": ("launchers.status", "show where a run stands, or list the runs"),
    "logs": ("launchers.logs_command", "show what a stage printed, whole or of one rank, and follow it"),
    "cancel": ("launchers.cancel_command", "stop a run; the running stage saves"),
    "report": ("launchers.report", "write a run's report, one HTML page"),
    "convert": ("launchers.convert_command", "convert between a Megatron checkpoint and a Hugging Face folder"),
    "eval": ("launchers.eval_command", "evaluate a finished model, beside the published numbers"),
}
"""Subcommand -> module (with `add_parser(subparsers)` and `run(args) -> int`) and one line of help."""

FAST = {"tokenize"}
"""Commands that are short of time, and register nothing to be done when the interpreter ends."""

DESCRIPTION = "Training recipes for Granite-4.1-style models on Megatron-LM: plan, prepare data, launch, follow, report."
EXAMPLE = """examples:
  quarry plan curriculum=smoke                     what would be trained, phase by phase
  quarry launch curriculum=smoke cluster=local     train it here; run it again to continue after anything
  quarry status                                    the runs and how far they are
  quarry report smoke-tiny                         one page with every curve
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code. Errors that a user can mend are one message and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        args = parse(arguments)
        return int(args.run(args))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `quarry status | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full or read-only disk, a folder of somebody else
        from data_prep.errors import machine_says

        said = machine_says(error)
        if said is None:
            raise
        print(f"quarry: {said}", file=sys.stderr)
        return EXIT_USAGE
    except ValueError as error:
        if not _is_readable(error):
            raise
        print(f"quarry: {error}", file=sys.stderr)
        return EXIT_USAGE


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse a command line; imports only the module of the subcommand that it names."""
    parser = argparse.ArgumentParser(
        prog="quarry", description=DESCRIPTION, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    wanted = next((a for a in arguments if not a.startswith("-")), None)
    for name, (module, help_text) in COMMANDS.items():
        if name == wanted:
            command = importlib.import_module(module)
            command.add_parser(subparsers)
            subparsers.choices[name].set_defaults(run=command.run)
        else:
            subparsers.add_parser(name, help=help_text, add_help=False)
    args, rest = parser.parse_known_args(arguments)
    if args.version:
        args.run = _print_version
        return args
    # argparse gives up on positional words behind an option (`launch --run x curriculum=smoke`): they are overrides too.
    if rest and hasattr(args, "overrides") and not any(word.startswith("-") for word in rest):
        args.overrides = [*args.overrides, *rest]
        rest = []
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}; `quarry {wanted} --help` lists what there is")
    if not hasattr(args, "run") or not callable(args.run):
        parser.print_help()
        parser.exit(EXIT_USAGE)
    return args


def _print_version(args: argparse.Namespace) -> int:
    from importlib.metadata import version

    print(f"quarry {version(VERSION_OF)}")
    return 0


def _is_readable(error: ValueError) -> bool:
    """Whether the error is one of ours that says its remedy; other ValueErrors are bugs and keep their traceback."""
    from data_prep.errors import DataError
    from launchers.errors import LaunchError
    from recipes.schema import RecipeError

    return isinstance(error, RecipeError | DataError | LaunchError)


def script() -> NoReturn:
    """What the command `quarry` calls: main(), and the end of the process.

    Of commands in FAST without looking for cycles of garbage, of which they make few, and without taking memory apart in the end.
    """
    if not FAST.intersection(sys.argv[1:2]):
        sys.exit(main())
    gc.disable()
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    script()
