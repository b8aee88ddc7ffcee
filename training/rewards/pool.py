"""Worker processes that score samples: order kept, a limit per sample, a hung or dead worker replaced, nothing of it fatal."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from training.rewards.base import RewardError, Sample, Score
from training.rewards.registry import check_options

KILL_GRACE_SECONDS = 1.0
"""A worker ends a sample itself at its time limit; one that has not by this much later hangs outside of Python and is killed."""
LOOK_SECONDS = 0.2
MAX_START_ATTEMPTS = 3
"""A worker that dies while it starts is started again so often; then the machine is at fault, and a message beats a loop."""

Job = tuple[str, Sample]


class _Worker:
    def __init__(self, start: bytes, start_seconds: float) -> None:
        self.connection, other = Pipe()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0"}
        # The child must find `training` before it has our sys.path.
        environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "training.rewards.worker", str(other.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=(other.fileno(),),
            start_new_session=True,
            env=environment,
        )
        other.close()
        self.ready = False
        self.job: int | None = None
        self.deadline = time.monotonic() + start_seconds
        with contextlib.suppress(OSError):  # it died at once; whoever waits for it sees that
            self.connection.send_bytes(start)

    def end(self) -> None:
        """Kill the worker and what it has started in its session."""
        self.connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class WorkerPool:
    """`workers` processes, each with all of `rewards` (key -> (reward, options)).

    RewardError from the constructor where a reward cannot work here: at the start, not at step 3000.
    """

    def __init__(
        self,
        rewards: Mapping[str, tuple[str, Mapping[str, Any]]],
        *,
        workers: int,
        memory_bytes: int | None = None,
        start_seconds: float = 120.0,
    ) -> None:
        self._limits = {key: check_options(name, options).time_limit_seconds for key, (name, options) in rewards.items()}
        self._start_seconds = start_seconds
        start = {"path": sys.path, "memory_bytes": memory_bytes, "rewards": {k: [n, dict(o)] for k, (n, o) in rewards.items()}}
        self._start = json.dumps(start).encode()
        self.restarts = 0
        """Workers replaced since the start: hung, or dead."""
        self._workers: list[_Worker] = []
        try:
            self._workers += [self._new() for _ in range(workers)]
            self._wait_for_start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for worker in self._workers:
            worker.end()
        self._workers.clear()

    def _new(self) -> _Worker:
        return _Worker(self._start, self._start_seconds)

    def _wait_for_start(self) -> None:
        attempts = 0
        while waiting := [w for w in self._workers if not w.ready]:
            ready = wait([w.connection for w in waiting], LOOK_SECONDS)
            for worker in waiting:
                if worker.connection in ready and self._started(worker):
                    continue
                if worker.process.poll() is not None or time.monotonic() > worker.deadline:
                    attempts += 1
                    self._replace(worker, "before it was ready", attempts)

    def _started(self, worker: _Worker) -> bool:
        """Take a worker's first message; False where it died instead."""
        try:
            message = json.loads(worker.connection.recv_bytes())
        except (EOFError, OSError):
            return False
        if "refused" in message:
            raise RewardError(message["refused"])
        worker.ready = True
        return True

    def _replace(self, worker: _Worker, when: str, attempts: int) -> None:
        code = worker.process.poll()
        worker.end()
        if attempts >= MAX_START_ATTEMPTS:
            how = f"exit code {code}" if code is not None else f"not ready after {self._start_seconds:g} s"
            raise RewardError(f"a reward worker ended {when}, {attempts} times in a row ({how}); see its messages in the log")
        self.restarts += 1
        self._workers[self._workers.index(worker)] = self._new()

    def score(self, jobs: Sequence[Job]) -> list[Score]:
        """Scores of (key, sample) in the order of `jobs`. A sample whose worker hangs or dies gets a failure score."""
        if unknown := {key for key, _ in jobs} - set(self._limits):
            raise RewardError(f"no reward has the key {sorted(unknown)[0]!r}; known: {', '.join(self._limits)}")
        scores: list[Score | None] = [None] * len(jobs)
        todo = deque(range(len(jobs)))
        start_failures = 0
        try:
            while todo or any(w.job is not None for w in self._workers):
                for worker in self._workers:
                    # One that died after its last answer has lost no sample: its successor gets this one.
                    if worker.ready and worker.job is None and todo and not self._give(worker, todo.popleft(), jobs):
                        todo.appendleft(worker.job)
                        worker.job = None
                        self._replace(worker, "", 0)
                busy = [w for w in self._workers if w.job is not None or not w.ready]
                ready: list[Any] = wait([w.connection for w in busy], LOOK_SECONDS)
                for worker in busy:
                    if worker.connection in ready:
                        if not worker.ready:
                            if self._started(worker):
                                start_failures = 0
                                continue
                        elif (score := _receive(worker.connection)) is not None:
                            assert worker.job is not None
                            scores[worker.job] = score
                            worker.job = None
                            continue
                    code = worker.process.poll()
                    late = time.monotonic() > worker.deadline
                    if worker.connection not in ready and code is None and not late:
                        continue
                    if worker.job is not None:
                        scores[worker.job] = self._lost(worker, jobs, late)
                        self._replace(worker, "", 0)
                    else:
                        start_failures += 1
                        self._replace(worker, "before it was ready", start_failures)
        except BaseException:
            # Whatever interrupts (Ctrl-C, a refusal) leaves no worker with an answer that the next batch would take for its own.
            for worker in self._workers:
                if worker.job is not None:
                    worker.end()
                    self._workers[self._workers.index(worker)] = self._new()
            raise
        assert all(score is not None for score in scores)
        return scores  # type: ignore[return-value]

    def _give(self, worker: _Worker, number: int, jobs: Sequence[Job]) -> bool:
        key, sample = jobs[number]
        worker.job = number
        worker.deadline = time.monotonic() + self._limits[key] + KILL_GRACE_SECONDS
        try:
            worker.connection.send_bytes(json.dumps({"key": key, "sample": sample.model_dump(mode="json")}).encode())
        except OSError:
            return False
        return True

    def _lost(self, worker: _Worker, jobs: Sequence[Job], late: bool) -> Score:
        assert worker.job is not None
        limit = self._limits[jobs[worker.job][0]]
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(0 if late else KILL_GRACE_SECONDS)  # its connection closes a moment before it is gone
        code = worker.process.poll()
        if code is None:
            return Score.failure(f"time-out after {limit:g} s: worker hung and was killed")
        if code == -signal.SIGPROF:
            return Score.failure(f"time-out after {limit:g} s: worker hung and was ended by its CPU limit")
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return Score.failure(f"the worker died while it scored this sample ({how})")


def _receive(connection: Connection) -> Score | None:
    """A worker's answer; None where it died instead."""
    try:
        return Score.model_validate_json(connection.recv_bytes())
    except (EOFError, OSError):
        return None
