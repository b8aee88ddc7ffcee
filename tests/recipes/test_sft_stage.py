"""Fine-tuning in a recipe: the published settings for each size, the learning rate, and what the linter refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.compose import compose
from recipes.lint import lint
from recipes.schedules import learning_rate_function
from recipes.schema import Recipe
from recipes.sft_stage import as_phase

CURRICULUM = """# @package _global_
defaults:
  - /posttrain@sft.sft: sft
  - five_phase
  - _self_
name: with_sft
stages: [foundation, capability, annealing, sft, export]
sft: {sft: {sources: {chat: {paths: [chat/*.jsonl]}}}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conf")
    (folder / "curriculum").mkdir()
    (folder / "curriculum" / "with_sft.yaml").write_text(CURRICULUM)
    return folder


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Recipe:
    return compose(["curriculum=with_sft"], [folder])


@pytest.mark.parametrize("size", ["3b", "8b", "30b"])
def test_the_published_settings_hold_for_every_size(folder: Path, recipe: Recipe, size: str) -> None:
    if recipe.model.name != f"granite_4_1_{size}":
        recipe = compose(["curriculum=with_sft", f"model=granite_4_1_{size}"], [folder])
    assert lint(recipe) == []
    sft = recipe.sft["sft"]
    assert (sft.peak_lr, sft.seq_length_tokens, sft.global_batch_sequences, sft.epochs) == (5e-6, 16_384, 256, 3)
    assert sft.parallel.name == f"granite_4_1_{size}/sft"
    assert recipe.stage_kind("sft") == "sft"


def test_a_stage_is_a_phase_of_its_sequences(recipe: Recipe) -> None:
    """4.1M samples at about 1.9 a sequence are the published 25K steps."""
    seen = as_phase(recipe, "sft", sequences=2_130_000)
    phase = seen.phase["sft"]
    assert phase.steps == 24_961
    assert phase.tokens == phase.steps * 256 * 16_384
    assert phase.rope_base == recipe.phase["annealing"].rope_base
    assert seen.tokens_before("sft") == recipe.tokens_before("sft")
    rate, per_step = learning_rate_function(seen, "sft"), phase.tokens_per_step
    warm = 749  # 3% of the steps, rounded up
    assert rate(0) == 0
    assert rate(warm * per_step) == pytest.approx(5e-6)
    assert rate((warm - 1) * per_step) == pytest.approx(5e-6 * (warm - 1) / warm)
    middle = (warm + phase.steps) * per_step // 2
    assert rate(middle) == pytest.approx(2.5e-6)
    assert rate(phase.tokens) == 0
    assert as_phase(recipe, "sft", sequences=1).phase["sft"].steps == 1


@pytest.mark.parametrize(("changes", "key", "message"), [
    ({"sources": {}}, "sft.sft.sources", "nothing to learn from"),
    ({"sources": {"x": {}}}, "sft.sft.sources.x.paths", "either files or a builder"),
    ({"sources": {"x": {"builder": "reasoning_chat"}}}, "sft.sft.sources.x.max_samples", "how many samples"),
    ({"warmup_percent": 100.0}, "sft.sft.warmup_percent", "not be over"),
    ({"end_lr": 1.0}, "sft.sft.end_lr", "would rise"),
    ({"heldout_percent": 101.0}, "sft.sft.heldout_percent", "more than all"),
    ({"pack_multiple_tokens": 6}, "sft.sft.pack_multiple_tokens", "set it to 8"),
    ({"seq_length_tokens": 16_382}, "sft.sft.seq_length_tokens", "is no multiple of what a sample takes up"),
    ({"rope_base": 5e3}, "sft.sft.rope_base", "falls from 10000"),
    ({"rope_base": 1e4 + 0.5}, "sft.sft.rope_base", "whole numbers"),
    ({"global_batch_sequences": 250}, "sft.sft.global_batch_sequences", "change sft.sft.parallel.micro_batch_samples"),
    ({"parallel": {"name": "x", "gpus": 64, "tensor": 3}}, "sft.sft.parallel.tensor", "must divide"),
    ({"parallel": {"name": "x", "gpus": 64, "micro_batch_samples": 2}}, "sft.sft.parallel.micro_batch_samples", "set it to 1"),
])  # fmt: skip
def test_what_cannot_be_trained_is_refused(recipe: Recipe, changes: dict, key: str, message: str) -> None:
    values = recipe.model_dump(mode="json")
    values["sft"]["sft"] |= changes
    problems = lint(Recipe.model_validate(values))
    assert any(p.key == key and message in str(p) for p in problems), problems


def test_no_phase_comes_after_it(recipe: Recipe) -> None:
    stages = ["foundation", "sft", "capability", "export"]
    problems = lint(Recipe.model_validate(recipe.model_dump(mode="json") | {"stages": stages}))
    assert any("pre-training would go on after fine-tuning, with capability" in str(p) for p in problems)


def test_the_first_stage_begins_with_a_model_of_elsewhere(recipe: Recipe) -> None:
    values = recipe.model_dump(mode="json") | {"stages": ["sft", "export"]}
    values["sft"]["sft"]["rope_base"] = 1e7
    (problem,) = lint(Recipe.model_validate(values))
    assert "no model to start from" in str(problem)
    assert "give sft.sft.initial" in problem.remedy
    values["sft"]["sft"]["initial"] = "models/granite"
    assert lint(Recipe.model_validate(values)) == []
    values["stages"] = recipe.stages
    assert any(p.key == "sft.sft.initial" and "annealing hands on" in p.rule for p in lint(Recipe.model_validate(values)))
