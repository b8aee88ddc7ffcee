"""Equality of mathematical answers by math-verify, inside a worker process that can be killed."""

from __future__ import annotations

import logging
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue

from training.rewards.answers import Place, boxed, final_answer
from training.rewards.base import Options, Reward, RewardError, Sample, Score, need, shorten


class MathOptions(Options):
    """Options of the reward `math`; `reference` of a sample is the answer as text (LaTeX or plain) or a number."""

    time_limit_seconds: Annotated[float, Field(gt=0, le=3600)] = 5.0
    """Of one sample; a first symbolic comparison takes up to 0.2 s, all further ones a millisecond or two."""
    answer_in: Place = "boxed_or_tag"
    """Where the answer stands; `any` also takes the whole completion, and so pays for answers hidden in prose."""
    several_boxed: Literal["last", "refuse"] = "last"
    """`last`: the last \\boxed counts. `refuse`: different boxes score 0, so that guessing cannot pay."""
    answer_max_characters: Annotated[int, Field(gt=0)] = 1000
    """A longer answer scores 0 unread: parsing time grows with length, and no reference is that long."""
    float_rounding: Annotated[int, Field(ge=0, le=15)] = 6
    """Decimals that numbers are rounded to before they are compared."""


class MathAnswer(Reward):
    """1 if the final answer equals the reference as mathematics, else 0."""

    options_type = MathOptions
    options: MathOptions

    def prepare(self) -> None:
        need("math_verify", "math", "math-verify[antlr4_9_3]")
        need("sympy", "math")
        try:
            parsed = self._parse("$\\frac{1}{2}$")
        except ImportError as error:
            raise RewardError(
                f"reward 'math': latex2sympy2_extended does not work here ({error}); "
                "pip install 'math-verify[antlr4_9_3]' (hydra-core needs the antlr4 runtime 4.9.3)"
            ) from error
        if not parsed:
            raise RewardError("reward 'math': math-verify does not parse \\frac{1}{2}; pip install 'math-verify[antlr4_9_3]'")

    def score(self, sample: Sample) -> Score:
        options = self.options
        reference = sample.reference
        self.check_reference(reference)
        if options.several_boxed == "refuse" and len(set(boxed(sample.completion))) > 1:
            return Score(value=0.0, reason=f"{len(set(boxed(sample.completion)))} different \\boxed answers")
        answer = final_answer(sample.completion, options.answer_in)
        if not answer:
            return Score(value=0.0, reason=f"no answer (looked for: {options.answer_in})")
        if len(answer) > options.answer_max_characters:
            return Score(value=0.0, reason=f"answer of {len(answer)} characters, the limit is {options.answer_max_characters}")
        gold = self._parse(_as_math(str(reference)))
        if not gold:
            raise RewardError(f"reference {str(reference)!r} cannot be read as mathematics")
        bare = options.answer_in == "any" and answer == sample.completion.strip()
        found = self._parse(answer) if bare else self._parse(_as_math(answer)) or self._parse(answer)
        if not found:
            return Score(value=0.0, reason=f"answer {shorten(answer, 80)!r} cannot be read as mathematics")
        # Gold first: verify is not symmetric. No time-outs inside: the worker has its own, and these work in the main thread only.
        equal = need("math_verify", "math").verify(gold, found, float_rounding=options.float_rounding, timeout_seconds=None)
        return Score(
            value=float(equal),
            reason="equal" if equal else f"{shorten(answer, 80)!r} is not {shorten(str(reference), 80)!r}",
            details={"answer": shorten(answer, 200)},
        )

    def check_reference(self, reference: JsonValue) -> None:
        if isinstance(reference, bool) or not isinstance(reference, str | int | float) or not str(reference).strip():
            raise RewardError(f"reference must be the answer as text or number, found {shorten(repr(reference), 80)}")

    @staticmethod
    def _parse(text: str) -> list[Any]:
        # It warns once that its time-out is off, which is meant: the worker's own also ends what never returns to Python.
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        parsed = need("math_verify", "math").parse(text, parsing_timeout=None)
        # Text that it could not read comes back as it is. Division by zero ("3:00" is one to it) equals every other.
        undefined = (need("sympy", "math").zoo, need("sympy", "math").nan)
        known = [one for one in parsed if not isinstance(one, str)]
        return parsed if known and not any(one in undefined for one in known) else []


def _as_math(text: str) -> str:
    """The text between $ signs, unless it has its own: math-verify then reads the whole of it as one expression."""
    # An escaped percent sign is dropped by the LaTeX reader, a bare one divides by 100: 10\\% is 0.1 too.
    text = text.strip().replace("\\%", "%")
    return text if text.startswith(("$", "\\(", "\\[")) else f"${text}$"
