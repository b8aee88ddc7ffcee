"""Options of a Slurm cluster: what a shell, sbatch or pyxis would read as something else is refused, by name."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from recipes.compose import compose
from recipes.lint import lint
from recipes.slurm_options import OWN_SRUN_ARGUMENTS, SlurmOptions, limit_seconds, slurm_options
from tests.recipes.hostile import HOSTILE


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("key", ["account", "partition", "qos", "reservation", "constraint", "mem", "python"])
def test_hostile_words_are_refused_by_name(key: str, value: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        slurm_options({key: value})
    assert refusal.value.errors()[0]["loc"] == (key,)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"container_mounts": ["/data:/data,/etc:/etc"]}, "container_mounts"),
        ({"container_mounts": ["/my data:/data"]}, "container_mounts"),
        ({"container_mounts": ["/data:/data:rx"]}, "container_mounts"),
        ({"container_mounts": ["relative:/data"]}, "container_mounts"),
        ({"container_mounts": ["/data"]}, "container_mounts"),
        ({"container_mounts": ["/data:/$(id)"]}, "container_mounts"),
        ({"container_image": "image; rm -r x"}, "container_image"),
        ({"environment": {"A": "b; touch x"}}, "environment"),
        ({"environment": {"a": "b"}}, "environment"),
        ({"environment": {"A B": "b"}}, "environment"),
        ({"environment": {"MASTER_ADDR": "elsewhere"}}, "environment"),
        ({"srun_args": ["--mpi=none --output=/x"]}, "srun_args"),
        ({"srun_args": ["mpi=none"]}, "srun_args"),
        ({"srun_args": ["--comment=$(id)"]}, "srun_args"),
        ({"time": "tomorrow"}, "time"),
        ({"time": "00:00:00"}, "time"),
        ({"time": 60}, "time"),
        ({"max_requeues": -1}, "max_requeues"),
        ({"acount": "a"}, "acount"),
    ],
)
def test_refused(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        slurm_options(options)
    assert refusal.value.errors()[0]["loc"][0] == key


@pytest.mark.parametrize("name", OWN_SRUN_ARGUMENTS)
def test_arguments_that_quarry_sets_are_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="set by Quarry"):
        slurm_options({"srun_args": [f"--{name}=x"]})


@given(st.text(max_size=20))
def test_what_passes_is_one_plain_word_of_the_shell(value: str) -> None:
    try:
        checked = slurm_options({"account": value}).account
    except ValidationError:
        return
    said = subprocess.run(["bash", "-c", f"printf '%s|' {checked}"], capture_output=True, text=True, check=True).stdout
    assert said == f"{value}|"


def test_times() -> None:
    assert limit_seconds("1-02:03:04") == 86400 + 2 * 3600 + 3 * 60 + 4
    assert limit_seconds("00:10:00") == 600


def test_the_linter_names_key_value_and_remedy() -> None:
    found = lint(compose(["curriculum=smoke", "cluster=slurm", "cluster.options.qos='a b'"]))
    assert [problem.key for problem in found] == ["cluster.options.qos"]
    assert "'a b'" in str(found[0])
    unknown = lint(compose(["curriculum=smoke", "cluster=slurm", "+cluster.options.que=a"]))
    assert "known options: account, partition" in str(unknown[0])


def test_a_signal_before_the_job_begins_is_refused() -> None:
    found = lint(compose(["curriculum=smoke", "cluster=slurm", "cluster.options.time='00:10:00'"]))
    assert [problem.key for problem in found] == ["cluster.options.signal_seconds_before_limit"]


def test_every_option_of_the_published_cluster_is_known_and_none_is_missing() -> None:
    options = compose(["curriculum=smoke", "cluster=slurm"]).cluster.options
    assert set(options) == set(SlurmOptions.model_fields)


def test_cpu_ranks_stay_on_one_node() -> None:
    assert lint(compose(["curriculum=smoke", "cluster=slurm", "cluster.gpu=cpu"])) == []
    found = lint(compose(["curriculum=smoke", "cluster=slurm", "cluster.gpu=cpu", "cluster.gpus_per_node=1"]))
    assert any("on one node only" in str(problem) for problem in found)
