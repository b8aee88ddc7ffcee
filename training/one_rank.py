"""What a rank does in the same way whatever it trains: import Megatron, read its arguments, train in Megatron's loop, hand off, end.

A kind of stage (training.pretrain, training.sft, training.ab_arm, training.rl.grpo) brings its data, its hooks and what it measures. Imports no
torch: on the CPU that is done once, by the process that forks the ranks (`import_megatron`).
"""

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
from typing import TYPE_CHECKING, Any

from recipes.schema import Model, Recipe
from training import async_saves, disk, fast_import, rank_end, stacks, startup
from training.arguments import Load, add_granite_arguments
from training.exit_codes import DISK_FULL, REFUSED
from training.files import read_json_lines
from training.handoff import Drawn, Handoff, final_checkpoint
from training.loss_gate import LossGate
from training.versions import versions

if TYPE_CHECKING:
    from training.hooks import PhaseHooks

RankMain = Callable[[Recipe, str, Path, Load | None, str], int]
"""One rank of a stage: (recipe, stage, run folder, what it starts from, digest of what decides its result) -> exit code."""


# --- from the process's start to its end ----------------------------------------------------------


def main(argv: list[str] | None = None, *, program: str, rank_main: RankMain) -> int:
    """A rank under torchrun, which `rank_program` has told what to do."""
    startup.begin()
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description="One rank, started by training.stage.")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--training-digest", required=True)
    parser.add_argument("--load", help="JSON: checkpoints, step, resume")
    options = parser.parse_args(argv)
    recipe = Recipe.read(options.run_dir / "recipe.json")
    return rank_main(recipe, options.stage, options.run_dir, parse_load(options.load), options.training_digest)


def rank_program(module: str, run_dir: Path, stage: str, load: Load | None, training_digest: str) -> list[str]:
    """What torchrun starts: `main` of `module`."""
    program = ["-m", module, "--run-dir", str(run_dir), "--stage", stage, "--training-digest", training_digest]
    return [*program, *load_arguments(load)]


def load_arguments(load: Load | None) -> list[str]:
    """What a rank that torchrun starts is told of where it begins."""
    if load is None:
        return []
    return ["--load", json.dumps({"checkpoints": str(load.checkpoints), "step": load.step, "resume": load.resume})]


def parse_load(text: str | None) -> Load | None:
    """The value of `load_arguments`' option."""
    if text is None:
        return None
    values = json.loads(text)
    return Load(checkpoints=Path(values["checkpoints"]), step=values["step"], resume=values["resume"])


def run(stage_dir: Path, written: Path, body: Callable[[], int]) -> int:
    """`body`, with files of the rank's own (training/stacks.py) and a record of an end that is not 0 (training/rank_end.py).

    The process environment holds RANK, WORLD_SIZE and the rendezvous. `written` is the folder that most is written to: it may be a mount
    of its own. Returns the exit code: that of `body`, DISK_FULL if a write of any kind found no space, REFUSED after LossGate, SUSPICIOUS.
    """
    rank = int(os.environ["RANK"])
    startup.mark("ranks")
    stacks.separate_rank(stage_dir, rank)
    witness = disk.Witness()

    def ended() -> int:
        try:
            return body()
        except LossGate as error:  # on every rank alike
            if rank == 0:
                print(f"refused: {error}", file=sys.stderr, flush=True)
            raise rank_end.Ended(REFUSED, str(error)) from error
        except BaseException as error:  # torch's CheckpointException is no Exception
            if not (witness.seen or disk.is_full(error, written)):
                raise
            traceback.print_exc()
            print(disk.message(written), file=sys.stderr, flush=True)
            raise rank_end.Ended(DISK_FULL, disk.message(written)) from error

    return rank_end.recorded(stage_dir, ended)


def leave_group() -> None:
    """The end of a rank: no rank leaves before the first has written the hand-off."""
    import torch

    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


# --- setting up Megatron --------------------------------------------------------------------------


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


def parse_arguments(program: str, arguments: list[str], *, eod_id: int, stage_dir: Path | None) -> Any:
    """Megatron's arguments, parsed and validated; `program` stands for the program's name in messages of its parser.

    `eod_id` is the end-of-document id of the data's tokenizer. The first rank writes `args.txt` in `stage_dir`.
    """
    from megatron.training.arguments import parse_and_validate_args

    from training import token_ids

    token_ids.install(eod_id)
    sys.argv = [program, *arguments]
    args = parse_and_validate_args(add_granite_arguments)
    if stage_dir is not None and args.rank == 0:
        (stage_dir / "args.txt").write_text("\n".join(arguments) + "\n")
    startup.mark("arguments")
    return args


def initialize(args: Any) -> None:
    """Process groups, seeds and fused kernels, for a loop that is not Megatron's own."""
    import megatron.training.training as upstream
    from megatron.training.initialize import initialize_megatron

    initialize_megatron()
    upstream.set_jit_fusion_options(tp_size=args.tensor_model_parallel_size)


def model_provider(model: Model, args: Any, *, rope_base: float, max_sequence_length_tokens: int) -> Callable[..., Any]:
    """What Megatron's get_model calls for each model chunk of this rank."""
    import model.builder as builder

    def provide(
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        config: Any = None,
        pg_collection: Any = None,
    ) -> Any:
        from megatron.training.argument_utils import core_transformer_config_from_args

        return builder.build(
            config or core_transformer_config_from_args(args),
            model,
            rope_base=rope_base,
            max_sequence_length=max_sequence_length_tokens,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
            pg_collection=pg_collection,
            loss_chunk_tokens=args.loss_chunk_tokens,
        )

    return provide


def phase_model(recipe: Recipe, stage: str, args: Any) -> Callable[..., Any]:
    """`model_provider` of a phase."""
    phase = recipe.phase[stage]
    return model_provider(recipe.model, args, rope_base=phase.rope_base, max_sequence_length_tokens=phase.seq_length_tokens)


# --- Megatron's own loop, and what it leaves ------------------------------------------------------


def train(
    args: Any,
    hooks: PhaseHooks,
    provide_data: Callable[..., Any],
    forward_step: Callable[..., Any],
    provide_model: Callable[..., Any],
) -> bool:
    """Megatron's whole pre-training with `hooks` in it; False: it has saved after a signal or at the time limit, before the last step."""
    import megatron.training.training as upstream
    from megatron.core.enums import ModelType
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    hooks.install()
    if not args.async_save:
        fast_import.results_stay_in_process()
    elif args.distributed_backend == "gloo":
        async_saves.install()
    provide_data.is_distributed = True  # type: ignore[attr-defined]  # every rank maps the files itself
    container = pretrain_cfg_container_from_args(args)
    try:
        upstream.pretrain(container, provide_data, ModelType.encoder_or_decoder, forward_step, model_provider=provide_model)
    except SystemExit as leave:
        if leave.code not in (None, 0):
            raise
        return False
    return True


def shared_final_loss(hooks: PhaseHooks) -> float:
    """Training loss of the last step, on every rank: it lives on the last one; after a resume with no step left it is in the log."""
    import torch

    final_loss = torch.tensor(
        [math.nan if hooks.final_loss is None else hooks.final_loss], dtype=torch.float64, device=torch.cuda.current_device()
    )
    torch.distributed.broadcast(final_loss, src=torch.distributed.get_world_size() - 1)
    loss = final_loss.item()
    return float(read_json_lines(hooks.stage_dir / "metrics.jsonl")[-1]["loss"]) if math.isnan(loss) else loss


def write_handoff(
    seen: Recipe,
    stage: str,
    stage_dir: Path,
    previous: Handoff | None,
    *,
    kind: str,
    total_tokens: int,
    recipe_digest: str,
    training_digest: str,
    data_digest: str,
    tokenizer: dict[str, Any],
    drawn: dict[str, Drawn],
    final_loss: float,
    losses: dict[str, float],
    heldout_digest: str,
    answers: dict[str, float] | None = None,
) -> None:
    """handoff.json of a stage that has taken all its steps; `seen` is the recipe with the stage as a phase.

    Values that training decides go into the fields of the same names, `losses` and `answers` into `heldout` and `heldout_answers`, `drawn`
    into the ledger.
    """
    phase = seen.phase[stage]
    Handoff(
        **final_checkpoint(stage_dir, phase.steps),
        stage=stage,
        kind=kind,
        stage_tokens=phase.tokens,
        total_tokens=total_tokens,
        recipe_digest=recipe_digest,
        training_digest=training_digest,
        data_digest=data_digest,
        ledger={**(previous.ledger if previous else {}), stage: drawn},
        layout=phase.parallel.model_dump(mode="json"),
        rope_base=phase.rope_base,
        seq_length_tokens=phase.seq_length_tokens,
        model=seen.model,
        tokenizer=tokenizer,
        final_loss=final_loss,
        heldout=losses,
        heldout_digest=heldout_digest,
        heldout_answers=answers,
        versions=versions(),
    ).write(stage_dir)
