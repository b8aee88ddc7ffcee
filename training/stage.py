"""The command of one stage of a run: decides first start, resume or refuse on this node, makes the ranks, and says how it ended.

    python -m training.stage --run-dir runs/smoke --stage foundation

Exit codes: 0 finished (also when it had finished before); 74 no space left on the disk; 75 saved and to be resumed; 78 refused, a
configuration or hand-off is wrong; 16 and 17 a suspicious result (Megatron's rerun check, or a loss that is not finite); any other: a crash.

On CPU the ranks are forked from this process after one import of torch and Megatron, because on a laptop the imports of every rank are
most of a short stage's time. On GPUs torchrun makes them (training/torchrun.py).
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from data_prep.manifest import DataError, TokenizerRecord
from recipes.schema import Recipe, RecipeError
from recipes.slurm_options import slurm_options
from training import disk, fast_import, one_rank, rank_end, stacks, startup, wandb_log
from training.arguments import Load
from training.exit_codes import DISK_FULL, FINISHED, REFUSED, REQUEUE
from training.handoff import Decision, Refused, write_model_json, write_start
from training.one_rank import RankMain

# After the first rank died the others wait in a collective for it; gloo notices in milliseconds, so this is generous.
GRACE_SECONDS = 10.0

# Before Slurm kills at the limit: time to write down how the ranks ended.
LAST_SECONDS = 15.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.stage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", type=Path, required=True, help="folder of the run; holds recipe.json")
    parser.add_argument("--stage", required=True)
    options = parser.parse_args(argv)
    startup.begin()
    startup.mark("interpreter")
    stacks.on_request()
    try:
        return run_stage(options.run_dir, options.stage)
    except Exception as error:
        if not disk.is_full(error):
            raise
        print(disk.message(options.run_dir / "stages" / options.stage), file=sys.stderr, flush=True)
        return DISK_FULL


def run_stage(folder: Path, stage: str) -> int:
    try:
        recipe = Recipe.read(folder / "recipe.json")
        recipe.stage_kind(stage)
        wandb_log.check(recipe)
    except RecipeError as error:
        return refuse(error)
    os.environ.setdefault("OMP_NUM_THREADS", str(recipe.cluster.threads_per_rank))
    run_dir = folder.resolve()
    code = _run_kind(recipe, stage, run_dir)
    # A stage that is to be resumed may have been asked to stop, and what is left of its time is the wrapper's.
    if code != REQUEUE and os.environ.get("NODE_RANK", "0") == "0":
        wandb_log.after_attempt(recipe, stage, run_dir)
    return code


def _run_kind(recipe: Recipe, stage: str, run_dir: Path) -> int:
    kind = recipe.stage_kind(stage)
    if kind == "phase":
        from training.pretrain import run_phase

        return run_phase(recipe, stage, run_dir)
    if kind == "sft":
        from training.sft import run_sft

        return run_sft(recipe, stage, run_dir)
    if kind == "grpo":
        from training.rl.stage import run_grpo

        return run_grpo(recipe, stage, run_dir)
    if kind == "ab":
        from training.ab import run_ab

        return run_ab(recipe, stage, run_dir)
    from training import finish

    try:
        if kind == "merge":
            return finish.run_merge(recipe, stage, run_dir)
        return finish.run_export(recipe, stage, run_dir)
    except finish.REFUSALS as error:
        return refuse(error)


def refuse(error: Exception) -> int:
    print(f"refused: {error}", file=sys.stderr, flush=True)
    return REFUSED


@dataclass(frozen=True, kw_only=True)
class Ready:
    """What a stage that trains has found on this node before its ranks are made."""

    decision: Decision
    seen: Recipe
    """The recipe with the stage as a phase."""
    tokenizer: TokenizerRecord
    rank_main: RankMain
    """A forked rank."""
    describe_data: Callable[[], str]
    """One line for the log, of a stage that is not finished."""
    write_inputs: Callable[[], None] = lambda: None
    """Writes what its ranks read, beside what all stages have."""


def train_stage(
    recipe: Recipe,
    stage: str,
    run_dir: Path,
    look: Callable[[bool], Ready],
    *,
    program: str,
    imports: tuple[str, ...] = (),
    refusals: tuple[type[Exception], ...] = (),
) -> int:
    """First start, resume or refuse, then the ranks of this node; returns the stage's exit code.

    `look(verify_files)` finds out how the stage begins, on one node of the job with every file compared with its digest: the others would
    only read them again. It is refused by DataError, Refused, RecipeError and `refusals`. `program` and `imports`: see run_ranks.
    """
    stage_dir = run_dir / "stages" / stage
    stage_dir.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    try:
        ready = look(os.environ.get("NODE_RANK", "0") == "0")
    except (DataError, Refused, RecipeError, *refusals) as error:
        return refuse(error)
    decision = ready.decision
    print(f"stage '{stage}': {decision.kind} ({decision.reason}), verified in {time.monotonic() - began:.1f} s", flush=True)
    if decision.kind == "finished":
        return FINISHED
    print(ready.describe_data(), flush=True)
    if decision.kind == "first_start":
        write_start(stage_dir, decision)
    write_model_json(ready.seen, stage, stage_dir, ready.tokenizer.model_dump(mode="json"))
    ready.write_inputs()
    load, digest = decision.load, decision.training_digest
    code = run_ranks(recipe, stage, run_dir, load, digest, program=program, rank_main=ready.rank_main, imports=imports)
    return outcome(code, stage_dir / "handoff.json")


def outcome(code: int, result: Path) -> int:
    """The stage's exit code after its ranks: without `result`, which they write last, they have saved and left before the last step."""
    if code != FINISHED:
        return code
    return FINISHED if result.exists() else REQUEUE


def run_ranks(
    recipe: Recipe,
    stage: str,
    run_dir: Path,
    load: Load | None,
    training_digest: str,
    *,
    program: str,
    rank_main: RankMain,
    imports: tuple[str, ...] = (),
) -> int:
    """The ranks of this node: forked on CPU, where each calls `rank_main`, by torchrun on GPUs, where each is `python -m program`.

    `imports` are modules that the ranks need beside Megatron, and the pre-training's own; forked ranks find them imported. Returns the
    exit code of `run_forked` or `torchrun`.
    """
    startup.mark("verification")
    if recipe.cluster.gpu != "cpu":
        return run_torchrun(recipe, stage, run_dir, load, training_digest, program=program)
    one_rank.import_megatron(recipe)
    for name in imports:
        importlib.import_module(name)
    startup.mark("imports")
    rank_end.clear(run_dir / "stages" / stage)  # as torchrun does
    return run_forked(_gpus(recipe, stage)[1], lambda: rank_main(recipe, stage, run_dir, load, training_digest))


def _gpus(recipe: Recipe, stage: str) -> tuple[str, int]:
    """The key of the stage's number of ranks, and the number."""
    kind = recipe.stage_kind(stage)
    return f"{kind}.{stage}.parallel.gpus", getattr(recipe, kind)[stage].parallel.gpus


def run_forked(ranks: int, rank_main: Callable[[], int]) -> int:
    """Run `rank_main` in `ranks` forked processes with torchrun's environment; 0 if all return 0, else the first failure's exit code.

    When one rank dies the others are ended, first with SIGTERM, after GRACE_SECONDS with SIGKILL. SIGTERM and SIGINT to this process
    go to every rank, which saves at the end of its step and leaves.
    """
    port = free_port()
    sys.stdout.flush()
    sys.stderr.flush()
    running: dict[int, int] = {}
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            _rank_process(rank, ranks, port, rank_main)
        running[pid] = rank

    def forward(number: int, frame: FrameType | None) -> None:
        for pid in running:
            os.kill(pid, signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    first_failure = 0
    by_signal = killing = False
    deadline: float | None = None
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            if deadline is not None and time.monotonic() > deadline:
                for left in running:
                    os.kill(left, signal.SIGKILL)
                deadline, killing = None, True
            time.sleep(0.02)
            continue
        rank = running.pop(pid)
        code = os.waitstatus_to_exitcode(status)
        # A rank that a signal from outside ended is the cause, even where another, whose connection broke by it, is seen first.
        from_outside = code < 0 and -code != signal.SIGTERM and not killing and not by_signal
        if (code != 0 and first_failure == 0) or from_outside:
            by_signal = code < 0
            # 128 + n for a signal, as shells say it
            first_failure = code if code > 0 else 128 - code
            reason = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
            print(f"rank {rank} ended with {reason}; ending the other {len(running)}", file=sys.stderr, flush=True)
            deadline = deadline or time.monotonic() + GRACE_SECONDS
            for left in running:
                os.kill(left, signal.SIGTERM)
    return first_failure


def _rank_process(rank: int, ranks: int, port: int, rank_main: Callable[[], int]) -> None:
    """Body of a forked rank; never returns."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        CUDA_DEVICE_MAX_CONNECTIONS="1",  # Megatron asks for it with TP or CP; without meaning on CPU
    )
    code = 1
    try:
        code = rank_main()
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else (0 if leave.code is None else 1)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        # No interpreter teardown in a forked rank: destructors of the parent's objects are not its own.
        fast_import.leave(code)


def run_torchrun(recipe: Recipe, stage: str, run_dir: Path, load: Load | None, training_digest: str, *, program: str) -> int:
    """Start this node's ranks of a stage with torchrun."""
    key, gpus = _gpus(recipe, stage)
    words = one_rank.rank_program(program, run_dir, stage, load, training_digest)
    return torchrun(gpus, key, words, stage_dir=run_dir / "stages" / stage, grace_seconds=grace_seconds(recipe))


def grace_seconds(recipe: Recipe) -> float | None:
    """How long ranks may save after they were asked to stop; None where no cluster will kill them at a time that is known."""
    if recipe.cluster.kind != "slurm":
        return None
    return max(LAST_SECONDS, slurm_options(recipe.cluster.options).signal_seconds_before_limit - LAST_SECONDS)


def torchrun(world: int, key: str, program: list[str], *, stage_dir: Path, grace_seconds: float | None) -> int:
    """Start this node's ranks of `program` with torchrun and return the most specific exit code of all ranks (128 + n for signal n).

    NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT come from the launcher's environment. `key` is what sets the number of ranks `world`.
    `stage_dir`: where ranks that go through `rank_end.recorded` leave why they ended. SIGTERM and SIGINT to this process go to the ranks,
    which are killed `grace_seconds` later if they still run.
    """
    nodes = int(os.environ.get("NNODES", "1"))
    if world % nodes:
        return refuse(RecipeError(f"{key} is {world}, which {nodes} nodes (NNODES) do not divide"))
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if nodes > 1 and missing:
        return refuse(
            RecipeError(f"NNODES is {nodes} but {' and '.join(missing)} not set: the nodes cannot meet; set them in the job")
        )
    command = [
        *(sys.executable, "-m", "training.torchrun", "--stage-dir", str(stage_dir)),
        *(() if grace_seconds is None else ("--grace-seconds", f"{grace_seconds:g}")),
        "--",
        *("--nproc-per-node", str(world // nodes), "--nnodes", str(nodes), "--node-rank", os.environ.get("NODE_RANK", "0")),
        *(
            "--master-addr",
            os.environ.get("MASTER_ADDR", "127.0.0.1"),
            "--master-port",
            os.environ.get("MASTER_PORT", str(free_port())),
        ),
        *program,
    ]
    # CUDA_DEVICE_MAX_CONNECTIONS=1 orders communication before computation, which overlap with TP and CP needs on Hopper.
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", **os.environ, **startup.environment()}
    process = subprocess.Popen(command, env=environment)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, f: process.send_signal(signal.SIGTERM))
    code = process.wait()
    return code if code >= 0 else 128 - code


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


if __name__ == "__main__":
    fast_import.leave(main())  # its ranks have ended: tearing the modules down would take as long as a small save
