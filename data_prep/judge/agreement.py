"""How far a judge agrees with people: confusion table, agreement, Cohen's kappa, precision and recall per verdict."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from data_prep.errors import DataError
from data_prep.files import Strict
from data_prep.judge.config import VERDICTS, Verdict
from data_prep.records import Count


class PerVerdict(Strict):
    labelled: Count
    judged: Count
    agreed: Count
    precision: float | None
    """Of the samples with this verdict, the share that people gave it too; None where there are none."""
    recall: float | None
    """Of the samples that people gave it, the share with this verdict."""


class Agreement(Strict):
    samples: Count
    """Labelled and judged."""
    confusion: dict[Verdict, dict[Verdict, Count]]
    """Label -> verdict -> samples."""
    agreement: float | None
    """Share of samples whose verdict is their label; None without samples."""
    expected: float | None
    """Agreement that chance would bring, given how often each side says what."""
    kappa: float | None
    """(agreement - expected) / (1 - expected); None where both sides always say the same one thing."""
    weighted_kappa: float | None
    """With linear weights: accept against reject counts twice as much as either against borderline."""
    verdicts: dict[Verdict, PerVerdict]
    labelled_unjudged: Count = 0
    labelled_refused_by_rules: Count = 0
    labelled_not_in_input: Count = 0


def read_labels(path: Path) -> dict[str, Verdict]:
    """Labels of a JSON-lines file of {"id": ..., "verdict": accept | borderline | reject}; DataError with line and remedy."""
    labels: dict[str, Verdict] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--labels {path}: cannot be read ({error})") from None
    for number, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        try:
            value = json.loads(raw)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}); a label is one JSON object a line") from None
        given = value.get("id") if isinstance(value, dict) else None
        if not isinstance(given, str | int) or isinstance(given, bool) or value.get("verdict") not in VERDICTS:
            raise DataError(f'{path}, line {number}: must be {{"id": ID, "verdict": one of {", ".join(VERDICTS)}}}')
        if labels.get(str(given), value["verdict"]) != value["verdict"]:
            raise DataError(f"{path}, line {number}: {given} has two labels; keep one")
        labels[str(given)] = value["verdict"]
    if not labels:
        raise DataError(f"--labels {path}: no label in it")
    return labels


def agreement(pairs: Iterable[tuple[Verdict, Verdict]], **counts: int) -> Agreement:
    """From (label, verdict) of each sample. Kappa: Cohen 1960, "A coefficient of agreement for nominal scales"; weighted: Cohen 1968,
    with disagreement |i - j| over the order accept, borderline, reject. `counts` are the other labelled samples."""
    table = {label: dict.fromkeys(VERDICTS, 0) for label in VERDICTS}
    for label, verdict in pairs:
        table[label][verdict] += 1
    n = sum(sum(row.values()) for row in table.values())
    rows = {v: sum(table[v].values()) for v in VERDICTS}
    columns = {v: sum(table[label][v] for label in VERDICTS) for v in VERDICTS}
    agreed = sum(table[v][v] for v in VERDICTS)
    observed_gap = sum(abs(i - j) * table[a][b] for i, a in enumerate(VERDICTS) for j, b in enumerate(VERDICTS))
    expected_gap = sum(abs(i - j) * rows[a] * columns[b] for i, a in enumerate(VERDICTS) for j, b in enumerate(VERDICTS))
    by_chance = sum(rows[v] * columns[v] for v in VERDICTS)  # times n squared, in whole numbers until the last step
    return Agreement(
        samples=n,
        confusion=table,
        agreement=agreed / n if n else None,
        expected=by_chance / n**2 if n else None,
        kappa=(agreed * n - by_chance) / (n**2 - by_chance) if n and by_chance != n**2 else None,
        weighted_kappa=1 - observed_gap * n / expected_gap if expected_gap else None,
        verdicts={
            v: PerVerdict(
                labelled=rows[v],
                judged=columns[v],
                agreed=table[v][v],
                precision=table[v][v] / columns[v] if columns[v] else None,
                recall=table[v][v] / rows[v] if rows[v] else None,
            )
            for v in VERDICTS
        },
        **counts,
    )
