"""Weights & Biases' offline files of a stage, made from its logs when it has finished or failed, or at any time by hand:

    python -m training.wandb_log --run-dir runs/x --stage foundation       # while it trains or waits to be resumed, too
    wandb sync runs/x/stages/*/wandb/offline-run-*                         # from a machine that may; nothing here sends anything

One run per stage, always whole (a later attempt replaces the folder, under the same run id), grouped by the run of the chain, with
`total_tokens` as the axis on which all stages lie in a row.

It does not log from the ranks, as Megatron would: wandb's service, a process beside the rank, ends on the SIGTERM that Slurm sends to every
process of a job, whereupon the next `log` raises ConnectionResetError in the middle of the save before preemption, and what it had taken
is lost (wandb 0.31.0: 7 bytes were on the disk). metrics.jsonl is on the disk after every step.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from recipes.logging_options import missing_package
from recipes.schema import Recipe, RecipeError
from training.files import read_json_lines
from training.metrics import curves

FOLDER = "wandb"
LOGS = ("metrics.jsonl", "heldout.jsonl")
TIMEOUT_SECONDS = 300.0
"""60,000 logged steps took 25 s of one core."""


def check(recipe: Recipe) -> None:
    """RecipeError if the recipe wants wandb and it is not installed here."""
    missing = missing_package(recipe.logging)
    if missing:
        raise RecipeError(missing)


def after_attempt(recipe: Recipe, stage: str, run_dir: Path) -> None:
    """Write the stage's run in a process of its own, if the recipe wants it and there is something new.

    A failure is said and ends nothing: all numbers are in metrics.jsonl, and the command can be given again.
    """
    stage_dir = run_dir / "stages" / stage
    logs = [stage_dir / name for name in LOGS if (stage_dir / name).exists()]
    written = [path.stat().st_mtime for path in (stage_dir / FOLDER).glob("offline-run-*")]
    if recipe.logging.wandb is None or not logs or (written and max(written) > max(path.stat().st_mtime for path in logs)):
        return
    command = [sys.executable, "-m", "training.wandb_log", "--run-dir", str(run_dir), "--stage", stage]
    try:
        code: int | str = subprocess.run(command, timeout=TIMEOUT_SECONDS, check=False).returncode
    except subprocess.TimeoutExpired:
        code = f"none after {TIMEOUT_SECONDS:g} s"
        for left in (stage_dir / FOLDER).glob(".writing-*"):
            shutil.rmtree(left, ignore_errors=True)
    if code != 0:
        print(
            f"wandb's files of stage '{stage}' were not written (exit code {code}); metrics.jsonl has all numbers; again: {' '.join(command)}",
            file=sys.stderr,
            flush=True,
        )


def points(stage_dir: Path) -> dict[int, dict[str, float]]:
    """Step -> values by name, in the order of the steps: what TensorBoard shows, with the tokens of the axis."""
    found: dict[int, dict[str, float]] = {}
    for name in LOGS:
        path = stage_dir / name
        for line in read_json_lines(path) if path.exists() else []:
            found.setdefault(line["step"], {}).update(curves(line))
    return dict(sorted(found.items()))


def write(recipe: Recipe, stage: str, run_dir: Path) -> Path:
    """Write the stage's run, in place of an earlier one; returns its folder. Nothing reads or writes outside the stage's folder."""
    stage_dir = run_dir / "stages" / stage
    home = stage_dir / FOLDER
    home.mkdir(exist_ok=True)
    steps = points(stage_dir)
    with tempfile.TemporaryDirectory(dir=home, prefix=".writing-") as temporary:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            del os.environ[name]  # a run id, an address or a mode of the user's other work
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # wandb reports its own errors to Sentry
        for name in ("CONFIG", "CACHE", "DATA"):
            os.environ[f"WANDB_{name}_DIR"] = temporary
        import wandb

        run = wandb.init(
            mode="offline",
            dir=temporary,
            project=recipe.logging.wandb_project,
            id=_run_id(home),
            name=f"{run_dir.name}/{stage}",
            group=run_dir.name,
            job_type=recipe.stage_kind(stage),
            config={"stage": stage, "recipe": recipe.model_dump(mode="json")},
            settings=wandb.Settings(
                console="off", disable_git=True, disable_code=True, x_disable_stats=True, x_disable_meta=True, silent=True
            ),
        )
        run.define_metric("*", step_metric="total_tokens")
        for step, values in steps.items():
            run.log(values, step=step)
        run.finish()
        wandb.teardown()
        [made] = (Path(temporary) / "wandb").glob("offline-run-*")
        before = list(home.glob("offline-run-*"))
        place = home / made.name
        if place in before:  # made within the same second
            shutil.rmtree(place)
            before.remove(place)
        for link in [path for path in made.rglob("*") if path.is_symlink()]:
            link.unlink()  # to wandb's own logs in the temporary folder
        made.rename(place)
    for old in before:
        shutil.rmtree(old)
    return place


def _run_id(home: Path) -> str:
    """The stage's own, the same for every attempt."""
    path = home / "run_id.txt"
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n")
    return path.read_text().strip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.wandb_log", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--stage", required=True)
    options = parser.parse_args(argv)
    try:
        recipe = Recipe.read(options.run_dir / "recipe.json")
        recipe.stage_kind(options.stage)
        check(recipe.model_copy(update={"logging": recipe.logging.model_copy(update={"wandb": "offline"})}))
        if not (options.run_dir / "stages" / options.stage / LOGS[0]).exists():
            raise RecipeError(f"{options.run_dir / 'stages' / options.stage} has no {LOGS[0]}: it has not trained a step")
    except RecipeError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 78
    print(write(recipe, options.stage, options.run_dir.resolve()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
