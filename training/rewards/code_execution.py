"""Code by execution: the program in the completion runs in the sandbox, and its outputs are compared out here.

With `stdin` and `call` tests the expected outputs never enter the sandbox, so a program cannot pass by reading them, by patching the
comparison or by leaving early. `asserts` tests (HumanEval's form) run in the program's own process: leaving early does not
pass them, but a program that looks for them in its own memory can cheat. Prefer the other two for training.
"""

from __future__ import annotations

import json
import re
import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

from training.rewards import sandbox
from training.rewards.base import Options, Reward, RewardError, Sample, Score, shorten
from training.rewards.structured_output import same_json, strict_json

_FENCE = re.compile(r"^[ \t]*```(?:python|py|python3)?[ \t]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE | re.IGNORECASE)


class _Test(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StdinTest(_Test):
    """The whole program, fed with `stdin`; its output must be `stdout`, trailing blanks of lines and of the whole aside."""

    kind: Literal["stdin"]
    stdin: str
    stdout: str


class CallTest(_Test):
    """One call of a function that the program defines; arguments and result are JSON values (a tuple is a list)."""

    kind: Literal["call"]
    function: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]
    args: list[JsonValue] = []
    kwargs: dict[str, JsonValue] = {}
    expected: JsonValue


class AssertsTest(_Test):
    """Statements that run behind the program; any exception fails them."""

    kind: Literal["asserts"]
    code: str


Test = Annotated[StdinTest | CallTest | AssertsTest, Field(discriminator="kind")]
TESTS: TypeAdapter[list[Any]] = TypeAdapter(Annotated[list[Test], Field(min_length=1)])


class CodeOptions(Options):
    """Options of `code`; `reference` is the list of tests ({"kind": "stdin" | "call" | "asserts", ...}), see docs/rewards.md."""

    time_limit_seconds: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """Of all tests of one sample together; each one has `limits.wall_seconds`."""
    limits: sandbox.Limits = sandbox.Limits()
    """Of each test's program."""
    aggregate: Literal["all", "share"] = "all"
    """`all`: 1 only if every test passes (the rest is not run after a failure). `share`: the share that passes."""
    take: Literal["last_fence", "fences", "whole"] = "last_fence"
    """The program: the last code fence, all fences in order, or the completion itself. Without a fence, `last_fence` and `fences` score 0."""
    program_max_characters: Annotated[int, Field(gt=0)] = 100_000
    """A longer program scores 0 without being run."""


class CodeExecution(Reward):
    """The share of tests passed, or 1 only for all of them."""

    options_type = CodeOptions
    options: CodeOptions

    def prepare(self) -> None:
        sandbox.check()

    def score(self, sample: Sample) -> Score:
        tests = _read(sample.reference)
        program = self.program(sample.completion)
        if program is None:
            return Score(value=0.0, reason="no code fence in the completion")
        if len(program) > self.options.program_max_characters:
            return Score(value=0.0, reason=f"a program of {len(program)} characters")
        passed, first = 0, ""
        for number, test in enumerate(tests):
            problem = self._run(program, test)
            if problem is None:
                passed += 1
                continue
            first = first or f"test {number}: {problem}"
            if self.options.aggregate == "all":
                break
        value = passed / len(tests) if self.options.aggregate == "share" else float(passed == len(tests))
        return Score(
            value=value,
            reason=shorten(first) or f"all {len(tests)} tests pass",
            details={"tests": len(tests), "passed": passed},
        )

    def check_reference(self, reference: JsonValue) -> None:
        _read(reference)

    def program(self, completion: str) -> str | None:
        """The code to run, or None where the completion has none."""
        if self.options.take == "whole":
            return completion
        fences = _FENCE.findall(completion)
        if not fences:
            return None
        return fences[-1] if self.options.take == "last_fence" else "\n".join(fences)

    def _run(self, program: str, test: StdinTest | CallTest | AssertsTest) -> str | None:
        """None if the test passes, else why not."""
        if isinstance(test, StdinTest):
            outcome = sandbox.run_python(program, stdin=test.stdin.encode(), limits=self.options.limits)
            if not outcome.ok:
                return _ending(outcome)
            if _lines(outcome.stdout.decode(errors="replace")) != _lines(test.stdout):
                return "another output"
            return None
        # What the driver says is believed only behind a mark that no earlier run could know. It reaches the driver as standard input.
        mark = secrets.token_hex(16)
        order: dict[str, Any] = {"mark": mark, "program": program}
        if isinstance(test, CallTest):
            order |= {"function": test.function, "args": test.args, "kwargs": test.kwargs}
        else:
            order["asserts"] = test.code
        outcome = sandbox.run_python(DRIVER, stdin=json.dumps(order).encode(), limits=self.options.limits)
        if not outcome.ok:
            return _ending(outcome)
        said = outcome.stdout.decode(errors="replace").rstrip("\n").rpartition("\n")[2]
        if not said.startswith(mark):
            return "left before its result"
        if isinstance(test, AssertsTest):
            return None
        try:
            found = strict_json(said.removeprefix(mark))
        except (ValueError, RecursionError):
            return "a result that is not JSON"
        return None if same_json(found, test.expected) else f"{test.function} gave another result"


def _read(reference: JsonValue) -> list[Any]:
    try:
        return TESTS.validate_python(reference)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(str(p) for p in problem["loc"]) or "tests"
        raise RewardError(shorten(f"reference, {place}: {problem['msg']}")) from None


# Runs inside the sandbox. The program's own prints go to standard error, so that the result stands alone on standard output.
DRIVER = """
import json, os, sys
order = json.loads(sys.stdin.buffer.read())
mark = order.pop("mark")
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
space = {"__name__": "program"}  # a main part that reads its input is for stdin tests
exec(compile(order.pop("program"), "program.py", "exec"), space)
if "asserts" in order:
    exec(compile(order["asserts"], "tests.py", "exec"), space)
    result = None
else:
    result = space[order["function"]](*order["args"], **order["kwargs"])
out.write("\\n" + mark + json.dumps(result, allow_nan=False) + "\\n")
out.flush()
os._exit(0)
"""


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _ending(outcome: sandbox.Outcome) -> str:
    words = {
        "wall_time": "ran past the wall-clock limit",
        "cpu_time": "ran past the CPU limit",
        "output": "wrote more than the output limit",
        "memory": "took more memory than the limit",
        "signal": f"ended by signal {outcome.code}",
        "exit": f"exit status {outcome.code}",
    }[outcome.status]
    last = outcome.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    return f"{words}: {last}" if last else words
