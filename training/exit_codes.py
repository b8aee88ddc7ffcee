"""How a stage ended, told to whoever started it by its exit code (`launchers/policy.py` acts on these)."""

FINISHED = 0
"""Done, also when it had been done before; or, from a rank, saved after a signal or at a time limit."""
DISK_FULL = 74
"""EX_IOERR: no space (or no quota) was left where the stage writes; it goes on from its last checkpoint once there is."""
REQUEUE = 75
"""EX_TEMPFAIL: saved and to be resumed."""
REFUSED = 78
"""EX_CONFIG: a configuration or hand-off is wrong; starting again changes nothing."""
UNEXPECTED = 16
"""Megatron's code for a result that differs from the first run of the same step, where it is not yet known whether that repeats."""
SUSPICIOUS = 17
"""Megatron's code for a result that must not be trained on; also a loss that is not finite, and where reinforcement learning stops by its
own rule."""


class SuspiciousResult(RuntimeError):
    """A training result that must stop the chain: a loss or gradient that is not finite. A rank that raises it ends with SUSPICIOUS."""
