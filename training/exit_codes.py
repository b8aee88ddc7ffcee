"""How a stage ended, told to whoever started it by its exit code (`launchers/policy.py` acts on these)."""

FINISHED = 0
"""Done, also when it had been done before; or, from a rank, saved after a signal or at a time limit."""
DISK_FULL = 74
"""EX_IOERR: no space (or no quota) was left where the stage writes; it goes on from its last checkpoint once there is."""
REQUEUE = 75
"""EX_TEMPFAIL: saved and to be resumed."""
REFUSED = 78
"""EX_CONFIG: a configuration or hand-off is wrong; starting again changes nothing."""
SUSPICIOUS = 17
"""Megatron's code for a result that must not be trained on; also where reinforcement learning stops by its own rule."""
