"""Prompts of reinforcement-learning stages: files are found or named as missing, built-in ones are made once and are what rewards can check."""

from __future__ import annotations

import json

import pytest

from data_prep.errors import DataError
from data_prep.rl_prompts import prepare_prompts, prompt_paths
from recipes.compose import compose
from recipes.lint import lint


def stage(**changes):
    return compose(["curriculum=smoke"]).grpo["math"].model_copy(update=changes)


def test_built_in_prompts_are_made_once_and_their_references_hold(tmp_path):
    grpo = stage(max_prompts=96)
    with pytest.raises(DataError, match="grpo.math.builder: .*small_sums.*`quarry prep` makes it"):
        prompt_paths(grpo, "math", tmp_path)
    (path,) = prepare_prompts(grpo, "math", tmp_path)
    before = path.stat().st_mtime_ns
    assert prepare_prompts(grpo, "math", tmp_path) == prompt_paths(grpo, "math", tmp_path) == [path]
    assert path.stat().st_mtime_ns == before
    prompts = [json.loads(line) for line in path.read_text().splitlines()]
    questions = [prompt["messages"][0]["content"] for prompt in prompts]
    assert len(prompts) == len(set(questions)) == 96
    for question, prompt in zip(questions, prompts, strict=True):
        left, sign, right = question.split(":")[-1].replace("=", " ").replace("?", " ").split()[:3]
        assert prompt["reference"] in "0123456789"
        assert int(prompt["reference"]) == int(left) + (1 if sign == "+" else -1) * int(right)
    assert prepare_prompts(stage(max_prompts=95), "math", tmp_path) != [path]


def test_more_prompts_than_there_are_questions_are_refused(tmp_path):
    with pytest.raises(DataError, match="small_sums: there are .* different questions, 5000 were asked for"):
        prepare_prompts(stage(max_prompts=5000), "math", tmp_path)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_an_unknown_builder_and_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match="no builder of prompts 'riddles'; known: small_sums"):
        prepare_prompts(stage(builder="riddles"), "math", tmp_path)
    with pytest.raises(DataError, match="grpo.math.prompts: nothing matches '.*none"):
        prepare_prompts(stage(builder=None, prompts=[str(tmp_path / "none" / "*.jsonl")]), "math", tmp_path)
    (tmp_path / "b.jsonl").write_text("{}")
    (tmp_path / "a.jsonl").write_text("{}")
    found = prepare_prompts(stage(builder=None, prompts=[str(tmp_path / "*.jsonl")]), "math", tmp_path)
    assert [path.name for path in found] == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["grpo.math.prompts=[x.jsonl]"], "grpo.math.prompts"),
        (["grpo.math.builder=null", "grpo.math.max_prompts=null"], "grpo.math.prompts"),
        (["grpo.math.max_prompts=null"], "grpo.math.max_prompts"),
        (["grpo.math.builder=null", "grpo.math.prompts=[x.jsonl]"], "grpo.math.max_prompts"),
    ],
)
def test_files_or_a_builder(overrides, key):
    assert key in [problem.key for problem in lint(compose(["curriculum=smoke", *overrides]))]
