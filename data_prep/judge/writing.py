"""Last pass: every line of the input goes to exactly one of four files, with one line in the audit; then the counts must add up."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.files import FileRecord, atomic_write, record_file
from data_prep.judge.cache import Cache
from data_prep.judge.config import Curation, Rubric, Verdict
from data_prep.judge.planning import JUDGE, Plan, Row, again
from data_prep.judge.records import OUTCOME_OF, OUTCOMES, AuditLine, DimensionScores, Outcome, RubricRecord
from data_prep.judge.samples import Line, Sample
from data_prep.judge.verdict import judge
from data_prep.progress import Progress
from data_prep.text_files import MAX_BAD_FREE, MAX_BAD_PERCENT

UNREADABLE_CHARACTERS = 1 << 20
"""Of a line that is no JSON object, in rejected.jsonl; the whole of it is where it was."""
CONSTANT_FROM_SAMPLES = 50
"""From so many judged samples on it is said when all have the same scores."""


@dataclass
class Tally:
    """Counts of the last pass."""

    samples: int = 0
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    steps: dict[str, Counter[str]] = field(default_factory=dict)
    repairs: Counter[str] = field(default_factory=Counter)
    answered_as: Counter[str] = field(default_factory=Counter)
    rubrics: dict[str, RubricTally] = field(default_factory=dict)
    labelled: list[tuple[Verdict, Verdict]] = field(default_factory=list)
    labels_seen: Counter[str] = field(default_factory=Counter)
    """not judged, refused by rules, judged"""


@dataclass
class RubricTally:
    judged: int = 0
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    scores: dict[str, Counter[int]] = field(default_factory=dict)
    flags: Counter[str] = field(default_factory=Counter)
    contradictions: int = 0
    answers: set[str] = field(default_factory=set)
    """Distinct scores and flags, up to two."""

    def record(self, rubric: Rubric) -> RubricRecord:
        return RubricRecord(
            sha256=rubric.sha256,
            judged=self.judged,
            outcomes={outcome: self.outcomes[outcome] for outcome in OUTCOMES if outcome != "unjudged"},
            scores={
                name: DimensionScores(
                    mean=sum(score * n for score, n in counts.items()) / counts.total(),
                    distribution={str(score): counts[score] for score in range(rubric.scale.lowest, rubric.scale.highest + 1)},
                )
                for name, counts in self.scores.items()
            },
            flags={name: self.flags[name] for name in rubric.hard_rejects},
            contradictions=self.contradictions,
        )


def write_outputs(
    folder: Path,
    paths: Sequence[Path],
    plan: Plan,
    cache: Cache,
    curation: Curation,
    rubrics: dict[str, Rubric],
    labels: dict[str, Verdict],
    given_up: str | None,
    progress: Progress,
) -> tuple[Tally, dict[str, FileRecord]]:
    """accepted, borderline, rejected, unjudged and audit .jsonl; DataError when the input is not that of the plan any more."""
    tally = Tally()
    names = [*OUTCOMES, "audit"]
    with ExitStack() as stack, progress.step("write", None) as done:
        files = {name: stack.enter_context(atomic_write(folder / f"{name}.jsonl")) for name in names}
        for found in again(paths, plan, curation):
            assert found is not None
            row, line, value, sample = found
            audit = _audit(row, cache, rubrics, given_up, tally)
            written = (
                _json_line(_carried(line, value, sample))
                if audit.outcome != "rejected" or line.value is not None
                else _unreadable(line)
            )
            files[audit.outcome].write(written)
            files["audit"].write(_json_line(audit.model_dump(mode="json", exclude_none=True)))
            tally.samples += 1
            tally.outcomes[audit.outcome] += 1
            tally.steps.setdefault(audit.step, Counter())[audit.reason] += 1
            tally.repairs.update(audit.repairs)
            _note_label(row, audit, labels, tally)
            done(len(written), 1)
    return tally, {f"{name}.jsonl": record_file(folder / f"{name}.jsonl") for name in names}


def _audit(row: Row, cache: Cache, rubrics: dict[str, Rubric], given_up: str | None, tally: Tally) -> AuditLine:
    common: dict[str, Any] = {
        "number": row.number,
        "id": row.id,
        "file": row.file,
        "line": row.line,
        "content_sha256": row.digest,
        "repairs": list(row.repairs),
        "step": row.step,
    }
    if row.step != JUDGE:
        return AuditLine(**common, outcome="rejected", reason=row.reason, detail=row.detail)
    assert row.rubric is not None
    assert row.key is not None
    rubric = rubrics[row.rubric]
    common |= {"rubric": row.rubric, "key": row.key, "failures": cache.failures(row.key)}
    stored = cache.get(row.key, rubric)
    if stored is None:
        last = cache.last_failure(row.key)
        reason = "no judgement" if last else "not asked"
        detail = "; ".join(part for part in (last, given_up and f"the judge was given up: {given_up}") if part)
        return AuditLine(**common, outcome="unjudged", reason=reason, detail=detail or "no attempt was made")
    answer, judged = stored.answer, judge(stored.answer, rubric)
    audit = AuditLine(
        **common,
        outcome=OUTCOME_OF[judged.verdict],
        reason=judged.reason,
        detail=judged.why,
        score=judged.score,
        scores=answer.scores,
        flags=answer.flags,
        judge_verdict=answer.verdict,
        contradiction=judged.contradiction,
        explanation=answer.reason,
        attempts=stored.attempts,
    )
    tally.answered_as[stored.model] += 1
    counts = tally.rubrics.setdefault(row.rubric, RubricTally())
    counts.judged += 1
    counts.outcomes[audit.outcome] += 1
    counts.contradictions += judged.contradiction
    for name, score in answer.scores.items():
        counts.scores.setdefault(name, Counter())[score] += 1
    counts.flags.update(name for name, flag in answer.flags.items() if flag)
    if len(counts.answers) < 2:
        counts.answers.add(json.dumps([answer.scores, answer.flags]))
    return audit


def _note_label(row: Row, audit: AuditLine, labels: dict[str, Verdict], tally: Tally) -> None:
    label = labels.get(row.id)
    if label is None:
        return
    if audit.step != JUDGE:
        tally.labels_seen["refused by rules"] += 1
    elif audit.outcome == "unjudged":
        tally.labels_seen["unjudged"] += 1
    else:
        tally.labels_seen["judged"] += 1
        tally.labelled.append((label, next(v for v, outcome in OUTCOME_OF.items() if outcome == audit.outcome)))


def _carried(line: Line, value: dict[str, Any], sample: Sample | None) -> dict[str, Any]:
    """The sample as it goes on: its own keys, with id, and the messages, tools and documents as repaired and typed."""
    if sample is None:
        return _refused(line, value)
    rest = {key: v for key, v in value.items() if key not in ("messages", "tools", "documents")}
    return {"id": line.id, **rest, **sample.plain()}


def _refused(line: Line, value: dict[str, Any]) -> dict[str, Any]:
    """What the schema refused, as it came, under the id that the audit has."""
    return value if str(value.get("id")) == line.id else {**value, "id": line.id, "given_id": value.get("id")}


def _unreadable(line: Line) -> bytes:
    return _json_line({"id": line.id, "unreadable": line.raw.decode("utf-8", "backslashreplace")[:UNREADABLE_CHARACTERS]})


def _json_line(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate, in a sample that was refused for it or in a key that is only carried
        return json.dumps(value, allow_nan=False).encode() + b"\n"


def warnings_of(tally: Tally, given_up: str | None) -> list[str]:
    """What a person should look at before using the result."""
    found = [f"the judge was given up: {given_up}"] if given_up else []
    if tally.outcomes["unjudged"]:
        found.append(f"{tally.outcomes['unjudged']} samples are unjudged; run the command again to ask about them")
    no_samples = sum(sum(tally.steps.get(step, {}).values()) for step in ("readable", "schema"))
    if no_samples > MAX_BAD_FREE and 100 * no_samples > MAX_BAD_PERCENT * tally.samples:
        found.append(f"{no_samples} of {tally.samples} lines hold no sample of the right form: is this the right file?")
    for name, counts in tally.rubrics.items():
        if counts.judged >= CONSTANT_FROM_SAMPLES and len(counts.answers) == 1:
            found.append(
                f"rubric {name}: all {counts.judged} samples got the same scores and flags: this judge does not tell them apart"
            )
    return found
