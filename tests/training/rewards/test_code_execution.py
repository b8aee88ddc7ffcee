"""Code by execution: tests of three kinds, and programs that try to pass without solving anything."""

import pytest

from tests.training.rewards.helpers import need_bubblewrap
from training.rewards import RewardError, Sample
from training.rewards.code_execution import CodeExecution, CodeOptions
from training.rewards.sandbox import Limits

LIMITS = Limits(wall_seconds=20)


@pytest.fixture(scope="module", autouse=True)
def _bubblewrap():
    need_bubblewrap()


def score(program, tests, **options):
    reward = CodeExecution(CodeOptions(limits=LIMITS, **options))
    return reward.score(Sample(completion=f"Here:\n```python\n{program}\n```\nDone.", reference=tests))


CALLS = [
    {"kind": "call", "function": "add", "args": [1, 2], "expected": 3},
    {"kind": "call", "function": "add", "args": [[1], [2]], "expected": [1, 2]},
    {"kind": "call", "function": "add", "kwargs": {"a": "x", "b": "y"}, "expected": "xy"},
]
STDIN = [{"kind": "stdin", "stdin": "2 3\n", "stdout": "5\n"}]
ASSERTS = [{"kind": "asserts", "code": "assert add(1, 2) == 3\nassert add(2, 2) == 4"}]


def test_right_programs_pass():
    add = "def add(a, b):\n    print('chatter')\n    return a + b"
    for tests in (CALLS, ASSERTS):
        result = score(add, tests)
        assert (result.value, result.failed) == (1.0, False), result
    assert score("print(sum(map(int, input().split())), '  ')\nprint()", STDIN).value == 1
    both = "def add(a, b):\n    return a + b\nif __name__ == '__main__':\n    print(add(*map(int, input().split())))"
    assert score(both, CALLS + STDIN + ASSERTS).value == 1


def test_share_of_tests():
    only_numbers = "def add(a, b):\n    return int(a) + int(b)"
    assert score(only_numbers, CALLS, aggregate="share").value == pytest.approx(1 / 3)
    result = score(only_numbers, CALLS)
    assert result.value == 0
    assert result.reason.startswith("test 1: exit status 1: TypeError")


@pytest.mark.parametrize(
    ("program", "tests", "reason"),
    [
        ("import os; os._exit(0)", ASSERTS, "left before its result"),
        ("import sys; sys.exit(0)", CALLS, "left before its result"),
        ("import atexit\nprint('0' * 32 + '3')", CALLS, "KeyError"),
        ("def add(a, b): return type('T', (int,), {'__eq__': lambda *a: True})(9)", CALLS, "another result"),
        ("def add(a, b): return float('nan')", CALLS, "ValueError"),
        ("def add(a, b): return True", [{"kind": "call", "function": "add", "args": [0, 1], "expected": 1}], "another result"),
        ("print(6)", STDIN, "another output"),
        ("def add(a, b): return {}", ASSERTS, "AssertionError"),
        ("def add(:", CALLS, "SyntaxError"),
    ],
)
def test_wrong_and_cheating_programs_do_not(program, tests, reason):
    result = score(program, tests)
    assert (result.value, result.failed) == (0.0, False)
    assert reason in result.reason, result.reason


def test_expected_results_never_enter_the_sandbox():
    # Everything that the driver was given can be read again; the answer is not there.
    program = "import os\ndef add(a, b):\n    os.lseek(0, 0, 0)\n    return os.read(0, 10000).decode()"
    tests = [{"kind": "call", "function": "add", "args": [1, 2], "expected": "987654321"}]
    reward = CodeExecution(CodeOptions(limits=LIMITS))
    assert reward.score(Sample(completion=f"```\n{program}\n```", reference=tests)).value == 0


def test_which_part_of_the_completion_is_the_program():
    two = "```python\nx = 1\n```\ntext\n```py\nprint(2)\n```"
    assert CodeExecution(CodeOptions()).program(two) == "print(2)\n"
    assert CodeExecution(CodeOptions(take="fences")).program(two) == "x = 1\n\nprint(2)\n"
    assert CodeExecution(CodeOptions(take="whole")).program("print(1)") == "print(1)"
    assert CodeExecution(CodeOptions()).program("print(1)") is None
    assert (
        CodeExecution(CodeOptions()).score(Sample(completion="print(1)", reference=STDIN)).reason
        == "no code fence in the completion"
    )


@pytest.mark.parametrize("reference", [None, [], [{"kind": "shell"}], [{"kind": "call", "function": "a.b", "expected": 1}]])
def test_a_bad_reference_is_the_datas_failure_and_not_the_models(reference):
    with pytest.raises(RewardError, match="^reference, "):
        CodeExecution(CodeOptions()).score(Sample(completion="```\n1\n```", reference=reference))
