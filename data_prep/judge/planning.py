"""First pass: every line of the input is read, repaired and held against the rules; what is left is what the judge will be asked about.

The result is a table on disk (4 million samples with their digests are no load for memory), one row per line, in the order of the input.
It is made anew in every run: rules cost little, and a changed rule must count.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import DataError
from data_prep.judge import prompt
from data_prep.judge.cache import judgement_key
from data_prep.judge.client import Sampling
from data_prep.judge.config import Curation, Rubric
from data_prep.judge.duplicates import Leakage, NearDuplicateSearch
from data_prep.judge.rules import Finding, first_finding
from data_prep.judge.samples import Line, Sample, normalise, read_lines, typed
from data_prep.progress import Progress

BATCH_SAMPLES = 512
"""Searched for leakage together."""
DETAIL_CHARACTERS = 500
JUDGE = "judge"
"""The step of samples that passed every rule."""
STEPS = (
    "readable",
    "schema",
    "turn_order",
    "lengths",
    "control_tokens",
    "tool_calls",
    "leakage",
    "exact_duplicates",
    "near_duplicates",
    JUDGE,
)
"""In their order; a sample is decided by the first that refuses it."""
AUTO_RUBRICS = {
    "tools": "tool_calling",
    "documents": "rag",
    "language": "multilingual",
    "turns": "multi_turn",
    "else": "general",
}
_TABLE = """
CREATE TABLE plan (
  number INTEGER PRIMARY KEY, id TEXT NOT NULL, file TEXT NOT NULL, line INTEGER NOT NULL, digest TEXT, repairs TEXT NOT NULL,
  step TEXT NOT NULL, reason TEXT, detail TEXT, rubric TEXT, key TEXT, prompt_bytes INTEGER, prompt_tokens INTEGER
);
CREATE TABLE firsts (digest TEXT PRIMARY KEY, number INTEGER NOT NULL) WITHOUT ROWID;
"""
_COLUMNS = "number, id, file, line, digest, repairs, step, reason, detail, rubric, key, prompt_bytes, prompt_tokens"


@dataclass(frozen=True)
class Row:
    """What the first pass found out about a line."""

    number: int
    id: str
    file: str
    line: int
    digest: str | None
    """Of its content; None where it has none."""
    repairs: tuple[str, ...]
    step: str
    reason: str | None
    detail: str | None
    rubric: str | None
    key: str | None
    """Of the cache; for samples that the judge decides."""
    prompt_bytes: int
    prompt_tokens: int


class Rubrics:
    """One rubric for all samples, or with `auto` the one that fits a sample's shape."""

    def __init__(self, rubrics: dict[str, Rubric], chosen: str):
        self.all, self._chosen = rubrics, chosen

    def of(self, sample: Sample, value: dict[str, Any]) -> Rubric:
        return self.all[auto_rubric(sample, value) if self._chosen == "auto" else self._chosen]


def auto_rubric(sample: Sample, value: dict[str, Any]) -> str:
    """tool_calling with tools, rag with documents, multilingual where the sample's key `language` names another than English,
    multi_turn with several questions, else general; the first that fits."""
    language = value.get("language")
    if sample.tools:
        return AUTO_RUBRICS["tools"]
    if sample.documents:
        return AUTO_RUBRICS["documents"]
    if isinstance(language, str) and language.lower().split("-")[0] not in ("en", "eng", "english", ""):
        return AUTO_RUBRICS["language"]
    return AUTO_RUBRICS["turns" if sum(m.role == "user" for m in sample.messages) > 1 else "else"]


@dataclass(frozen=True)
class Tokens:
    """How prompts are counted before the endpoint counts them."""

    encode: Any = None
    """A function from a text to its tokens; None: by characters."""
    characters_each: float = 3.5
    """Of English prose and code per token, rounded down: the estimate should rather be too high. CJK text has more tokens."""

    def count(self, text: str) -> int:
        return len(self.encode(text)) if self.encode is not None else int(len(text) / self.characters_each) + 1


class Plan:
    """The table; use it in one thread."""

    def __init__(self, path: Path):
        path.unlink(missing_ok=True)
        self.path = path
        # Made anew in every run, so nothing of it must survive a crash.
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.executescript(_TABLE)
        self._db.execute("BEGIN")

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *error: Any) -> None:
        self._db.close()
        self.path.unlink(missing_ok=True)

    def add(self, row: Row) -> None:
        values = (row.number, row.id, row.file, row.line, row.digest, json.dumps(row.repairs), row.step, row.reason, row.detail)
        more = (row.rubric, row.key, row.prompt_bytes, row.prompt_tokens)
        self._db.execute(f"INSERT INTO plan ({_COLUMNS}) VALUES ({', '.join('?' * 13)})", (*values, *more))

    def first(self, digest: str, number: int) -> int:
        """The number of the first sample of this content, which is this one if none came before."""
        self._db.execute("INSERT OR IGNORE INTO firsts VALUES (?, ?)", (digest, number))
        return self._db.execute("SELECT number FROM firsts WHERE digest = ?", (digest,)).fetchone()[0]

    def refuse(self, number: int, step: str, reason: str, detail: str) -> None:
        """A sample that had been for the judge is not."""
        self._db.execute(
            "UPDATE plan SET step = ?, reason = ?, detail = ?, rubric = NULL, key = NULL WHERE number = ? AND step = ?",
            (step, reason, detail, number, JUDGE),
        )

    def rows(self) -> Iterator[Row]:
        cursor = self._db.cursor()
        for values in cursor.execute(f"SELECT {_COLUMNS} FROM plan ORDER BY number"):
            row = Row(*values)
            yield Row(*values[:5], tuple(json.loads(row.repairs)), *values[6:])

    def id_of(self, number: int) -> str:
        return self._db.execute("SELECT id FROM plan WHERE number = ?", (number,)).fetchone()[0]

    def repeated_id(self) -> str | None:
        """An id that two samples have."""
        row = self._db.execute("SELECT id FROM plan GROUP BY id HAVING COUNT(*) > 1 LIMIT 1").fetchone()
        return row[0] if row else None

    def asked(self) -> Iterator[tuple[str, int, int, str]]:
        """(key, prompt's bytes, prompt's tokens, rubric) of what the judge decides, each key once."""
        cursor = self._db.cursor()
        yield from cursor.execute(
            "SELECT key, MIN(prompt_bytes), MIN(prompt_tokens), MIN(rubric) FROM plan WHERE step = ? GROUP BY key ORDER BY MIN(number)",
            (JUDGE,),
        )


@dataclass(frozen=True)
class Planner:
    """What the first pass needs to know."""

    curation: Curation
    rubrics: Rubrics
    model: str
    sampling: Sampling
    tokens: Tokens

    def run(self, paths: Sequence[Path], plan: Plan, progress: Progress) -> None:
        """Fill the table; DataError for a benchmark that cannot be read."""
        leakage = Leakage(self.curation) if self.curation.decontamination is not None else None
        near = NearDuplicateSearch(self.curation.near_duplicates) if self.curation.near_duplicates is not None else None
        with progress.step("rules", sum(path.stat().st_size for path in paths) if _plain(paths) else None) as done:
            for batch in _batches(read_lines(paths)):
                samples = [self._read(line) for line in batch]
                asked = [i for i, (sample, *_) in enumerate(samples) if isinstance(sample, Sample)]
                hits = leakage.find([samples[i][0] for i in asked]) if leakage is not None else [None] * len(asked)
                found = dict(zip(asked, hits, strict=True))
                for i, (line, (sample, value, repairs, step, finding)) in enumerate(zip(batch, samples, strict=True)):
                    row = self._row(plan, line, sample, value, repairs, step, finding, found.get(i))
                    plan.add(row)
                    if near is not None and row.step == JUDGE:
                        near.add(row.number, sample)
                done(sum(len(line.raw) + 1 for line in batch), len(batch))
            for number, stays in (near.duplicates() if near is not None else {}).items():
                plan.refuse(number, "near_duplicates", "similar sample", f"like {plan.id_of(stays)}")

    def _read(self, line: Line) -> tuple[Sample | None, dict[str, Any], list[str], str, Finding | None]:
        """(sample or None, normalised object, repairs, step that refuses it or JUDGE, why)"""
        if line.value is None:
            return None, {}, [], "readable", Finding((line.bad or "").split(":")[0].split(" at ")[0], line.bad or "")
        value, repairs = normalise(line.value, self.curation.unicode_form)
        sample = typed(value)
        if isinstance(sample, str):
            return None, value, repairs, "schema", Finding("schema", sample)
        if refused := first_finding(sample, self.curation):
            return sample, value, repairs, *refused
        return sample, value, repairs, JUDGE, None

    def _row(
        self,
        plan: Plan,
        line: Line,
        sample: Sample | None,
        value: dict[str, Any],
        repairs: list[str],
        step: str,
        finding: Finding | None,
        leak: Finding | None,
    ) -> Row:
        digest = sample.sha256 if sample is not None else None
        if step == JUDGE and leak is not None:
            step, finding = "leakage", leak
        if step == JUDGE and self.curation.exact_duplicates:
            assert digest is not None
            if (first := plan.first(digest, line.number)) != line.number:
                step, finding = "exact_duplicates", Finding("equal sample", f"equals {plan.id_of(first)}")
        rubric = key = None
        size_bytes = tokens = 0
        if step == JUDGE:
            assert sample is not None
            assert digest is not None
            rubric = self.rubrics.of(sample, value)
            key = judgement_key(digest, rubric, self.model, self.sampling)
            text = "\n".join(m["content"] for m in prompt.messages(sample, rubric))
            size_bytes, tokens = len(text.encode()), self.tokens.count(text)
        return Row(
            line.number,
            line.id.encode("utf-8", "replace").decode(),
            line.file,
            line.line,
            digest,
            tuple(repairs),
            step,
            finding.reason if finding else None,
            _shown(finding.detail) if finding else None,
            rubric.name if rubric else None,
            key,
            size_bytes,
            tokens,
        )


def again(
    paths: Sequence[Path], plan: Plan, curation: Curation, wanted: Callable[[Row], bool] = lambda row: True
) -> Iterator[tuple[Row, Line, dict[str, Any], Sample | None] | None]:
    """The lines of the input once more beside their rows, None for those not wanted; DataError when they are not those of the plan."""
    lines = read_lines(paths)
    for row in plan.rows():
        line = next(lines, None)
        if line is not None and not wanted(row):
            yield None
            continue
        value, sample = {}, None
        if line is not None and line.value is not None:
            value, _ = normalise(line.value, curation.unicode_form)
            sample = found if isinstance(found := typed(value), Sample) else None
        if line is None or (line.file, line.line) != (row.file, row.line) or (sample.sha256 if sample else None) != row.digest:
            raise DataError(f"{row.file}, line {row.line}: changed while it was judged; run the command again")
        yield row, line, value, sample
    if next(lines, None) is not None:
        raise DataError("the input grew while it was judged; run the command again")


def _batches(lines: Iterator[Line]) -> Iterator[list[Line]]:
    batch: list[Line] = []
    for line in lines:
        batch.append(line)
        if len(batch) == BATCH_SAMPLES:
            yield batch
            batch = []
    if batch:
        yield batch


def _shown(detail: str) -> str:
    """A sample's words in its audit: short, and Unicode."""
    return detail[:DETAIL_CHARACTERS].encode("utf-8", "replace").decode()


def _plain(paths: Sequence[Path]) -> bool:
    return not any(path.suffix in (".gz", ".zst") for path in paths)
