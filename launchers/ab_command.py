"""`quarry ab`: the first steps of a phase in two ways, on this machine, and a verdict on the difference.

It is the stage of a gate (recipes/ab_options.py) in a run of its own: same data, same job, same verdict as in a curriculum.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.errors import LaunchError
from launchers.recipe_arguments import add_recipe_arguments

if TYPE_CHECKING:
    from launchers.stage_job import StageJob
    from recipes.schema import Recipe

FOLDER = "ab"
"""Below the folder of the runs, so that `quarry status` lists none of these as a run."""
GROUPS = ("precision", "parallel", "optimizer")
SINGLE = ("transformer_impl", "emulated_fp8")
SHOW_SECONDS = 5.0
POLL_SECONDS = 0.1
LOG_TAIL_LINES = 20

EPILOG = """examples:
  quarry ab --stage foundation --a precision=bf16 --b precision=fp8_tensorwise --steps 500 cluster=local cluster.gpu=h100
  quarry ab --stage capability --from-run runs/big --b precision=fp8_blockwise --b precision.fp8_param_gather=true --steps 200
  quarry ab --stage second --b parallel=tp2_sp --steps 20 --tolerance 0.001 curriculum=mine cluster=local      two layouts
  quarry ab --stage capability --b emulated_fp8=true --steps 20 curriculum=smoke cluster=local   tries the gate itself, on CPU

Both arms take the first steps of the phase STAGE from the same checkpoint with the same samples in the same order. What an arm does not say is
as the phase has it. The same command goes on after anything: a finished arm is not run again. docs/fp8.md has the criteria and their reasons.

exit codes: 0 passed; 17 failed: the arms part, or a loss is not finite; 78 refused; 2 the command or recipe is wrong; 130/143 stopped by
Ctrl-C/SIGTERM; otherwise an arm crashed with that code.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "ab",
        help="train the first steps of a phase in two ways and compare",
        description="Train the first steps of a phase in two ways (precisions, layouts ...) and say whether the losses are equal enough.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_recipe_arguments(parser, "curriculum=smoke or model=tiny")
    parser.add_argument("--stage", required=True, metavar="PHASE", help="the phase whose first steps both arms take")
    for arm, what in (("a", "what is trusted"), ("b", "what is to be shown equal enough")):
        parser.add_argument(
            f"--{arm}",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help=f"{what}: {', '.join(f'{g}=NAME' for g in GROUPS)}, GROUP.KEY=VALUE, {', '.join(f'{s}=VALUE' for s in SINGLE)}; repeatable",
        )
    parser.add_argument("--steps", type=int, required=True, metavar="N", help="steps of each arm")
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="PERCENT",
        help="largest relative difference of the mean loss of the last quarter, and of the held-out loss (default: 0.25)",
    )
    parser.add_argument("--step-tolerance", type=float, metavar="PERCENT", help="the same for any single step (default: 2.5)")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--from-run", metavar="RUN", help="recipe and checkpoint of this run (a name under runs/, or a folder)")
    start.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FOLDER",
        help="folder of the finished stage to start from (default: of the recipe's run)",
    )
    parser.add_argument(
        "--run", dest="run_name", metavar="NAME", help="name of the comparison (default: from what is compared)"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    from launchers.run_arguments import RUNS_ROOT
    from launchers.runs import default_name, find_run
    from recipes.compose import compose
    from recipes.lint import check
    from recipes.schema import Recipe

    if args.from_run:
        if args.overrides:
            raise LaunchError(
                f"--from-run takes the recipe of run '{args.from_run}' as it is; leave out {' '.join(args.overrides)}"
            )
        source = find_run(args.from_run, RUNS_ROOT).path
        base = Recipe.read(source / "recipe.json")
    else:
        base = compose(args.overrides, config_dirs=args.config_dir)
        source = Path(base.cluster.runs_root) / default_name(base)
    if base.cluster.kind != "local":
        raise LaunchError(
            f"quarry ab runs on this machine, the recipe's cluster is {base.cluster.name}; add cluster=local (and cluster.gpu=h100), "
            "or put a gate into the curriculum (docs/fp8.md), which runs as one of its jobs"
        )
    recipe, gate = with_gate(base, args)
    check(recipe)
    folder = Path(base.cluster.runs_root) / FOLDER / (args.run_name or _name(recipe, gate))
    link_start(recipe, gate, folder, source=source, checkpoint=args.checkpoint)
    return compare(recipe, gate, folder)


def with_gate(base: Recipe, args: argparse.Namespace) -> tuple[Recipe, str]:
    """`base` with a gate in front of the phase args.stage, and the gate's name; RecipeError for what it cannot have."""
    from pydantic import ValidationError

    from recipes.schema import Ab, Recipe, RecipeError, describe

    stage = args.stage
    if stage not in base.phase or stage not in base.stages:
        phases = [s for s in base.stages if s in base.phase]
        raise RecipeError(f"--stage {stage}: is no phase of this curriculum; phases: {', '.join(phases)}")
    values: dict[str, Any] = {"title": f"{stage} in two ways", "phase": stage, "steps": args.steps}
    values |= {arm: arm_values(base, stage, arm, getattr(args, arm), args.config_dir) for arm in ("a", "b")}
    for key, given in (("tolerance_percent", args.tolerance), ("step_tolerance_percent", args.step_tolerance)):
        if given is not None:
            values[key] = given
    try:
        gate = Ab.model_validate(values)
    except ValidationError as error:
        raise RecipeError(describe(error)) from None
    name = f"ab_{stage}"
    # Every stage stays: what a phase draws from its sources depends on the others.
    stages = [word for s in base.stages if s not in base.ab for word in ((name, s) if s == stage else (s,))]
    return Recipe.model_validate(base.model_dump() | {"stages": stages, "ab": {name: gate.model_dump()}}), name


def arm_values(base: Recipe, stage: str, arm: str, words: list[str], config_dirs: list[Path]) -> dict[str, Any]:
    """The arm that the words of --a or --b describe, as a plain dictionary of Arm's keys."""
    import yaml

    from recipes.compose import option
    from recipes.schema import RecipeError

    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        group, _, inner = key.partition(".")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        if not equals:
            raise RecipeError(f"--{arm} {word}: is no KEY=VALUE, such as precision=bf16")
        if key in GROUPS:
            values[key] = option(key, text, config_dirs)
        elif group in GROUPS and inner:
            phase = base.phase[stage]
            own = phase.optimizer or base.optimizer if group == "optimizer" else getattr(phase, group)
            values[group] = {**(values.get(group) or own.model_dump()), inner: value}
        elif key == "emulated_fp8":
            values[key] = {} if value is True else value or None
        elif group == "emulated_fp8" and inner:
            values[group] = {**(values.get(group) or {}), inner: value}
        elif key in SINGLE:
            values[key] = value
        else:
            known = ", ".join(
                [*(f"{g}=NAME" for g in GROUPS), *(f"{g}.KEY=VALUE" for g in GROUPS), *(f"{s}=VALUE" for s in SINGLE)]
            )
            raise RecipeError(
                f"--{arm} {word}: an arm cannot differ in it, because both take the same steps with the same samples; it can differ in {known}"
            )
    return values


def _name(recipe: Recipe, gate: str) -> str:
    """The same comparison finds its folder again."""
    from data_prep.plain_files import digest_of
    from launchers.runs import default_name

    values = recipe.ab[gate].model_dump(mode="json", exclude={"tolerance_percent", "step_tolerance_percent"})
    return f"{default_name(recipe)}-{recipe.ab[gate].phase}-{digest_of(values)[:8]}"


def link_start(recipe: Recipe, gate: str, folder: Path, *, source: Path, checkpoint: Path | None) -> None:
    """Make the stage before the gate's phase part of the run in `folder`, as a link; LaunchError if nothing can be started from."""
    from data_prep.plain_files import replace_symlink
    from recipes.ab_arms import arm_recipe

    phase = recipe.ab[gate].phase
    before = arm_recipe(recipe, gate, "a").previous(phase)
    if before is None:
        if checkpoint is not None:
            raise LaunchError(
                f"--checkpoint {checkpoint}: '{phase}' is the first phase and begins with random weights; leave it out"
            )
        return
    found = checkpoint or source / "stages" / before
    if not (found / "handoff.json").is_file():
        raise LaunchError(
            f"'{phase}' starts from the hand-off of '{before}', and {found / 'handoff.json'} does not exist; finish that stage "
            "(quarry launch ... --to "
            f"{before}), or name a run that has it (--from-run RUN), or the folder of the finished stage (--checkpoint FOLDER)"
        )
    replace_symlink(folder / "stages" / before, str(found.resolve()))


def compare(
    recipe: Recipe,
    gate: str,
    folder: Path,
    *,
    stage_command: tuple[str, ...] | None = None,
    data_command: tuple[str, ...] | None = None,
) -> int:
    """Prepare the data, run the gate's job, show the verdict; returns the exit code of `quarry ab`."""
    from launchers import stage_job
    from launchers.control import Signals
    from launchers.journal import FORMAT, Journal
    from launchers.runs import RunFolder
    from launchers.view import terminal
    from recipes.ab_table import verdict_lines

    console, run_folder = terminal(), RunFolder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with run_folder.lock():
        journal = Journal.read(run_folder.journal)
        recipe.write(run_folder.recipe)
        journal.append("run", format=FORMAT, recipe_digest=recipe.digest(), changes=[])
        console.print(f"comparison {run_folder.name}; folder {folder}")
        phase = recipe.ab[gate].phase
        data = stage_job.data_job(recipe, folder, last=phase, data_command=data_command or stage_job.DATA_COMMAND)
        job = stage_job.stage_job(recipe, folder, gate, stage_command=stage_command or stage_job.STAGE_COMMAND)
        with Signals() as signals:
            for one in (data, job):
                code, reason = _run_job(one, journal, signals, console)
                if signals.received is not None and not (one is job and code == 0):
                    console.print(f"stopped; the same command goes on: {folder}", style="yellow")
                    return 128 + signals.received
                if code != 0:
                    break
    verdict = Path(job.stage_dir) / "ab.json"
    if one is job and verdict.exists() and (code == 0 or _is_newer(verdict, journal)):
        for line in verdict_lines(json.loads(verdict.read_bytes())):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        console.print(f"recorded in {verdict}", soft_wrap=True)
    if code not in (0, 17):
        _explain(one, reason, console)
    return code


def _is_newer(verdict: Path, journal: Any) -> bool:
    """Whether the verdict is of the last attempt."""
    from datetime import datetime

    intents = [row for row in journal.rows if row["event"] == "intent"]
    return verdict.stat().st_mtime >= datetime.fromisoformat(intents[-1]["time"]).timestamp() - 1.0


def _run_job(job: StageJob, journal: Any, signals: Any, console: Any) -> tuple[int, str]:
    """One start of the job through its wrapper; what its arms say, and requests to stop passed on."""
    from launchers.journal import attempts, last_outcome
    from launchers.local import start_directly

    attempt = attempts(journal.rows, job.stage) + 1
    job.write()
    journal.append("intent", stage=job.stage, attempt=attempt, executor="direct", command=job.command)
    forwarded, shown, arms = 0, time.monotonic(), Steps(Path(job.stage_dir))
    with start_directly(job, attempt) as submitted:
        journal.append("submitted", stage=job.stage, attempt=attempt, job=submitted.job)
        while submitted.alive():
            if signals.count > forwarded:
                forwarded = signals.count
                _stop(job, journal, kill=forwarded > 1)
            if time.monotonic() - shown >= SHOW_SECONDS:
                shown = time.monotonic()
                for line in arms.news():
                    console.print(line, highlight=False)
            time.sleep(POLL_SECONDS)
    journal.poll()
    outcome = last_outcome(journal.rows, job.stage)
    if outcome is None or outcome["attempt"] != attempt:
        return 1, "its job ended without a trace (killed, or the machine went down)"
    code = int(outcome["exit_code"])
    return (code if code >= 0 else 128 - code), outcome.get("reason", "")


def _stop(job: StageJob, journal: Any, *, kill: bool) -> None:
    """SIGTERM to the job's wrapper, which makes the arm save and leave; with `kill` SIGKILL to all of it."""
    from launchers import processes

    live = processes.stage_processes(Path(job.stage_dir))
    if kill:
        processes.end_all(live, 0.0)
        return
    journal.poll()
    started = [row for row in journal.rows if row["event"] == "started" and row["stage"] == job.stage]
    if started and processes.is_alive(started[-1]["pid"], started[-1]["process_started"]):
        os.kill(started[-1]["pid"], signal.SIGTERM)


class Steps:
    """The last step of each arm, from its metrics.jsonl."""

    def __init__(self, stage_dir: Path) -> None:
        self._stage_dir = stage_dir
        self._files: dict[Path, Any] = {}
        self._last: dict[Path, int] = {}

    def news(self) -> list[str]:
        """'arm a: step 12, loss 3.2101' of every arm that has taken steps since the last call."""
        from launchers.jsonl import JsonLines

        lines = []
        for path in sorted(self._stage_dir.glob("arms/*/stages/*/metrics.jsonl")):
            file = self._files.setdefault(path, JsonLines(path))
            file.poll()
            if file.rows and file.rows[-1]["step"] != self._last.get(path):
                self._last[path] = file.rows[-1]["step"]
                lines.append(f"arm {path.parents[2].name}: step {file.rows[-1]['step']}, loss {file.rows[-1]['loss']:.4f}")
        return lines


def _explain(job: StageJob, reason: str, console: Any) -> None:
    from launchers.control import tail

    for line in tail(job.log, LOG_TAIL_LINES):
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{job.stage}: {reason}; whole log: {job.log}", style="bold red", soft_wrap=True, markup=False)
