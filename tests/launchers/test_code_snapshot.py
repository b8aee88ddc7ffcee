"""Snapshots of HEAD for jobs, on a small git repository of the test's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launchers.code_snapshot import Code
from launchers.docker_container import Caller, Containers
from launchers.errors import LaunchError
from launchers.slurm_script import SlurmScripts
from launchers.stage_job import stage_job
from recipes.schema import Recipe

OPTIONS = {"docker": {"container_image": "quarry:gpu"}, "slurm": {"account": "a", "partition": "p"}}


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    (folder / "pack").mkdir(parents=True)
    (folder / "pack" / "__init__.py").write_text("VALUE = 1\n")
    (folder / ".gitignore").write_text("runs/\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "one")
    return folder


def recipe(harness: Any, kind: str = "docker", packager: str = "git_archive") -> Recipe:
    options = {**OPTIONS[kind], "packager": packager}
    cluster = {**harness.dict()["cluster"], "kind": kind, "name": kind, "gpu": "h100", "options": options}
    return Recipe.model_validate(harness.dict(cluster=cluster))


def test_jobs_run_what_was_launched_whatever_is_committed_later(harness: Any, repository: Path) -> None:
    (repository / "runs").mkdir()
    (repository / "runs" / "ignored").touch()
    code = Code.of(recipe(harness), harness.run_dir, repository)
    assert code.commit == git(repository, "rev-parse", "HEAD")
    assert code.path == harness.run_dir / "code" / code.commit
    assert not harness.root.exists()  # a dry run writes none
    code.write()
    (repository / "pack" / "__init__.py").write_text("VALUE = 2\n")
    git(repository, "commit", "-q", "-am", "two")
    job = code.job(stage_job(recipe(harness), harness.run_dir, "a"))
    says = [sys.executable, "-c", "import pack; print(pack.VALUE)"]
    done = subprocess.run(says, env={**os.environ, **job.environment}, cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
    assert sorted(path.name for path in code.path.iterdir()) == [".gitignore", "pack"]
    assert code.journal() == {"commit": code.commit, "code": str(code.path)}
    code.write()  # there already
    later = Code.of(recipe(harness), harness.run_dir, repository)
    later.write()
    assert (later.path / "pack" / "__init__.py").read_text() == "VALUE = 2\n"
    assert sorted(path.name for path in code.path.parent.iterdir()) == sorted([str(code.commit), str(later.commit)])


@pytest.mark.parametrize("change", ["changed", "new", "staged", "deleted"])
def test_changes_that_would_not_be_in_it_are_refused_by_name(harness: Any, repository: Path, change: str) -> None:
    name = "pack/__init__.py" if change in ("changed", "deleted") else "pack/ä new.py"
    (repository / name).unlink() if change == "deleted" else (repository / name).write_text("VALUE = 3\n")
    if change == "staged":
        git(repository, "add", ".")
    with pytest.raises(LaunchError, match=f"packager = git_archive.*in no commit.*{name}.*packager=none"):
        Code.of(recipe(harness), harness.run_dir, repository)
    assert Code.of(recipe(harness, packager="none"), harness.run_dir, repository).path == repository


def test_without_a_commit_or_a_repository_it_is_refused(harness: Any, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    with pytest.raises(LaunchError, match="not a git repository.*set it to none"):
        Code.of(recipe(harness), harness.run_dir, folder)
    git(folder, "init", "-q")
    with pytest.raises(LaunchError, match="git rev-parse"):
        Code.of(recipe(harness), harness.run_dir, folder)


def test_a_snapshot_that_was_cut_is_not_taken_for_one(harness: Any, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = Code.of(recipe(harness), harness.run_dir, repository)

    def full(path: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("launchers.code_snapshot._sync", full)
    with pytest.raises(OSError, match="No space"):
        code.write()
    assert not code.path.exists()
    monkeypatch.undo()
    code.write()
    assert (code.path / "pack" / "__init__.py").exists()


def test_slurm_and_docker_use_it(harness: Any, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = Code.of(recipe(harness), harness.run_dir, repository)
    caller = Caller(uid=1000, gid=1000, home="/home/somebody")
    containers = Containers(recipe(harness), harness.run_dir, caller, code=code)
    assert f"{code.path}:{code.path}:ro" in containers.mounts("a")
    assert containers.job(stage_job(harness.recipe, harness.run_dir, "a")).environment["PYTHONPATH"] == str(code.path)
    assert SlurmScripts(None, recipe(harness, "slurm"), harness.run_dir, code.path).code == code.path
