"""The stage of supervised fine-tuning: the node's part (`run_sft`, called by training.stage) and one rank's, under torchrun or forked.

To Megatron it is a phase whose samples are packed sequences (recipes.sft_stage), with a data set, a forward step and a normalisation of
its own: the sum of the losses of a global batch is divided by the number of its loss tokens, whichever ranks and micro batches hold them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.files import digest_of
from data_prep.manifest import DataError, HeldoutManifest, heldout_path
from data_prep.sft_manifest import PackedSequences, SampleStore, SftManifest, manifest_path
from recipes.schedules import learning_rate_function
from recipes.schema import Recipe, RecipeError
from recipes.sft_stage import as_phase
from training import fast_import, pretrain
from training.arguments import Load, add_granite_arguments, compile_phase
from training.exit_codes import FINISHED, REFUSED, REQUEUE
from training.files import digest_folder
from training.handoff import Drawn, FileRecord, Handoff, Refused, decide, latest_step, predecessor, write_start
from training.versions import versions

# How Megatron normalises: by the loss tokens of the global batch, not by micro batch and rank.
EXTRA_ARGUMENTS = ("--calculate-per-token-loss",)


def run_sft(recipe: Recipe, stage: str, run_dir: Path) -> int:
    """First start, resume or refuse, then the ranks of this node; returns the exit code (see training.stage)."""
    from training.stage import grace_seconds, refuse, run_forked, torchrun

    stage_dir = run_dir / "stages" / stage
    stage_dir.mkdir(parents=True, exist_ok=True)
    data_root = Path(recipe.data.root)
    began = time.monotonic()
    first_node = os.environ.get("NODE_RANK", "0") == "0"  # one node of a job reads all files
    try:
        manifest = SftManifest.read(manifest_path(data_root, stage))
        heldout = HeldoutManifest.read(heldout_path(data_root))
        seen = as_phase(recipe, stage, manifest.training.sequences)
        problems = check_data(recipe, stage, manifest, heldout, verify_files=first_node)
        decision = decide(
            seen,
            stage,
            run_dir,
            _data_digest(recipe, stage, manifest),
            manifest.tokenizer.sha256,
            problems,
            initial=recipe.sft[stage].initial,
            verify_files=first_node,
        )
        _check_moments(recipe, stage, decision.previous)
    except (DataError, Refused, RecipeError) as error:
        return refuse(error)
    print(f"stage '{stage}': {decision.kind} ({decision.reason}), verified in {time.monotonic() - began:.1f} s", flush=True)
    if decision.kind == "finished":
        return FINISHED
    packs = manifest.training
    print(
        f"samples: {packs.samples} in {packs.sequences} sequences ({packs.utilisation_percent:.2f}% used), {recipe.sft[stage].epochs} epochs, "
        f"{seen.phase[stage].steps} steps",
        flush=True,
    )
    if decision.kind == "first_start":
        write_start(stage_dir, decision)
    pretrain.write_model_json(seen, stage, stage_dir, manifest.tokenizer.model_dump(mode="json"))
    ranks = recipe.sft[stage].parallel.gpus
    if recipe.cluster.gpu == "cpu":
        pretrain.import_megatron(recipe)
        import training.sft_heldout  # noqa: F401  (before the ranks are forked)

        code = run_forked(ranks, lambda: run_rank(recipe, stage, run_dir, decision.load, decision.training_digest))
    else:
        program = [
            "-m",
            "training.sft",
            "--run-dir",
            str(run_dir),
            "--stage",
            stage,
            "--training-digest",
            decision.training_digest,
        ]
        if decision.load is not None:
            load = {
                "checkpoints": str(decision.load.checkpoints), "step": decision.load.step, "resume": decision.load.resume,
            }  # fmt: skip
            program += ["--load", json.dumps(load)]
        grace = grace_seconds(recipe)
        code = torchrun(ranks, f"sft.{stage}.parallel.gpus", program, stage_dir=stage_dir, grace_seconds=grace)
    if code != 0:
        return code
    return FINISHED if (stage_dir / "handoff.json").exists() else REQUEUE


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
    problems = []
    for key, expected, found in (
        ("stage", stage, manifest.stage),
        ("seq_length_tokens", sft.seq_length_tokens, manifest.seq_length_tokens),
        ("too_long", sft.too_long, manifest.too_long),
        ("sources", sorted(sft.sources), sorted(manifest.sources)),
    ):
        if expected != found:
            problems.append(
                f"the data of stage '{stage}' were prepared with {key} {found}, the recipe says {expected}; {remedy}"
            )
    pieces = 2 * sft.parallel.context if sft.parallel.context > 1 else 1
    if manifest.multiple_tokens % pieces:
        problems.append(
            f"the samples of stage '{stage}' take up multiples of {manifest.multiple_tokens} tokens, context parallelism of "
            f"{sft.parallel.context} cuts each into {pieces} pieces; {remedy}, or resume in a layout that divides them"
        )
    if manifest.tokenizer.vocab_size > recipe.model.vocab_size:
        problems.append(
            f"the data's tokenizer has {manifest.tokenizer.vocab_size} entries, the model's vocab_size is {recipe.model.vocab_size}; "
            "use a model with at least as many rows"
        )
    for data in (manifest, heldout) if verify_files else ():
        try:
            data.verify(Path(recipe.data.root))
        except DataError as error:
            problems.append(str(error))
    return problems


def run_rank(recipe: Recipe, stage: str, run_dir: Path, load: Load | None, training_digest: str) -> int:
    """As pretrain.run_rank, for an SFT stage of `recipe`."""
    return pretrain.run_rank(recipe, stage, run_dir, load, training_digest, train=_train)


def _train(recipe: Recipe, stage: str, run_dir: Path, load: Load | None, training_digest: str) -> int:
    pretrain.import_megatron(recipe)
    import megatron.training.training as upstream
    from megatron.core.enums import ModelType
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from training import heldout, token_ids
    from training.hooks import PhaseHooks
    from training.sft_data import EpochDataset, forward_step
    from training.sft_heldout import evaluate_answers

    sft = recipe.sft[stage]
    stage_dir, data_root = run_dir / "stages" / stage, Path(recipe.data.root)
    manifest = SftManifest.read(manifest_path(data_root, stage))
    heldout_manifest = HeldoutManifest.read(heldout_path(data_root))
    seen = as_phase(recipe, stage, manifest.training.sequences)
    phase = seen.phase[stage]
    first_start = load is None or not load.resume
    previous_dir = predecessor(recipe, stage, run_dir, sft.initial)
    previous = Handoff.read(previous_dir) if previous_dir else None

    token_ids.install(manifest.tokenizer.eod_id)
    arguments = compile_sft(recipe, stage, run_dir, manifest.training.sequences, load)
    sys.argv = ["sft", *arguments]
    args = parse_and_validate_args(add_granite_arguments)
    if args.rank == 0:
        (stage_dir / "args.txt").write_text("\n".join(arguments) + "\n")

    def evaluate(hooks: PhaseHooks) -> dict[str, float]:
        config = upstream.get_model_config(hooks.model[0])
        return heldout.evaluate(hooks.model, config, heldout_manifest, data_root, recipe.data.heldout_batch_samples)

    def answers(hooks: PhaseHooks) -> dict[str, float]:
        return evaluate_answers(hooks.model, upstream.get_model_config(hooks.model[0]), manifest, data_root)

    def before_training(hooks: PhaseHooks) -> None:
        """On a first start: the gate against the hand-off, and the losses that this stage begins with."""
        if not first_start:
            return
        losses = pretrain.evaluate_through_gate(seen, stage, hooks, previous, heldout_manifest.digest, evaluate)
        found = answers(hooks)
        if upstream.is_last_rank():
            hooks.metrics.append_heldout(
                when="start", step=0, total_tokens=seen.tokens_before(stage), losses=losses, answers=found
            )

    class SftHooks(PhaseHooks):
        def get_optimizer_param_scheduler(self, optimizer: Any) -> Any:
            scheduler = super().get_optimizer_param_scheduler(optimizer)
            scheduler.mup_scaling = sft.mup_scaling
            scheduler.step(0)  # the rates that it has set already followed muP
            return scheduler

    hooks = SftHooks(
        stage_dir=stage_dir,
        learning_rate=learning_rate_function(seen, stage),
        first_start=first_start,
        tokens_before=seen.tokens_before(stage),
        keep_checkpoints=phase.keep_checkpoints,
        before_training=before_training,
    )
    hooks.install()
    if not args.async_save:
        fast_import.results_stay_in_process()

    def provide_data(train_valid_test_samples: Any, vp_stage: int | None = None) -> tuple[Any, None, None]:
        if hooks.loaded_step >= args.train_iters:
            return None, None, None  # killed between the last save and the hand-off
        sequences = PackedSequences(manifest, data_root, manifest.training)
        return EpochDataset(sequences, seed=recipe.seed, epochs=sft.epochs, length=phase.samples), None, None

    provide_data.is_distributed = True  # type: ignore[attr-defined]  # every rank maps the files itself

    try:
        upstream.pretrain(
            pretrain_cfg_container_from_args(args),
            provide_data,
            ModelType.encoder_or_decoder,
            forward_step,
            model_provider=pretrain.model_provider(seen, stage, args),
        )
    except SystemExit as leave:
        if leave.code not in (None, 0):
            raise
        return FINISHED  # saved after a signal or at the time limit
    except pretrain.LossGate as error:  # on every rank alike
        if args.rank == 0:
            print(f"refused: {error}", file=sys.stderr, flush=True)
        return REFUSED

    losses, found = evaluate(hooks), answers(hooks)
    final_loss = pretrain.shared_final_loss(hooks, stage_dir)
    if upstream.is_last_rank():
        total_tokens = seen.tokens_before(stage) + phase.tokens
        hooks.metrics.append_heldout(when="end", step=args.train_iters, total_tokens=total_tokens, losses=losses, answers=found)
    if args.rank == 0:
        _hand_off(
            seen,
            stage,
            stage_dir,
            previous,
            manifest,
            sft.epochs,
            training_digest,
            final_loss,
            losses,
            found,
            heldout_manifest.digest,
            recipe.digest(),
        )
    pretrain.leave_group()
    return FINISHED


def _hand_off(
    seen: Recipe,
    stage: str,
    stage_dir: Path,
    previous: Handoff | None,
    manifest: SftManifest,
    epochs: int,
    training_digest: str,
    final_loss: float,
    losses: dict[str, float],
    answers: dict[str, float],
    heldout_digest: str,
    recipe_digest: str,
) -> None:
    """Write handoff.json; `seen` is the recipe with the stage as a phase."""
    phase = seen.phase[stage]
    step = latest_step(stage_dir / "checkpoints")
    if step != phase.steps:
        raise RuntimeError(
            f"{stage_dir}: the last checkpoint is of step {step}, the stage has {phase.steps}; no hand-off is written"
        )
    checkpoint = f"checkpoints/iter_{step:07d}"
    ledger = dict(previous.ledger) if previous else {}
    ledger[stage] = count_drawn(manifest, Path(seen.data.root), epochs)
    Handoff(
        stage=stage,
        kind="sft",
        step=step,
        stage_tokens=phase.tokens,
        total_tokens=seen.tokens_before(stage),
        checkpoint=checkpoint,
        checkpoint_files={k: FileRecord.model_validate(v) for k, v in digest_folder(stage_dir / checkpoint).items()},
        recipe_digest=recipe_digest,
        training_digest=training_digest,
        data_digest=manifest.digest,
        ledger=ledger,
        layout=phase.parallel.model_dump(mode="json"),
        rope_base=phase.rope_base,
        seq_length_tokens=phase.seq_length_tokens,
        model=seen.model,
        tokenizer=manifest.tokenizer.model_dump(mode="json"),
        final_loss=final_loss,
        heldout=losses,
        heldout_digest=heldout_digest,
        heldout_answers=answers,
        versions=versions(),
    ).write(stage_dir)


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
    fast_import.leave(pretrain.main(program="training.sft", rank_main=run_rank))
