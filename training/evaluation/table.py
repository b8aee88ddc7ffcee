"""What was measured as rows beside what was published, and those rows as a terminal's table, as Markdown and as JSON.

A published number never stands in the column of ours: a row without a measurement says why there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from recipes.needle_table import TITLE, needle_table
from training.evaluation.suite import SIZES, Suite

COMPARABLE = {
    "close": "close",
    "differs": "no: settings differ",
    "none": "no: nothing published",
}
HEADINGS = ("benchmark", "ours", "setting of ours", "published 3B", "8B", "30B", "setting of the published", "comparable")
FOOTNOTE = (
    "Columns 3B, 8B and 30B are the publisher's own numbers for the publisher's models, never measured here. `close`: the same benchmark, "
    "as many examples and the same kind of answer, while the publisher's prompts and code are unknown; a few points of difference mean nothing."
)


@dataclass(frozen=True, kw_only=True)
class Row:
    suite: str
    benchmark: str
    title: str
    ours_percent: float | None
    """Measured here, 0 to 100; None: not measured, `note` says why."""
    ours_stderr_percent: float | None
    ours_setting: str
    published_percent: dict[str, float] | None
    """By model size, of the publisher's models."""
    published_setting: str
    published_by: str
    comparable: str
    note: str


def rows(suite: Suite, measured: dict[str, dict[str, Any]], skipped: Sequence[str] = ()) -> list[Row]:
    """One row per benchmark of `suite`, in its order; `measured`: benchmark -> result of training.evaluation.harness.parse."""
    out = []
    for name in [*suite.benchmarks, *(n for n in suite.run if n not in suite.benchmarks)]:
        published, run, result = suite.benchmarks.get(name), suite.run.get(name), measured.get(name)
        value = None if result is None else result["value"]
        error = None if result is None else result["stderr"]
        if run is None:
            note, comparable = f"not measured: {suite.not_run[name]}", "none"
        elif result is None:
            note, comparable = "not measured: --skip" if name in skipped else "not measured", run.comparable
        else:
            note, comparable = run.why, run.comparable
            if result["limit"] is not None:
                note, comparable = f"only {result['limit']} documents per task (--limit): no result", "none"
            if value is None:
                shown = ", ".join(f"{k} {v:.4g}" for k, v in result["metrics"].items())
                note = f"{shown} ({note})"
        out.append(
            Row(
                suite=suite.name,
                benchmark=name,
                title=published.title if published else name,
                ours_percent=None if value is None else 100 * value,
                ours_stderr_percent=None if error is None or value is None else 100 * error,
                ours_setting="" if run is None else _setting(run.task, run.metric, result),
                published_percent=dict(published.percent) if published else None,
                published_setting=published.setting if published else "",
                published_by=suite.published_by,
                comparable=comparable,
                note=note,
            )
        )
    return out


def _setting(task: str, metric: str, result: dict[str, Any] | None) -> str:
    if result is None:
        return task
    shots = sorted({t["shots"] for t in result["tasks"].values()})
    return f"{task}, {'/'.join(map(str, shots))}-shot{', ' + metric if metric else ''}"


def _cells(row: Row) -> list[str]:
    error = "" if row.ours_stderr_percent is None else f" ± {row.ours_stderr_percent:.2f}"
    ours = "-" if row.ours_percent is None else f"{row.ours_percent:.2f}{error}"
    published = [f"{row.published_percent[size]:.2f}" if row.published_percent else "" for size in SIZES]
    if row.ours_percent is None:
        verdict = row.note
    else:
        verdict = COMPARABLE[row.comparable] if row.published_percent or row.comparable == "none" else row.comparable
        verdict += f" ({row.note})" if row.note else ""
    return [row.title, ours, row.ours_setting, *published, row.published_setting, verdict]


def markdown_table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    clean = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in (headings, *lines)]
    out = ["| " + " | ".join(line) + " |" for line in clean]
    return "\n".join([out[0], "|" + " --- |" * len(headings), *out[1:]])


def _heldout_lines(heldout: dict[str, Any]) -> list[list[str]]:
    mine, theirs = heldout.get("megatron") or {}, heldout["transformers"]
    return [[c, f"{mine[c]:.6f}" if c in mine else "-", f"{theirs[c]:.6f}"] for c in theirs]


def sections(results: dict[str, Any]) -> list[tuple[str, Sequence[str], list[list[str]], str]]:
    """(title, headings, lines, note) of each table of results.json."""
    out: list[tuple[str, Sequence[str], list[list[str]], str]] = []
    if (heldout := results.get("heldout")) is not None:
        check = heldout["agreement"]
        note = "from the Hugging Face folder only; there is no Megatron checkpoint to check it against"
        if check is not None:
            words = "agree" if check["agrees"] else "DO NOT AGREE"
            note = f"{words}: at most {check['difference_nats']:.2e} nats apart ({check['category']}), tolerance {check['tolerance_nats']:g}"
        note += f"; {heldout['samples']} sequences of {heldout['seq_length_tokens']} tokens per category at most"
        out.append(
            ("Held-out loss, nats per token", ("category", "Megatron", "transformers"), _heldout_lines(heldout), f"{note}.")
        )
    if (needle := results.get("needle")) is not None:
        out.append((TITLE, *needle_table(needle)))
    for suite in dict.fromkeys(row["suite"] for row in results["benchmarks"]):
        lines = [_cells(Row(**row)) for row in results["benchmarks"] if row["suite"] == suite]
        by = next((row["published_by"] for row in results["benchmarks"] if row["suite"] == suite), "")
        note = f"Published by {by}. {FOOTNOTE}" if by else "Nothing published compares with it."
        out.append((f"Benchmarks: {suite}, percent", HEADINGS, lines, note))
    return out


def as_dicts(table: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in table]


def markdown(results: dict[str, Any]) -> str:
    """The whole of results.json for people."""
    model = results["model"]
    out = [
        f"# Evaluation of {model['name'] or model['given']}\n",
        f"Model: `{model['given']}` ({model['kind']}, SHA-256 `{model['sha256']}`), {results['device']}, {results['dtype']}.\n",
    ]
    for title, headings, lines, note in sections(results):
        out += [f"## {title}\n", markdown_table(headings, lines), f"\n{note}\n"]
    return "\n".join(out)


def show(results: dict[str, Any]) -> None:
    """The same on the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 180, highlight=False)
    for title, headings, lines, note in sections(results):
        table = Table(title=title, title_justify="left")
        for number, heading in enumerate(headings):
            table.add_column(
                heading, justify="left" if number == 0 or "setting" in heading or heading == "comparable" else "right"
            )
        for line in lines:
            table.add_row(*line)
        console.print(table)
        console.print(note, markup=False, soft_wrap=True)
        console.print()
