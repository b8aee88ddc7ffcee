"""compose.yaml against the Dockerfile: targets and images, users, folders, and commands that `quarry` understands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from launchers.cli import parse
from recipes.docker_options import DockerOptions

ROOT = Path(__file__).resolve().parent.parent
# https://github.com/compose-spec/compose-spec, what of a service is used here.
SERVICE_KEYS = {
    *("build", "cap_drop", "command", "deploy", "environment", "image", "init", "profiles", "security_opt", "shm_size"),
    *("stop_grace_period", "ulimits", "user", "volumes"),
}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def targets() -> dict[str, str]:
    """Target of the Dockerfile -> its text."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    parts = re.split(r"^FROM \S+ AS (\S+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_services_have_only_keys_of_the_specification(compose: dict[str, Any]) -> None:
    assert {key for key in compose if not key.startswith("x-")} == {"name", "services"}
    for service in compose["services"].values():
        assert set(service) <= SERVICE_KEYS


def test_each_service_builds_a_target_of_the_dockerfile_under_its_name(
    compose: dict[str, Any], targets: dict[str, str]
) -> None:
    for name, service in compose["services"].items():
        target = service["build"]["target"]
        assert service["build"]["context"] == "."
        assert target in targets, name
        assert service["image"] == f"quarry:{target}"
        gpus = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
        assert bool(gpus) == (target == "gpu") == ("profiles" in service)
    assert {service["build"]["target"] for service in compose["services"].values()} == {"gpu", "cpu"}


def test_runs_lie_where_the_images_work(compose: dict[str, Any], targets: dict[str, str]) -> None:
    for service in compose["services"].values():
        folder = re.search(r"^WORKDIR (/\S+)\nUSER", targets[service["build"]["target"]], flags=re.MULTILINE)
        assert folder
        assert service["volumes"] == [f"./runs:{folder[1]}/runs"]


def test_nobody_is_root_and_limits_are_those_of_cluster_docker(compose: dict[str, Any]) -> None:
    options = DockerOptions()
    for service in compose["services"].values():
        assert re.fullmatch(r"\$\{QUARRY_UID:\?[^}$]+\}:\$\{QUARRY_GID:\?[^}$]+\}", service["user"])
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["shm_size"] == f"{options.shm_gib}g"
        assert service["ulimits"] == options.ulimits
        assert service["init"] is True


def test_commands_are_ones_of_quarry(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        program, *words = service["command"]
        assert program == "quarry"
        assert "curriculum=smoke" in parse(words).overrides
