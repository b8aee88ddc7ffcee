"""The ranks of a stage: how they end decides the exit code, and none survives another's death."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest


def run(body, *, ranks=2, send=None):
    """Run `run_forked` in a process of its own with `body` as each rank's main; returns (exit code, output)."""
    program = textwrap.dedent(
        """
        import os, signal, sys, time
        import training.stage
        from training.stage import run_forked
        training.stage.GRACE_SECONDS = 1.0
        def main():
            rank = int(os.environ["RANK"])
        {body}
        sys.exit(run_forked({ranks}, main))
        """
    ).format(body=textwrap.indent(textwrap.dedent(body), "    "), ranks=ranks)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if send is not None:
        assert process.stdout.readline().strip() == "ready"
        process.send_signal(send)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def test_ranks_have_torchruns_environment():
    body = """
        line = " ".join([str(rank), os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]]) + chr(10)
        os.write(1, line.encode())  # one call: lines of several ranks do not mix
        return 0
        """
    code, output = run(body, ranks=3)
    assert code == 0
    assert sorted(output.split("\n"))[1:] == ["0 3 0", "1 3 1", "2 3 2"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [("return 16 if rank == 1 else 0", 16), ("sys.exit(75)", 75), ("raise ValueError('x')", 1), ("sys.exit('text')", 1)],
)
def test_exit_code_is_the_first_failures(body, expected):
    code, _ = run(body)
    assert code == expected


def test_when_a_rank_is_killed_the_others_end_too():
    began = time.monotonic()
    code, output = run("os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(60)")
    assert code == 128 + signal.SIGKILL
    assert "rank 1 ended with signal SIGKILL" in output
    assert time.monotonic() - began < 30


def test_the_rank_that_was_killed_is_the_cause_even_when_another_ends_first(tmp_path):
    """A broken connection ends a rank within milliseconds; the killed one, with all its memory, may take longer to be gone."""
    body = f"""
        ready = {str(tmp_path / "ready")!r}
        if rank == 0:
            while not os.path.exists(ready):  # before rank 1 has its handler, SIGTERM would end it as SIGTERM does
                time.sleep(0.01)
            return 1
        signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        open(ready, "w").close()
        time.sleep(60)
        """
    code, output = run(body)
    assert code == 128 + signal.SIGKILL
    assert output.index("rank 0 ended with exit code 1") < output.index("rank 1 ended with signal SIGKILL")


def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace():
    body = "signal.signal(signal.SIGTERM, signal.SIG_IGN) if rank == 0 else sys.exit(3)\ntime.sleep(60)"
    began = time.monotonic()
    code, _ = run(body)
    assert code == 3
    assert time.monotonic() - began < 30


def test_sigterm_reaches_every_rank_and_a_clean_end_is_a_clean_exit():
    body = """
        stop = []
        signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
        if rank == 0:
            time.sleep(0.5)
            print("ready", flush=True)
        while not stop:
            time.sleep(0.01)
        return 0
        """
    code, _ = run(body, send=signal.SIGTERM)
    assert code == 0


def test_an_unknown_run_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "training.stage", "--run-dir", str(tmp_path), "--stage", "foundation"],
        capture_output=True,
        text=True,
        env={**os.environ},
    )
    assert done.returncode == 78
    assert "no resolved recipe" in done.stderr


def test_a_full_disk_has_its_own_exit_code_and_names_the_disk(tmp_path):
    """/dev/full gives the kernel's own error; Megatron's writers pass it on wrapped, so the rank wraps it twice."""
    body = f"""
        import pathlib, training.pretrain as pretrain
        def save(*arguments):
            try:
                with open("/dev/full", "w") as f:
                    f.write("x" * 100_000)
            except OSError as error:
                raise RuntimeError("worker failed") from RuntimeError(str(error))
        pretrain._run_rank = save
        return pretrain.run_rank(None, "a", pathlib.Path({str(tmp_path)!r}), None, "")
        """
    code, output = run(body)
    assert code == 74
    assert f"disk full: no space or quota is left under {tmp_path / 'stages' / 'a' / 'checkpoints'} (file system " in output
    assert "keep_checkpoints" in output


def test_stacks_and_output_of_every_rank_are_in_its_own_files(tmp_path):
    body = f"""
        import pathlib
        from training import stacks
        def blocked_here():
            os.kill(os.getpid(), signal.SIGUSR2)
        stacks.separate_rank(pathlib.Path({str(tmp_path)!r}), rank)
        print("this is rank " + str(rank) + chr(10), end="")  # one write: lines of several ranks do not mix
        blocked_here()
        return 0
        """
    code, output = run(body)
    assert code == 0
    for rank in (0, 1):
        assert f"this is rank {rank}" in output
        assert (tmp_path / "ranks" / f"rank-{rank}.txt").read_text().splitlines()[1:] == [f"this is rank {rank}"]
        written = (tmp_path / "ranks" / f"rank-{rank}.stacks.txt").read_text()
        assert written.startswith(f"rank {rank}, process ")
        assert "in blocked_here" in written
