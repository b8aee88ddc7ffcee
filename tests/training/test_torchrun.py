"""Ranks under the real torchrun: the most specific of their ends becomes the exit code, and a request to stop leaves them time."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from tests.training.factory import make_recipe
from training import rank_end
from training.exit_codes import DISK_FULL, REFUSED, SUSPICIOUS
from training.rank_end import RankEnd
from training.stage import LAST_SECONDS, free_port, grace_seconds
from training.torchrun import ended

RANK = """
import os, signal, sys, time
from pathlib import Path
from training.rank_end import Ended, recorded
from training.exit_codes import SuspiciousResult
rank, stage_dir = int(os.environ["RANK"]), Path({stage_dir!r})
def wait_for(name):
    while not (stage_dir / name).exists():
        time.sleep(0.01)
def main():
{body}
sys.exit(recorded(stage_dir, main))
"""


def start(tmp_path, body, *, world=2, grace=None, **environment):
    """`stage.torchrun` of two ranks with `body` as each one's main, in a process of its own."""
    program = tmp_path / "rank.py"
    program.write_text(RANK.format(stage_dir=str(tmp_path), body=textwrap.indent(textwrap.dedent(body), "    ")))
    call = f"torchrun({world}, 'gpus', [{str(program)!r}], stage_dir=Path({str(tmp_path)!r}), grace_seconds={grace})"
    code = f"import sys; from pathlib import Path; from training.stage import torchrun; sys.exit({call})"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_broken_connection_does_not_hide_what_broke_it(tmp_path):
    """Rank 0 ends first, with 1; rank 1 has found a NaN, and says so only while it is already being ended."""
    body = """
        if rank == 0:
            wait_for("ready")
            raise ConnectionError("connection closed by peer")
        def found(*_):
            raise SuspiciousResult("training loss is nan at step 5")
        signal.signal(signal.SIGTERM, found)
        (stage_dir / "ready").touch()
        time.sleep(60)
        """
    process = start(tmp_path, body)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == SUSPICIOUS, output
    assert "rank 1 ended with exit code 17 (SuspiciousResult: training loss is nan at step 5)" in output
    left = json.loads((tmp_path / "ranks" / "rank-0.end.json").read_text())
    assert (left["exit_code"], left["reason"]) == (1, "ConnectionError: connection closed by peer")


def test_ranks_that_save_for_longer_than_a_moment_end_cleanly(tmp_path):
    """As Megatron does: a handler notes the request, the step and the save come after it, then the rank leaves with 0."""
    body = """
        stop = []
        signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
        (stage_dir / f"ready-{rank}").touch()
        while not stop:
            time.sleep(0.01)
        time.sleep(1 + rank)
        (stage_dir / f"saved-{rank}").touch()
        return 0
        """
    process = start(tmp_path, body, grace=60)
    wait_for(tmp_path, process, "ready-0", "ready-1")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()


def test_a_rank_that_does_not_leave_is_killed_after_the_grace(tmp_path):
    body = """
        signal.signal(signal.SIGTERM, signal.SIG_IGN if rank else lambda *_: sys.exit(0))
        (stage_dir / f"ready-{rank}").touch()
        time.sleep(60)
        """
    process = start(tmp_path, body, grace=0.5)
    wait_for(tmp_path, process, "ready-0", "ready-1")
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL, output
    assert "did not end within 0.5 s" in output
    assert time.monotonic() - began < 25  # torch's own 30 s have no part in it


def test_the_first_node_knows_why_a_rank_of_another_node_ended(tmp_path):
    """Two nodes on this machine, one rank each; the second refuses, and the first sees only a closed connection."""
    body = """
        if rank == 1:
            raise Ended(78, "the held-out loss is not the one that was handed off")
        wait_for("ranks/rank-1.end.json")
        return 1
        """
    port = str(free_port())
    nodes = [
        start(tmp_path, body, NNODES="2", NODE_RANK=str(node), MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for node in (0, 1)
    ]
    output = nodes[0].communicate(timeout=90)[0]
    nodes[1].communicate(timeout=90)
    assert nodes[0].returncode == REFUSED, output
    assert "rank 1 ended with exit code 78 (the held-out loss is not the one that was handed off)" in output


def wait_for(tmp_path, process, *names):
    deadline = time.monotonic() + 60
    while not all((tmp_path / name).exists() for name in names):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([1, 74, 1], 74),
        ([1, -15, 78, 74], 78),
        ([-9, 1, -15], 137),  # killed from outside, the others lost their connection
        ([-6, 1, -6], 1),  # NCCL's watchdog aborts the ranks that wait for the one that failed
        ([-15, -15], 143),
        ([16, -9, 78], 16),
        ([3, 1], 3),  # equals: the first
    ],
)
def test_the_most_specific_end_is_the_cause(tmp_path, codes, expected):
    for rank, code in enumerate(codes):
        RankEnd(rank=rank, exit_code=code, reason="r", time=float(rank), host="n").write(tmp_path / rank_end.FOLDER)
    assert ended(tmp_path, {len(codes) - 1: codes[-1]}, several_nodes=False) == expected


def test_a_full_disk_needs_no_file_to_be_told(tmp_path):
    (tmp_path / rank_end.FOLDER).write_text("a file where the folder should be")
    assert ended(tmp_path, {0: 1, 3: DISK_FULL, 5: -15}, several_nodes=False) == DISK_FULL


def test_a_new_attempt_does_not_see_how_the_last_one_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert rank_end.recorded(tmp_path, lambda: 78) == 78
    assert [end.exit_code for end in rank_end.read_all(tmp_path)] == [78]
    assert rank_end.recorded(tmp_path, lambda: 0) == 0
    assert rank_end.read_all(tmp_path) == []


def test_the_grace_is_the_recipes(tmp_path):
    recipe = make_recipe(tmp_path, {"gpus": 1}, "single")
    assert grace_seconds(recipe) is None
    options = {"signal_seconds_before_limit": 900}
    slurm = recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update={"kind": "slurm", "options": options})})
    assert grace_seconds(slurm) == 900 - LAST_SECONDS
