"""The reinforcement-learning stage of a curriculum: the node's part (`run_grpo`, called by training.stage) and one rank's.

What training.rl.grpo does for a job that stands alone, with what a chain adds: the model and the tokenizer come from the hand-off before,
held-out losses are compared at the boundary, and a hand-off is left.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.files import digest_of
from data_prep.manifest import HeldoutManifest, TokenizerRecord, heldout_path
from data_prep.rl_prompts import prompt_paths
from recipes.grpo_stage import as_phase, settings
from recipes.schema import Recipe, RecipeError
from training import fast_import, one_rank
from training.arguments import Load
from training.files import read_json_lines
from training.handoff import (
    Decision,
    Drawn,
    Handoff,
    Refused,
    decide,
    final_checkpoint,
    predecessor,
    read_predecessor,
)
from training.loss_gate import evaluate_through_gate
from training.metrics import MetricsLog
from training.rl import grpo
from training.rl.grpo import REFUSALS, Boundary, Inputs, read_inputs
from training.rl.job import RESUMABLE_CHANGES, Initial, Job
from training.versions import versions


def make_job(recipe: Recipe, stage: str, run_dir: Path) -> tuple[Job, TokenizerRecord]:
    """The stage as a job, and its data's tokenizer; raises Refused, RecipeError or DataError."""
    own = recipe.grpo[stage]
    before = predecessor(recipe, stage, run_dir, own.initial)
    if before is None:
        raise RecipeError(
            f"grpo stage '{stage}' is the first stage: there is no model to start from; put a phase or sft before it, or give "
            f"grpo.{stage}.initial"
        )
    previous = read_predecessor(recipe, stage, before)
    if previous.checkpoint is None:
        raise Refused(f"stage '{before.name}' is an export and leaves no checkpoint; put it after all stages")
    checkpoint = (before / previous.checkpoint).resolve()
    tokenizer = HeldoutManifest.read(heldout_path(Path(recipe.data.root))).tokenizer
    job = job_of(
        recipe,
        stage,
        tokenizer=str((Path(recipe.data.root) / tokenizer.path).resolve()),
        prompts=[str(path) for path in prompt_paths(own, stage, Path(recipe.data.root))],
        initial=Initial(checkpoints=str(checkpoint.parent), step=int(checkpoint.name.removeprefix("iter_"))),
    )
    return job, tokenizer


def job_of(recipe: Recipe, stage: str, *, tokenizer: str, prompts: list[str], initial: Initial | None) -> Job:
    """What the recipe says of the stage, with what is found where it runs."""
    own = recipe.grpo[stage]
    return Job(
        model=recipe.model,
        grpo=settings(recipe, stage),
        parallel=own.parallel,
        precision=own.precision,
        optimizer=own.optimizer or recipe.optimizer,
        seed=recipe.seed,
        gpu=recipe.cluster.gpu,
        tokenizer=tokenizer,
        prompts=prompts,
        rewards=own.rewards,
        initial=initial,
    )


def _resolve(recipe: Recipe, stage: str, run_dir: Path, job: Job, inputs: Inputs, *, verify_files: bool) -> Decision:
    """First start, resume or finished, by the rules of all stages."""
    data_digest = digest_of(
        {
            "prompts": inputs.prompts.digest,
            "rewards": job.rewards,
            "grpo": job.grpo.model_dump(mode="json", exclude=RESUMABLE_CHANGES),
        }
    )
    seen = as_phase(recipe, stage)
    initial = recipe.grpo[stage].initial
    return decide(seen, stage, run_dir, data_digest, inputs.tokenizer.digest, [], initial=initial, verify_files=verify_files)


def run_grpo(recipe: Recipe, stage: str, run_dir: Path) -> int:
    """First start, resume or refuse, then the ranks of this node; returns the exit code (see training.stage)."""
    from training.stage import Ready, train_stage

    def look(verify_files: bool) -> Ready:
        job, tokenizer = make_job(recipe, stage, run_dir)
        inputs, own = read_inputs(job), job.grpo

        def rank_main(recipe: Recipe, stage: str, run_dir: Path, load: Load | None, training_digest: str) -> int:
            return _run_rank(recipe, stage, run_dir, load, training_digest, job, inputs)

        return Ready(
            decision=_resolve(recipe, stage, run_dir, job, inputs, verify_files=verify_files),
            seen=as_phase(recipe, stage),
            tokenizer=tokenizer,
            rank_main=rank_main,
            describe_data=lambda: (
                f"prompts: {len(inputs.prompts.items)}, {own.prompts_per_step} x {own.samples_per_prompt} samples a step, {own.steps} steps"
            ),
            write_inputs=lambda: job.write(run_dir / "stages" / stage / "job.json"),
        )

    return train_stage(recipe, stage, run_dir, look, program="training.rl.stage", refusals=REFUSALS)


def run_rank(recipe: Recipe, stage: str, run_dir: Path, load: Load | None, training_digest: str) -> int:
    """As pretrain.run_rank, for a reinforcement-learning stage of `recipe`, in a process that has not read its inputs yet."""
    job, _ = make_job(recipe, stage, run_dir)
    return _run_rank(recipe, stage, run_dir, load, training_digest, job, read_inputs(job))


def _run_rank(
    recipe: Recipe, stage: str, run_dir: Path, load: Load | None, training_digest: str, job: Job, inputs: Inputs
) -> int:
    boundary = _boundary(recipe, stage, run_dir, job, training_digest)
    return grpo.run_rank(job, run_dir / "stages" / stage, load, inputs, None, boundary)


def _boundary(recipe: Recipe, stage: str, run_dir: Path, job: Job, training_digest: str) -> Boundary:
    """Held-out losses at both ends, the gate against the hand-off before, and this stage's own hand-off."""
    stage_dir, data_root = run_dir / "stages" / stage, Path(recipe.data.root)
    before = predecessor(recipe, stage, run_dir, recipe.grpo[stage].initial)
    assert before is not None, "checked by make_job"
    previous = Handoff.read(before)
    manifest = HeldoutManifest.read(heldout_path(data_root))

    def begin(model: list[Any], metrics: MetricsLog) -> None:
        import torch

        losses = evaluate_through_gate(as_phase(recipe, stage), stage, model, previous, manifest)
        if torch.distributed.get_rank() == 0:
            metrics.append_heldout(when="start", step=0, total_tokens=recipe.tokens_before(stage), losses=losses)

    def end(model: list[Any], metrics: MetricsLog) -> None:
        import torch

        from training import heldout

        losses = heldout.evaluate(model, manifest, data_root, recipe.data.heldout_batch_samples)
        if torch.distributed.get_rank() != 0:
            return
        checkpoint = final_checkpoint(stage_dir, job.grpo.steps)
        last = read_json_lines(stage_dir / "metrics.jsonl")[-1]
        metrics.append_heldout(when="end", step=job.grpo.steps, total_tokens=recipe.tokens_before(stage), losses=losses)
        drawn = {"rollouts": Drawn(samples=job.grpo.steps * job.grpo.samples_per_step, tokens=last["stage_tokens"])}
        previous.model_copy(
            update={
                "stage": stage,
                "kind": "grpo",
                "stage_tokens": last["stage_tokens"],
                "total_tokens": recipe.tokens_before(stage),
                **checkpoint,
                "recipe_digest": recipe.digest(),
                "training_digest": training_digest,
                "data_digest": None,
                "ledger": previous.ledger | {stage: drawn},
                "layout": job.parallel.model_dump(mode="json"),
                "rope_base": job.grpo.rope_base,
                "seq_length_tokens": job.grpo.seq_length_tokens,
                "final_loss": last["loss"],
                "heldout": losses,
                "heldout_bound": None,
                "heldout_answers": None,
                "heldout_digest": manifest.digest,
                "tokenizer": manifest.tokenizer.model_dump(mode="json"),
                "versions": versions(),
            }
        ).write(stage_dir)

    return Boundary(begin, end)


if __name__ == "__main__":
    # Without the interpreter's teardown: NCCL and loader threads can hang in it long after the work is done.
    fast_import.leave(one_rank.main(program="training.rl.stage", rank_main=run_rank))
