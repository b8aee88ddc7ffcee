"""A process that scores samples for training/rewards/pool.py: JSON messages in and out, nothing imported from whoever started it.

Its own program instead of multiprocessing's spawn: that imports the parent's main module again, which in training is Megatron.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

CPU_GRACE_SECONDS = 2.0


class _TimeIsUp(BaseException):
    """Not an Exception: rewards and their libraries catch those."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise _TimeIsUp after `seconds` of wall-clock time; end the process after as much CPU time and a grace.

    The first works wherever Python code runs. The second is the kernel's (SIGPROF's default), so that a worker inside one endless
    C function goes even when its parent is no longer there to kill it.
    """

    def up(signum: int, frame: object) -> None:
        raise _TimeIsUp

    before = signal.signal(signal.SIGALRM, up)
    signal.setitimer(signal.ITIMER_PROF, seconds + CPU_GRACE_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGALRM, before)


def main() -> int:
    connection = Connection(int(sys.argv[1]))
    os.set_inheritable(connection.fileno(), False)
    # What a library prints belongs to the log; whatever it starts must not hold our standard input.
    os.dup2(2, 1)
    start = json.loads(connection.recv_bytes())
    sys.path[:] = start["path"]
    if start["memory_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_AS, (start["memory_bytes"], resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    from training.rewards.base import RewardError, Sample, Score
    from training.rewards.registry import build

    try:
        rewards = {key: build(name, options) for key, (name, options) in start["rewards"].items()}
        for reward in rewards.values():
            reward.prepare()
    except RewardError as error:
        connection.send_bytes(json.dumps({"refused": str(error)}).encode())
        return 1
    except Exception:
        connection.send_bytes(json.dumps({"refused": f"a reward cannot start:\n{traceback.format_exc()}"}).encode())
        return 1
    connection.send_bytes(b'{"ready": true}')

    while True:
        try:
            job = json.loads(connection.recv_bytes())
        except EOFError:
            return 0
        reward = rewards[job["key"]]
        limit = reward.options.time_limit_seconds
        try:
            with _time_limit(limit):
                sample = Sample.model_validate(job["sample"])
                score = reward.score(sample)
                if not isinstance(score, Score):
                    score = Score.failure(f"{type(reward).__name__}.score returned {type(score).__name__}, not a Score")
        except _TimeIsUp:
            score = Score.failure(f"time-out after {limit:g} s")
        except MemoryError:
            score = Score.failure("out of memory (worker_memory_bytes)")
        except RewardError as error:
            score = Score.failure(str(error))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            score = Score.failure(f"{type(error).__name__}: {error} ({os.path.basename(where.filename)}:{where.lineno})")
        connection.send_bytes(score.model_dump_json().encode())


if __name__ == "__main__":
    sys.exit(main())
