"""What a report shows of `quarry eval`: results.json of training/evaluation, wherever a run has one. Read as plain JSON, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from launchers import text
from launchers.jsonl import Row, finite, read_json
from launchers.progress import RunProgress
from launchers.report_posttrain import Section
from recipes.needle_table import TITLE, needle_table

FORMAT = "quarry.evaluation/1"
SIZES = ("3B", "8B", "30B")
NOT_COMPARABLE = {"differs": "no: settings differ", "none": "no: nothing published"}
PUBLISHED = (
    "3B, 8B and 30B: the publisher's own numbers ({by}) for the publisher's models, never measured here. close: the same benchmark, as many "
    "examples and the same kind of answer, while the publisher's prompts and code are unknown; a few points of difference mean nothing."
)


def evaluations(progress: RunProgress) -> Iterator[Section]:
    """One for each results.json in the run's folder, in a stage's, or beside a stage (where `quarry eval` writes it)."""
    for path in _results(progress.run.path):
        results = read_json(path)
        if results is None or results.get("format") != FORMAT:
            continue
        model = results.get("model") or {}
        words = [str(model.get("given", "?")), f"{results.get('device')}, {results.get('dtype')}", str(path)]
        parts = [_benchmarks(results), _heldout(results.get("heldout")), _needle(results.get("needle"))]
        name = path.parent.name
        yield Section(f"Evaluation: {name.removesuffix('-eval')}", escape("; ".join(words)), "".join(p for p in parts if p))


def _results(run: Path) -> list[Path]:
    return sorted(path for pattern in ("results.json", "*/results.json", "stages/*/results.json") for path in run.glob(pattern))


def _benchmarks(results: Row) -> str:
    """Ours beside what was published. A row without a measurement of ours says why there is none."""
    out = []
    rows = [row for row in results.get("benchmarks") or [] if isinstance(row, dict)]
    for suite in dict.fromkeys(str(row.get("suite")) for row in rows):
        mine = [row for row in rows if str(row.get("suite")) == suite]
        by = next((str(row["published_by"]) for row in mine if row.get("published_by")), "")
        lines = [_benchmark(row) for row in mine]
        headings = (
            "benchmark",
            "ours, %",
            *(f"published {size}" for size in SIZES),
            "setting of ours",
            "of the published",
            "comparable",
        )
        note = PUBLISHED.format(by=by) if by else "Nothing published compares with it."
        out.append(_table(f"Benchmarks: {suite}", headings, lines, note, left=(0, 5, 6, 7)))
    return "".join(out)


def _benchmark(row: Row) -> list[str]:
    ours, error = finite(row.get("ours_percent")), finite(row.get("ours_stderr_percent"))
    published = row.get("published_percent") or {}
    verdict = str(row.get("note") or "")
    if ours is not None:
        word = str(row.get("comparable"))
        verdict = NOT_COMPARABLE.get(word, word) + (f" ({verdict})" if verdict else "")
    return [
        str(row.get("title")),
        "-" if ours is None else f"{ours:.2f}" + ("" if error is None else f" ± {error:.2f}"),
        *("" if finite(published.get(size.lower())) is None else f"{published[size.lower()]:.2f}" for size in SIZES),
        str(row.get("ours_setting") or ""),
        str(row.get("published_setting") or ""),
        verdict,
    ]


def _heldout(heldout: Row | None) -> str:
    if not heldout:
        return ""
    megatron, other = heldout.get("megatron") or {}, heldout.get("transformers") or {}
    lines = [[category, text.loss(finite(megatron.get(category))), text.loss(finite(other[category]))] for category in other]
    check = heldout.get("agreement")
    note = "From the Hugging Face folder only: there is no Megatron checkpoint to check it against."
    if check:
        words = "They agree" if check.get("agrees") else "They DO NOT AGREE"
        note = f"{words}: at most {check.get('difference_nats'):.2e} nats apart, tolerance {check.get('tolerance_nats'):g}."
    return _table("Held-out loss, nats per token", ("category", "Megatron", "transformers"), lines, note)


def _needle(needle: Row | None) -> str:
    if not needle:
        return ""
    return _table(TITLE, *needle_table(needle))


def _table(title: str, headings: Sequence[str], lines: Sequence[Sequence[Any]], note: str, left: Sequence[int] = (0,)) -> str:
    def css(number: int) -> str:
        return "l wrap" if number in left and number else "l" if number in left else ""

    head = "".join(f'<th class="{css(i)}">{escape(heading)}</th>' for i, heading in enumerate(headings))
    rows = "".join(
        "<tr>" + "".join(f'<td class="{css(i)}">{escape(str(cell))}</td>' for i, cell in enumerate(line)) + "</tr>"
        for line in lines
    )
    return f'<h3>{escape(title)}</h3><div class="scroll"><table><tr>{head}</tr>{rows}</table></div><p class="caption">{escape(note)}</p>'
