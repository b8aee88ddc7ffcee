"""Starts jobs on this machine through nemo-run's LocalExecutor: one experiment per attempt of a stage, one `run.Script` in it.

nemo-run 0.11.1 takes about 2 s to import, so `LocalJobs` imports it in a thread while the data is prepared. Its
LocalExecutor runs the next job after a failed one; therefore it only ever sees one job, and the chain (`launchers/chain.py`) decides.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from launchers.errors import LaunchError
from launchers.nemo_import import import_nemo_run
from launchers.stage_job import StageJob

WRAPPER_MODULE = "launchers.wrapper"
EXIT_POLL_SECONDS = 0.01


class Submitted(Protocol):
    """A job that an executor has taken."""

    job: str
    """The executor's name of it."""

    def alive(self) -> bool:
        """False when the executor knows that the job has ended."""
        ...


class LocalJobs:
    """Submits jobs through nemo-run on this machine."""

    def __init__(self, nemo_home: Path) -> None:
        self._home = str(nemo_home.resolve())
        os.environ["NEMORUN_HOME"] = self._home  # read once, at import: nothing of ours goes to the user's home
        self._module: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._import, name="import-nemo-run", daemon=True)
        self._thread.start()

    def _import(self) -> None:
        try:
            self._module = import_nemo_run()
        except BaseException as error:
            self._error = error

    def ready(self) -> Any:
        """The module nemo_run; waits for its import. LaunchError if it cannot be imported."""
        self._thread.join()
        if self._error is not None:
            raise LaunchError(
                f"nemo-run cannot be imported ({type(self._error).__name__}: {self._error}); run `make setup` again, which installs the "
                f"locked versions (nemo-run 0.11.1 needs leptonai 0.26.7)"
            ) from self._error
        return self._module

    def close(self) -> None:
        """Wait for the import: a thread inside a C extension's import must not meet the end of the interpreter."""
        self._thread.join()

    @contextlib.contextmanager
    def submit(self, job: StageJob, attempt: int) -> Iterator[Submitted]:
        """Start the wrapper of `job`; leave the context only when it has ended (nemo-run ends what still runs)."""
        nemo_run = self.ready()
        nemo_run.config.set_nemorun_home(self._home)  # for a second run in one process
        with nemo_run.Experiment(
            job.stage,
            id=f"{job.stage}_{attempt}_{os.getpid()}",
            executor=nemo_run.LocalExecutor(),
            log_level="ERROR",
            clean_mode=True,
            enable_goodbye_message=False,
            skip_status_at_exit=True,
            serialize_metadata_for_scripts=False,
        ) as experiment:
            script = nemo_run.Script(
                path=WRAPPER_MODULE, m=True, entrypoint=sys.executable, args=job.wrapper_arguments(attempt), env=job.environment
            )
            experiment.add(script, name=job.stage)
            experiment.run()
            submitted = _NemoJob(experiment, job.stage)
            yield submitted
            while submitted.alive():  # nemo-run's own wait looks only every 2 s
                time.sleep(EXIT_POLL_SECONDS)


class _NemoJob:
    def __init__(self, experiment: Any, stage: str) -> None:
        self._experiment = experiment
        self._stage = stage
        self.job = experiment.jobs[0].handle

    def alive(self) -> bool:
        status = self._experiment.status(return_dict=True)[self._stage]["status"]
        return str(getattr(status, "name", status)) in ("UNSUBMITTED", "SUBMITTED", "PENDING", "RUNNING")


@contextlib.contextmanager
def start_directly(job: StageJob, attempt: int) -> Iterator[Submitted]:
    """Start the wrapper of `job` as a child process: for what always runs on the launching machine (the data)."""
    process = subprocess.Popen(
        [sys.executable, "-m", WRAPPER_MODULE, *job.wrapper_arguments(attempt)],
        env={**os.environ, **job.environment},
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C reaches the launcher, which forwards it once
    )
    try:
        yield _ChildJob(process)
    finally:
        process.wait()


class _ChildJob:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.job = f"process {process.pid}"

    def alive(self) -> bool:
        return self._process.poll() is None
