"""From a judge's text to a verdict of ours: parsed strictly, checked against what was asked, computed from scores and flags."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from data_prep.judge.config import VERDICTS, Rubric, Verdict

KEYS = ("reason", "scores", "flags", "verdict")
REASON_KEPT_CHARACTERS = 2000
"""Of an explanation, in cache and audit."""


class BadAnswer(Exception):
    """A judge's answer that is no judgement; `kind` is what counts are kept by."""

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


@dataclass(frozen=True)
class Answer:
    """What the judge said, as asked: a score for every dimension, a flag for every hard reject."""

    reason: str
    scores: dict[str, int]
    flags: dict[str, bool]
    verdict: Verdict
    """The judge's own view; nothing depends on it."""

    def plain(self) -> dict[str, Any]:
        return {"reason": self.reason, "scores": self.scores, "flags": self.flags, "verdict": self.verdict}


@dataclass(frozen=True)
class Judged:
    """Our verdict on an answer."""

    verdict: Verdict
    score: float
    """Weighted sum, on the rubric's scale."""
    reason: str
    """What counts are kept by."""
    why: str
    """The flag, floor or threshold that decided."""
    contradiction: bool
    """The judge's own verdict is another one."""


def parse_answer(content: Any, rubric: Rubric) -> Answer:
    """Raises BadAnswer: `malformed JSON` for what is no single JSON object, `wrong schema` for other keys or types, `out of range` for
    scores outside the scale. Nothing is repaired: a judge that does not keep to the form has not judged."""
    if not isinstance(content, str) or not content.strip():
        raise BadAnswer("empty answer", f"content is {'blank' if isinstance(content, str) else type(content).__name__}")
    try:
        value = json.loads(content, object_pairs_hook=_distinct, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise BadAnswer("malformed JSON", str(error)) from None
    _need_keys(value, KEYS, "answer")
    _need_keys(value["scores"], rubric.dimensions, "scores")
    _need_keys(value["flags"], rubric.hard_rejects, "flags")
    if not isinstance(value["reason"], str):
        raise BadAnswer("wrong schema", f"reason is a {type(value['reason']).__name__}")
    if value["verdict"] not in VERDICTS:
        raise BadAnswer("wrong schema", f"verdict is {str(value['verdict'])[:40]!r}")
    low, high = rubric.scale.lowest, rubric.scale.highest
    for name, score in value["scores"].items():
        if isinstance(score, bool) or not isinstance(score, int):
            raise BadAnswer("wrong schema", f"scores.{name} is a {type(score).__name__}, not a whole number")
        if not low <= score <= high:
            raise BadAnswer("out of range", f"scores.{name} is {score}, the scale is {low} to {high}")
    for name, flag in value["flags"].items():
        if not isinstance(flag, bool):
            raise BadAnswer("wrong schema", f"flags.{name} is a {type(flag).__name__}, not true or false")
    try:
        value["reason"].encode()
    except UnicodeEncodeError:
        raise BadAnswer("malformed JSON", "reason holds a lone surrogate") from None
    return Answer(
        value["reason"][:REASON_KEPT_CHARACTERS],
        {name: value["scores"][name] for name in rubric.dimensions},
        {name: value["flags"][name] for name in rubric.hard_rejects},
        value["verdict"],
    )


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key comes twice")
    return value


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _need_keys(value: Any, keys: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise BadAnswer("wrong schema", f"{where} is a {type(value).__name__}, not an object")
    missing, more = [k for k in keys if k not in value], [k for k in value if k not in keys]
    if missing or more:
        parts = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has {', '.join(k[:40] for k in more[:5])}"] * bool(more)
        raise BadAnswer("wrong schema", f"{where} {' and '.join(parts)}")


def judge(answer: Answer, rubric: Rubric) -> Judged:
    """Flags first, then the weighted sum against the thresholds, then floors: a dimension below its floor makes an accept borderline."""
    score = weighted_score(answer.scores, rubric)
    raised = [name for name, flag in answer.flags.items() if flag]
    below = [name for name, d in rubric.dimensions.items() if d.floor is not None and answer.scores[name] < d.floor]
    verdict: Verdict
    if raised:
        verdict, reason, why = "reject", "hard reject", ", ".join(raised)
    elif score < rubric.thresholds.borderline:
        verdict, reason, why = "reject", "low score", f"score {score:.2f} below {rubric.thresholds.borderline:g}"
    elif score < rubric.thresholds.accept:
        verdict, reason, why = "borderline", "middling score", f"score {score:.2f} below {rubric.thresholds.accept:g}"
    elif below:
        verdict, reason, why = "borderline", "below a floor", ", ".join(below)
    else:
        verdict, reason, why = "accept", "good score", f"score {score:.2f}"
    return Judged(verdict, score, reason, why, verdict != answer.verdict)


def weighted_score(scores: dict[str, int], rubric: Rubric) -> float:
    """Sum of weight times score, rounded to 9 digits so that a sum of decimal weights meets a decimal threshold exactly."""
    return round(sum(d.weight * scores[name] for name, d in rubric.dimensions.items()), 9)
