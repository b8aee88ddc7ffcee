"""Folders, names and changed recipes of runs."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launchers.errors import LaunchError
from launchers.runs import ABSENT, RunFolder, check_change, default_name, differences, find_run, list_runs
from launchers.stage_job import check_name, stage_job
from recipes.schema import Recipe

LEAF = st.integers(0, 3) | st.sampled_from(["x", None, True]) | st.lists(st.integers(0, 2), max_size=2)
TREE = st.recursive(LEAF, lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=8)
DICT = st.dictionaries(st.sampled_from("abc"), TREE, max_size=3)


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        tree = tree[part]
    if value is ABSENT:
        del tree[last]
    else:
        tree[last] = value


@given(old=DICT, new=DICT)
def test_differences_are_exactly_what_turns_one_recipe_into_the_other(old: dict, new: dict) -> None:
    found = differences(old, new)
    assert (found == []) == (repr(_sorted(old)) == repr(_sorted(new)))
    changed = copy.deepcopy(old)
    for d in found:
        put(changed, d.key, d.new)
    assert repr(_sorted(changed)) == repr(_sorted(new))  # repr: 1 and True differ


def _sorted(tree: Any) -> Any:
    return {k: _sorted(tree[k]) for k in sorted(tree)} if isinstance(tree, dict) else tree


def test_difference_reads_like_a_change() -> None:
    found = differences({"a": {"b": 1, "c": "x"}}, {"a": {"b": 2}, "d": None})
    assert [str(d) for d in found] == ["a.b: 1 -> 2", 'a.c: "x" -> (absent)', "d: (absent) -> null"]


def test_what_may_change_when_stages_are_finished(harness: Any, tmp_path: Path) -> None:
    old = Recipe.model_validate(harness.dict())
    run = RunFolder(tmp_path)

    def change(finished: set[str], **changes: Any) -> list[str]:
        return [d.key for d in check_change(run, old, Recipe.model_validate(harness.dict(**changes)), finished, accept=True)]

    assert change({"a"}, extra={"owner": "me"}) == ["extra.owner"]
    assert change({"a"}, logging={"wandb": "offline"}) == ["logging.wandb"]
    assert change(set(), seed=7) == ["seed"]
    assert change({"a", "b"}, stages=["a", "b", "c"]) == ["stages"]
    for changes in ({"seed": 7}, {"stages": ["b", "a", "merged", "c", "hf"]}, {"stages": ["c", "hf"]}):
        with pytest.raises(LaunchError, match="--accept-changes refuses"):
            change({"a", "b"}, **changes)


def test_default_name_is_stable_and_a_folder_name(harness: Any) -> None:
    assert default_name(harness.recipe) == "smoke-tiny-model" == default_name(Recipe.model_validate(harness.dict(seed=5)))
    with pytest.raises(LaunchError, match=r"run name 'a/b-tiny-model' cannot be used.*for example 'a-b-tiny-model'"):
        default_name(Recipe.model_validate(harness.dict(name="a/b")))


@given(st.text())
def test_accepted_names_are_plain_words(name: str) -> None:
    try:
        check_name("run", name)
    except LaunchError:
        return
    assert not set(name) & set(" /\\$`'\"|;&<>*?()[]{}!#~\n")
    assert Path(name).name == name
    assert not name.startswith(("-", "."))


def test_find_and_list(harness: Any, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    for age, name in enumerate(("old", "new")):
        (root / name).mkdir(parents=True)
        harness.recipe.write(root / name / "recipe.json")
        os.utime(root / name / "recipe.json", (1000 + age, 1000 + age))
    (root / "data").mkdir()
    assert [run.name for run in list_runs(root)] == ["new", "old"]
    assert find_run("old", root).path == root / "old"
    assert find_run(str(root / "new"), Path("elsewhere")).path == root / "new"
    with pytest.raises(LaunchError, match=r"no run 'data'.*runs under .*: new, old"):
        find_run("data", root)


def test_stage_may_not_take_the_name_of_the_data(harness: Any, tmp_path: Path) -> None:
    value = harness.dict(stages=["data"])
    value["phase"]["data"] = value["phase"]["a"]
    with pytest.raises(LaunchError, match="cannot be called 'data'"):
        stage_job(Recipe.model_validate(value), tmp_path, "data")


def test_environment_of_a_job(harness: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine")
    job = stage_job(harness.recipe, tmp_path, "a")
    root = str(Path(__file__).resolve().parents[2])
    assert job.environment["PYTHONPATH"] == f"{root}{os.pathsep}/mine"
    assert job.environment["OMP_NUM_THREADS"] == "1"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in job.environment
    assert job.command[1:] == ["-m", "training.stage", "--run-dir", str(tmp_path), "--stage", "a"]
    cluster = {**harness.dict()["cluster"], "gpu": "h100", "threads_per_rank": 4}
    job = stage_job(Recipe.model_validate(harness.dict(cluster=cluster)), tmp_path, "a")
    assert (job.environment["CUDA_DEVICE_MAX_CONNECTIONS"], job.environment["MKL_NUM_THREADS"]) == ("1", "4")
