"""The published stages as recipes: they compose, they are typed, they hold the published numbers, and Megatron takes them."""

from contextlib import nullcontext
from itertools import pairwise

import pytest
from pydantic import ValidationError

from recipes.compose import compose
from recipes.grpo_stage import settings
from recipes.lint import lint
from recipes.plan import print_plan
from recipes.posttrain import Grpo
from recipes.schema import RecipeError

FOUR_STAGES = """# @package _global_
defaults:
  - /posttrain@grpo.multi_domain: grpo_multi_domain
  - /posttrain@grpo.rlhf: grpo_rlhf
  - /posttrain@grpo.identity: grpo_identity
  - /posttrain@grpo.math: grpo_math
  - five_phase
  - _self_
name: with_grpo
stages: [foundation, capability, annealing, multi_domain, rlhf, identity, math, export]
grpo:
  multi_domain: &any {prompts: [prompts.jsonl], rewards: {domains: {math: {parts: [{reward: math}]}}}}
  rlhf: *any
  identity: *any
  math: *any
"""
PUBLISHED = {  # reference/granite-4.1.md, 6.1: unique prompts, learning rate, KL coefficient
    "multi_domain": (45_504, 5e-7, 0.05),
    "rlhf": (17_920, 3e-7, 0.09),
    "identity": (1_728, 3e-7, 0.09),
    "math": (13_504, 5e-7, 0.05),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conf")
    (folder / "curriculum").mkdir()
    (folder / "curriculum" / "with_grpo.yaml").write_text(FOUR_STAGES)
    return folder


@pytest.fixture(scope="module")
def recipe(folder):
    return compose(["curriculum=with_grpo"], [folder])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(recipe, name):
    grpo = recipe.grpo[name]
    prompts, rate, beta = PUBLISHED[name]
    assert (grpo.learning_rate, grpo.kl_coefficient) == (rate, beta)
    assert (grpo.samples_per_prompt, grpo.samples_per_step, grpo.seq_length_tokens) == (16, 1024, 8192)
    assert grpo.optimizer_steps_per_rollout == 1
    assert not grpo.dynamic_sampling
    # One pass over the unique prompts, but for the third stage, whose "about 40 steps" are published.
    assert grpo.steps == (40 if name == "identity" else prompts / grpo.prompts_per_step)
    assert (grpo.clip_low, grpo.clip_high) == (0.2, 0.28)
    assert settings(recipe, name).rope_base == recipe.phase["annealing"].rope_base


@pytest.mark.parametrize("size", ["3b", "8b", "30b"])
def test_the_four_stages_pass_the_linter_in_each_size(folder, recipe, size):
    if recipe.model.name != f"granite_4_1_{size}":
        recipe = compose(["curriculum=with_grpo", f"model=granite_4_1_{size}"], [folder])
    assert lint(recipe) == []
    assert recipe.grpo["math"].parallel.name == f"granite_4_1_{size}/grpo"
    assert recipe.stage_kind("math") == "grpo"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer_steps_per_rollout": 3}, "prompts_per_step is 64, which optimizer_steps_per_rollout 3 does not divide"),
        ({"seq_length_tokens": 6144}, "no room is left for a prompt"),
        ({"overlong_cache_tokens": 7000}, "overlong_cache_tokens is 7000, over rollout.max_response_tokens 6144"),
        ({"kl_coeficient": 0.1}, "Extra inputs are not permitted"),
        ({"samples_per_prompt": 1}, "greater than or equal to 2"),
        ({"rollout": {"max_response_tokens": 8, "engine": "vllm"}}, "rollout.engine is vllm: .* which needs it"),
    ],
)
def test_settings_that_do_not_fit_are_refused(recipe, change, message):
    with pytest.raises(ValidationError, match=message):
        Grpo.model_validate(settings(recipe, "math").model_dump() | change)


@pytest.mark.parametrize("gpu", ["h100", "cpu"])
def test_megatron_arguments_of_a_published_stage(recipe, tmp_path, gpu):
    """Against Megatron's own parser this is tested for every phase; here, that model, layout and optimizer arrive and what differs does."""
    from training.arguments import Load
    from training.rl.job import Initial, Job

    own = recipe.grpo["math"]
    job = Job(
        model=recipe.model,
        grpo=settings(recipe, "math"),
        parallel=own.parallel,
        precision=own.precision,
        optimizer=recipe.optimizer,
        seed=1,
        gpu=gpu,
        tokenizer="tokenizer",
        prompts=["math.jsonl"],
        rewards={"domains": {}},
        initial=Initial(checkpoints=str(tmp_path), step=5),
    )
    job.check()
    arguments = job.compile(tmp_path, Load(checkpoints=tmp_path, step=5, resume=False))
    given = dict(pairwise(arguments))
    assert given["--num-layers"] == "40"
    assert given["--seq-length"] == "8192"
    assert given["--global-batch-size"] == "1024"
    assert given["--train-samples"] == str(211 * 1024)
    assert given["--ckpt-step"] == "5"
    assert "--finetune" in arguments
    assert given["--transformer-impl"] == ("local" if gpu == "cpu" else "transformer_engine")
    assert "--finetune" not in job.compile(tmp_path, Load(checkpoints=tmp_path, step=5, resume=True))
    aware = job.model_copy(update={"optimizer": job.optimizer.model_copy(update={"precision_aware": True})})
    refusal = pytest.raises(RecipeError, match="optimizer.precision_aware = True: .* ranks run on CPU here")
    with refusal if gpu == "cpu" else nullcontext():
        aware.check()


def test_the_plan_shows_the_stages(recipe):
    from rich.console import Console

    console = Console(width=200, record=True)
    print_plan(recipe, console)
    text = console.export_text()
    assert "64 prompts" in text
    assert "rollouts (megatron)" in text


@pytest.mark.parametrize(
    ("part", "change", "key", "rule"),
    [
        (None, {"prompts": []}, "prompts", "there is nothing to answer"),
        (None, {"rewards": {}}, "rewards", "nothing says what a good answer is"),
        ("parallel", {"context": 2}, "parallel.context", "inference keeps whole sequences"),
        ("parallel", {"virtual_pipeline": 2}, "parallel.virtual_pipeline", "inference knows no interleaved schedule"),
        ("parallel", {"overlap_param_gather": True}, "parallel.overlap_param_gather", "rollouts would read weights"),
        ("parallel", {"loss_chunk_tokens": 64}, "parallel.loss_chunk_tokens", "from the logits of the responses"),
        ("parallel", {"gpus": 48}, "prompts_per_step", "24 data-parallel ranks, which answer a share each, do not divide it"),
        ("parallel", {"micro_batch_samples": 7}, "parallel.micro_batch_samples", "does not divide the 1024 samples"),
        ("parallel", {"tensor": 3, "gpus": 48}, "parallel.tensor", ""),
        ("precision", {"fp8": "tensorwise"}, "precision.fp8", "single tokens are not decoded in FP8"),
    ],
)  # fmt: skip
def test_the_linter_refuses(recipe, part, change, key, rule):
    stage = recipe.grpo["math"]
    changed = stage.model_copy(update={part: getattr(stage, part).model_copy(update=change)} if part else change)
    problems = lint(recipe.model_copy(update={"grpo": {**recipe.grpo, "math": changed}}))
    assert any(p.key == f"grpo.math.{key}" and rule in p.rule for p in problems), [str(p) for p in problems]
