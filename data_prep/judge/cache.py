"""What a judge said, on disk the moment it is known: SQLite, one row per judgement, one per sample and kind of failure."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import DataError
from data_prep.judge.client import Reply, Sampling
from data_prep.judge.config import Rubric
from data_prep.judge.prompt import PROMPT_VERSION
from data_prep.judge.verdict import Answer, BadAnswer, parse_answer
from data_prep.plain_files import digest_of

FORMAT = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS judgements (
  key TEXT PRIMARY KEY, judge TEXT NOT NULL, content TEXT NOT NULL, model TEXT NOT NULL,
  prompt_tokens INTEGER, answer_tokens INTEGER, seconds REAL NOT NULL, attempts INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS failures (
  key TEXT NOT NULL, kind TEXT NOT NULL, count INTEGER NOT NULL, last TEXT NOT NULL, PRIMARY KEY (key, kind)
) WITHOUT ROWID;
"""


def judgement_key(content_sha256: str, rubric: Rubric, model: str, sampling: Sampling) -> str:
    """SHA-256 of all that an answer depends on: the sample's canonical content, what the rubric asks, model, sampling parameters.

    Not the address, which may change; not weights and thresholds, which the verdict is computed with later.
    """
    return digest_of(
        {
            "content": content_sha256,
            "asked": rubric.asked,
            "prompt": PROMPT_VERSION,
            "model": model,
            "sampling": sampling.plain(),
        }
    )


@dataclass(frozen=True)
class Stored:
    answer: Answer
    model: str
    attempts: int
    """Of the run that judged it."""


@dataclass(frozen=True)
class Measured:
    """Means over judgements of one model by one kind of rubric."""

    judgements: int
    prompt_tokens: float | None
    answer_tokens: float | None
    seconds: float


class Cache:
    """Use it in one thread. Each call is committed when it returns: a killed process loses nothing that `store` took. (A power cut may
    lose the last moments' rows, never the file.)"""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._readable():
            self._db = sqlite3.connect(path, isolation_level=None, timeout=30)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version not in (0, FORMAT):
                raise DataError(
                    f"{path}: a cache of format {version}, this is {FORMAT}; give another --cache, or move the file away"
                )
            self._db.executescript(_TABLES)
            self._db.execute(f"PRAGMA user_version = {FORMAT}")

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise DataError(
                f"{self.path}: the cache cannot be used ({error}); free the disk or the lock, or move the file away to begin anew"
            ) from None

    def store(self, key: str, judge: str, reply: Reply, attempts: int) -> None:
        """`judge`: what measured() groups by."""
        row = (key, judge, reply.content, reply.model, reply.prompt_tokens, reply.answer_tokens, reply.seconds, attempts)
        with self._readable():
            self._db.execute("INSERT OR IGNORE INTO judgements VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)

    def failed(self, key: str, kind: str, detail: str) -> None:
        with self._readable():
            self._db.execute(
                "INSERT INTO failures VALUES (?, ?, 1, ?) ON CONFLICT DO UPDATE SET count = count + 1, last = excluded.last",
                (key, kind, detail),
            )

    def holds(self, key: str) -> bool:
        with self._readable():
            return self._db.execute("SELECT 1 FROM judgements WHERE key = ?", (key,)).fetchone() is not None

    def get(self, key: str, rubric: Rubric) -> Stored | None:
        """The stored answer, checked again: a row that was tampered with is refused, not believed."""
        with self._readable():
            row = self._db.execute("SELECT content, model, attempts FROM judgements WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        try:
            return Stored(parse_answer(row[0], rubric), row[1], row[2])
        except BadAnswer as error:
            raise DataError(
                f"{self.path}: row {key} is damaged ({error}); delete it, or move the file away to begin anew"
            ) from None

    def failures(self, key: str) -> dict[str, int]:
        """Kind -> attempts, over all runs."""
        with self._readable():
            return dict(self._db.execute("SELECT kind, count FROM failures WHERE key = ? ORDER BY kind", (key,)).fetchall())

    def last_failure(self, key: str) -> str | None:
        with self._readable():
            row = self._db.execute("SELECT kind, last FROM failures WHERE key = ? ORDER BY count DESC, kind", (key,)).fetchone()
        return f"{row[0]}: {row[1]}" if row else None

    def measured(self, judge: str) -> Measured | None:
        with self._readable():
            row = self._db.execute(
                "SELECT COUNT(*), AVG(prompt_tokens), AVG(answer_tokens), AVG(seconds) FROM judgements WHERE judge = ?",
                (judge,),
            ).fetchone()
        return Measured(*row) if row[0] else None
