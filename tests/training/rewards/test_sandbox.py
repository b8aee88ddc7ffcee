"""The sandbox: what a hostile program tries, is stopped, and leaves nothing behind."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from tests.training.rewards.helpers import need_bubblewrap
from training.rewards import RewardError, Sample, sandbox
from training.rewards.code_execution import CodeExecution, CodeOptions
from training.rewards.sandbox import Limits, run_python


@pytest.fixture(scope="module", autouse=True)
def _bubblewrap():
    need_bubblewrap()


@pytest.fixture(autouse=True)
def _nothing_left():
    """No process that a test has started outlives it, not even as a zombie."""
    before = below()
    yield
    assert below() <= before


def below(pid=None):
    """Processes that descend from `pid`, this one if None."""
    found, todo = set(), [pid or os.getpid()]
    while todo:
        one = todo.pop()
        try:
            for task in os.listdir(f"/proc/{one}/task"):
                children = {int(c) for c in Path(f"/proc/{one}/task/{task}/children").read_text().split()}
                found |= children
                todo += children
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


SHORT = Limits(wall_seconds=0.4)


def test_runs_a_program_with_input_and_arguments():
    outcome = run_python("import sys\nprint(input()[::-1], sys.argv[1:])\nsys.exit(3)", arguments=["a b"], stdin=b"abc\n")
    assert (outcome.status, outcome.code, outcome.stdout) == ("exit", 3, b"cba ['a b']\n")


def test_endless_loop_and_sleep_end():
    for program in (
        "while True: pass",
        "import time; time.sleep(60)",
        "import signal, time\nfor s in range(1, 32):\n  try: signal.signal(s, signal.SIG_IGN)\n  except OSError: pass\ntime.sleep(60)",
    ):
        begun = time.monotonic()
        assert run_python(program, limits=SHORT).status == "wall_time"
        assert time.monotonic() - begun < 5


def test_cpu_limit_ends_a_loop_before_the_wall_clock():
    outcome = run_python("while True: pass", limits=Limits(wall_seconds=20, cpu_seconds=1))
    assert outcome.status == "cpu_time"


def test_fork_bomb_is_held_and_gone():
    # All fork for ever; the first one says how far it got, and then asks to be stopped by flooding its output.
    program = """
import os
first, children = os.getpid(), 0
while True:
    try: children += os.fork() > 0
    except OSError:
        if os.getpid() == first: os.write(1, b"%d\\n" % children * 1000)
"""
    outcome = run_python(program, limits=Limits(wall_seconds=20, cpu_seconds=20, output_bytes=1 << 16))
    assert outcome.status == "output"
    assert 0 < int(outcome.stdout.split(b"\n")[0]) < 24


def test_threads_count_as_processes():
    program = """
import threading, time
n = 0
try:
    while True:
        threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
        n += 1
except RuntimeError: print(n)
"""
    assert int(run_python(program).stdout) < 24


def test_memory_hog_alone_and_in_company():
    assert b"MemoryError" in run_python("x = bytearray(1 << 30)").stderr
    many = (
        "import os, time\nfor _ in range(4):\n  if os.fork() == 0:\n    x = bytearray(50 << 20); time.sleep(30)\ntime.sleep(30)"
    )
    outcome = run_python(many, limits=Limits(memory_bytes=96 << 20, wall_seconds=20))
    assert outcome.status == "memory"


def test_files_outside_cannot_be_written_or_read(tmp_path):
    tmp_path.chmod(0o777)
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    secret.chmod(0o666)
    program = f"""
import os
for path in ({str(secret)!r}, "/etc/passwd", "/etc/shadow", "/home", "/proc/1/root/etc/passwd", "/sys/kernel"):
    try: print(path, len(os.listdir(path)) if os.path.isdir(path) else open(path).read())
    except OSError: pass
for path in ({str(secret)!r}, "/usr/x", "/x", "/etc/x", "/program.py", "/dev/x", "/bin/x", "/var/x"):
    try: open(path, "w").write("x"); print("wrote", path)
    except OSError: pass
open("/tmp/x", "w").write("x")
print("end")
"""
    outcome = run_python(program)
    assert outcome.stdout.decode().split() == ["end"], outcome
    assert secret.read_text() == "s3cret"
    assert not Path("/tmp/x").exists()


def test_disk_and_file_size_are_limited():
    program = """
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for name, count in (("one", 3), ("many", 40)):
    try:
        for i in range(count):
            f = open(f"/tmp/{name}{i if name == 'many' else ''}", "ab")
            f.write(b"x" * 900_000); f.close()
    except OSError as e: print(name, e.errno)
"""
    assert run_python(program).stdout.split(b"\n")[:2] == [b"one 27", b"many 28"]


def test_no_network_not_even_to_a_listener_on_this_machine():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        reached = []

        def listen():
            try:
                server.accept()
                reached.append(True)
            except TimeoutError:
                pass

        thread = threading.Thread(target=listen)
        thread.start()
        port = server.getsockname()[1]
        program = f"""
import socket
for family, address in ((socket.AF_INET, ("127.0.0.1", {port})), (socket.AF_INET, ("192.0.2.1", 80))):
    try:
        s = socket.socket(family); s.settimeout(0.3); s.connect(address); print("connected")
    except OSError as e: print(type(e).__name__)
"""
        outcome = run_python(program)
        thread.join()
    assert b"connected" not in outcome.stdout
    assert b"ConnectionRefusedError" in outcome.stdout
    assert not reached


def test_huge_output_is_cut_and_stopped():
    for stream in (1, 2):
        outcome = run_python(f"import os\nwhile True: os.write({stream}, b'x' * 65536)", limits=Limits(output_bytes=100_000))
        assert outcome.status == "output"
        assert len((outcome.stdout, outcome.stderr)[stream - 1]) == 100_000


def test_daemons_and_zombies_go_with_the_program():
    program = """
import os, time
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.close(1); os.close(2); time.sleep(300)
        os._exit(0)  # nobody waits for it: a zombie
print("parent leaves")
"""
    outcome = run_python(program)  # _nothing_left looks afterwards
    assert (outcome.status, outcome.stdout) == ("exit", b"parent leaves\n")


def test_nothing_of_the_host_is_seen(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "s3cret")
    program = """
import os
print(dict(os.environ), os.getuid(), sorted(p for p in os.listdir("/proc") if p.isdigit()), os.listdir("/proc/self/fd"))
"""
    said = run_python(program).stdout.decode()
    assert "s3cret" not in said
    assert "['1', '2']" in said
    assert "['0', '1', '2', '3']" in said  # 3 is listdir's own
    if os.geteuid() == 0:
        assert f" {sandbox.NOBODY} " in said


def test_nothing_stays_when_its_worker_is_killed():
    program = "import os, time\nfor _ in range(3): os.fork()\nprint(flush=True)\ntime.sleep(300)"
    code = (
        "import os, sys, threading, time\nfrom training.rewards import sandbox\n"
        "limits = sandbox.Limits(wall_seconds=60)\n"
        f"threading.Thread(target=sandbox.run_python, args=({program!r},), kwargs={{'limits': limits}}, daemon=True).start()\n"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as worker:
        inside = set()
        while len(inside) < 10:  # setpriv's bwrap, the namespace's first process, eight of the program
            assert worker.poll() is None
            time.sleep(0.02)
            inside = below(worker.pid)
        worker.kill()
    end = time.monotonic() + 20
    while any(alive(pid) for pid in inside) and time.monotonic() < end:
        time.sleep(0.02)
    assert not [pid for pid in inside if alive(pid)]
    for pid in inside:  # this process adopts orphans since its first sandbox
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_without_bubblewrap_nothing_runs(monkeypatch):
    sandbox._probe.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "bwrap" else f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("ran something"))
    reward = CodeExecution(CodeOptions())
    with pytest.raises(RewardError, match="bwrap is not installed; install the package 'bubblewrap'"):
        reward.prepare()
    with pytest.raises(RewardError, match="bwrap is not installed"):
        reward.score(Sample(completion="```python\nprint(1)\n```", reference=[{"kind": "stdin", "stdin": "", "stdout": "1"}]))
    sandbox._probe.cache_clear()


def test_a_sandbox_that_cannot_be_made_is_refused_with_what_bubblewrap_says(monkeypatch):
    # Not tmp_path: setpriv runs it as a user who may not enter pytest's folders.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        fake = Path(folder, "bwrap")
        fake.write_text("#!/bin/sh\necho 'No permissions to create new namespace' >&2\nexit 1\n")
        fake.chmod(0o755)
        sandbox._probe.cache_clear()
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        with pytest.raises(RewardError, match="No permissions to create new namespace.*user.max_user_namespaces"):
            sandbox.check()
    sandbox._probe.cache_clear()
