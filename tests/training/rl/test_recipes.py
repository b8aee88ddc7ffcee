"""The published stages as recipes: they compose, they are typed, they hold the published numbers, and Megatron takes them."""

import itertools

import hydra
import pytest
from omegaconf import OmegaConf
from pydantic import ValidationError

from recipes.compose import TREE, compose
from recipes.posttrain import Grpo

PUBLISHED = {  # reference/granite-4.1.md, 6.1: unique prompts, learning rate, KL coefficient
    "multi_domain": (45_504, 5e-7, 0.05),
    "rlhf": (17_920, 3e-7, 0.09),
    "identity": (1_728, 3e-7, 0.09),
    "math": (13_504, 5e-7, 0.05),
}


def load(name, *overrides):
    with hydra.initialize_config_dir(str(TREE), version_base="1.3", job_name="test"):
        return OmegaConf.to_container(hydra.compose(f"posttrain/{name}", list(overrides)).posttrain, resolve=True)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name):
    grpo = Grpo.model_validate(load(f"grpo_{name}"))
    prompts, rate, beta = PUBLISHED[name]
    assert (grpo.learning_rate, grpo.kl_coefficient) == (rate, beta)
    assert (grpo.samples_per_prompt, grpo.samples_per_step, grpo.seq_length_tokens) == (16, 1024, 8192)
    assert grpo.optimizer_steps_per_rollout == 1
    assert not grpo.dynamic_sampling
    # One pass over the unique prompts, but for the third stage, whose "about 40 steps" are published.
    assert grpo.steps == (40 if name == "identity" else prompts / grpo.prompts_per_step)
    assert (grpo.clip_low, grpo.clip_high) == (0.2, 0.28)


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
def test_settings_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValidationError, match=message):
        Grpo.model_validate(load("grpo_math") | change)


@pytest.mark.parametrize("gpu", ["h100", "cpu"])
def test_megatron_arguments_of_a_published_stage(tmp_path, gpu):
    """Against Megatron's own parser this is tested for every phase; here, that model, layout and optimizer arrive and what differs does."""
    from training.rl.job import Initial, Job

    recipe = compose(["curriculum=five_phase", "model=granite_4_1_8b"])
    phase = recipe.phase["foundation"]
    job = Job(
        model=recipe.model,
        grpo=Grpo.model_validate(load("grpo_math") | {"rope_base": 10e6}),
        parallel=phase.parallel.model_copy(update={"gpus": 64, "overlap_param_gather": False}),
        precision=phase.precision,
        optimizer=recipe.optimizer,
        seed=1,
        gpu=gpu,
        tokenizer="tokenizer",
        prompts=["math.jsonl"],
        rewards={"domains": {}},
        initial=Initial(checkpoints=str(tmp_path), step=5),
    )
    job.check()
    from training.arguments import Load

    arguments = job.compile(tmp_path, Load(checkpoints=tmp_path, step=5, resume=False))
    given = dict(itertools.pairwise(arguments))
    assert given["--num-layers"] == "40"
    assert given["--seq-length"] == "8192"
    assert given["--global-batch-size"] == "1024"
    assert given["--train-samples"] == str(211 * 1024)
    assert given["--ckpt-step"] == "5"
    assert "--finetune" in arguments
    assert given["--transformer-impl"] == ("local" if gpu == "cpu" else "transformer_engine")
    assert "--finetune" not in job.compile(tmp_path, Load(checkpoints=tmp_path, step=5, resume=True))


CURRICULUM = [
    "curriculum=smoke",
    "stages=[foundation,math]",
    "+posttrain@grpo.math=grpo_math",
    "+parallel@grpo.math.parallel=tp2_sp",
    "+precision@grpo.math.precision=fp32",
    "grpo.math.parallel.micro_batch_samples=8",
    "+grpo.math.prompts=[math.jsonl]",
    "+grpo.math.rewards={domains: {math: {parts: [{reward: math}]}}}",
    "grpo.math.seq_length_tokens=128",
    "grpo.math.rollout.max_response_tokens=96",
]


def test_a_curriculum_with_a_stage_of_reinforcement_learning():
    from recipes.lint import lint
    from recipes.plan import print_plan

    recipe = compose(CURRICULUM)
    assert recipe.stage_kind("math") == "grpo"
    assert lint(recipe) == []
    from rich.console import Console

    console = Console(width=200, record=True)
    print_plan(recipe, console)
    text = console.export_text()
    assert "64 prompts" in text
    assert "rollouts (megatron)" in text


@pytest.mark.parametrize(
    ("override", "key", "rule"),
    [
        ("grpo.math.prompts=[]", "grpo.math.prompts", "there is nothing to answer"),
        ("grpo.math.parallel.context=2", "grpo.math.parallel.context", "inference keeps whole sequences"),
        ("grpo.math.parallel.overlap_param_gather=true", "grpo.math.parallel.overlap_param_gather", "rollouts would read weights"),
        ("grpo.math.parallel.gpus=6", "grpo.math.prompts_per_step", "3 data-parallel ranks x 1 optimizer steps do not divide it"),
        ("grpo.math.parallel.micro_batch_samples=7", "grpo.math.parallel.micro_batch_samples", "does not divide the 1024"),
    ],
)  # fmt: skip
def test_the_linter_refuses(override, key, rule):
    from recipes.lint import lint

    problems = lint(compose([*CURRICULUM, override]))
    assert any(p.key == key and rule in p.rule for p in problems), [str(p) for p in problems]
