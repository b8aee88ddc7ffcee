"""Every published curriculum x model x precision compiles to arguments that the pinned Megatron parses, validates and builds a
configuration from, at the intended world size."""

import contextlib
import dataclasses
import functools
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.compose import compose
from recipes.grpo_stage import settings
from recipes.lint import check as lint_check
from recipes.lint import lint
from recipes.schema import RecipeError
from recipes.sft_stage import as_phase
from training import cpu_backend
from training.arguments import NOMINAL_LR, Load, add_granite_arguments, compile_phase
from training.rl.job import Initial, Job

cpu_backend.install()

import torch  # noqa: E402
from megatron.training.argument_utils import ArgumentGroupFactory, core_transformer_config_from_args  # noqa: E402
from megatron.training.arguments import parse_args, validate_args  # noqa: E402

from model.config import check  # noqa: E402

RECIPES = Path(__file__).parents[2] / "recipes"
MODELS = ["granite_4_1_3b", "granite_4_1_8b", "granite_4_1_30b"]
CURRICULA = sorted(p.stem for p in (RECIPES / "curriculum").glob("*.yaml") if not p.stem.startswith("_") and p.stem != "smoke")
# fp32 is for CPUs; gradients in bf16 have a test of their own.
PRECISIONS = sorted(
    p.stem
    for p in (RECIPES / "precision").glob("*.yaml")
    if not p.stem.startswith("_") and p.stem not in ("fp32", "bf16_gradients")
)
# The GPU that a precision needs, and its compute capability.
GPU = {"mxfp8": ("b200", (10, 0))}
used_layouts: set[str] = set()
_read_docstrings = ArgumentGroupFactory._get_field_docstrings


@functools.cache
def _docstrings(config_class):
    return _read_docstrings(ArgumentGroupFactory.__new__(ArgumentGroupFactory), config_class)


@pytest.fixture(autouse=True, scope="module")
def docstrings_once():
    """Help texts of Megatron's arguments, which it reads from source code: once, and not for every parser (a third of a second)."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ArgumentGroupFactory, "_get_field_docstrings", lambda self, config_class: _docstrings(config_class))
        yield


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


@functools.cache
def composed(*overrides):
    return compose(list(overrides))


def with_precision(curriculum, model, precision, gpu):
    """The recipe with `precision` for every phase. Hydra, 1 s a recipe, is asked once per curriculum and model and once per precision."""
    recipe = composed(f"curriculum={curriculum}", f"model={model}")
    assert {phase.precision.name for phase in recipe.phase.values()} == {"bf16"}
    other = composed(f"precision={precision}", f"cluster.gpu={gpu}")
    value = other.phase["foundation"].precision
    phases = {name: phase.model_copy(update={"precision": value}) for name, phase in recipe.phase.items()}
    if (curriculum, model) == (other.name, other.model.name):
        assert phases == other.phase
    return recipe.model_copy(update={"phase": phases, "cluster": other.cluster})


# Curricula differ in the order, length and rates of phases, none of which a precision looks at: each with bf16, the default with all.
@pytest.mark.parametrize(
    ("curriculum", "model", "precision"),
    [
        (curriculum, model, precision)
        for curriculum in CURRICULA
        for model in MODELS
        for precision in PRECISIONS
        if precision == "bf16" or curriculum == "five_phase"
    ],
)
def test_published_recipes_compile(curriculum, model, precision, monkeypatch):
    gpu, capability = GPU.get(precision, ("h100", (9, 0)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    recipe = with_precision(curriculum, model, precision, gpu)
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


def with_options(precision, gpu, **options):
    """The default curriculum in a shipped precision, its first phase with options of it."""
    recipe = composed(f"precision={precision}", f"cluster.gpu={gpu}")
    phase = recipe.phase["foundation"]
    phase = phase.model_copy(update={"precision": phase.precision.model_copy(update=options)})
    return recipe.model_copy(update={"phase": {**recipe.phase, "foundation": phase}})


def test_dtypes_of_gradients_and_optimizer_reach_megatron(monkeypatch):
    from megatron.core.optimizer import OptimizerConfig
    from megatron.training.training import get_megatron_ddp_config

    recipe = composed("curriculum=five_phase", "model=granite_4_1_8b")
    args, _ = parse(recipe, "foundation", monkeypatch)
    assert get_megatron_ddp_config(args).grad_reduce_in_fp32
    assert not args.use_precision_aware_optimizer
    recipe = composed("precision=bf16_gradients", "optimizer=adamw_precision_aware", "optimizer.main_params_dtype=fp16")
    lint_check(recipe)
    args, _ = parse(recipe, "foundation", monkeypatch)
    assert not get_megatron_ddp_config(args).grad_reduce_in_fp32
    names = {f.name for f in dataclasses.fields(OptimizerConfig)}
    values = {name: value for name, value in vars(args).items() if name in names}
    with pytest.raises(RuntimeError, match="requires FusedAdam from TransformerEngine"):
        OptimizerConfig(**values)  # which its own checks were passed before
    dtypes = [values[name] for name in ("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")]
    assert dtypes == [torch.float16, torch.bfloat16, torch.bfloat16]
    # Read by Megatron's names alone: the default, which cannot be loaded again, must not come back.
    assert values["use_precision_aware_optimizer"]
    assert values["store_param_remainders"] is False


@pytest.mark.parametrize("precision", [p for p in PRECISIONS if p != "bf16"])
def test_options_of_fp8_reach_megatron(precision, monkeypatch):
    """Parameter gather with every recipe, bf16 layers at either end where the recipe takes them; DDP and the optimizer check theirs too."""
    from megatron.core.optimizer import OptimizerConfig
    from megatron.training.training import get_megatron_ddp_config

    gpu, capability = GPU.get(precision, ("h100", (9, 0)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    layers = {} if precision == "fp8_delayed" else {"bf16_layers_at_start": 2, "bf16_layers_at_end": 3}
    recipe = with_options(precision, gpu, fp8_param_gather=True, **layers)
    lint_check(recipe)
    args, config = parse(recipe, "foundation", monkeypatch)
    assert args.fp8_param_gather
    assert config.fp8_param
    assert config.fp8_recipe == recipe.phase["foundation"].precision.fp8
    assert args.reuse_grad_buf_for_mxfp8_param_ag == (precision == "mxfp8")
    assert get_megatron_ddp_config(args).fp8_param_gather
    names = {f.name for f in dataclasses.fields(OptimizerConfig)}
    OptimizerConfig(**{name: value for name, value in vars(args).items() if name in names})  # its own checks
    kept = (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) if config.first_last_layers_bf16 else (0, 0)
    assert kept == ((2, 3) if layers else (0, 0))


def test_megatron_refuses_what_the_linter_refuses_of_bf16_layers(monkeypatch):
    recipe = with_options("fp8_delayed", "h100", bf16_layers_at_start=1)
    assert any(p.key == "phase.foundation.precision.bf16_layers_at_start" for p in lint(recipe))
    with pytest.raises(ValueError, match="Delayed scaling does not support first / last layer in BF16"):
        parse(recipe, "foundation", monkeypatch)


def test_documents_apart_reach_megatron(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    recipe = composed("curriculum=five_phase", "model=granite_4_1_8b")
    args, _ = parse(recipe, "long_32k", monkeypatch)
    assert args.documents_apart
    assert args.restart_positions
    assert args.calculate_per_token_loss
    args, _ = parse(recipe, "foundation", monkeypatch)
    assert not any((args.documents_apart, args.restart_positions, args.calculate_per_token_loss))

    def compiled(**changes):
        phase = recipe.phase["long_32k"].model_copy(update=changes)
        changed = recipe.model_copy(update={"phase": {**recipe.phase, "long_32k": phase}})
        return compile_phase(changed, "long_32k", Path("/runs/x")), phase

    arguments, phase = compiled(restart_positions=False)
    assert "--no-rope-fusion" in arguments  # the fused kernel restarts in every packed sequence
    assert not phase.packed_lengths_vary
    layout = recipe.phase["long_32k"].parallel.model_copy(update={"pipeline": 2})
    arguments, phase = compiled(parallel=layout)
    assert phase.packed_lengths_vary
    assert arguments[arguments.index("--moe-token-dispatcher-type") + 1] == "alltoall"
    _, phase = compiled(parallel=layout.model_copy(update={"context": 1}))
    assert not phase.packed_lengths_vary


def test_smoke_compiles(monkeypatch):
    recipe = compose(["curriculum=smoke", "cluster=local"])
    for stage, phase in recipe.phase.items():
        args, config = parse(recipe, stage, monkeypatch)
        used_layouts.add(phase.parallel.name)
        assert args.world_size == phase.parallel.gpus
        assert not args.bf16
        assert args.transformer_impl == "local"
        check(config, recipe.model)


# Layouts of the 8B beside its curricula's own, by the stage that they are for.
LONG_CONTEXT = [
    {"long_32k": "32k_a2a", "long_128k": "128k_hierarchical", "long_512k": "512k_hierarchical"},
    {"long_32k": "32k_offload", "long_128k": "128k_all_gather", "long_512k": "512k_recompute"},
    {"long_128k": "128k_recompute"},
]


@pytest.mark.parametrize("variants", LONG_CONTEXT, ids=lambda v: " ".join(v.values()))
def test_long_context_layouts_compile(variants, monkeypatch):
    overrides = [f"parallel@phase.{stage}.parallel=granite_4_1_8b/{name}" for stage, name in variants.items()]
    for stage, name in variants.items():
        if name.endswith(("hierarchical", "all_gather")):  # which Transformer Engine has not for packed documents
            overrides += [f"++phase.{stage}.documents_apart=false", f"++phase.{stage}.restart_positions=false"]
    recipe = compose(overrides)
    assert lint(recipe) == []
    for stage, name in variants.items():
        args, config = parse(recipe, stage, monkeypatch)
        layout = recipe.phase[stage].parallel
        assert layout.name == f"granite_4_1_8b/{name}"
        used_layouts.add(layout.name)
        assert config.cp_comm_type == layout.context_communication
        assert config.hierarchical_context_parallel_sizes == layout.context_hierarchy
        assert (config.recompute_granularity or "none") == layout.recompute
        assert layout.recompute_modules in (None, config.recompute_modules)
        assert config.cpu_offloading == (layout.offload_layers is not None)
        assert config.cpu_offloading_num_layers == (layout.offload_layers or 0)
        assert args.loss_chunk_tokens == layout.loss_chunk_tokens
        assert args.data_parallel_size == layout.data


def test_kinds_of_recomputation_compile(monkeypatch):
    recipe = compose(["curriculum=smoke"])
    layout = recipe.phase["long_32k"].parallel
    for changes in (
        {"recompute": "full"},
        {"recompute": "full", "recompute_method": "block", "recompute_num_layers": 2},
        {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]},
    ):
        phase = recipe.phase["long_32k"].model_copy(update={"parallel": layout.model_copy(update=changes)})
        _, config = parse(recipe.model_copy(update={"phase": recipe.phase | {"long_32k": phase}}), "long_32k", monkeypatch)
        full = changes["recompute"] == "full"
        assert config.recompute_granularity == changes["recompute"]
        assert config.recompute_method == (changes.get("recompute_method", "uniform") if full else None)
        assert config.recompute_num_layers == (changes.get("recompute_num_layers", 1) if full else None)
        assert full or config.recompute_modules == changes.get("recompute_modules", ["core_attn"])


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
