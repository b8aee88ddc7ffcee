"""Pace, back-off and patience on a clock of the test's; addresses, keys and Retry-After; agreement against a direct computation."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import json
import random
import sqlite3

import pytest

from data_prep.errors import DataError
from data_prep.judge.agreement import agreement, read_labels
from data_prep.judge.asking import Asking, Limits, Question
from data_prep.judge.cache import Cache
from data_prep.judge.client import Failed, Reply, endpoint, retry_after
from data_prep.judge.config import VERDICTS, load_rubric
from data_prep.judge.estimate import duration
from data_prep.judge.verdict import parse_answer
from tests.data_prep.judge.stub import answer

GENERAL = load_rubric("general")


class Clock:
    """Time that passes only while everybody sleeps."""

    def __init__(self):
        self.now = 1000.0
        self._sleepers = []
        self._tie = itertools.count()

    def __call__(self):
        return self.now

    async def sleep(self, seconds):
        assert seconds >= 0
        woken = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.now + seconds, next(self._tie), woken))
        await woken

    async def run(self, work):
        task = asyncio.ensure_future(work)
        while not task.done():
            for _ in range(20):
                await asyncio.sleep(0)
            if self._sleepers and not task.done():
                self.now, _, woken = heapq.heappop(self._sleepers)
                woken.set_result(None)
        return task.result()


class Told:
    def __init__(self):
        self.judgements, self.failures, self.left = {}, [], []

    def judged(self, question, reply, attempts):
        self.judgements[question.key] = attempts

    def failed(self, question, failure):
        self.failures.append((question.key, failure.kind))

    def unjudged(self, question):
        self.left.append(question.key)


class Scripted:
    """Answers after a second; `script(key, attempt)` gives a Failed or None. The message's content is the key."""

    def __init__(self, clock, script=lambda key, attempt: None, seconds=1.0, tokens=100):
        self.clock, self.script, self.seconds, self.tokens = clock, script, seconds, tokens
        self.times, self.attempts = [], {}
        self.in_flight = self.peak = 0

    async def ask(self, messages, rubric):
        key = messages[0]["content"]
        self.attempts[key] = self.attempts.get(key, 0) + 1
        self.times.append(self.clock.now)
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        await self.clock.sleep(self.seconds)
        self.in_flight -= 1
        if failure := self.script(key, self.attempts[key]):
            raise failure
        content = '{"reason": "", "scores": {}, "flags": {}, "verdict": "accept"}'
        return Reply(None, content, "m", self.tokens // 2, self.tokens - self.tokens // 2, self.seconds)


def go(limits, count=20, script=lambda key, attempt: None, tokens=100, jitter=lambda: 1.0, reserved=100):
    clock = Clock()
    client, told = Scripted(clock, script, tokens=tokens), Told()
    asking = Asking(client, limits, told, clock=clock, sleep=clock.sleep, jitter=jitter)
    questions = [Question(str(i), [{"role": "user", "content": str(i)}], GENERAL, reserved, 10) for i in range(count)]
    asyncio.run(clock.run(asking.run(iter([None, *questions, None]))))
    return client, told, asking


def busiest_minute(times):
    return max(sum(start <= t < start + 60 for t in times) for start in times)


def test_concurrency_is_used_and_kept():
    client, told, _ = go(Limits(concurrency=7), 50)
    assert client.peak == 7
    assert len(told.judgements) == 50


def test_requests_per_minute_hold_in_every_minute():
    client, told, _ = go(Limits(concurrency=30, requests_per_minute=60), 150)
    assert busiest_minute(client.times) <= 61
    assert client.times[-1] - client.times[0] == pytest.approx(149)  # and are used up
    assert len(told.judgements) == 150


def test_tokens_per_minute_are_reserved_and_corrected_by_what_was_counted():
    times = go(Limits(concurrency=1, tokens_per_minute=6000), 20)[0].times
    assert times[-1] - times[0] == pytest.approx(19)  # a second for each 100 tokens, whatever the answer takes
    times = go(Limits(concurrency=1, tokens_per_minute=6000), 20, tokens=300)[0].times
    assert times[-1] - times[0] == pytest.approx(3 * 19, rel=0.1)


def test_backoff_doubles_with_full_jitter_and_ends_with_the_attempts():
    client, told, _ = go(Limits(concurrency=1, attempts=4, backoff_seconds=2), 1, lambda *_: Failed("HTTP 500", ""))
    assert [b - a for a, b in itertools.pairwise(client.times)] == [3, 5, 9]  # an answer's second, and 2, 4, 8
    assert (told.left, told.judgements) == (["0"], {})
    rng = random.Random(1)
    times = go(Limits(concurrency=1, attempts=9, backoff_seconds=2), 1, lambda *_: Failed("x", ""), jitter=rng.random)[0].times
    waits = [b - a - 1 for a, b in itertools.pairwise(times)]
    assert all(0 <= wait <= min(60, 2 * 2**i) for i, wait in enumerate(waits))
    assert len(set(waits)) == len(waits)


def test_retry_after_holds_up_everybody():
    def script(key, attempt):
        return Failed("HTTP 429", "", wait_seconds=30) if (key, attempt) == ("0", 1) else None

    client, told, _ = go(Limits(concurrency=2), 10, script, jitter=lambda: 0.0)
    begun = client.times[0]
    assert client.times[:2] == [begun, begun]
    assert [t - begun for t in client.times[2:4]] == [31, 31]
    assert len(told.judgements) == 10
    assert told.judgements["0"] == 2


def test_a_fatal_refusal_stops_unless_something_was_judged_before():
    with pytest.raises(DataError, match="refuses every request"):
        go(Limits(concurrency=2), 10, lambda *_: Failed("HTTP 401", "", fatal=True))
    _, told, asking = go(
        Limits(concurrency=1, attempts=2), 10, lambda key, _: Failed("HTTP 404", "", fatal=True) if key == "5" else None
    )
    assert told.left == ["5"]
    assert asking.given_up is None
    assert len(told.judgements) == 9


def test_patience_needs_failures_and_time():
    limits = Limits(concurrency=4, attempts=3, backoff_seconds=1, patience_failures=10, patience_seconds=10)
    client, told, asking = go(limits, 100, lambda *_: Failed("connection", ""))
    assert asking.given_up is not None
    assert 10 <= len(told.failures) <= 30
    assert client.times[-1] - client.times[0] >= 9
    # One judgement in between begins the count anew.
    _, told, asking = go(limits, 60, lambda key, _: None if int(key) % 3 == 0 else Failed("connection", ""))
    assert asking.given_up is None
    assert len(told.judgements) == 20


@pytest.mark.parametrize("name", ["concurrency", "attempts", "requests_per_minute", "timeout_seconds"])
def test_limits_that_cannot_work_are_refused(name):
    for value in (0, -1):
        with pytest.raises(DataError, match=name.replace("_", "-")):
            Limits(**{name: value}).check()


@pytest.mark.parametrize(
    "url",
    ["host:8000/v1", "ftp://h/v1", "http:///v1", "http://h/v1?key=1", "http://h/v1#x", "http://h:99999/v1", "http://h /v1",
     "http://h/v1/chat/completions", "file:///etc/passwd", "http://user:secretword@h/v1"],
)  # fmt: skip
def test_addresses_are_checked(url):
    with pytest.raises(DataError, match="--endpoint") as caught:
        endpoint(url, "m", "NO_SUCH_VARIABLE")
    assert "secretword" not in str(caught.value)


def test_the_key_comes_from_the_environment_and_is_never_shown(monkeypatch):
    monkeypatch.setenv("THE_KEY", "sk-secret")
    found = endpoint("https://host/v1/", "m", "THE_KEY")
    assert (found.key, found.url) == ("sk-secret", "https://host/v1")
    assert "sk-secret" not in repr(found)
    monkeypatch.setenv("THE_KEY", "sk-secret\nX-Other: 1")
    with pytest.raises(DataError, match="THE_KEY") as caught:
        endpoint("https://host/v1", "m", "THE_KEY")
    assert "sk-secret" not in str(caught.value)


def test_retry_after_is_seconds_or_a_date():
    assert retry_after("12") == 12
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT", now_seconds=1445412450) == 30
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT", now_seconds=1445412490) == 0
    assert retry_after(None) is retry_after("soon") is retry_after("-3") is retry_after("") is None


def test_cache_refuses_what_is_damaged(tmp_path):
    path = tmp_path / "cache.sqlite"
    good = parse_answer(json.dumps(answer()), GENERAL)
    with Cache(path) as cache:
        cache.store("k", "g", Reply(good, '{"reason": "', "m", 1, 1, 1.0), 1)
        assert cache.holds("k")
        with pytest.raises(DataError, match="row k is damaged"):
            cache.get("k", GENERAL)
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 7")
    with pytest.raises(DataError, match="format 7"):
        Cache(path)
    path.write_bytes(b"no database at all, but long enough to be looked at" * 100)
    for more in ("-wal", "-shm"):
        (tmp_path / f"cache.sqlite{more}").unlink(missing_ok=True)
    with pytest.raises(DataError, match="move the file away"):
        Cache(path)


def test_durations():
    assert [duration(s) for s in (8, 200, 5 * 3600 + 7 * 60, 51 * 3600)] == ["8 s", "3:20 min", "5:07 h", "2 d 3 h"]


# --- agreement -------------------------------------------------------------------------------------------------------------------


def direct(pairs):
    """Kappa and linearly weighted kappa from the definition over pairs of raters' marginal probabilities."""
    n = len(pairs)
    place = {v: i for i, v in enumerate(VERDICTS)}
    observed = sum(a == b for a, b in pairs) / n
    chance = sum(a == b for a, _ in pairs for _, b in pairs) / n**2  # every label against every verdict
    gap = sum(abs(place[a] - place[b]) for a, b in pairs) / n
    gap_by_chance = sum(abs(place[a] - place[b]) for a, _ in pairs for _, b in pairs) / n**2
    return observed, (observed - chance) / (1 - chance), 1 - gap / gap_by_chance


@pytest.mark.parametrize("seed", range(5))
def test_agreement_is_that_of_a_direct_computation_and_of_sklearn(seed):
    rng = random.Random(seed)
    pairs = []
    for _ in range(80):
        label = rng.choices(VERDICTS, (5, 3, 2))[0]
        pairs.append((label, label if rng.random() < 0.6 else rng.choice(VERDICTS)))
    found = agreement(pairs)
    assert (found.agreement, found.kappa, found.weighted_kappa) == pytest.approx(direct(pairs), abs=1e-12)
    assert sum(sum(row.values()) for row in found.confusion.values()) == found.samples == 80
    try:
        from sklearn.metrics import cohen_kappa_score
    except ImportError:
        return
    labels, verdicts = zip(*pairs, strict=True)
    assert found.kappa == pytest.approx(cohen_kappa_score(labels, verdicts, labels=list(VERDICTS)), abs=1e-12)
    assert found.weighted_kappa == pytest.approx(
        cohen_kappa_score(labels, verdicts, labels=list(VERDICTS), weights="linear"), abs=1e-12
    )


def test_agreement_of_a_textbook():
    # Cohen's kappa of two readers and 50 proposals: 20 both yes, 15 both no, 5 and 10 apart: 0.4.
    pairs = [("accept", "accept")] * 20 + [("accept", "reject")] * 5 + [("reject", "accept")] * 10 + [("reject", "reject")] * 15
    found = agreement(pairs)
    assert (found.agreement, found.expected, found.kappa) == pytest.approx((0.7, 0.5, 0.4))
    assert found.verdicts["accept"].precision == pytest.approx(20 / 30)
    assert found.verdicts["accept"].recall == pytest.approx(20 / 25)
    assert found.verdicts["borderline"].precision is None


def test_agreement_says_when_there_is_none_to_compute():
    assert agreement([]).kappa is None
    assert agreement([("accept", "accept")] * 3).kappa is None
    assert agreement([("accept", "accept")] * 3).agreement == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no label"),
        ("x\n", "line 1: not JSON"),
        ('{"id": "a", "verdict": "good"}\n', "line 1: must be"),
        ('{"id": "a", "verdict": "accept"}\n{"id": "a", "verdict": "reject"}\n', "line 2: a has two labels"),
    ],
)
def test_wrong_labels_are_refused(tmp_path, text, problem):
    (tmp_path / "labels.jsonl").write_text(text)
    with pytest.raises(DataError, match=problem):
        read_labels(tmp_path / "labels.jsonl")
