"""The whole path against a real server: every sample accounted for under every kind of fault, none asked about twice, also when killed."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter

import pytest

from data_prep.errors import DataError
from data_prep.judge.asking import Limits
from data_prep.judge.client import Endpoint
from data_prep.judge.config import load_curation, load_rubric
from data_prep.judge.curate import Request, curate
from data_prep.judge.estimate import Estimate, Prices
from data_prep.plain_files import file_sha256
from data_prep.progress import Silent
from tests.data_prep.judge import stub
from tests.data_prep.judge.stub import CLOSE, DRIP, HALF_BODY, HANG, Stub, answer, read, says, status, write_samples

OUTCOMES = ("accepted", "borderline", "rejected", "unjudged")
LIMITS = Limits(concurrency=16, attempts=3, timeout_seconds=2, backoff_seconds=0.01)


def request(folder, url, inputs, *, limits=LIMITS, rubric="general", rules="sft", model="stub", **more):
    loaded = load_rubric(rubric)
    return Request(
        inputs=inputs,
        folder=folder,
        endpoint=Endpoint(url, model),
        rubrics={loaded.name: loaded},
        rubric=loaded.name,
        curation=load_curation(rules),
        limits=limits,
        **more,
    )


def outcomes(folder):
    """Mark -> outcome, by the four files; each sample is in one of them and has the audit's line to it."""
    found = {}
    for outcome in OUTCOMES:
        for line in read(folder / f"{outcome}.jsonl"):
            assert line["id"] not in found
            found[line["id"]] = outcome
    audit = read(folder / "audit.jsonl")
    assert [line["number"] for line in audit] == list(range(1, len(found) + 1))
    assert {line["id"]: line["outcome"] for line in audit} == found
    record = json.loads((folder / "record.json").read_text())
    assert record["samples"] == len(found)
    assert record["outcomes"] == {o: list(found.values()).count(o) for o in OUTCOMES}
    return found


FAULTS = {
    0: lambda: HANG,
    1: lambda: status(429, retry_after="0"),
    2: lambda: status(500),
    3: lambda: says('{"reason": "b", "scores": {"instr'),
    4: lambda: says({"score": 5}),
    5: lambda: says(answer(correctness=9)),
    6: lambda: says(answer(), finish="length"),
    7: lambda: says(None, refusal="I will not judge this."),
    8: lambda: CLOSE,
    9: lambda: HALF_BODY,
    10: lambda: status(503, b"<html>"),
    11: lambda: (200, {}, b"[]"),
}
VERDICTS = {
    0: (answer(), "accepted"),
    1: (answer(correctness=3, completeness=3), "borderline"),
    2: (answer(correctness=1, completeness=2, instruction_following=2), "rejected"),
    3: (answer(flags={"hallucination": True}), "rejected"),  # a judge that lies: its own verdict is accept
}


def behave(mark, attempt, _):
    """One in four samples meets a fault at its first attempts, some of them at every one."""
    if mark % 4 == 1 and (attempt <= 1 or mark % 100 == 1):
        return FAULTS[mark // 4 % len(FAULTS)]()
    return says(VERDICTS[mark % 4 if mark % 4 != 1 else mark // 4 % 4][0])


def expected(mark):
    if mark % 100 == 1:
        return "unjudged"
    return VERDICTS[mark % 4 if mark % 4 != 1 else mark // 4 % 4][1]


def test_a_thousand_samples_through_every_fault_are_all_accounted_for_and_asked_once(tmp_path):
    samples = [stub.sample(mark) for mark in range(1000)]
    path = write_samples(tmp_path / "samples.jsonl", samples)
    with Stub(behave) as server:
        record = curate(request(tmp_path / "out", server.url, [path]), Silent())
        assert server.peak <= LIMITS.concurrency
        found = outcomes(tmp_path / "out")
        unjudged = {mark for mark in range(1000) if found[f"s{mark}"] == "unjudged"}
        # On a busy machine a few more may time out; what matters is that nothing else happens to them.
        assert set(range(1, 1000, 100)) <= unjudged
        assert len(unjudged) < 200
        assert all(found[f"s{mark}"] == expected(mark) for mark in range(1000) if mark not in unjudged)
        kinds = set(record.work.failed_attempts)
        assert kinds >= {
            "time-out", "HTTP 429", "HTTP 500", "HTTP 503", "malformed JSON", "wrong schema", "out of range", "cut off", "refusal",
            "connection", "no completion",
        }  # fmt: skip
        assert all(server.asked[mark] == LIMITS.attempts for mark in range(1, 1000, 100))
        assert record.samples == len(found) == 1000
        accepted = read(tmp_path / "out" / "accepted.jsonl")
        assert accepted == [s for s in samples if found[s["id"]] == "accepted"]  # nothing changed, the order of the input
        liar = next(line for line in read(tmp_path / "out" / "audit.jsonl") if line["number"] == 4)
        assert (liar["outcome"], liar["judge_verdict"], liar["contradiction"]) == ("rejected", "accept", True)
        assert record.rubrics["general"].contradictions > 0
        # A second run asks again about what is unjudged, and about nothing else.
        before = dict(server.asked)
        server._behave = lambda mark, *_: says(answer())
        curate(request(tmp_path / "out", server.url, [path]), Silent())
        again = {mark for mark in server.asked if server.asked[mark] != before[mark]}
        assert again == unjudged
        assert "unjudged" not in outcomes(tmp_path / "out").values()


PROGRAM = """
import sys
from pathlib import Path
from data_prep.judge.asking import Limits
from data_prep.judge.client import Endpoint
from data_prep.judge.config import load_curation, load_rubric
from data_prep.judge.curate import Request, curate
from data_prep.progress import Silent
folder, url, path = sys.argv[1:]
limits = Limits(concurrency=8, attempts=4, timeout_seconds=20, backoff_seconds=0.01)
general = {"general": load_rubric("general")}
curate(Request([Path(path)], Path(folder), Endpoint(url, "stub"), general, "general", load_curation("sft"), limits=limits), Silent())
"""


def test_killed_at_any_point_no_judged_sample_is_asked_about_again(tmp_path):
    marks = range(200)
    path = write_samples(tmp_path / "samples.jsonl", [stub.sample(mark) for mark in marks])
    folder, kill_at = tmp_path / "out", [50, 100]
    with Stub(lambda mark, *_: says(VERDICTS[mark % 4][0])) as server:
        command = [sys.executable, "-c", PROGRAM, str(folder), server.url, str(path)]
        process = None

        def on_request():
            if kill_at and len(server.requests) >= kill_at[0]:
                kill_at.pop(0)
                os.kill(process.pid, signal.SIGKILL)

        server.on_request = on_request
        known = set()
        for code in (-signal.SIGKILL, -signal.SIGKILL, 0):
            asked_before = len(server.requests)
            process = subprocess.Popen(command)
            assert process.wait(60) == code
            asked = {mark for mark, *_ in server.requests[asked_before:]}
            assert not asked & known
            assert (folder / "record.json").exists() == (code == 0)
            with sqlite3.connect(folder / "cache.sqlite") as db:
                judged = {key for (key,) in db.execute("SELECT key FROM judgements")}
            audit = _keys(tmp_path, server.url, path)
            known = {mark for mark, key in audit.items() if key in judged}
            assert len(asked - known) <= 8  # under way when it was killed
        assert known == set(marks)
        # At most what was under way at a kill came twice: the answer was lost with the process.
        assert sum(n - 1 for n in server.asked.values()) <= 2 * 8
    assert outcomes(folder) == {f"s{mark}": VERDICTS[mark % 4][1] for mark in marks}
    assert not [p for p in folder.iterdir() if p.name.endswith(".tmp")]
    # Equal to a run without interruption, but for what the attempts were.
    with Stub(lambda mark, *_: says(VERDICTS[mark % 4][0])) as server:
        curate(request(tmp_path / "whole", server.url, [path]), Silent())
    for name in (*OUTCOMES, "audit"):
        assert (tmp_path / "whole" / f"{name}.jsonl").read_bytes() == (folder / f"{name}.jsonl").read_bytes()


def test_killed_at_any_step_of_writing_the_record_never_vouches_for_what_is_not_there(tmp_path):
    path = write_samples(tmp_path / "samples.jsonl", [stub.sample(mark) for mark in range(12)])
    (tmp_path / "strict.yaml").write_text("base: general\nname: strict\nthresholds: {accept: 4.9, borderline: 4.8}\n")
    folder, names = tmp_path / "out", [f"{name}.jsonl" for name in (*OUTCOMES, "audit")]
    with Stub(lambda mark, *_: says(VERDICTS[mark % 4][0])) as server:
        requests = [request(folder, server.url, [path], rubric=rubric) for rubric in ("general", str(tmp_path / "strict.yaml"))]
        curate(requests[0], Silent())
    written = []  # by each of the two rubrics
    for r in requests:
        curate(r, Silent())  # nobody is asked: the server is gone
        written.append([(folder / name).read_bytes() for name in names])
    assert written[0] != written[1]
    step, ended = 0, False
    while not ended:
        step += 1
        ended = _dies_at(step, requests[step % 2])
        if (folder / "record.json").exists():
            record = json.loads((folder / "record.json").read_text())
            assert all(file_sha256(folder / name) == file["sha256"] for name, file in record["files"].items())
    assert step > 2 * len(names)
    curate(requests[0], Silent())
    assert [(folder / name).read_bytes() for name in names] == written[0]
    assert sorted(p.name for p in folder.iterdir() if not p.name.startswith("cache")) == sorted(
        [".lock", *names, "record.json"]
    )


def _dies_at(step, request):
    """Run in a child that is killed at this call of os.replace or os.fsync; True when it came to its end first."""
    child = os.fork()
    if child == 0:
        left = step

        def counted(call):
            def stepped(*arguments):
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments)

            return stepped

        os.replace, os.fsync = counted(os.replace), counted(os.fsync)
        try:
            curate(request, Silent())
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return not os.WIFSIGNALED(status)


def _keys(tmp_path, url, path):
    """Mark -> key of the cache, by the plan."""
    from data_prep.judge.planning import Plan, Planner, Rubrics

    r = request(tmp_path / "unused", url, [path])
    with Plan(tmp_path / "keys.sqlite") as plan:
        Planner(r.curation, Rubrics(r.rubrics, r.rubric), "stub", r.sampling, r.tokens).run([path], plan, Silent())
        return {int(row.id[1:]): row.key for row in plan.rows()}


def test_an_unreachable_judge_is_given_up_and_nothing_is_lost_or_let_through(tmp_path):
    path = write_samples(tmp_path / "samples.jsonl", [stub.sample(mark) for mark in range(200)])
    limits = Limits(
        concurrency=8, attempts=3, timeout_seconds=1, backoff_seconds=0.001, patience_failures=20, patience_seconds=0
    )
    progress = Heard()
    record = curate(request(tmp_path / "out", "http://127.0.0.1:9/v1", [path], limits=limits), progress)
    assert "nothing judged yet: 20 attempts failed, the last with connection" in " ".join(progress.messages)
    assert set(outcomes(tmp_path / "out").values()) == {"unjudged"}
    assert record.work.given_up is not None
    assert sum(record.work.failed_attempts.values()) <= 20 + 8
    assert {line["reason"] for line in read(tmp_path / "out" / "audit.jsonl")} == {"no judgement", "not asked"}


@pytest.mark.parametrize(("behaviour", "kind"), [(DRIP, "time-out"), ((200, {}, b" " * (5 << 20)), "endless answer")])
def test_a_judge_that_does_not_end_is_cut_off(tmp_path, behaviour, kind):
    path = write_samples(tmp_path / "samples.jsonl", [stub.sample(1)])
    limits = Limits(concurrency=1, attempts=2, timeout_seconds=0.3 if behaviour == DRIP else 20, backoff_seconds=0)
    with Stub(lambda *_: behaviour) as server:
        record = curate(request(tmp_path / "out", server.url, [path], limits=limits), Silent())
    assert record.work.failed_attempts == {kind: 2}
    assert outcomes(tmp_path / "out") == {"s1": "unjudged"}


def test_equal_samples_that_rules_let_through_are_asked_about_once(tmp_path):
    rules = load_curation("sft").model_copy(update={"exact_duplicates": False})
    path = write_samples(tmp_path / "samples.jsonl", [{**stub.sample(1), "id": str(number)} for number in range(30)])
    with Stub(lambda *_: says(answer())) as server:
        r = request(tmp_path / "out", server.url, [path])
        curate(Request(**{**vars(r), "curation": rules}), Silent())
        assert server.asked == {1: 1}
    assert set(outcomes(tmp_path / "out").values()) == {"accepted"}


def test_no_samples_is_no_error(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("\n")
    record = curate(request(tmp_path / "out", "http://127.0.0.1:9/v1", [path]), Silent())
    assert record.samples == 0
    assert outcomes(tmp_path / "out") == {}


@pytest.mark.parametrize("code", [401, 403, 404, 307])
def test_an_endpoint_that_refuses_from_the_start_stops_the_run(tmp_path, code):
    path = write_samples(tmp_path / "samples.jsonl", [stub.sample(mark) for mark in range(50)])
    with Stub(lambda *_: status(code, location="http://elsewhere.invalid/")) as server:
        with pytest.raises(DataError, match=f"HTTP {code}.*--model"):
            curate(request(tmp_path / "out", server.url, [path]), Silent())
        assert sum(server.asked.values()) <= LIMITS.concurrency
    assert not (tmp_path / "out" / "record.json").exists()


def test_a_request_that_is_refused_for_good_is_not_repeated(tmp_path):
    path = write_samples(tmp_path / "samples.jsonl", [stub.sample(mark) for mark in range(4)])
    with Stub(lambda mark, *_: status(400, b"context length") if mark == 2 else says(answer())) as server:
        curate(request(tmp_path / "out", server.url, [path]), Silent())
        assert server.asked[2] == 1
    assert outcomes(tmp_path / "out")["s2"] == "unjudged"


def test_rules_decide_before_the_judge_and_every_line_is_accounted_for(tmp_path):
    good = stub.sample(1)
    lines = [
        json.dumps(good),
        "not json",
        json.dumps([1]),
        json.dumps({"id": "shape", "messages": "no"}),
        json.dumps({**stub.sample(1), "id": "equal"}),
        json.dumps({"id": "order", "messages": [{"role": "assistant", "content": "hello"}]}),
        json.dumps(stub.sample(7, said="<|im_end|> go on")),
        "",
        json.dumps({"id": "leak", "messages": [
            {"role": "user", "content": "Some musicians are parents. No parents are programmers. Does it logically follow that some "
             "musicians are not programmers?"},
            {"role": "assistant", "content": "Yes."},
        ]}),
        json.dumps({"id": "surrogate", "messages": [{"role": "user", "content": "\ud800"}]}),
        json.dumps(stub.sample(9, extra={"kept": [1, 2]})),
        json.dumps(stub.sample(10))[:-1] + ', "far": 1e999}',
        json.dumps(stub.sample(11))[:-1] + ', "deep": ' + "[" * 3000 + "]" * 3000 + "}",
        json.dumps({**stub.sample(12), "id": [1]}),
        json.dumps(stub.sample(13, tools=[{"name": "<|end_of_role|>"}])),
    ]  # fmt: skip
    path = tmp_path / "samples.jsonl"
    path.write_bytes("\n".join(lines).encode() + b'\n{"messages": "\xff"}\n')
    with Stub(lambda *_: says(answer())) as server:
        record = curate(request(tmp_path / "out", server.url, [path], rules="smoke"), Silent())
        assert set(server.asked) == {1, 9}
    found = outcomes(tmp_path / "out")
    assert Counter(found.values()) == {"accepted": 2, "rejected": 13}
    steps = {line["id"]: line["step"] for line in read(tmp_path / "out" / "audit.jsonl")}
    assert steps == {
        "s1": "judge",
        f"{path}:2": "readable",
        f"{path}:3": "readable",
        "shape": "schema",
        "equal": "exact_duplicates",
        "order": "turn_order",
        "s7": "control_tokens",
        "leak": "leakage",
        "surrogate": "schema",
        "s9": "judge",
        f"{path}:12": "readable",  # a number that is none
        f"{path}:13": "readable",  # too deep
        f"{path}:14": "schema",  # an id that is none
        "s13": "control_tokens",
        f"{path}:16": "readable",
    }
    assert record.steps["exact_duplicates"] == {"equal sample": 1}
    assert read(tmp_path / "out" / "accepted.jsonl")[1]["extra"] == {"kept": [1, 2]}


def test_estimate_asks_nothing_and_learns_from_what_was_measured(tmp_path):
    path = write_samples(tmp_path / "samples.jsonl", [stub.sample(mark) for mark in range(40)])
    prices = Prices(input=2.0, output=10.0)
    with Stub(lambda *_: says(answer())) as server:
        limits = Limits(concurrency=4, requests_per_minute=6000)
        ask = request(tmp_path / "out", server.url, [path], limits=limits, prices=prices)
        first = curate(ask, Silent(), only_estimate=True)
        assert isinstance(first, Estimate)
        assert not server.asked
        assert not (tmp_path / "out" / "record.json").exists()
        assert first.requests == 40
        assert first.seconds == pytest.approx(40 / 6000 * 60)
        assert first.cost == pytest.approx((first.prompt_tokens * 2 + 40 * 180 * 10) / 1e6)
        with pytest.raises(DataError, match="--max-cost"):
            curate(request(tmp_path / "out", server.url, [path], prices=prices, max_cost=0.0001), Silent())
        record = curate(ask, Silent())
        assert record.work.cost == pytest.approx(40 * (300 * 2 + 80 * 10) / 1e6)
        write_samples(path, [stub.sample(mark) for mark in range(60)])
        second = curate(ask, Silent(), only_estimate=True)
        assert (second.requests, second.cached, second.answer_tokens) == (20, 40, 20 * 80)


def test_thresholds_can_change_without_asking_again(tmp_path):
    path = write_samples(tmp_path / "samples.jsonl", [stub.sample(mark) for mark in range(4)])
    (tmp_path / "strict.yaml").write_text("base: general\nname: strict\nthresholds: {accept: 4.9, borderline: 4.8}\n")
    with Stub(lambda mark, *_: says(answer())) as server:
        curate(request(tmp_path / "out", server.url, [path]), Silent())
        curate(request(tmp_path / "out", server.url, [path], rubric=str(tmp_path / "strict.yaml")), Silent())
        assert set(server.asked.values()) == {1}
    assert set(outcomes(tmp_path / "out").values()) == {"rejected"}


def test_the_key_goes_into_the_header_and_nowhere_else(tmp_path):
    key = "sk-very-secret-0123456789"
    path = write_samples(tmp_path / "samples.jsonl", [stub.sample(mark) for mark in range(3)])
    with Stub(lambda mark, *_: status(400, f"bad key {key}".encode()) if mark == 1 else says(answer())) as server:
        r = request(tmp_path / "out", server.url, [path])
        r = Request(**{**vars(r), "endpoint": Endpoint(server.url, "stub", key)})
        assert key not in repr(r)
        curate(r, Silent())
        assert all(headers["authorization"] == f"bearer {key}" for *_, headers in server.requests)
    for file in (tmp_path / "out").iterdir():
        assert key.encode() not in file.read_bytes(), file


def test_an_output_is_no_input_and_a_changed_input_is_noticed(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    path = write_samples(out / "accepted.jsonl", [stub.sample(1)])
    with pytest.raises(DataError, match="overwritten"):
        curate(request(out, "http://127.0.0.1:9/v1", [path]), Silent())
    path = write_samples(tmp_path / "samples.jsonl", [stub.sample(1), stub.sample(2)])

    def change(*_):
        write_samples(path, [stub.sample(1), stub.sample(3)])
        return says(answer())

    with Stub(change) as server, pytest.raises(DataError, match="changed while"):
        curate(request(out, server.url, [path]), Silent())


def test_a_judge_that_always_says_the_same_is_named(tmp_path):
    path = write_samples(tmp_path / "samples.jsonl", [stub.sample(mark) for mark in range(60)])
    progress = Heard()
    with Stub(lambda *_: says(answer())) as server:
        record = curate(request(tmp_path / "out", server.url, [path], prices=Prices(1.0, 1.0)), progress)
    assert "does not tell them apart" in record.warnings[0]
    measured = next(text for text in progress.messages if text.startswith("measured over 32 answers"))
    assert "(47 % of the samples), cost 0.02 in all" in measured  # 60 times 380 tokens


class Heard(Silent):
    def __init__(self):
        self.messages = []

    def message(self, text):
        self.messages.append(text)
