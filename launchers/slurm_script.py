"""The batch script of one stage, through nemo-run's SlurmExecutor: one srun, one task a node, and a requeue only where it was decided.

nemo-run's own retries requeue after any failure, so they are off; a trap in the script requeues on the one exit code that
`launchers/slurm_job.py` gives a stage that is to go on, and where Slurm ended the job at its time limit. After any other failure it
writes a row into the journal. Everything that gets into the script is checked to mean nothing to a shell.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launchers.code_snapshot import REPOSITORY
from launchers.errors import LaunchError
from launchers.slurm_job import EXIT_AGAIN
from launchers.stage_job import StageJob
from recipes.docker_options import layout_of
from recipes.schema import Recipe
from recipes.slurm_options import SlurmOptions, slurm_options

JOB_MODULE = "launchers.slurm_job"
SHELL_WORD = re.compile(r"[A-Za-z0-9_./@+=:-]+")
PORTS = (10000, 20000)
"""First and number of the ports that the ranks of a job meet at: from its id, so that two jobs on one node do not collide."""


def options_of(recipe: Recipe) -> SlurmOptions:
    """The cluster's options, complete for a launch; LaunchError for what only a launch needs."""
    options = slurm_options(recipe.cluster.options)
    for key in ("account", "partition"):
        if getattr(options, key) is None:
            raise LaunchError(
                f"cluster.options.{key} is not set, and no job can be submitted without it; add cluster.options.{key}=NAME "
                f"({'`sacctmgr show associations` lists yours' if key == 'account' else '`sinfo` lists them'})"
            )
    return options


def nodes_of(recipe: Recipe, stage: str) -> int:
    """Nodes of a stage; data, merges and exports take one."""
    layout = layout_of(recipe, stage) if stage in recipe.stages else None
    return 1 if layout is None else max(1, layout.gpus // recipe.cluster.gpus_per_node)


def shell_word(what: str, value: str) -> str:
    """`value` if a shell takes it as one plain word; LaunchError otherwise."""
    if not SHELL_WORD.fullmatch(value):
        raise LaunchError(
            f"{what} {value!r} has characters that a shell or pyxis would read as something else; use a path of letters, digits and "
            "_ . / @ + = : -"
        )
    return value


class SlurmScripts:
    """Makes experiments of nemo-run, one per job."""

    def __init__(self, nemo_run: Any, recipe: Recipe, run_dir: Path, code: Path = REPOSITORY) -> None:
        self._nemo = nemo_run
        self.recipe = recipe
        self.options = options_of(recipe)
        self.run_dir = Path(shell_word("the folder of the run", str(run_dir.resolve())))
        self.code = Path(shell_word("the folder of the code", str(code)))
        self.workdir = shell_word("the working folder", os.getcwd())
        self.python = self.options.python or (
            "python" if self.options.container_image else shell_word("Python", sys.executable)
        )

    def job_name(self, stage: str) -> str:
        return f"quarry.{self.run_dir.name}.{stage}"

    @contextlib.contextmanager
    def experiment(self, job: StageJob, attempt: int, dependency: str | None, label: str) -> Iterator[Any]:
        """nemo-run's experiment with the one job; `dependency` is the Slurm id of the job that has to succeed before it.

        `label` tells experiments of one attempt apart: nemo-run refuses a folder that is there already, and takes the last _ for the end of
        the title.
        """
        nemo_run = self._nemo
        with (
            _no_input(),
            nemo_run.Experiment(
                job.stage,
                id=f"{job.stage}_{attempt}-{label}",
                executor=self._executor(job, dependency),
                log_level="ERROR",
                clean_mode=True,
                enable_goodbye_message=False,
                skip_status_at_exit=True,
                serialize_metadata_for_scripts=False,
            ) as experiment,
        ):
            arguments = [*job.wrapper_arguments(attempt), "--chdir", self.workdir]
            script = nemo_run.Script(
                path=JOB_MODULE,
                m=True,
                entrypoint=self.python,
                args=[shell_word(f"an argument of stage '{job.stage}'", word) for word in arguments],
            )
            experiment.add(script, name=job.stage)
            yield experiment

    def script(self, job: StageJob, attempt: int, dependency: str | None = None) -> str:
        """Text of the sbatch script, made without a Slurm."""
        home = self.run_dir / ".nemo-run" / "experiments" / job.stage / f"{job.stage}_{attempt}-dryrun"
        shutil.rmtree(home, ignore_errors=True)
        with self.experiment(job, attempt, dependency, "dryrun") as experiment:
            experiment.dryrun(log=False, delete_exp_dir=False)
            return Path(experiment._exp_dir, f"{job.stage}_sbatch.sh").read_text()

    def submit(self, job: StageJob, attempt: int, dependency: str | None) -> str:
        """Submit the job; returns its Slurm id. LaunchError when Slurm refuses it."""
        with self.experiment(job, attempt, dependency, f"{int(time.time())}-{os.getpid()}") as experiment:
            try:
                experiment.run(detach=True)
            except Exception as error:  # nemo-run lets through whatever its tunnel raises
                raise LaunchError(_reason(error)) from error
            handle = experiment.jobs[0].handle or ""
        found = re.fullmatch(r"[^:]*://[^/]*/(\d+)(?:/.*)?", handle)
        if not found:
            raise LaunchError(
                f"sbatch gave no job id (nemo-run's handle is {handle!r}); try `sbatch` by hand with the script in {self.run_dir}"
            )
        return found[1]

    def _executor(self, job: StageJob, dependency: str | None) -> Any:
        nemo_run, options, cluster = self._nemo, self.options, self.recipe.cluster
        on_gpus = cluster.gpu != "cpu" and options.request_gpus and job.stage in self.recipe.phase
        more: dict[str, Any] = {"kill_on_invalid_dep": "yes", "reservation": options.reservation}
        executor = nemo_run.SlurmExecutor(
            account=options.account,
            partition=options.partition,
            qos=options.qos,
            time=options.time,
            nodes=nodes_of(self.recipe, job.stage),
            ntasks_per_node=1,
            cpus_per_task=options.cpus_per_task,
            gpus_per_node=cluster.gpus_per_node if on_gpus else None,
            mem=options.mem,
            exclusive=options.exclusive or None,
            constraint=options.constraint,
            # To the job's steps, not to the batch script (that would be B:): the wrapper hears it and the stage saves.
            signal=f"TERM@{options.signal_seconds_before_limit}",
            container_image=options.container_image,
            container_mounts=self._mounts(),
            srun_args=list(options.srun_args) or None,
            additional_parameters={key: value for key, value in more.items() if value is not None},
            env_vars={**options.environment, "PYTHONPATH": str(self.code), "PYTHONSAFEPATH": "1"},
            setup_lines=self._setup_lines(job),
            dependencies=[f"slurm_tunnel://nemo_run/{dependency}/master/0"] if dependency else [],
            tunnel=nemo_run.LocalTunnel(job_dir=""),
            packager=nemo_run.Packager(),
            retries=0,
            poll_estimated_start_time=False,
        )
        executor.job_name_prefix = f"quarry.{self.run_dir.name}."
        return executor

    def _mounts(self) -> list[str]:
        if not self.options.container_image:
            return []
        paths = [os.path.abspath(self.recipe.data.root), str(self.run_dir.parent), self.workdir, str(self.code)]
        own = [shell_word("a folder to mount", path) for path in dict.fromkeys(paths)]
        return [*(f"{path}:{path}" for path in own), *self.options.container_mounts]

    def _setup_lines(self, job: StageJob) -> str:
        first, count = PORTS
        row = f'{{"time": "%s", "event": "job_failed", "stage": "{job.stage}", "job": "%s", "exit_code": %d, "output": "%s"}}'
        journal = shell_word("the journal of the run", str(self.run_dir / "journal.jsonl"))
        return "\n".join(
            (
                'export MASTER_ADDR="${head_node_ip%% *}"',
                f"export MASTER_PORT=$(( {first} + SLURM_JOB_ID % {count} ))",
                "at_the_end() {",
                "code=$?; set +ex",
                '[ $code -ne 0 ] || [ -z "${exitcode+set}" ] || return 0',
                'about=$(scontrol show job "$SLURM_JOB_ID")',
                # The stage did not save and leave before the limit. Slurm ends this script too, with srun still running, and would count
                # the job as failed; requeued, it goes on from its last checkpoint, and launchers/slurm_job.py counts such ends.
                f'[ -n "${{exitcode+set}}" ] || [[ "$about" != *Reason=TimeLimit* ]] || code={EXIT_AGAIN}',
                # The only requeue: decided in the job, on the first node. Slurm requeues by itself when a node fails.
                f'if [ $code -eq {EXIT_AGAIN} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {self.options.max_requeues} ]; '
                'then scontrol requeue "$SLURM_JOB_ID";',
                # For the case that nothing of ours began, or was left to say how it ended: no Python, no container, no memory.
                'elif [ $code -ne 0 ]; then output=$(sed -n "s/^ *StdOut=//p" <<< "$about"); output=${output%/*};',
                f'printf \'{row}\\n\' "$(date -u +%Y-%m-%dT%H:%M:%S.000+00:00)" "$SLURM_JOB_ID" $code "$output" >> {journal};',
                "fi; }",
                "trap at_the_end EXIT",
            )
        )


@contextlib.contextmanager
def _no_input() -> Iterator[None]:
    """While it lasts standard input is empty: nemo-run runs its commands through invoke, which would read what is typed here."""
    with open(os.devnull) as nothing:
        before, sys.stdin = sys.stdin, nothing
        try:
            yield
        finally:
            sys.stdin = before


def _reason(error: BaseException) -> str:
    """What Slurm said, of the long texts that nemo-run wraps around it."""
    lines = [line.strip() for line in str(error).splitlines() if "error" in line.lower() and "sbatch" in line.lower()]
    return "; ".join(lines) or f"{type(error).__name__}: {error}"
