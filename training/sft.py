"""The stage of supervised fine-tuning: the node's part (`run_sft`, called by training.stage) and one rank's, under torchrun or forked.

To Megatron it is a phase whose samples are packed sequences (recipes.sft_stage), with a data set, a forward step and a normalisation of
its own: the sum of the losses of a global batch is divided by the number of its loss tokens, whichever ranks and micro batches hold them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data_prep.files import digest_of
from data_prep.manifest import HeldoutManifest, heldout_path
from data_prep.sft_manifest import PackedSequences, SampleStore, SftManifest, manifest_path
from recipes.schedules import learning_rate_function
from recipes.schema import Recipe
from recipes.sft_stage import as_phase
from training import fast_import, one_rank
from training.arguments import Load, compile_phase
from training.exit_codes import FINISHED
from training.handoff import Drawn, Handoff, Refused, data_problems, decide, predecessor
from training.loss_gate import evaluate_through_gate

# How Megatron normalises: by the loss tokens of the global batch, not by micro batch and rank.
EXTRA_ARGUMENTS = ("--calculate-per-token-loss",)


def run_sft(recipe: Recipe, stage: str, run_dir: Path) -> int:
    """First start, resume or refuse, then the ranks of this node; returns the exit code (see training.stage)."""
    from training.stage import Ready, train_stage

    sft, data_root = recipe.sft[stage], Path(recipe.data.root)

    def look(verify_files: bool) -> Ready:
        manifest = SftManifest.read(manifest_path(data_root, stage))
        heldout = HeldoutManifest.read(heldout_path(data_root))
        packs = manifest.training
        seen = as_phase(recipe, stage, packs.sequences)
        problems = check_data(recipe, stage, manifest, heldout, verify_files=verify_files)
        digest, tokenizer = _data_digest(recipe, stage, manifest), manifest.tokenizer
        decision = decide(
            seen, stage, run_dir, digest, tokenizer.sha256, problems, initial=sft.initial, verify_files=verify_files
        )
        _check_moments(recipe, stage, decision.previous)
        return Ready(
            decision=decision,
            seen=seen,
            tokenizer=tokenizer,
            rank_main=run_rank,
            describe_data=lambda: (
                f"samples: {packs.samples} in {packs.sequences} sequences ({packs.utilisation_percent:.2f}% used), {sft.epochs} epochs, "
                f"{seen.phase[stage].steps} steps"
            ),
        )

    return train_stage(recipe, stage, run_dir, look, program="training.sft", imports=("training.sft_heldout",))


def _check_moments(recipe: Recipe, stage: str, previous: Handoff | None) -> None:
    if recipe.sft[stage].keep_moments and previous is not None and previous.kind == "import":
        raise Refused(
            f"sft.{stage}.keep_moments is true, but '{previous.stage}' is a converted model and has none; set it to false"
        )


def compile_sft(recipe: Recipe, stage: str, run_dir: Path, sequences: int, load: Load | None = None) -> list[str]:
    """Megatron's arguments of the SFT stage, whose data are `sequences` packed sequences per epoch."""
    arguments = [*compile_phase(as_phase(recipe, stage, sequences), stage, run_dir, load), *EXTRA_ARGUMENTS]
    if load is not None and not load.resume and not recipe.sft[stage].keep_moments:
        arguments.append("--finetune")  # weights only
    return arguments


def _data_digest(recipe: Recipe, stage: str, manifest: SftManifest) -> str:
    """Of the data and of what decides their order and weight."""
    sft = recipe.sft[stage]
    own = {"epochs": sft.epochs, "mup_scaling": sft.mup_scaling, "keep_moments": sft.keep_moments}
    return digest_of({"data": manifest.digest, **own})


def check_data(recipe: Recipe, stage: str, manifest: SftManifest, heldout: HeldoutManifest, *, verify_files: bool) -> list[str]:
    """What is wrong with the data of `stage` for this recipe, one sentence each."""
    sft, remedy = recipe.sft[stage], f"run `python -m data_prep.sft --recipe recipe.json --stage {stage}` again"
    fields = (
        ("stage", stage, manifest.stage),
        ("seq_length_tokens", sft.seq_length_tokens, manifest.seq_length_tokens),
        ("too_long", sft.too_long, manifest.too_long),
        ("sources", sorted(sft.sources), sorted(manifest.sources)),
    )
    manifests = (manifest, heldout) if verify_files else ()
    problems = data_problems(recipe, stage, fields, manifest.tokenizer, manifests, remedy=remedy)
    pieces = 2 * sft.parallel.context if sft.parallel.context > 1 else 1
    if manifest.multiple_tokens % pieces:
        problems.append(
            f"the samples of stage '{stage}' take up multiples of {manifest.multiple_tokens} tokens, context parallelism of "
            f"{sft.parallel.context} cuts each into {pieces} pieces; {remedy}, or resume in a layout that divides them"
        )
    return problems


def run_rank(recipe: Recipe, stage: str, run_dir: Path, load: Load | None, training_digest: str) -> int:
    """As pretrain.run_rank, for an SFT stage of `recipe`."""
    stage_dir = run_dir / "stages" / stage
    return one_rank.run(stage_dir, stage_dir / "checkpoints", lambda: _run_rank(recipe, stage, run_dir, load, training_digest))


def _run_rank(recipe: Recipe, stage: str, run_dir: Path, load: Load | None, training_digest: str) -> int:
    one_rank.import_megatron(recipe)
    from megatron.training.utils import is_last_rank

    from training import heldout
    from training.hooks import PhaseHooks
    from training.sft_data import EpochDataset, forward_step
    from training.sft_heldout import evaluate_answers

    sft = recipe.sft[stage]
    stage_dir, data_root = run_dir / "stages" / stage, Path(recipe.data.root)
    manifest = SftManifest.read(manifest_path(data_root, stage))
    heldout_manifest = HeldoutManifest.read(heldout_path(data_root))
    seen = as_phase(recipe, stage, manifest.training.sequences)
    phase = seen.phase[stage]
    previous_dir = predecessor(recipe, stage, run_dir, sft.initial)
    previous = Handoff.read(previous_dir) if previous_dir else None

    arguments = compile_sft(recipe, stage, run_dir, manifest.training.sequences, load)
    args = one_rank.parse_arguments("sft", arguments, eod_id=manifest.tokenizer.eod_id, stage_dir=stage_dir)

    def at_first_start(hooks: PhaseHooks) -> None:
        """The gate against the hand-off, and the losses that this stage begins with."""
        losses = evaluate_through_gate(seen, stage, hooks.model, previous, heldout_manifest)
        answers = evaluate_answers(hooks.model, manifest, data_root)
        if is_last_rank():
            total_tokens = seen.tokens_before(stage)
            hooks.metrics.append_heldout(when="start", step=0, total_tokens=total_tokens, losses=losses, answers=answers)

    class SftHooks(PhaseHooks):
        def get_optimizer_param_scheduler(self, optimizer: Any) -> Any:
            scheduler = super().get_optimizer_param_scheduler(optimizer)
            scheduler.mup_scaling = sft.mup_scaling
            scheduler.step(0)  # the rates that it has set already followed muP
            return scheduler

    hooks = SftHooks(
        stage_dir=stage_dir,
        learning_rate=learning_rate_function(seen, stage),
        first_start=load is None or not load.resume,
        tokens_before=seen.tokens_before(stage),
        keep_checkpoints=phase.keep_checkpoints,
        at_first_start=at_first_start,
    )

    def provide_data(train_valid_test_samples: Any, vp_stage: int | None = None) -> tuple[Any, None, None]:
        if hooks.loaded_step >= args.train_iters:
            return None, None, None  # killed between the last save and the hand-off
        sequences = PackedSequences(manifest, data_root, manifest.training)
        return EpochDataset(sequences, seed=recipe.seed, epochs=sft.epochs, length=phase.samples), None, None

    if not one_rank.train(args, hooks, provide_data, forward_step, one_rank.phase_model(seen, stage, args)):
        return FINISHED

    losses = heldout.evaluate(hooks.model, heldout_manifest, data_root, recipe.data.heldout_batch_samples)
    answers = evaluate_answers(hooks.model, manifest, data_root)
    final_loss = one_rank.shared_final_loss(hooks)
    if is_last_rank():
        total_tokens = seen.tokens_before(stage) + phase.tokens
        hooks.metrics.append_heldout(
            when="end", step=args.train_iters, total_tokens=total_tokens, losses=losses, answers=answers
        )
    if args.rank == 0:
        one_rank.write_handoff(
            seen,
            stage,
            stage_dir,
            previous,
            kind="sft",
            total_tokens=seen.tokens_before(stage),  # of pre-training: fine-tuning has a schedule of its own
            recipe_digest=recipe.digest(),
            training_digest=training_digest,
            data_digest=manifest.digest,
            tokenizer=manifest.tokenizer.model_dump(mode="json"),
            drawn=count_drawn(manifest, data_root, sft.epochs),
            final_loss=final_loss,
            losses=losses,
            heldout_digest=heldout_manifest.digest,
            answers=answers,
        )
    one_rank.leave_group()
    return FINISHED


def count_drawn(manifest: SftManifest, data_root: Path, epochs: int) -> dict[str, Drawn]:
    """Samples and their tokens, without padding, that all epochs draw of each source."""
    store = SampleStore(manifest, data_root)
    numbers = PackedSequences(manifest, data_root, manifest.training, store).samples
    lengths = np.minimum(store.lengths[numbers], manifest.seq_length_tokens)
    drawn, first = {}, 0
    for source, files in sorted(manifest.sources.items()):
        last = first + sum(file.samples for file in files)
        mine = (numbers >= first) & (numbers < last)
        drawn[source] = Drawn(samples=epochs * int(mine.sum()), tokens=epochs * int(lengths[mine].sum(dtype=np.int64)))
        first = last
    return drawn


if __name__ == "__main__":
    fast_import.leave(one_rank.main(program="training.sft", rank_main=run_rank))
