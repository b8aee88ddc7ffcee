"""What follows from the way a job ended: the next stage, the same stage again, or a stop that names its remedy.

| the job ended with | what follows |
|---|---|
| 0 and a hand-off | the next stage; 0 without a hand-off stops |
| 75, saved | the same stage again, if its checkpoint is newer than before; else it stops |
| 79, hung: ended by the wrapper without progress | the same stage again from its last checkpoint |
| 80, hung the third time in a row without a new checkpoint | stop, with the place where the ranks stand |
| 74, disk full | stop, with the disk |
| 16 and 17, Megatron's rerun check or a loss that is not finite | stop: a start that goes well would hide a suspicious result |
| 78, refused; 73, another job of the stage runs; 127, no such command | stop: nothing would change |
| killed by a signal (137 and the like), or no trace | stop (on Slurm again: see below) |
| any other code, a crash | stop |

On this machine a kill stops the chain, because whoever did it, or the memory that it lacked, is here to be asked; on Slurm a node may have
failed, so launchers/slurm_job.py starts the stage again, within a limit. A launcher that was asked to stop starts nothing more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launchers.hang import EXIT_HUNG, EXIT_HUNG_REPEATEDLY, MAX_HANGS
from launchers.wrapper import EXIT_BUSY

EXIT_FINISHED = 0
EXIT_DISK_FULL = 74  # EX_IOERR: no space left
EXIT_SAVED = 75  # EX_TEMPFAIL: saved, start me again
EXIT_REFUSED = 78  # EX_CONFIG: configuration or hand-off; starting again changes nothing

MAX_STARTS_PER_LAUNCH = 100
"""Starts of one stage by one launcher. Every one must have made progress, so this only stops a stage that crawls."""

SAME_COMMAND = "the same command continues from the stage's last checkpoint"


@dataclass(frozen=True)
class Decision:
    action: Literal["next", "again", "stop"]
    reason: str
    remedy: str = ""
    exit_code: int = 0
    """What the launcher exits with when it stops."""


def decide(
    exit_code: int | None,
    *,
    reason: str,
    handed_off: bool,
    step_before: int,
    step_after: int,
    starts: int,
    stop_signal: int | None,
    attached: bool = False,
) -> Decision:
    """The policy of the local chain.

    `exit_code` is the stage command's (negative: ended by that signal; None: unknown, its job ended without a trace); `step_*` are the
    steps of its last whole checkpoint; `starts` counts this launcher's starts of the stage; `stop_signal` is set when the launcher was
    asked to stop; `attached` when this launcher only waited for a job that an earlier one had started.
    """
    if handed_off and exit_code in (EXIT_FINISHED, None) and stop_signal is None:
        return Decision("next", "finished")
    if stop_signal is not None:
        ended = "finished" if handed_off else f"saved at step {step_after}" if exit_code == EXIT_SAVED else reason
        return Decision("stop", f"the launcher was asked to stop; the stage {ended}", SAME_COMMAND, 128 + stop_signal)
    if attached and exit_code in (EXIT_SAVED, None):
        return Decision("again", "the job of an earlier launcher has ended; starting the stage from its last checkpoint")
    if exit_code == EXIT_FINISHED:
        return Decision(
            "stop",
            "it ended with 0 but left no hand-off",
            "read the log: the stage command must write handoff.json before it ends with 0",
            1,
        )
    if exit_code == EXIT_SAVED:
        if step_after <= step_before:
            return Decision(
                "stop",
                f"it asked to be resumed (75) without a step of progress (its checkpoint is of step {step_after}, as before)",
                "lower save_interval_steps or raise exit_after_minutes of the phase, so that each start saves at least once",
                EXIT_SAVED,
            )
        if starts >= MAX_STARTS_PER_LAUNCH:
            return Decision(
                "stop", f"it was started {starts} times by this launcher", f"see its log for why; {SAME_COMMAND}", EXIT_SAVED
            )
        return Decision("again", f"saved at step {step_after}, to be resumed")
    if exit_code == EXIT_HUNG:
        if starts >= MAX_STARTS_PER_LAUNCH:
            return Decision("stop", f"{reason}; start {starts} of this launcher", f"see its log; {SAME_COMMAND}", EXIT_HUNG)
        return Decision("again", f"{reason}; starting it from its last checkpoint (step {step_after})")
    if exit_code == EXIT_HUNG_REPEATEDLY:
        return Decision(
            "stop",
            f"{reason}; that was hang {MAX_HANGS} in a row without a new checkpoint (it is of step {step_after})",
            f"see in its log where the ranks stand; if it is only slow, set QUARRY_HANG_SECONDS higher; {SAME_COMMAND}",
            EXIT_HUNG_REPEATEDLY,
        )
    if exit_code == EXIT_DISK_FULL:
        return Decision(
            "stop",
            f"{reason} (74)",
            f"free space there, or lower keep_checkpoints of the phase; {SAME_COMMAND}",
            EXIT_DISK_FULL,
        )
    if exit_code in (16, 17):
        return Decision(
            "stop",
            reason,
            f"find the cause before going on (another node, ECC errors, the batch that its last lines name); then {SAME_COMMAND}",
            exit_code,
        )
    if exit_code == EXIT_REFUSED:
        return Decision(
            "stop",
            "it refused its configuration or hand-off (78); starting it again would change nothing",
            "mend what its last lines name, then run the same command",
            EXIT_REFUSED,
        )
    if exit_code == EXIT_BUSY:
        return Decision("stop", reason, "wait for that job, or end it; then run the same command", EXIT_BUSY)
    if exit_code is None:
        return Decision("stop", "its job ended without a trace (killed, or the machine went down)", SAME_COMMAND, 1)
    if exit_code < 0:
        remedy = (
            f"{SAME_COMMAND}; if nobody killed it, look for the out-of-memory killer in `dmesg`"
            if exit_code == -9
            else SAME_COMMAND
        )
        return Decision("stop", reason, remedy, 128 - exit_code)
    return Decision("stop", reason, f"mend what its last lines name; {SAME_COMMAND}", exit_code)
