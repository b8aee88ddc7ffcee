"""Stages and index caches by their commands, and tests' own programs that start ranks, forked from one process that has imported torch and
Megatron: 3 to 4 s of CPU less each.

What the command has to itself as a process (signals, children, environment, output, exit code) a fork has too. That `python -m
training.stage` and `python -m training.index_cache` are commands is seen where launchers start them (tests/test_smoke.py, tests/slurm).
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

_server: StageServer | None = None


def start(
    arguments: list[str], output: Path, environment: dict[str, str] | None = None, program: str = "training.stage:main"
) -> Stage:
    """`program`, MODULE:FUNCTION that takes the arguments and returns the exit code, in the background in a process of its own; what it
    prints is appended to `output`."""
    global _server
    if _server is not None and (code := _server.ended()) is not None:
        warnings.warn(f"the stage server has ended with exit code {code}; another one is started", stacklevel=2)
        _server = None
    if _server is None:
        _server = StageServer()
    return _server.start(program, arguments, output, {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})})


class Stage:
    """What tests use of subprocess.Popen."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = connection.makefile("r")
        self.pid = int(self._lines.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"stage process {self.pid}", timeout or 0.0)
            self.returncode = int(self._lines.readline())
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class StageServer:
    """One for each test process, from its first stage to its end: the server ends when its standard input does."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="stages-")
        self._path = str(Path(self._folder.name) / "socket")
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.training.stage_server", self._path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n", "the stage server did not start"
        atexit.register(self._end)

    def ended(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.poll()

    def _end(self) -> None:
        self._process.communicate()  # closes its standard input

    def start(self, program: str, arguments: list[str], output: Path, environment: dict[str, str]) -> Stage:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._path)
        request = {
            "program": program,
            "arguments": arguments,
            "output": str(output),
            "environment": environment,
            "folder": os.getcwd(),
        }
        connection.sendall((json.dumps(request) + "\n").encode())
        return Stage(connection)


def main(path: str) -> None:
    from training.one_rank import import_megatron_on

    import_megatron_on("cpu")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    os.write(1, b"ready\n")
    attending: set[int] = set()
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        attending -= {pid for pid in attending if os.waitpid(pid, os.WNOHANG)[0]}
        if 0 in ready and not os.read(0, 1):
            return
        if listener in ready:
            connection, _ = listener.accept()
            pid = os.fork()
            if pid == 0:
                listener.close()
                _attend(connection)
            attending.add(pid)
            connection.close()


def _attend(connection: socket.socket) -> None:
    """Fork the stage, tell its process id and, once it has ended, its exit code. Never returns."""
    request = json.loads(connection.makefile("r").readline())
    pid = os.fork()
    if pid == 0:
        connection.close()
        _become_stage(request)
    connection.sendall(f"{pid}\n".encode())
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    connection.sendall(f"{code}\n".encode())
    os._exit(0)


def _become_stage(request: dict[str, Any]) -> None:
    import traceback

    from training import fast_import

    code = 1
    try:
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        module, _, function = request["program"].partition(":")
        sys.argv = [module, *request["arguments"]]
        code = getattr(importlib.import_module(module), function)(request["arguments"])
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else (0 if leave.code is None else 1)
    except BaseException:
        traceback.print_exc()
    finally:
        fast_import.leave(code)


if __name__ == "__main__":
    main(sys.argv[1])
