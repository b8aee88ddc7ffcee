"""What a Slurm job runs on each of its nodes: the wrapper on the first one, the stage's command on the others, and what follows.

    python -m launchers.slurm_job --job STAGE_DIR/job.json --attempt N --chdir FOLDER

Exit code of the first node, which the batch script acts on (`launchers/slurm_script.py`): 0 the stage is finished; EXIT_AGAIN the job
is to be requeued; anything else stops the chain (dependents are cancelled by Slurm). The decision and its reason are in the journal.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from launchers import policy
from launchers.journal import Journal, attempts, last_outcome, stage_rows
from launchers.jsonl import Row
from launchers.stage_job import DATA, StageJob
from launchers.steps import checkpoint_step
from launchers.wrapper import EXIT_BUSY
from launchers.wrapper import main as run_wrapper

EXIT_AGAIN = policy.EXIT_SAVED
MAX_FAULTS_WITHOUT_PROGRESS = 3
"""Starts of a stage in a row that a fault ended before a new checkpoint: more would burn a cluster on a fault that repeats."""
FAULTS = tuple(
    128 + number for number in (signal.SIGKILL, signal.SIGBUS, signal.SIGSEGV, signal.SIGABRT, signal.SIGTERM, signal.SIGHUP)
)
"""Exit codes of a stage that something outside ended: a node, the out-of-memory killer, a driver."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launchers.slurm_job", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--job", type=Path, required=True, help="job.json of the stage")
    parser.add_argument(
        "--attempt", type=int, required=True, help="number of the stage's start that was submitted; requeues count on"
    )
    parser.add_argument("--chdir", type=Path, required=True, help="where the launch ran: relative paths of the recipe mean it")
    args = parser.parse_args(argv)
    os.chdir(args.chdir)
    job = StageJob.read(args.job)
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    node = int(os.environ.get("SLURM_NODEID", "0"))
    os.environ["NODE_RANK"] = str(node)
    os.environ["NNODES"] = os.environ.get("SLURM_NNODES", "1")
    if node > 0:
        return other_node(job, node)
    journal = Journal.read(Path(job.run_dir) / "journal.jsonl")
    attempt = args.attempt
    if restarts:
        lost = after_a_loss(job, journal.rows)
        if lost is not None:
            _journal(journal, job, attempts(journal.rows, job.stage), lost, fault=True)
            if lost.action == "stop":
                return lost.exit_code
        attempt = attempts(journal.rows, job.stage) + 1
        journal.append("intent", stage=job.stage, attempt=attempt, executor="slurm", command=job.command, restarts=restarts)
        journal.append("submitted", stage=job.stage, attempt=attempt, job=os.environ.get("SLURM_JOB_ID", ""), executor="slurm")
    step_before = checkpoint_step(job)
    run_wrapper(["--job", str(args.job), "--attempt", str(attempt)])
    journal.poll()
    decision, fault = decide(job, journal.rows, attempt, step_before, checkpoint_step(job))
    _journal(journal, job, attempt, decision, fault=fault)
    if decision.action == "next":
        return 0
    if decision.action == "again":
        return EXIT_AGAIN
    return decision.exit_code if decision.exit_code not in (0, EXIT_AGAIN) else 1


def _journal(journal: Journal, job: StageJob, attempt: int, decision: policy.Decision, *, fault: bool) -> None:
    journal.append(
        "decision",
        stage=job.stage,
        attempt=attempt,
        decision=decision.action,
        reason=decision.reason,
        step=checkpoint_step(job),
        fault=fault,
    )
    print(f"{job.stage}, attempt {attempt}: {decision.action}: {decision.reason}; {decision.remedy}", flush=True)


def after_a_loss(job: StageJob, rows: list[Row]) -> policy.Decision | None:
    """What follows for a requeued job whose start before left no decision: its node was lost, or it was killed at the time limit.

    None if a decision is there. Nobody else counts such ends: without this they would repeat as often as the job may be requeued.
    """
    last = attempts(rows, job.stage)
    if any(row["event"] == "decision" and row.get("attempt") == last for row in stage_rows(rows, job.stage)):
        return None
    return _again_or_stop(
        job, rows, checkpoint_step(job), "its job ended without a trace (a lost node, or killed at the limit)"
    )


def decide(job: StageJob, rows: list[Row], attempt: int, step_before: int, step_after: int) -> tuple[policy.Decision, bool]:
    """(what follows from the way this attempt ended, whether a fault ended it)."""
    outcome = last_outcome(rows, job.stage)
    code = outcome.get("exit_code") if outcome and outcome.get("attempt") == attempt else None
    reason = (outcome or {}).get("reason", "")
    if job.stage == DATA and code == 0:
        return policy.Decision("next", "finished"), False
    decision = policy.decide(
        code,
        reason=reason,
        handed_off=(Path(job.stage_dir) / "handoff.json").exists(),
        step_before=step_before,
        step_after=step_after,
        starts=1,
        stop_signal=None,
    )
    preempted = code is not None and code != 0 and " after SIG" in reason
    if decision.action == "stop" and code == policy.EXIT_SAVED and preempted:
        # Told to stop before its first step was done: that is no fault of the stage, but must not go on for ever.
        return _again_or_stop(job, rows, step_after, f"{reason}, before a step was saved"), True
    # EXIT_BUSY: after a requeue the job before may still be ending on its node.
    if decision.action == "stop" and (code is None or code < 0 or code in FAULTS or code == EXIT_BUSY or preempted):
        return _again_or_stop(job, rows, step_after, reason or decision.reason), True
    return decision, False


def _again_or_stop(job: StageJob, rows: list[Row], step: int, reason: str) -> policy.Decision:
    faults = 1
    for row in reversed([row for row in stage_rows(rows, job.stage) if row["event"] == "decision"]):
        if not row.get("fault") or row.get("step") != step:
            break
        faults += 1
    if faults > MAX_FAULTS_WITHOUT_PROGRESS:
        return policy.Decision(
            "stop",
            f"{reason}; {faults} starts in a row ended so without progress (its checkpoint is of step {step})",
            f"see its log for the cause; {policy.SAME_COMMAND}",
            1,
        )
    return policy.Decision("again", f"{reason}; fault {faults} of at most {MAX_FAULTS_WITHOUT_PROGRESS} without progress")


def other_node(job: StageJob, node: int) -> int:
    """Run the stage's command on a node that is not the first; 0 also when it saved: what follows is the first node's to say."""
    with open(Path(job.stage_dir) / f"log-node-{node}.txt", "ab", buffering=0) as log:
        process = subprocess.Popen(
            job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **job.environment}
        )

        def forward(number: int, frame: FrameType | None) -> None:
            process.send_signal(signal.SIGTERM)

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, forward)
        code = process.wait()
    return 0 if code in (0, policy.EXIT_SAVED) else 1


if __name__ == "__main__":
    sys.exit(main())
