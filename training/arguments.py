"""Compile one phase of a resolved recipe into the exact command-line arguments of the pinned Megatron.

Megatron's argument parser is the only interface between a recipe and the training loop: nothing is set behind its back except what
it has no flag for (Granite's softmax scale and residual multiplier, the chunks of the loss and in which form main weights are kept, which
`training.one_rank` adds as arguments of its own, and the learning rate, which `training.scheduler` computes in tokens). Imports no torch:
`quarry plan --args` answers at once.

TensorBoard is off in Megatron: its writer reads the loss, and so waits for the GPU, at every step, and writes the steps that a resume takes
again twice. training/metrics.py writes the event files, on GPUs and CPU alike.

    python -m training.arguments --recipe runs/smoke/recipe.json --stage foundation
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from recipes.schema import Model, Optimizer, Phase, Recipe, RecipeError

# The distributed optimizer finds its parameter groups in a checkpoint by their maximum and minimum learning rate, so both are constants
# of the whole curriculum; muP's groups are ratios of it. The absolute learning rate comes from training.scheduler.
NOMINAL_LR = 1.0


@dataclass(frozen=True, kw_only=True)
class Load:
    """Where a phase starts from."""

    checkpoints: Path
    """Folder that holds iter_* and latest_checkpointed_iteration.txt."""
    step: int
    resume: bool
    """True: the phase's own checkpoint (nothing is reset). False: another stage's (the cursor, the schedule and the RNG start anew)."""


def compile_phase(recipe: Recipe, stage: str, run_dir: Path, load: Load | None = None) -> list[str]:
    """Megatron's arguments of the phase `stage`, in a stable order.

    Raises RecipeError if `stage` is no phase, or holds a value that Megatron has no way to take.
    """
    if recipe.stage_kind(stage) != "phase":
        raise RecipeError(f"stage '{stage}' is a {recipe.stage_kind(stage)}: it has no Megatron arguments of its own")
    phase = recipe.phase[stage]
    stage_dir = run_dir / "stages" / stage
    on_cpu = recipe.cluster.gpu == "cpu"
    return [
        *_model(recipe.model, phase),
        *_layout(phase),
        *_precision(phase),
        *_optimizer(phase.optimizer or recipe.optimizer),
        *_data(recipe, phase),
        *_checkpoints(phase, stage_dir, load),
        *(_cpu() if on_cpu else _gpu()),
    ]


def _flags(*names: str) -> list[str]:
    return [f"--{name}" for name in names]


def _values(**values: object) -> list[str]:
    """`tensor_model_parallel_size=2` -> ["--tensor-model-parallel-size", "2"]; floats by repr, which round-trips."""
    out = []
    for name, value in values.items():
        out += [f"--{name.replace('_', '-')}", repr(value) if isinstance(value, float) else str(value)]
    return out


def _integral(value: float, key: str) -> int:
    if value != int(value):
        raise RecipeError(f"{key} is {value}: Megatron's --rotary-base takes whole numbers; round it to {round(value)}")
    return int(value)


def _model(model: Model, phase: Phase) -> list[str]:
    args = _values(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        norm_epsilon=model.norm_epsilon,
        position_embedding_type="rope",
        rotary_base=_integral(phase.rope_base, "rope_base"),
        rotary_percent=1.0,
        seq_length=phase.seq_length_tokens,
        max_position_embeddings=phase.seq_length_tokens,
        init_method_std=model.init_std,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # The data holds token ids; the job needs no tokenizer, only the number of rows of the embedding.
        tokenizer_type="NullTokenizer",
        vocab_size=model.vocab_size,
        make_vocab_size_divisible_by=1,
        # mup_embedding_mult and mup_output_mult are silently ignored without --use-mup; with the base width equal to the
        # hidden size muP's width multiplier is 1 and nothing else is scaled.
        mup_base_hidden_size=model.mup_base_hidden_size or model.hidden_size,
        mup_embedding_mult=model.embedding_multiplier,
        mup_output_mult=1.0 / model.logits_scaling,
        softmax_scale=model.attention_multiplier,
        residual_multiplier=model.residual_multiplier,
    )
    args += _flags("group-query-attention", "swiglu", "disable-bias-linear", "use-mup")
    if not model.tied_embeddings:
        args += _flags("untie-embeddings-and-output-weights")
    return args


def _layout(phase: Phase) -> list[str]:
    layout = phase.parallel
    args = _values(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        micro_batch_size=layout.micro_batch_samples,
        global_batch_size=phase.global_batch_samples,
    )
    if layout.virtual_pipeline is not None:
        args += _values(num_virtual_stages_per_pipeline_rank=layout.virtual_pipeline)
    if layout.sequence_parallel:
        args += _flags("sequence-parallel")
    args += _flags("use-distributed-optimizer")
    if layout.overlap_grad_reduce:
        args += _flags("overlap-grad-reduce")
    if layout.overlap_param_gather:
        args += _flags("overlap-param-gather")
    if layout.recompute == "selective":
        args += _values(recompute_granularity="selective")
        if layout.recompute_modules is not None:
            args += ["--recompute-modules", *layout.recompute_modules]
    elif layout.recompute == "full":
        args += _values(
            recompute_granularity="full",
            recompute_method=layout.recompute_method or "uniform",
            recompute_num_layers=layout.recompute_num_layers or 1,
        )
    if layout.context > 1:
        args += _values(cp_comm_type=layout.context_communication)
        if layout.context_hierarchy is not None:
            args += ["--hierarchical-context-parallel-sizes", *map(str, layout.context_hierarchy)]
    if layout.offload_layers is not None:
        args += _values(cpu_offloading_num_layers=layout.offload_layers)
    if layout.loss_chunk_tokens is not None:
        args += _values(loss_chunk_tokens=layout.loss_chunk_tokens)
    return args


def _precision(phase: Phase) -> list[str]:
    precision = phase.precision
    args = _flags("bf16") if precision.dtype == "bf16" else []
    if precision.gradients_dtype == "bf16":
        args += _flags("grad-reduce-in-bf16")
    if precision.fp8 is None:
        return args
    args += _values(fp8_format=precision.fp8_format or "hybrid", fp8_recipe=precision.fp8)
    if precision.fp8 == "delayed":
        # 1024 steps with the maximum is Transformer Engine's and NVIDIA's published setting for delayed scaling.
        args += _values(fp8_amax_history_len=precision.fp8_amax_history_steps or 1024, fp8_amax_compute_algo="max")
    if precision.fp8_param_gather:
        args += _flags("fp8-param-gather")
        if precision.fp8 == "mxfp8":
            # Without it every rank keeps another bf16 copy of the weights: Megatron warns and goes on.
            args += _flags("reuse-grad-buf-for-mxfp8-param-ag")
    if precision.bf16_layers_at_start or precision.bf16_layers_at_end:
        args += _flags("first-last-layers-bf16")
        args += _values(
            num_layers_at_start_in_bf16=precision.bf16_layers_at_start, num_layers_at_end_in_bf16=precision.bf16_layers_at_end
        )
    return args


def _optimizer(optimizer: Optimizer) -> list[str]:
    args = _values(
        optimizer="adam",
        lr=NOMINAL_LR,
        min_lr=0.0,
        lr_decay_style="constant",
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.epsilon,
        clip_grad=optimizer.clip_grad_norm,
    )
    if optimizer.precision_aware:
        # --main-grads-dtype would say what --grad-reduce-in-bf16 says; nothing else reads it.
        args += _flags("use-precision-aware-optimizer", "no-store-param-remainders")
        args += _values(
            main_params_dtype=optimizer.main_params_dtype,
            exp_avg_dtype=optimizer.exp_avg_dtype,
            exp_avg_sq_dtype=optimizer.exp_avg_sq_dtype,
        )
    return args


def _data(recipe: Recipe, phase: Phase) -> list[str]:
    return [
        *_values(
            train_samples=phase.samples,
            # Held-out losses are measured at the boundaries (training.heldout), by category; Megatron's own evaluation is off.
            eval_iters=0,
            eval_interval=phase.steps + 1,
            log_interval=phase.log_interval_steps,
            seed=recipe.seed,
        ),
        *_flags("no-create-attention-mask-in-dataloader"),
        *_documents(recipe, phase),
    ]


def _documents(recipe: Recipe, phase: Phase) -> list[str]:
    if not phase.documents_apart:
        return []
    # Samples differ in their number of loss tokens, and so do the parts of a sample that context-parallel ranks hold: the loss is the
    # mean over the tokens of the global batch, whoever holds them.
    args = _flags("documents-apart", "calculate-per-token-loss")
    if phase.packed_lengths_vary:
        # Megatron checks that its experts' dispatcher takes packed sequences of any length, also in a model without experts.
        args += _values(moe_token_dispatcher_type="alltoall")
    if phase.restart_positions:
        return [*args, *_flags("restart-positions")]
    # Transformer Engine's fused rotary embedding begins anew with every packed sequence.
    return args if recipe.cluster.gpu == "cpu" else [*args, *_flags("no-rope-fusion")]


def _checkpoints(phase: Phase, stage_dir: Path, load: Load | None) -> list[str]:
    args = _values(save=stage_dir / "checkpoints", save_interval=phase.save_interval_steps, ckpt_format="torch_dist")
    # Fully reshardable at every save: any checkpoint may become the boundary's, and the next stage may change TP, PP, CP and DP.
    # Integrity sums let a resume notice a damaged file; the hand-off has sums of its own.
    args += _flags("dist-ckpt-optim-fully-reshardable", "verify-integrity", "exit-signal-handler")
    if phase.async_saves:
        # The strategy of Megatron-Core: NVIDIA's own (nvrx) needs another package and a GPU.
        args += [*_flags("async-save", "use-persistent-ckpt-worker"), *_values(async_strategy="mcore")]
    if phase.exit_after_minutes is not None:
        args += _values(exit_duration_in_mins=phase.exit_after_minutes)
    if load is not None:
        args += _values(load=load.checkpoints, ckpt_step=load.step)
        # Without this flag a missing checkpoint means random weights and no error.
        args += _flags("exit-on-missing-checkpoint")
        if not load.resume:
            args += _flags("no-load-rng")
    return args


def _cpu() -> list[str]:
    """Megatron on gloo, see training/cpu_backend.py: no fused kernels, no device initialisation, no loader processes."""
    return [
        *_values(distributed_backend="gloo", transformer_impl="local", num_workers=0),
        *_flags(
            "use-cpu-initialization",
            "no-persist-layer-norm",
            "no-gradient-accumulation-fusion",
            "no-masked-softmax-fusion",
            "no-bias-swiglu-fusion",
            "no-bias-dropout-fusion",
            "no-rope-fusion",
        ),
    ]


def _gpu() -> list[str]:
    return [
        *_values(
            distributed_backend="nccl",
            transformer_impl="transformer_engine",
            num_workers=2,
            # Ranks collect garbage at the same steps, so that none waits for another's collection.
            manual_gc_interval=100,
            cross_entropy_fusion_impl="native",
        ),
        *_flags("manual-gc", "cross-entropy-loss-fusion", "log-throughput"),
    ]


def add_granite_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What Granite needs and Megatron has no flag for."""
    group = parser.add_argument_group("granite")
    group.add_argument("--softmax-scale", type=float, required=True, help="attention_multiplier; copied into TransformerConfig")
    group.add_argument("--residual-multiplier", type=float, required=True)
    group.add_argument("--documents-apart", action="store_true", help="training/documents.py")
    group.add_argument("--restart-positions", action="store_true", help="of RoPE, with each document")
    group.add_argument("--loss-chunk-tokens", type=int, help="tokens of a rank whose logits exist at once; default: all")
    # Megatron's OptimizerConfig has it, its parser does not. As remainders (the 16 bits that a bf16 weight lacks) main weights cannot be
    # loaded from a fully reshardable checkpoint: Megatron saves them as numbers in fp32, and Transformer Engine takes int16 only
    # (github.com/NVIDIA/Megatron-LM/pull/4222). Nor would they mean anything to a stage with other settings, or to a merge.
    group.add_argument(
        "--no-store-param-remainders", dest="store_param_remainders", action="store_false", help="main weights in whole"
    )
    return parser


def compile_stage(recipe: Recipe, stage: str, run_dir: Path) -> tuple[list[str], str | None]:
    """Megatron's arguments of any stage that trains, as it would begin without a checkpoint, and what they lack, if they do.

    Raises RecipeError for a stage that trains nothing.
    """
    kind = recipe.stage_kind(stage)
    if kind == "sft":
        from data_prep.manifest import DataError
        from data_prep.sft_manifest import SftManifest, manifest_path
        from training.sft import compile_sft

        try:
            manifest = SftManifest.read(manifest_path(Path(recipe.data.root), stage))
        except DataError as error:
            lacks = f"--train-samples is that of one step, not of {recipe.sft[stage].epochs} epochs, which follow from the data: {error}"
            return compile_sft(recipe, stage, run_dir, sequences=1), lacks
        return compile_sft(recipe, stage, run_dir, manifest.training.sequences), None
    if kind == "grpo":
        from training.rl.stage import job_of

        job = job_of(recipe, stage, tokenizer="", prompts=[], initial=None)  # none of them is an argument
        return job.compile(run_dir / "stages" / stage, None), None
    return compile_phase(recipe, stage, run_dir), None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.arguments", description="Print the Megatron arguments of one stage that trains."
    )
    parser.add_argument("--recipe", type=Path, required=True, help="resolved recipe (recipe.json)")
    parser.add_argument("--stage", required=True)
    parser.add_argument("--run-dir", type=Path, help="folder of the run; default: the folder of the recipe")
    options = parser.parse_args(argv)
    try:
        recipe = Recipe.read(options.recipe)
        arguments, lacks = compile_stage(recipe, options.stage, options.run_dir or options.recipe.parent)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 78
    lines: list[str] = []
    for word in arguments:
        if word.startswith("--"):
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    print("\n".join(lines))
    if lacks is not None:
        print(f"note: {lacks}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
