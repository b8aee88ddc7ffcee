"""Worker processes: order, time limits, crashes, restarts, refusals at the start."""

import os
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.training.rewards.helpers import quick
from training.rewards import RewardError, Sample, Score
from training.rewards.pool import WorkerPool

BEHAVE = "tests.training.rewards.broken:Behave"


def jobs(*completions):
    return [("brief" if c in ("sleep", "hang") else "one", Sample(completion=c)) for c in completions]


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(
        {"one": (BEHAVE, {}), "brief": (BEHAVE, {"time_limit_seconds": 0.4})}, workers=2, memory_bytes=2 << 30
    ) as pool:
        yield pool


@quick
@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), max_size=12), st.randoms(use_true_random=False))
def test_a_batch_keeps_its_order_and_scores_do_not_depend_on_it(pool, values, random):
    order = list(range(len(values)))
    random.shuffle(order)
    straight = pool.score(jobs(*(f"value {v}" for v in values)))
    shuffled = pool.score(jobs(*(f"value {values[i]}" for i in order)))
    assert [s.value for s in straight] == values
    assert [shuffled[order.index(i)] for i in range(len(values))] == straight


def test_slow_and_quick_samples_come_back_in_order(pool):
    scores = pool.score(jobs("slow 0.2", "value 0.25", "slow 0.1", "value 0.5", "print"))
    assert [s.value for s in scores] == [1.0, 0.25, 1.0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("order", "reason", "restarts"),
    [
        ("crash spoon", "KeyError: 'spoon' (broken.py:", 0),
        ("sleep", "time-out after 0.4 s", 0),
        ("hang", "worker hung and was killed", 1),
        ("exit", "died while it scored this sample (exit code 3)", 1),
        ("kill", "died while it scored this sample (signal SIGSEGV)", 1),
        ("memory", "out of memory", 0),
        ("nothing", "returned NoneType, not a Score", 0),
        ("value 7", "less than or equal to 1", 0),
        ("value nan", "ValidationError", 0),
    ],
)
def test_what_goes_wrong_is_one_failed_score(pool, order, reason, restarts):
    before = pool.restarts
    scores = pool.score(jobs("value 0.25", order, "value 1"))
    assert [s.value for s in scores] == [0.25, 0.0, 1.0]
    assert [s.failed for s in scores] == [False, True, False]
    assert reason in scores[1].reason
    assert pool.restarts == before + restarts


def test_a_worker_that_died_between_two_batches_costs_no_sample(pool):
    before = pool.restarts
    for worker in pool._workers:
        worker.process.kill()
        worker.process.wait()
    assert [s.value for s in pool.score(jobs("value 0.25", "value 0.5", "value 1"))] == [0.25, 0.5, 1.0]
    assert pool.restarts == before + 2


def test_unknown_key_is_refused(pool):
    with pytest.raises(RewardError, match="no reward has the key 'two'; known: one, brief"):
        pool.score([("two", Sample(completion=""))])


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ({"a": (BEHAVE, {"refuse": True})}, "lacks a spoon; bring one"),
        ({"a": ("maths", {})}, "no reward is called 'maths'; did you mean math"),
        ({"a": ("math", {"answer_inn": "tag"})}, "answer_inn: no such option; did you mean answer_in"),
        ({"a": ("math", {"time_limit_seconds": -1})}, "time_limit_seconds: Input should be greater than 0, found -1"),
        ({"a": ("os:path", {})}, "has no class path that derives from"),
        ({"a": ("no.such.module:Thing", {})}, "module no cannot be imported"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(rewards, message):
    with pytest.raises(RewardError, match="^[^\n]*" + message.replace("(", r"\(")):
        WorkerPool(rewards, workers=1)


def test_a_worker_that_never_gets_ready_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RewardError, match=r"ended before it was ready, 3 times in a row \(exit code"):
        WorkerPool({"a": (BEHAVE, {})}, workers=1)


def test_workers_vanish_with_their_parent():
    code = (
        "import os\nfrom training.rewards.pool import WorkerPool\n"
        f"pool = WorkerPool({{'a': ({BEHAVE!r}, {{}})}}, workers=1)\n"
        "print(pool._workers[0].process.pid, flush=True)\nos._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    pid = int(done.stdout)
    end = time.monotonic() + 10
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert not alive(pid)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_failure_score_is_zero_and_short():
    score = Score.failure("x" * 10_000)
    assert score.value == 0
    assert score.failed
    assert len(score.reason) <= 500
    assert os.linesep not in score.reason
