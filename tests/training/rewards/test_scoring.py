"""Plans: composition by domain, gates, penalties, statistics, and when to stop."""

import statistics as reference
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.training.rewards.helpers import quick
from training.rewards import DomainPlan, Part, RewardError, RewardPlan, Rewards, Sample, Score, TooManyFailures
from training.rewards.formats import Format, FormatOptions
from training.rewards.statistics import DomainStatistics, FailureGuard

BEHAVE = "tests.training.rewards.broken:Behave"


def domain(*parts):
    return DomainPlan(parts=tuple(Part(reward=BEHAVE, name=str(i), **part) for i, part in enumerate(parts)))


def combine(plan, *values):
    return plan.combine({str(i): Score(value=v) if v is not None else Score.failure("broke") for i, v in enumerate(values)})


def test_a_weighted_sum():
    assert combine(domain({"weight": 3}, {"weight": 1}), 1.0, 0.0).value == 0.75


def test_a_gate_decides_alone():
    plan = domain({"role": "gate", "at_least": 0.5, "otherwise": 0.125}, {})
    assert combine(plan, 0.5, 0.75).value == 0.75
    closed = combine(plan, 0.25)
    assert (closed.value, closed.details["gate"], closed.failed) == (0.125, "0", False)
    assert combine(domain({"role": "gate"}), 1.0).value == 1


def test_a_penalty_is_taken_off_and_stops_at_zero():
    plan = domain({}, {"role": "penalty", "weight": 0.25})
    assert [combine(plan, a, b).value for a, b in ((1, 1), (1, 0), (1, 0.5), (0.125, 0))] == [1, 0.75, 0.875, 0]


def test_a_failed_part_makes_a_failed_whole():
    for role in ("sum", "penalty", "gate"):
        score = combine(domain({}, {"role": role}), 1.0, None)
        assert (score.value, score.failed, score.reason) == (0.0, True, "1: broke")


parts = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["sum", "gate", "penalty"]),
        "weight": st.floats(0.01, 10),
        "at_least": st.floats(0.1, 1),
        "otherwise": st.floats(0, 0.9),
    }
)
unit = st.floats(0, 1)


@quick
@given(st.lists(st.tuples(parts, unit), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_totals_are_in_range_and_their_parts_have_no_order(rows, random):
    if all(part["role"] == "penalty" for part, _ in rows):
        rows = [*rows, ({"role": "sum"}, 0.5)]
    # Of several closed gates the first counts; give them the same value.
    rows = [({**part, "otherwise": 0.0}, value) for part, value in rows]
    total = combine(domain(*(p for p, _ in rows)), *(v for _, v in rows)).value
    assert 0 <= total <= 1
    shuffled = random.sample(rows, len(rows))
    assert combine(domain(*(p for p, _ in shuffled)), *(v for _, v in shuffled)).value == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({}, "domains: Field required"),
        (
            {"domains": {"math": {"parts": [{"reward": "maths"}]}}},
            "domain 'math': no reward is called 'maths'; did you mean math",
        ),
        (
            {"domains": {"a": {"parts": [{"reward": "format", "options": {"tag": []}}]}}},
            "tag: no such option; did you mean tags",
        ),
        ({"domains": {"a": {"parts": [{"reward": "format", "options": {"pattern": "("}}]}}}, "not a regular expression"),
        ({"domains": {"a": {"parts": [{"reward": "format"}, {"reward": "format"}]}}}, "two parts are called 'format'"),
        ({"domains": {"a": {"parts": [{"reward": "format", "role": "penalty"}]}}}, "only penalties"),
        ({"domains": {"a": {"parts": [{"reward": "format", "weight": 0}]}}}, "weight: Input should be greater than 0"),
        ({"domains": {"a": {"parts": []}}}, "parts: Tuple should have at least 1 item"),
        ({"domains": {"a": {"parts": [{"reward": "format"}]}}, "workrs": 2}, "workrs: Extra inputs are not permitted"),
    ],
)
def test_bad_plans_are_refused_by_name(plan, message):
    with pytest.raises(RewardError, match=message):
        RewardPlan.parse(plan)


def test_references_are_checked_before_the_first_step():
    plan = RewardPlan.parse(
        {
            "domains": {
                "math": {"parts": [{"reward": "math"}, {"reward": "format", "role": "penalty"}]},
                "code": {"parts": [{"reward": "code"}]},
                "gym": {"parts": [{"reward": "reasoning_gym"}]},
                "json": {"parts": [{"reward": "json_schema"}]},
                "ifeval": {"parts": [{"reward": "instructions"}]},
            }
        }
    )
    good = [
        ("math", "1/2"),
        ("code", [{"kind": "stdin", "stdin": "", "stdout": ""}]),
        ("gym", {"task": "gcd", "entry": {}}),
        ("json", {"type": "object"}),
        ("ifeval", [{"kind": "no_comma"}]),
    ]
    plan.check_references(good)
    bad = [
        ("math", None),
        ("code", []),
        ("gym", {"task": "countdown", "entry": {}}),
        ("json", "x"),
        ("ifeval", [{"kind": "x"}]),
        ("law", ""),
    ]
    with pytest.raises(RewardError) as caught:
        plan.check_references([*good, *bad])
    lines = str(caught.value).split("\n")
    assert [line.partition(":")[0] for line in lines[:-1]] == [f"sample {i + 5} (domain '{bad[i][0]}')" for i in range(5)]
    assert lines[-1] == "and 1 more"


@pytest.fixture(scope="module")
def rewards():
    plan = {
        "domains": {
            "gated": {
                "parts": [
                    {"reward": "format", "name": "form", "role": "gate", "options": {"pattern": "value.*|crash.*"}},
                    {"reward": BEHAVE, "name": "content", "weight": 3},
                    {"reward": "format", "name": "short", "options": {"max_characters": 8}},
                ]
            },
            "*": {"parts": [{"reward": BEHAVE}]},
        },
        "workers": 1,
        "max_failure_share": 0.4,
        "failure_min_samples": 4,
    }
    with Rewards(RewardPlan.parse(plan)) as rewards:
        yield rewards


def test_a_batch_of_several_domains(rewards):
    samples = [
        Sample(completion="value 0", domain="gated"),
        Sample(completion="exit", domain="gated"),  # the gate is closed: the worker is not asked, and so does not die
        Sample(completion="value 0.5", domain="other"),
        Sample(completion="value  0.5   ", domain="gated"),
        Sample(completion="crash x", domain="gated"),
    ]
    scores = rewards.score(samples)
    assert [s.value for s in scores] == [0.25, 0.0, 0.5, 0.375, 0.0]
    assert [s.failed for s in scores] == [False, False, False, False, True]
    assert scores[1].details["gate"] == "form"
    assert rewards.worker_restarts == 0
    summary = rewards.summary()
    assert summary["gated"]["samples"] == 4
    assert summary["gated"]["failures"] == 1
    assert summary["gated"]["part_means"] == {"content": 0.25, "form": 2 / 3, "short": 0.5}
    assert rewards.score(samples[:1]) == scores[:1]


def test_too_many_failures_stop_with_their_reasons(rewards):
    good, bad = (Sample(completion=c, domain="third") for c in ("value 1", "crash spoon"))
    rewards.score([good, good, bad])
    with pytest.raises(
        TooManyFailures, match=r"domain 'third': 3 of the last 5 rewards failed \(60.0%, the limit is 40.0%\).*3 times.*spoon"
    ):
        rewards.score([bad, bad])


def test_a_domain_without_rewards_is_refused():
    plan = RewardPlan.parse({"domains": {"math": {"parts": [{"reward": "format"}]}}})
    with pytest.raises(RewardError, match="domain is 'code', the plan has math; add it, or '\\*'"):
        plan.domain("code")


@quick
@given(st.lists(unit, min_size=1, max_size=30), st.integers(0, 3))
def test_statistics_agree_with_the_standard_library(values, failures):
    scores = [Score(value=v) for v in values] + [Score.failure("x")] * failures
    statistics = DomainStatistics()
    for score in scores:
        statistics.add(score)
    summary = statistics.summary()
    assert summary["samples"] == len(scores)
    assert summary["failures"] == failures
    assert summary["mean"] == pytest.approx(reference.fmean(values), abs=1e-12)
    assert summary["std"] == pytest.approx(reference.pstdev(values), abs=1e-9)
    assert summary["share_one"] == values.count(1.0) / len(values)


def test_the_guard_looks_at_a_window_and_survives_a_checkpoint():
    ok, broken = ("a", Score(value=1.0)), ("a", Score.failure("net"))
    guard = FailureGuard(0.5, window_samples=4, min_samples=3)
    guard.add([broken, broken])  # too few to say
    again = FailureGuard(0.5, window_samples=4, min_samples=3)
    again.restore(guard.state())
    with pytest.raises(TooManyFailures, match="2 of the last 3|3 of the last 3"):
        again.add([broken])
    guard.add([ok, ok])
    guard.add([ok, ok, broken])  # the first two have left the window
    assert guard.state() == {"a": [None, None, None, "net"]} or guard.state() == {"a": [None, None, "net"]}


@pytest.mark.parametrize(
    ("text", "value"),
    [("<think>a</think>\n<answer>b</answer>", 1), ("<answer>b</answer><think>a</think>", 0), ("<think>a</think><answer>b</answer>!", 0),
     ("<think>a</think>", 0), ("<think><think>a</think></think><answer>b</answer>", 0)],
)  # fmt: skip
def test_tags(text, value):
    assert Format(FormatOptions(tags=["think", "answer"])).score(Sample(completion=text)).value == value


def test_importing_the_package_is_light():
    heavy = {"torch", "math_verify", "sympy", "httpx", "jsonschema", "reasoning_gym", "py3langid", "numpy", "lm_eval"}
    code = f"import sys, training.rewards.__main__, training.rewards.scoring\nprint(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
