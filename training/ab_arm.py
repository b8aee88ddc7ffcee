"""One rank of one arm of a gate: the first steps of a phase as the arm has it, held-out losses at both ends, and no hand-off.

Learning rate and data are those of the whole phase, so that these are the very steps that the phase would begin with. The folder of an arm
is that of a run whose only stage to train is the phase; the stage before is a link to the real one:

    stages/<gate>/arms/a/recipe.json arm.json stages/<before> -> ...    what it is
    stages/<gate>/arms/a/stages/<phase>/metrics.jsonl heldout.jsonl samples/ ranks/ args.txt
    stages/<gate>/arms/a/stages/<phase>/result.json                     written last: the arm has taken all its steps
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from data_prep.files import write_json
from data_prep.manifest import HeldoutManifest, MixtureManifest, heldout_path, mixture_path
from recipes.ab_arms import shortened
from recipes.ab_options import EmulatedFp8
from recipes.fields import PositiveInt, Strict
from recipes.schedules import learning_rate_function
from recipes.schema import Recipe, read_strict
from training import fast_import, one_rank
from training.arguments import Load, compile_phase
from training.exit_codes import FINISHED
from training.versions import versions

SETTINGS_FILE = "arm.json"
RESULT_FILE = "result.json"
RESULT_FORMAT = "quarry.ab_arm/1"
LOCAL_ARGUMENTS = (
    "--no-persist-layer-norm",
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
    "--no-rope-fusion",
)
"""Megatron's own layers without kernels that need apex: plain torch, which is what another implementation is compared with."""


class ArmSettings(Strict):
    """What of an arm no recipe says."""

    format: Literal["quarry.ab_settings/1"] = "quarry.ab_settings/1"
    steps: PositiveInt
    transformer_impl: Literal["local", "transformer_engine"] | None
    emulated_fp8: EmulatedFp8 | None

    @classmethod
    def read(cls, arm_dir: Path) -> ArmSettings:
        path = arm_dir / SETTINGS_FILE
        missing = f"{path} does not exist; the gate's stage command writes it: start the gate again"
        return read_strict(cls, path, missing=missing)


def run_rank(recipe: Recipe, stage: str, run_dir: Path, load: Load | None, arm_digest: str) -> int:
    """As pretrain.run_rank, for the arm in `run_dir`, whose phase is `stage`."""
    stage_dir = run_dir / "stages" / stage
    return one_rank.run(stage_dir, stage_dir / "checkpoints", lambda: _run_rank(recipe, stage, run_dir, load, arm_digest))


def arguments_of(recipe: Recipe, stage: str, run_dir: Path, load: Load | None, settings: ArmSettings) -> list[str]:
    """Megatron's arguments of the arm: those of its phase, shortened."""
    arguments = compile_phase(shortened(recipe, stage, settings.steps), stage, run_dir, load)
    if settings.transformer_impl is not None:
        arguments += ["--transformer-impl", settings.transformer_impl]  # the last one counts
    if settings.transformer_impl == "local":
        arguments += LOCAL_ARGUMENTS
    return arguments


def _run_rank(recipe: Recipe, stage: str, run_dir: Path, load: Load | None, arm_digest: str) -> int:
    one_rank.import_megatron(recipe)
    from megatron.training.utils import is_last_rank

    from training import data, heldout
    from training.forward import forward_step
    from training.hooks import PhaseHooks

    settings = ArmSettings.read(run_dir)
    phase, steps = recipe.phase[stage], settings.steps
    stage_dir, data_root = run_dir / "stages" / stage, Path(recipe.data.root)
    mixture = MixtureManifest.read(mixture_path(data_root, stage))
    heldout_manifest = HeldoutManifest.read(heldout_path(data_root))

    arguments = arguments_of(recipe, stage, run_dir, load, settings)
    args = one_rank.parse_arguments("ab", arguments, eod_id=mixture.tokenizer.eod_id, stage_dir=stage_dir)
    args.variable_seq_lengths = phase.packed_lengths_vary  # has no flag, see training/pretrain.py

    def evaluate(hooks: PhaseHooks, when: Literal["start", "end"], step: int) -> None:
        losses = heldout.evaluate(hooks.model, heldout_manifest, data_root, recipe.data.heldout_batch_samples)
        if is_last_rank():
            tokens = recipe.tokens_before(stage) + step * phase.tokens_per_step
            hooks.metrics.append_heldout(when=when, step=step, total_tokens=tokens, losses=losses)

    class ArmHooks(PhaseHooks):
        def save_checkpoint(self, iteration: int, *rest: Any, **named: Any) -> None:
            if iteration < steps:  # asked to stop, or the phase's own interval; after the last step nobody goes on from it
                super().save_checkpoint(iteration, *rest, **named)

    hooks = ArmHooks(
        stage_dir=stage_dir,
        learning_rate=learning_rate_function(recipe, stage),
        first_start=load is None or not load.resume,
        tokens_before=recipe.tokens_before(stage),
        keep_checkpoints=1,
        # No gate against the hand-off here: the precision that is tried may be what moves this loss, and the arms are compared in it.
        at_first_start=lambda own: evaluate(own, "start", 0),
    )

    def provide_data(train_valid_test_samples: Any, vp_stage: int | None = None) -> tuple[Any, None, None]:
        return data.load_dataset(mixture, data_root, vp_stage, documents_apart=phase.documents_apart), None, None

    provide_model = one_rank.phase_model(recipe, stage, args)
    if settings.emulated_fp8 is not None:
        from training import fp8_emulation

        provide_model = fp8_emulation.around(provide_model, settings.emulated_fp8)
    if not one_rank.train(args, hooks, provide_data, forward_step, provide_model):
        return FINISHED  # without result.json the arm is to be resumed

    evaluate(hooks, "end", steps)
    import torch

    torch.distributed.barrier()  # the last rank has written the losses
    if args.rank == 0:
        record = {"format": RESULT_FORMAT, "digest": arm_digest, "steps": steps, "world_size": args.world_size}
        write_json(stage_dir / RESULT_FILE, {**record, "versions": versions()})
    one_rank.leave_group()
    return FINISHED


def read_result(stage_dir: Path) -> dict[str, Any] | None:
    """result.json of an arm that has taken all its steps; None before."""
    try:
        return json.loads((stage_dir / RESULT_FILE).read_bytes())
    except FileNotFoundError:
        return None


if __name__ == "__main__":
    # Without the interpreter's teardown, as in training/pretrain.py.
    fast_import.leave(one_rank.main(program="training.ab_arm", rank_main=run_rank))
