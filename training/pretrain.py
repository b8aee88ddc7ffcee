"""One rank of one pre-training phase, over `megatron.training.pretrain`. Started by training.stage, never by hand."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.files import write_json
from recipes.schedules import learning_rate_function
from recipes.schema import Recipe
from training import async_saves, disk, fast_import, rank_end, stacks, startup
from training.arguments import Load, add_granite_arguments, compile_phase
from training.exit_codes import DISK_FULL, FINISHED, REFUSED
from training.files import digest_folder
from training.handoff import Drawn, FileRecord, Handoff, latest_step
from training.versions import versions

# A loss may move this much across a boundary that changes nothing but the layout: 40 times what was measured in fp32 (2e-6 at most
# over all layouts), and what bf16's eight bits of mantissa leave of a mean over thousands of tokens.
GATE_NATS = {"fp32": 1e-4, "bf16": 2e-2}

# A merge may cost this much before training mends it [assumed: averages of neighbouring checkpoints usually gain].
MERGE_GATE_NATS = 0.5


class LossGate(RuntimeError):
    """The model that was loaded is not the model that was handed off."""


def run_rank(
    recipe: Recipe,
    stage: str,
    run_dir: Path,
    load: Load | None,
    training_digest: str,
    train: Callable[[Recipe, str, Path, Load | None, str], int] | None = None,
) -> int:
    """Train `stage` from `load` to its end and hand off; the process environment holds RANK, WORLD_SIZE and the rendezvous.

    `train` does it for another kind of stage; None: a phase.

    Returns 0, with or without a hand-off: without one the phase was interrupted after a save (signal or time limit); DISK_FULL if a
    write of any kind found no space; REFUSED, SUSPICIOUS.
    """
    stage_dir = run_dir / "stages" / stage
    startup.mark("ranks")
    stacks.separate_rank(stage_dir, int(os.environ["RANK"]))
    checkpoints = stage_dir / "checkpoints"  # may be a mount of its own
    witness = disk.Witness()

    def main() -> int:
        try:
            return (train or _run_rank)(recipe, stage, run_dir, load, training_digest)
        except BaseException as error:  # torch's CheckpointException is no Exception
            if not (witness.seen or disk.is_full(error, checkpoints)):
                raise
            traceback.print_exc()
            print(disk.message(checkpoints), file=sys.stderr, flush=True)
            raise rank_end.Ended(DISK_FULL, disk.message(checkpoints)) from error

    return rank_end.recorded(stage_dir, main)


def _run_rank(recipe: Recipe, stage: str, run_dir: Path, load: Load | None, training_digest: str) -> int:
    import_megatron(recipe)
    import megatron.training.training as upstream
    from megatron.core.enums import ModelType
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from data_prep.manifest import HeldoutManifest, MixtureManifest, heldout_path, mixture_path
    from training import data, heldout, token_ids
    from training.forward import forward_step
    from training.hooks import PhaseHooks

    phase = recipe.phase[stage]
    stage_dir = run_dir / "stages" / stage
    data_root = Path(recipe.data.root)
    mixture = MixtureManifest.read(mixture_path(data_root, stage))
    heldout_manifest = HeldoutManifest.read(heldout_path(data_root))
    first_start = load is None or not load.resume
    previous_stage = recipe.previous(stage)
    previous = Handoff.read(run_dir / "stages" / previous_stage) if previous_stage else None

    token_ids.install(mixture.tokenizer.eod_id)
    arguments = compile_phase(recipe, stage, run_dir, load)
    sys.argv = ["pretrain", *arguments]
    args = parse_and_validate_args(add_granite_arguments)
    # Has no flag: pipeline stages tell each other how long the packed sequence of a micro batch is.
    args.variable_seq_lengths = phase.packed_lengths_vary
    if args.rank == 0:
        (stage_dir / "args.txt").write_text("\n".join(arguments) + "\n")
    startup.mark("arguments")

    def evaluate(hooks: PhaseHooks) -> dict[str, float]:
        config = upstream.get_model_config(hooks.model[0])
        return heldout.evaluate(hooks.model, config, heldout_manifest, data_root, recipe.data.heldout_batch_samples)

    def before_training(hooks: PhaseHooks) -> None:
        """On a first start: the gate against the hand-off, and the loss that this stage begins with."""
        if not first_start:
            return
        losses = evaluate_through_gate(recipe, stage, hooks, previous, heldout_manifest.digest, evaluate)
        if upstream.is_last_rank():
            hooks.metrics.append_heldout(when="start", step=0, total_tokens=recipe.tokens_before(stage), losses=losses)

    hooks = PhaseHooks(
        stage_dir=stage_dir,
        learning_rate=learning_rate_function(recipe, stage),
        first_start=first_start,
        tokens_before=recipe.tokens_before(stage),
        keep_checkpoints=phase.keep_checkpoints,
        before_training=before_training,
    )
    hooks.install()
    if not args.async_save:
        fast_import.results_stay_in_process()
    elif recipe.cluster.gpu == "cpu":
        async_saves.install()

    dataset: list[Any] = []

    def provide_data(train_valid_test_samples: Any, vp_stage: int | None = None) -> tuple[Any, None, None]:
        if hooks.loaded_step >= args.train_iters:
            return None, None, None  # killed between the last save and the hand-off: nothing to train, Megatron skips the loop
        train = data.load_dataset(mixture, data_root, vp_stage, documents_apart=phase.documents_apart)
        if train is not None:
            dataset[:] = [train]
        return train, None, None

    provide_data.is_distributed = True  # type: ignore[attr-defined]

    try:
        upstream.pretrain(
            pretrain_cfg_container_from_args(args),
            provide_data,
            ModelType.encoder_or_decoder,
            forward_step,
            model_provider=model_provider(recipe, stage, args),
        )
    except SystemExit as leave:
        if leave.code not in (None, 0):
            raise
        return FINISHED  # saved after a signal or at the time limit
    except LossGate as error:  # on every rank alike
        if args.rank == 0:
            print(f"refused: {error}", file=sys.stderr, flush=True)
        raise rank_end.Ended(REFUSED, str(error)) from error

    losses = evaluate(hooks)
    if not dataset and data.reads_data():
        dataset[:] = [data.load_dataset(mixture, data_root)]
    final_loss = shared_final_loss(hooks, stage_dir)
    if upstream.is_last_rank():
        hooks.metrics.append_heldout(
            when="end", step=args.train_iters, total_tokens=recipe.tokens_before(stage) + phase.tokens, losses=losses
        )
    if args.rank == 0:
        write_handoff(
            recipe,
            stage,
            stage_dir,
            previous,
            training_digest=training_digest,
            mixture=mixture,
            heldout_digest=heldout_manifest.digest,
            drawn=data.count_drawn(dataset[0], mixture, phase.samples),
            final_loss=final_loss,
            losses=losses,
        )
    leave_group()
    return FINISHED


def model_provider(recipe: Recipe, stage: str, args: Any) -> Callable[..., Any]:
    """What Megatron's get_model calls for each model chunk of this rank."""
    import model.builder

    phase = recipe.phase[stage]

    def provide(
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        config: Any = None,
        pg_collection: Any = None,
    ) -> Any:
        from megatron.training.argument_utils import core_transformer_config_from_args

        return model.builder.build(
            config or core_transformer_config_from_args(args),
            recipe.model,
            rope_base=phase.rope_base,
            max_sequence_length=phase.seq_length_tokens,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
            pg_collection=pg_collection,
            loss_chunk_tokens=args.loss_chunk_tokens,
        )

    return provide


def evaluate_through_gate(
    recipe: Recipe,
    stage: str,
    hooks: Any,
    previous: Handoff | None,
    heldout_digest: str,
    evaluate: Callable[[Any], dict[str, float]],
) -> dict[str, float]:
    """The held-out losses that a first start begins with, compared with the hand-off where the held-out sets are the same; LossGate."""
    from training import heldout

    phase = recipe.phase[stage]
    gated = previous is not None and previous.heldout_digest == heldout_digest
    if gated and previous.rope_base != phase.rope_base:
        # The loss that was handed off was measured with the RoPE base of then.
        with heldout.rope_base(hooks.model, recipe.model, previous.rope_base):
            check_gate(previous, evaluate(hooks), phase.precision.dtype)
    losses = evaluate(hooks)
    if gated and previous.rope_base == phase.rope_base:
        check_gate(previous, losses, phase.precision.dtype)
    return losses


def shared_final_loss(hooks: Any, stage_dir: Path) -> float:
    """Training loss of the last step, on every rank: it lives on the last one; after a resume with no step left it is in the log."""
    import torch

    final_loss = torch.tensor(
        [math.nan if hooks.final_loss is None else hooks.final_loss], dtype=torch.float64, device=torch.cuda.current_device()
    )
    torch.distributed.broadcast(final_loss, src=torch.distributed.get_world_size() - 1)
    loss = final_loss.item()
    return last_logged_loss(stage_dir) if math.isnan(loss) else loss


def leave_group() -> None:
    """The end of a rank: no rank leaves before the first has written the hand-off."""
    import torch

    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def import_megatron(recipe: Recipe) -> None:
    """Import Megatron once, behind the CPU backend where the recipe's cluster has no GPU. Idempotent."""
    import_megatron_on(recipe.cluster.gpu)
    startup.mark("imports")


def import_megatron_on(gpu: str) -> None:
    """The same for ranks that run on `gpu` (Cluster.gpu)."""
    with fast_import.quick_imports(), fast_import.without_unused_torch() if gpu == "cpu" else contextlib.nullcontext():
        if gpu == "cpu":
            from training import cpu_backend, cpu_optimizer

            cpu_backend.install()
            import megatron.training.training

            cpu_optimizer.install()
        else:
            import megatron.core.datasets.utils
            import megatron.training.training

            # The wheel ships the compiled helper but no Makefile: rank 0 would try to build it and exit.
            megatron.core.datasets.utils.compile_helpers = lambda: None
        # The rank's own modules too, before the ranks are forked.
        import training.heldout
        import training.hooks  # noqa: F401


def check_gate(previous: Handoff, losses: dict[str, float], dtype: str) -> None:
    """Raise LossGate if a held-out loss is not what `previous` allows.

    After a phase: the same within what the precision explains. After a merge, whose loss nobody has measured: at most
    MERGE_GATE_NATS above the worst of its inputs.
    """
    if previous.heldout is not None:
        expected, low, high = previous.heldout, -GATE_NATS[dtype], GATE_NATS[dtype]
        rule = f"the held-out loss is not the one that '{previous.stage}' handed off (tolerance {high:g} nats in {dtype})"
        remedy = "the weights, a multiplier, the RoPE base or the held-out data are not what they were"
    elif previous.heldout_bound is not None:
        expected, low, high = previous.heldout_bound, -math.inf, MERGE_GATE_NATS
        rule = f"the held-out loss after the merge '{previous.stage}' is over {high:g} nats above the worst of its inputs"
        remedy = "the inputs lie too far apart to be averaged: weight the newest more, or drop the merge"
    else:
        return
    moved = {c: losses[c] - before for c, before in expected.items() if not low <= losses[c] - before <= high}
    if moved:
        worst = ", ".join(f"{c} {expected[c]:.4f} -> {losses[c]:.4f}" for c in sorted(moved, key=lambda c: -abs(moved[c])))
        raise LossGate(f"{rule}: {worst}; {remedy}")


def last_logged_loss(stage_dir: Path) -> float:
    from training.files import read_json_lines

    return float(read_json_lines(stage_dir / "metrics.jsonl")[-1]["loss"])


def write_handoff(
    recipe: Recipe,
    stage: str,
    stage_dir: Path,
    previous: Handoff | None,
    *,
    training_digest: str,
    mixture: Any,
    heldout_digest: str,
    drawn: dict[str, dict[str, int]],
    final_loss: float,
    losses: dict[str, float],
) -> None:
    phase = recipe.phase[stage]
    step = latest_step(stage_dir / "checkpoints")
    if step != phase.steps:
        raise RuntimeError(
            f"{stage_dir}: the last checkpoint is of step {step}, the phase has {phase.steps}; no hand-off is written"
        )
    checkpoint = f"checkpoints/iter_{step:07d}"
    ledger = dict(previous.ledger) if previous else {}
    ledger[stage] = {source: Drawn(**d) for source, d in drawn.items()}
    Handoff(
        stage=stage,
        kind="phase",
        step=step,
        stage_tokens=phase.tokens,
        total_tokens=recipe.tokens_before(stage) + phase.tokens,
        checkpoint=checkpoint,
        checkpoint_files={k: FileRecord.model_validate(v) for k, v in digest_folder(stage_dir / checkpoint).items()},
        recipe_digest=recipe.digest(),
        training_digest=training_digest,
        data_digest=mixture.digest,
        ledger=ledger,
        layout=phase.parallel.model_dump(mode="json"),
        rope_base=phase.rope_base,
        seq_length_tokens=phase.seq_length_tokens,
        model=recipe.model,
        tokenizer=mixture.tokenizer.model_dump(mode="json"),
        final_loss=final_loss,
        heldout=losses,
        heldout_digest=heldout_digest,
        versions=versions(),
    ).write(stage_dir)


def write_model_json(recipe: Recipe, stage: str, stage_dir: Path, tokenizer: dict[str, Any]) -> None:
    """What is needed to read the stage's checkpoints without the recipe (see model/convert.py)."""
    phase = recipe.phase[stage]
    path = Path(recipe.data.root) / tokenizer["path"]
    so_far = recipe.stages[: recipe.stages.index(stage) + 1]
    write_json(
        stage_dir / "model.json",
        {
            "format": "quarry.model/1",
            "model": recipe.model.model_dump(mode="json"),
            "rope_base": phase.rope_base,
            # What the model has been trained on up to here: an annealing at a shorter length does not take long context back.
            "max_position_tokens": max(recipe.phase[s].seq_length_tokens for s in so_far if s in recipe.phase),
            "tokenizer": {**tokenizer, "path": str(path.resolve())},
        },
    )


def main(
    argv: list[str] | None = None,
    *,
    program: str = "training.pretrain",
    rank_main: Callable[[Recipe, str, Path, Load | None, str], int] = run_rank,
) -> int:
    """A rank under torchrun."""
    startup.begin()
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--training-digest", required=True)
    parser.add_argument("--load", help="JSON: checkpoints, step, resume")
    options = parser.parse_args(argv)
    load = None
    if options.load:
        values = json.loads(options.load)
        load = Load(checkpoints=Path(values["checkpoints"]), step=values["step"], resume=values["resume"])
    recipe = Recipe.read(options.run_dir / "recipe.json")
    return rank_main(recipe, options.stage, options.run_dir, load, options.training_digest)


if __name__ == "__main__":
    # Without the interpreter's teardown: NCCL and loader threads can hang in it long after the work is done.
    fast_import.leave(main())
