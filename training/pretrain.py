"""A pre-training phase: the node's part (`run_phase`, called by training.stage) and one rank's, over `megatron.training.pretrain`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.manifest import HeldoutManifest, MixtureManifest, heldout_path, mixture_path
from recipes.schedules import learning_rate_function
from recipes.schema import Recipe
from training import fast_import, one_rank
from training.arguments import Load, compile_phase
from training.exit_codes import FINISHED
from training.handoff import Drawn, Handoff, resolve
from training.loss_gate import evaluate_through_gate


def run_phase(recipe: Recipe, stage: str, run_dir: Path) -> int:
    """The node's part: first start, resume or refuse, then its ranks; returns the exit code (see training.stage)."""
    from data_prep.index_caches import RECORD_NAME, IndexCache, cache_path
    from training.stage import Ready, train_stage

    data_root = Path(recipe.data.root)

    def look(verify_files: bool) -> Ready:
        mixture = MixtureManifest.read(mixture_path(data_root, stage))
        heldout = HeldoutManifest.read(heldout_path(data_root))

        def describe_data() -> str:
            cache = IndexCache.read(cache_path(data_root, mixture) / RECORD_NAME)
            how = "verified" if verify_files else "sizes checked, verified by the first node"
            return f"index cache: {cache.summary()}, {how}, none built"

        return Ready(
            decision=resolve(recipe, stage, run_dir, mixture, heldout, verify_files=verify_files),
            seen=recipe,
            tokenizer=mixture.tokenizer,
            rank_main=run_rank,
            describe_data=describe_data,
        )

    return train_stage(recipe, stage, run_dir, look, program="training.pretrain")


def run_rank(recipe: Recipe, stage: str, run_dir: Path, load: Load | None, training_digest: str) -> int:
    """Train the phase `stage` from `load` to its end and hand off; the process environment holds RANK, WORLD_SIZE and the rendezvous.

    Returns 0, with or without a hand-off: without one the phase was interrupted after a save (signal or time limit); else as one_rank.run.
    """
    stage_dir = run_dir / "stages" / stage
    return one_rank.run(stage_dir, stage_dir / "checkpoints", lambda: _run_rank(recipe, stage, run_dir, load, training_digest))


def _run_rank(recipe: Recipe, stage: str, run_dir: Path, load: Load | None, training_digest: str) -> int:
    one_rank.import_megatron(recipe)
    from megatron.training.utils import is_last_rank

    from training import data, heldout
    from training.forward import forward_step
    from training.hooks import PhaseHooks

    phase = recipe.phase[stage]
    stage_dir = run_dir / "stages" / stage
    data_root = Path(recipe.data.root)
    mixture = MixtureManifest.read(mixture_path(data_root, stage))
    heldout_manifest = HeldoutManifest.read(heldout_path(data_root))
    previous_stage = recipe.previous(stage)
    previous = Handoff.read(run_dir / "stages" / previous_stage) if previous_stage else None

    arguments = compile_phase(recipe, stage, run_dir, load)
    args = one_rank.parse_arguments("pretrain", arguments, eod_id=mixture.tokenizer.eod_id, stage_dir=stage_dir)
    # Has no flag: pipeline stages tell each other how long the packed sequence of a micro batch is.
    args.variable_seq_lengths = phase.packed_lengths_vary

    def at_first_start(hooks: PhaseHooks) -> None:
        """The gate against the hand-off, and the loss that this stage begins with."""
        losses = evaluate_through_gate(recipe, stage, hooks.model, previous, heldout_manifest)
        if is_last_rank():
            hooks.metrics.append_heldout(when="start", step=0, total_tokens=recipe.tokens_before(stage), losses=losses)

    hooks = PhaseHooks(
        stage_dir=stage_dir,
        learning_rate=learning_rate_function(recipe, stage),
        first_start=load is None or not load.resume,
        tokens_before=recipe.tokens_before(stage),
        keep_checkpoints=phase.keep_checkpoints,
        at_first_start=at_first_start,
    )
    dataset: list[Any] = []

    def provide_data(train_valid_test_samples: Any, vp_stage: int | None = None) -> tuple[Any, None, None]:
        if hooks.loaded_step >= args.train_iters:
            return None, None, None  # killed between the last save and the hand-off: nothing to train, Megatron skips the loop
        train = data.load_dataset(mixture, data_root, vp_stage, documents_apart=phase.documents_apart)
        if train is not None:
            dataset[:] = [train]
        return train, None, None

    if not one_rank.train(args, hooks, provide_data, forward_step, one_rank.phase_model(recipe, stage, args)):
        return FINISHED

    losses = heldout.evaluate(hooks.model, heldout_manifest, data_root, recipe.data.heldout_batch_samples)
    if not dataset and data.reads_data():
        dataset[:] = [data.load_dataset(mixture, data_root)]
    final_loss = one_rank.shared_final_loss(hooks)
    total_tokens = recipe.tokens_before(stage) + phase.tokens
    if is_last_rank():
        hooks.metrics.append_heldout(when="end", step=args.train_iters, total_tokens=total_tokens, losses=losses)
    if args.rank == 0:
        drawn = data.count_drawn(dataset[0], mixture, phase.samples)
        one_rank.write_handoff(
            recipe,
            stage,
            stage_dir,
            previous,
            kind="phase",
            total_tokens=total_tokens,
            recipe_digest=recipe.digest(),
            training_digest=training_digest,
            data_digest=mixture.digest,
            tokenizer=mixture.tokenizer.model_dump(mode="json"),
            drawn={source: Drawn(**d) for source, d in drawn.items()},
            final_loss=final_loss,
            losses=losses,
            heldout_digest=heldout_manifest.digest,
        )
    one_rank.leave_group()
    return FINISHED


if __name__ == "__main__":
    # Without the interpreter's teardown: NCCL and loader threads can hang in it long after the work is done.
    fast_import.leave(one_rank.main(program="training.pretrain", rank_main=run_rank))
