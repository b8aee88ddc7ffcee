"""Options of cluster=docker: an image that stays the same, and nothing that a shell or Docker's mounts would read as something else."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from recipes.compose import compose
from recipes.docker_options import OWN_VARIABLES, PREDEFINED_NETWORKS, docker_options, layout_of
from recipes.lint import lint
from recipes.schema import Recipe
from tests.recipes.hostile import HOSTILE

DIGEST = f"sha256:{'0a' * 32}"


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("key", ["container_image", "network", "python", "user"])
def test_hostile_words_are_refused_by_name(key: str, value: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        docker_options({key: value})
    assert refusal.value.errors()[0]["loc"] == (key,)


@pytest.mark.parametrize(
    "image",
    [
        "quarry:gpu",
        f"quarry@{DIGEST}",
        f"quarry:gpu@{DIGEST}",
        DIGEST,
        "nvcr.io/nvidia/pytorch:26.03-py3",
        "localhost:5000/team/quarry:1.2",
        "registry.example.com:443/a/b_c/d--e:v1",
    ],
)
def test_pinned_images(image: str) -> None:
    assert docker_options({"container_image": image}).container_image == image


@pytest.mark.parametrize(
    "image",
    [
        "quarry",
        "quarry:latest",
        "localhost:5000/quarry",
        "Quarry:gpu",
        "quarry@sha256:12",
        "quarry:gpu:x",
        "-v:1",
        "docker://quarry:gpu",
    ],
)
def test_images_without_a_pin_are_refused(image: str) -> None:
    with pytest.raises(ValidationError, match="quarry:gpu"):
        docker_options({"container_image": image})


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"container_mounts": ["/data:/data,/etc:/etc"]}, "container_mounts"),
        ({"container_mounts": ["/my data:/data"]}, "container_mounts"),
        ({"container_mounts": ["/data:/data:rx"]}, "container_mounts"),
        ({"container_mounts": ["/data:/data:rw,Z"]}, "container_mounts"),
        ({"container_mounts": ["relative:/data"]}, "container_mounts"),
        ({"container_mounts": ["/data"]}, "container_mounts"),
        ({"container_mounts": ["/data:/$(id)"]}, "container_mounts"),
        ({"container_mounts": ["/data/../etc:/data"]}, "container_mounts"),
        ({"container_mounts": ["/:/host"]}, "container_mounts"),
        ({"container_mounts": ["//:/host"]}, "container_mounts"),
        ({"container_mounts": ["/etc/:/etc2"]}, "container_mounts"),
        ({"container_mounts": ["/var/run/docker.sock:/x"]}, "container_mounts"),
        ({"container_mounts": ["/var//run:/x"]}, "container_mounts"),
        ({"container_mounts": ["/data:/proc/x"]}, "container_mounts"),
        ({"container_mounts": ["/data:/nemo_run"]}, "container_mounts"),
        ({"environment": {"a": "b"}}, "environment"),
        ({"environment": {"A B": "b"}}, "environment"),
        ({"environment": {"A": "b\nC=d"}}, "environment"),
        ({"user": "root"}, "user"),
        ({"user": "0:0"}, "user"),
        ({"user": "00:5"}, "user"),
        ({"user": "1000"}, "user"),
        ({"gpus": 0}, "gpus"),
        ({"gpus": -1}, "gpus"),
        ({"shm_gib": 0}, "shm_gib"),
        ({"ipc": "container:other"}, "ipc"),
        ({"ulimits": {"memlok": -1}}, "ulimits"),
        ({"ulimits": {"memlock": -2}}, "ulimits"),
        ({"ulimits": {"memlock": "x:y"}}, "ulimits"),
        ({"privileged": True}, "privileged"),
        ({"volumes": []}, "volumes"),
    ],
)
def test_refused(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        docker_options(options)
    assert refusal.value.errors()[0]["loc"][0] == key


@pytest.mark.parametrize("name", OWN_VARIABLES)
def test_variables_that_quarry_sets_are_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="set by Quarry"):
        docker_options({"environment": {name: "x"}})


@pytest.mark.parametrize("name", PREDEFINED_NETWORKS)
def test_networks_that_nemo_run_would_try_to_create_are_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="take 'host'"):
        docker_options({"network": name})


def test_mounts_are_read_only_unless_said_otherwise() -> None:
    mounts = docker_options({"container_mounts": ["/a:/b", "/a//c/:/d:rw", "/e:/f:ro"]}).container_mounts
    assert mounts == ["/a:/b:ro", "/a/c:/d:rw", "/e:/f:ro"]


@given(st.from_regex(r"/[ -~]{0,8}:/[ -~]{0,8}", fullmatch=True))
def test_a_mount_that_passes_is_one_word_with_two_absolute_paths(value: str) -> None:
    try:
        (mount,) = docker_options({"container_mounts": [value]}).container_mounts
    except ValidationError:
        return
    assert shlex.split(mount) == [mount]
    source, target, mode = mount.split(":")
    assert source.startswith("/")
    assert target.startswith("/")
    assert mode in ("ro", "rw")
    assert mount.count(",") == 0


def test_the_linter_names_key_value_and_remedy(changed: Any) -> None:
    recipe = compose(["curriculum=smoke", "cluster=docker", "cluster.gpu=cpu"])
    assert lint(recipe) == []
    found = [str(problem) for problem in lint(changed(recipe, **{"cluster.options.container_image": "quarry"}))]
    assert len(found) == 1
    assert found[0].startswith("cluster.options.container_image = 'quarry': ")
    assert "quarry:gpu" in found[0]
    found = [str(problem) for problem in lint(changed(recipe, **{"cluster.options.priviliged": True}))]
    assert "cluster.options.priviliged" in found[0]
    assert "container_mounts" in found[0]


@pytest.mark.parametrize(
    ("gpu", "gpus", "said"),
    [
        ("cpu", 1, "run on CPU"),
        ("h100", 9, "the machine has 8"),
        ("h100", 1, "at least 4"),
        ("h100", 4, None),
        ("h100", None, None),
    ],
)
def test_gpus_of_a_container_are_checked_against_machine_and_layouts(
    smoke: Recipe, changed: Any, gpu: str, gpus: int | None, said: str | None
) -> None:
    assert max(layout.gpus for s in smoke.stages if (layout := layout_of(smoke, s))) == 4
    docker = {"kind": "docker", "gpu": gpu, "options": {"gpus": gpus}}
    recipe = changed(smoke, **{f"cluster.{key}": value for key, value in docker.items()})
    problems = [str(problem) for problem in lint(recipe) if problem.key == "cluster.options.gpus"]
    assert len(problems) == (said is not None)
    assert said is None or said in problems[0]


def test_only_what_trains_has_a_layout(smoke: Recipe) -> None:
    assert {smoke.stage_kind(s) for s in smoke.stages if layout_of(smoke, s) is None} == {"merge", "export"}
