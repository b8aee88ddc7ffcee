"""Runs a Python program that nobody trusts: bubblewrap with no network, no files of the host, and limits on all that it can use up.

What holds it: own namespaces for users, processes, network, mounts, IPC and host name (bwrap --unshare-all); /usr read-only, a small tmpfs
for everything else, no /etc, no /home, no environment; rlimits on address space, CPU time, processes, file size and open files; a limit
on the memory of all its processes together, on output and on wall-clock time, kept from outside. The kernel is shared with the host: a fault in
the kernel is a way out. Where bubblewrap is absent or may not make namespaces, nothing runs; there is no unsandboxed mode.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from training.rewards.base import RewardError

INSTALL = "install the package 'bubblewrap' (apt-get install bubblewrap), and util-linux for setpriv and prlimit"
NOBODY = 65534
"""User and group that the program runs as when we are root: root's processes are not bound by the limit on their number."""
WATCH_SECONDS = 0.05
"""How often memory and time are looked at; a program can overshoot the memory limit by what it takes in this time."""
PAGE_BYTES = resource.getpagesize()

Status = Literal["exit", "signal", "wall_time", "cpu_time", "output", "memory"]


class Limits(BaseModel):
    """What one program may use."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    wall_seconds: Annotated[float, Field(gt=0, le=600)] = 5.0
    cpu_seconds: Annotated[int, Field(gt=0, le=600)] = 5
    """Per process (RLIMIT_CPU)."""
    memory_bytes: Annotated[int, Field(ge=64 << 20)] = 512 << 20
    """Address space of each process (RLIMIT_AS), and resident memory of all of them together, watched from outside."""
    processes: Annotated[int, Field(ge=4, le=1000)] = 24
    """Processes and threads together, bubblewrap's own two included (RLIMIT_NPROC). Before Linux 5.14 a user namespace does not count for
    itself, and processes of the same user outside count too."""
    file_bytes: Annotated[int, Field(gt=0)] = 1 << 20
    """Largest file (RLIMIT_FSIZE)."""
    disk_bytes: Annotated[int, Field(ge=1 << 16)] = 16 << 20
    """Size of /tmp, and of /dev/shm; both lie in memory."""
    output_bytes: Annotated[int, Field(gt=0)] = 1 << 20
    """Standard output and standard error, each; a program that writes more is killed."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended and what it wrote. `code`: exit status, or the signal's number where `status` is `signal`."""

    status: Status
    code: int
    stdout: bytes
    stderr: bytes
    seconds: float

    @property
    def ok(self) -> bool:
        return self.status == "exit" and self.code == 0


def check() -> str:
    """The interpreter that programs run under; RewardError with the remedy where no sandbox can be made here."""
    return _probe()


@lru_cache(maxsize=1)
def _probe() -> str:
    lacking = [name for name in ("bwrap", "prlimit", *(["setpriv"] if os.geteuid() == 0 else [])) if not shutil.which(name)]
    if lacking:
        raise RewardError(f"model-written code is run in a sandbox only, and {', '.join(lacking)} is not installed; {INSTALL}")
    said = []
    for interpreter in _interpreters():
        outcome = _run(interpreter, "print('in')", (), b"", Limits(wall_seconds=20))
        if outcome.ok and outcome.stdout == b"in\n":
            return interpreter
        said.append(f"{interpreter}: {outcome.status} {outcome.code}: {outcome.stderr.decode(errors='replace').strip()[-300:]}")
    raise RewardError(
        "bubblewrap cannot run a program here: " + "; ".join(said) + ". Unprivileged user namespaces must be allowed "
        "(sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns; in a container: --security-opt seccomp and "
        "apparmor profiles that allow unshare), and a Python must lie where an ordinary user can read it"
    )


def _interpreters() -> list[str]:
    """This Python first, then the system's: this one may lie in a home folder that the program's user cannot read."""
    own = str(Path(getattr(sys, "_base_executable", sys.executable)).resolve())
    return list(dict.fromkeys([own, *(p for p in ("/usr/bin/python3", "/usr/local/bin/python3") if Path(p).exists())]))


def run_python(program: str, *, arguments: Sequence[str] = (), stdin: bytes = b"", limits: Limits | None = None) -> Outcome:
    """Run `program` and wait until it and all that it has started are gone.

    RewardError where there is no sandbox; OSError where the kernel refuses what the sandbox needs.
    """
    return _run(check(), program, arguments, stdin, limits or Limits())


def _command(interpreter: str, program_fd: int, info_fd: int, arguments: Sequence[str], limits: Limits) -> list[str]:
    as_nobody = (
        ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs"] if os.geteuid() == 0 else []
    )
    prefix = Path(interpreter).parent.parent
    own_prefix = [] if prefix.is_relative_to("/usr") else ["--ro-bind", str(prefix), str(prefix)]
    links = []
    for name in ("lib", "lib64", "bin"):
        if Path("/", name).is_symlink():
            links += ["--symlink", f"usr/{name}", f"/{name}"]
        elif Path("/", name).is_dir():
            links += ["--ro-bind", f"/{name}", f"/{name}"]
    # fmt: off
    return [
        *as_nobody,
        "bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL",
        "--info-fd", str(info_fd), "--setenv", "PATH", "/usr/bin", "--setenv", "HOME", "/tmp", "--setenv", "OMP_NUM_THREADS", "1",
        "--setenv", "PYTHONDONTWRITEBYTECODE", "1", "--setenv", "PYTHONIOENCODING", "utf-8",
        "--ro-bind", "/usr", "/usr", *links, *own_prefix,
        "--proc", "/proc", "--dev", "/dev",
        "--size", str(limits.disk_bytes), "--tmpfs", "/tmp", "--size", str(limits.disk_bytes), "--tmpfs", "/dev/shm",
        "--ro-bind-data", str(program_fd), "/program.py", "--chdir", "/tmp",
        # bwrap makes both on a tmpfs without a size.
        "--remount-ro", "/dev", "--remount-ro", "/",
        "prlimit", f"--as={limits.memory_bytes}", f"--cpu={limits.cpu_seconds}", f"--nproc={limits.processes}",
        f"--fsize={limits.file_bytes}", "--nofile=64", "--core=0",
        interpreter, "-I", "/program.py", *arguments,
    ]
    # fmt: on


def _run(interpreter: str, program: str, arguments: Sequence[str], stdin: bytes, limits: Limits) -> Outcome:
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        program_fd = _memory_file("program", program.encode("utf-8", "surrogatepass"))
        stack.callback(os.close, program_fd)
        # A file and not a pipe: a program that does not read its input must not block us.
        stdin_fd = _memory_file("stdin", stdin)
        stack.callback(os.close, stdin_fd)
        info_fd, info_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        stack.callback(os.close, info_fd)
        stack.callback(os.close, info_end)
        _adopt_orphans()
        process = subprocess.Popen(
            _command(interpreter, program_fd, info_end, arguments, limits),
            stdin=stdin_fd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(program_fd, info_end),
            start_new_session=True,
            env={"PATH": os.environ.get("PATH", os.defpath)},
        )
        try:
            stopped, outputs = _watch(process, begun, limits)
        finally:
            _end(process, info_fd)
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            process.stderr.close()
    seconds = time.monotonic() - begun
    code = process.returncode
    if stopped is not None:
        return Outcome(stopped, code, *outputs, seconds)
    # bwrap passes a signal on as 128 + its number; SIGKILL and SIGXCPU are what RLIMIT_CPU sends.
    if code in (128 + signal.SIGKILL, 128 + signal.SIGXCPU):
        return Outcome("cpu_time", code - 128, *outputs, seconds)
    if code < 0 or code > 128:
        return Outcome("signal", -code if code < 0 else code - 128, *outputs, seconds)
    return Outcome("exit", code, *outputs, seconds)


def _memory_file(name: str, content: bytes) -> int:
    fd = os.memfd_create(name)
    with os.fdopen(os.dup(fd), "wb") as f:
        f.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    if os.geteuid() == 0:
        os.fchmod(fd, 0o444)
    return fd


def _watch(process: subprocess.Popen[bytes], begun: float, limits: Limits) -> tuple[Status | None, tuple[bytes, bytes]]:
    """Read both outputs up to their limit until the program has ended; the reason to kill it, or None."""
    assert process.stdout is not None
    assert process.stderr is not None
    kept = {process.stdout: bytearray(), process.stderr: bytearray()}
    stopped: Status | None = None
    next_look = begun
    with selectors.DefaultSelector() as selector:
        for stream in kept:
            os.set_blocking(stream.fileno(), False)
            selector.register(stream, selectors.EVENT_READ)
        while stopped is None and (selector.get_map() or process.poll() is None):
            now = time.monotonic()
            if now - begun > limits.wall_seconds:
                stopped = "wall_time"
            elif now >= next_look:
                next_look = now + WATCH_SECONDS
                if resident_bytes(process.pid) > limits.memory_bytes:
                    stopped = "memory"
            if not selector.get_map():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(WATCH_SECONDS)
            for key, _ in selector.select(WATCH_SECONDS) if selector.get_map() else ():
                stream = key.fileobj
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(stream)
                    continue
                room = limits.output_bytes - len(kept[stream])  # type: ignore[index]
                kept[stream] += chunk[:room]  # type: ignore[index]
                if len(chunk) > room:
                    stopped = "output"
    return stopped, (bytes(kept[process.stdout]), bytes(kept[process.stderr]))


def _end(process: subprocess.Popen[bytes], info_fd: int) -> None:
    """End the whole of it and wait until it is gone.

    The first process of the process namespace is killed before the bwrap that watches it, and waited for: the kernel lets that wait end
    only when every process of the namespace has ended, whatever sessions and orphans the program has made.
    """
    first = _first_process(info_fd)
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            if first is not None:
                os.kill(first, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(WATCH_SECONDS if first is None else 1.0)
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    # bwrap leaves as soon as the program has; its namespace's first process then dies (--die-with-parent) and is ours to reap.
    first = first or _first_process(info_fd)
    if first is not None:
        with contextlib.suppress(ChildProcessError):  # bwrap has reaped it itself
            os.waitpid(first, 0)


def _first_process(info_fd: int) -> int | None:
    """Number, out here, of the first process in the namespace, as bwrap has told it; None before it has."""
    try:
        said = os.read(info_fd, 4096)
        return int(json.loads(said)["child-pid"]) if said else None
    except (BlockingIOError, ValueError):
        return None


@lru_cache(maxsize=1)
def _adopt_orphans() -> None:
    """Make this process the parent of its descendants' orphans (PR_SET_CHILD_SUBREAPER), so that it can wait for them.

    In a container the first process often reaps nothing, and a million rollouts would leave a million zombies.
    """
    pr_set_child_subreaper = 36
    if ctypes.CDLL(None, use_errno=True).prctl(pr_set_child_subreaper, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and all below it, shared pages counted once per process; what vanishes meanwhile counts 0."""
    total = 0
    todo = [pid]
    while todo:
        one = todo.pop()
        try:
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1]) * PAGE_BYTES
            for task in os.listdir(f"/proc/{one}/task"):
                todo += [int(child) for child in Path(f"/proc/{one}/task/{task}/children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total
