"""Every published curriculum x model x precision compiles to arguments that the pinned Megatron parses, validates and builds a
configuration from, at the intended world size."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.compose import compose
from recipes.grpo_stage import settings
from recipes.schema import RecipeError
from recipes.sft_stage import as_phase
from training import cpu_backend
from training.arguments import NOMINAL_LR, Load, add_granite_arguments, compile_phase
from training.rl.job import Initial, Job

cpu_backend.install()

import torch  # noqa: E402
from megatron.training.argument_utils import core_transformer_config_from_args  # noqa: E402
from megatron.training.arguments import parse_args, validate_args  # noqa: E402

from model.config import check  # noqa: E402

RECIPES = Path(__file__).parents[2] / "recipes"
MODELS = ["granite_4_1_3b", "granite_4_1_8b", "granite_4_1_30b"]
CURRICULA = sorted(p.stem for p in (RECIPES / "curriculum").glob("*.yaml") if not p.stem.startswith("_") and p.stem != "smoke")
PRECISIONS = sorted(p.stem for p in (RECIPES / "precision").glob("*.yaml") if not p.stem.startswith("_") and p.stem != "fp32")
# The GPU that a precision needs, and its compute capability.
GPU = {"mxfp8": ("b200", (10, 0))}
used_layouts: set[str] = set()


def parse(recipe, stage, monkeypatch, load=None):
    """Megatron's validated arguments of a phase, as its job at the phase's world size would have them."""
    return parsed(compile_phase(recipe, stage, Path("/runs/x"), load), recipe.phase[stage].parallel.gpus, monkeypatch)


def parsed(arguments, world, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain", *arguments])
    for name, value in (
        ("WORLD_SIZE", world),
        ("RANK", 0),
        ("CUDA_DEVICE_MAX_CONNECTIONS", 1),
        ("LOCAL_WORLD_SIZE", min(8, world)),
    ):
        monkeypatch.setenv(name, str(value))
    with contextlib.redirect_stdout(io.StringIO()):
        args = parse_args(add_granite_arguments)
        validate_args(args, {})
        args.padded_vocab_size = args.vocab_size
        # The configuration class asks for the kernel itself, which only a GPU host has; the argument was parsed above.
        args.apply_rope_fusion = False
        config = core_transformer_config_from_args(args)
    return args, config


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("curriculum", CURRICULA)
def test_published_recipes_compile(curriculum, model, precision, monkeypatch):
    gpu, capability = GPU.get(precision, ("h100", (9, 0)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    recipe = compose([f"curriculum={curriculum}", f"model={model}", f"precision={precision}", f"cluster.gpu={gpu}"])
    for stage, phase in recipe.phase.items():
        args, config = parse(recipe, stage, monkeypatch)
        used_layouts.add(phase.parallel.name)
        assert args.world_size == phase.parallel.gpus
        assert args.data_parallel_size == phase.parallel.data
        assert args.train_samples * args.seq_length == phase.tokens
        assert args.global_batch_size == phase.global_batch_samples
        assert args.sequence_parallel == phase.parallel.sequence_parallel
        assert args.virtual_pipeline_model_parallel_size == phase.parallel.virtual_pipeline
        assert (args.fp8_recipe if args.fp8 else None) == phase.precision.fp8
        assert args.bf16
        assert args.use_distributed_optimizer
        assert args.rotary_base == phase.rope_base
        check(config, recipe.model)  # the four multipliers, sizes, norm, activation


def test_smoke_compiles(monkeypatch):
    recipe = compose(["curriculum=smoke", "cluster=local"])
    for stage, phase in recipe.phase.items():
        args, config = parse(recipe, stage, monkeypatch)
        used_layouts.add(phase.parallel.name)
        assert args.world_size == phase.parallel.gpus
        assert not args.bf16
        assert args.transformer_impl == "local"
        check(config, recipe.model)


POSTTRAIN = """# @package _global_
defaults:
  - /posttrain@sft.sft: sft
  - /posttrain@grpo.math: grpo_math
  - five_phase
  - _self_
name: posttrain
stages: [foundation, capability, annealing, sft, math, export]
sft: {sft: {sources: {chat: {paths: [chat.jsonl]}}}}
grpo: {math: {prompts: [math.jsonl], rewards: {domains: {math: {parts: [{reward: math}]}}}}}
"""


@pytest.mark.parametrize("model", MODELS)
def test_stages_of_post_training_compile(tmp_path, monkeypatch, model):
    (tmp_path / "curriculum").mkdir()
    (tmp_path / "curriculum" / "posttrain.yaml").write_text(POSTTRAIN)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    recipe = compose(["curriculum=posttrain", f"model={model}"], [tmp_path])
    seen = as_phase(recipe, "sft", sequences=25_600)
    own = recipe.grpo["math"]
    job = Job(
        model=recipe.model,
        grpo=settings(recipe, "math"),
        parallel=own.parallel,
        precision=own.precision,
        optimizer=recipe.optimizer,
        seed=1,
        gpu="h100",
        tokenizer="tokenizer",
        prompts=own.prompts,
        rewards=own.rewards,
        initial=Initial(checkpoints="/runs/x", step=5),
    )
    job.check()
    for layout, (args, config) in (
        (seen.phase["sft"].parallel, parse(seen, "sft", monkeypatch)),
        (own.parallel, parsed(job.compile(Path("/runs/x"), None), own.parallel.gpus, monkeypatch)),
    ):
        used_layouts.add(layout.name)
        assert (args.world_size, args.data_parallel_size) == (layout.gpus, layout.data)
        assert args.use_distributed_optimizer
        assert args.bf16
        check(config, recipe.model)


def test_every_layout_that_is_shipped_is_part_of_a_recipe():
    """Runs after those above (one process, file order): a layout that nothing uses would be compiled by no test."""
    if not used_layouts:
        pytest.skip("run the whole file: the compile tests fill the list")
    folder = RECIPES / "parallel"
    shipped = {str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml") if not p.name.startswith("_")}
    assert shipped - used_layouts == set()


def test_load_arguments(tmp_path):
    recipe = compose(["curriculum=smoke"])
    first = compile_phase(recipe, "capability", tmp_path, Load(checkpoints=tmp_path / "a", step=7, resume=False))
    resume = compile_phase(recipe, "capability", tmp_path, Load(checkpoints=tmp_path / "a", step=7, resume=True))
    assert "--no-load-rng" in first
    assert "--no-load-rng" not in resume
    for argv in (first, resume):
        assert argv[argv.index("--load") + 1] == str(tmp_path / "a")
        assert argv[argv.index("--ckpt-step") + 1] == "7"
        assert "--exit-on-missing-checkpoint" in argv
    assert "--load" not in compile_phase(recipe, "capability", tmp_path)


def test_nominal_learning_rate_is_the_same_in_every_phase(monkeypatch):
    """The distributed optimizer finds its parameter groups in a checkpoint by it."""
    recipe = compose([])
    for stage in recipe.phase:
        argv = compile_phase(recipe, stage, Path("/runs/x"))
        assert float(argv[argv.index("--lr") + 1]) == NOMINAL_LR
        assert float(argv[argv.index("--min-lr") + 1]) == 0.0


def test_refusals():
    recipe = compose(["curriculum=smoke", "phase.foundation.rope_base=10000.5"])
    with pytest.raises(RecipeError, match=r"rope_base is 10000\.5.*round it to 10000"):
        compile_phase(recipe, "foundation", Path("/runs/x"))
    with pytest.raises(RecipeError, match="'merge_32k' is a merge"):
        compile_phase(recipe, "merge_32k", Path("/runs/x"))


def test_the_command_prints_one_argument_a_line_without_torch(tmp_path):
    compose(["curriculum=smoke"]).write(tmp_path / "recipe.json")
    command = [sys.executable, "-X", "importtime", "-m", "training.arguments", "--recipe", str(tmp_path / "recipe.json")]
    done = subprocess.run([*command, "--stage", "long_32k"], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert "--pipeline-model-parallel-size 2" in done.stdout.splitlines()
    assert not [line for line in done.stderr.splitlines() if line.split("|")[-1].strip() in ("torch", "megatron", "hydra")]
    wrong = subprocess.run([*command, "--stage", "nothing"], capture_output=True, text=True, env=dict(os.environ))
    assert wrong.returncode == 78
    assert "no stage 'nothing'" in wrong.stderr
