"""The code that a run's jobs use: where it lies, or (`cluster.options.packager=git_archive`) a snapshot of HEAD in the run's folder.

Jobs may wait for days. Without a snapshot they run whatever lies in the repository when they start; with one, what was launched.
nemo-run's GitArchivePackager is not used: it leaves out uncommitted files without a word, packs once more for every job, and puts
the folder into the way of the working folder.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path

from launchers.errors import LaunchError
from launchers.stage_job import StageJob
from recipes.schema import Recipe

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = "code"
"""Below the run's folder; a snapshot is a folder there with the full name of its commit."""
NAMED = 5
"""Of the uncommitted files, in a refusal."""


@dataclass(frozen=True)
class Code:
    """What a launch gives its jobs to run."""

    path: Path
    commit: str | None = None
    """None: as it lies, whatever that is by the time a job starts."""
    repository: Path = REPOSITORY

    @classmethod
    def of(cls, recipe: Recipe, run_dir: Path, repository: Path = REPOSITORY) -> Code:
        """The code for this recipe's jobs; nothing is written yet. LaunchError if the snapshot would not be what lies in the repository."""
        if recipe.cluster.options.get("packager", "none") == "none":
            return cls(repository, repository=repository)
        commit = _git(repository, "rev-parse", "--verify", "HEAD^{commit}").decode().strip()
        changed = _uncommitted(repository)
        if changed:
            more = f" and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
            raise LaunchError(
                f"cluster.options.packager = git_archive: {repository} has changes that are in no commit, and the jobs would run without them: "
                f"{', '.join(changed[:NAMED])}{more}; commit them (or add them to .gitignore), or set cluster.options.packager=none"
            )
        return cls(run_dir.resolve() / FOLDER / commit, commit, repository)

    def write(self) -> None:
        """Make the snapshot if it is to be one and is not there: unpacked under a temporary name, synced, renamed."""
        if self.commit is None or self.path.is_dir():
            return
        archive = _git(self.repository, "archive", "--format=tar", self.commit)
        temporary = self.path.with_name(f".{self.commit}.{os.getpid()}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(temporary, filter="data")
        for folder, _, names in os.walk(temporary):
            for path in (folder, *(os.path.join(folder, name) for name in names)):
                _sync(path)
        os.rename(temporary, self.path)
        _sync(str(self.path.parent))

    def job(self, job: StageJob) -> StageJob:
        """The job with this code in front of its Python path."""
        if self.commit is None:
            return job
        _, *inherited = job.environment["PYTHONPATH"].split(os.pathsep)
        return replace(job, environment={**job.environment, "PYTHONPATH": os.pathsep.join((str(self.path), *inherited))})

    def journal(self) -> dict[str, str]:
        """For the journal's `launch` row."""
        return {} if self.commit is None else {"commit": self.commit, "code": str(self.path)}


def _uncommitted(repository: Path) -> list[str]:
    """Paths below the repository that differ from HEAD or are in no commit; ignored files are left out."""
    said = _git(repository, "status", "--porcelain=v1", "-z", "--untracked-files=all", "--no-renames", "--", ".")
    return [os.fsdecode(entry)[3:] for entry in said.split(b"\0") if entry]


def _git(repository: Path, *arguments: str) -> bytes:
    """What git says; LaunchError with its own words if it fails."""
    # Variables as in a hook would point git at another repository.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(repository), *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
    except FileNotFoundError:
        raise LaunchError(
            "cluster.options.packager = git_archive: there is no git here; install it, or set it to none"
        ) from None
    if done.returncode != 0:
        words = " ".join(done.stderr.decode(errors="replace").split())
        raise LaunchError(
            f"cluster.options.packager = git_archive: `git {arguments[0]}` in {repository} failed: {words}; launch from a git checkout, or "
            "set it to none"
        )
    return done.stdout


def _sync(path: str) -> None:
    if os.path.islink(path):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
