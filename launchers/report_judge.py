"""What a report shows of the curation before fine-tuning: the records that the judge's work left (data_prep/judge/records.py)."""

from __future__ import annotations

from html import escape
from pathlib import Path

from launchers.jsonl import Row, read_json

OUTCOMES = ("accepted", "borderline", "rejected", "unjudged")
FORMAT = "quarry.judged/1"


def judged(folder: Path) -> str:
    """A table over the sources below `folder` that went through rules and judge, and what each judge's verdicts are worth; else empty."""
    records = {path.parent.name: read_json(path) for path in sorted(folder.glob("*/record.json"))}
    known = {source: record for source, record in records.items() if record is not None and record.get("format") == FORMAT}
    if not known:
        return ""
    rows = "".join(_row(source, record) for source, record in known.items())
    head = "".join(f"<th>{name}</th>" for name in ("samples", *OUTCOMES, "contradictions"))
    worth = dict.fromkeys(_worth(record.get("judge") or {}) for record in known.values())
    return (
        f'<h3>Curation <span class="soft">by rules, then a judge</span></h3><div class="scroll"><table><tr><th class="l">source</th>{head}'
        f'<th class="l">judge</th><th class="l">decided by</th></tr>{rows}</table></div>'
        + "".join(f'<p class="caption">{escape(sentence)}</p>' for sentence in worth)
    )


def _worth(judge: Row) -> str:
    return f"What the verdicts of {judge.get('model', '?')} prove: {judge.get('proves', 'not recorded')}."


def _row(source: str, record: Row) -> str:
    outcomes, judge = record.get("outcomes") or {}, record.get("judge") or {}
    contradictions = sum(rubric.get("contradictions", 0) for rubric in (record.get("rubrics") or {}).values())
    cells = "".join(f"<td>{escape(str(n))}</td>" for n in (record.get("samples"), *(outcomes.get(o, 0) for o in OUTCOMES)))
    decided = "; ".join(
        f"{step}: {reason} {count}"
        for step, reasons in (record.get("steps") or {}).items()
        for reason, count in reasons.items()
    )
    return (
        f'<tr><td class="l">{escape(source)}</td>{cells}<td>{contradictions}</td><td class="l">{escape(str(judge.get("model", "-")))}</td>'
        f'<td class="l wrap soft">{escape(decided)}</td></tr>'
    )
