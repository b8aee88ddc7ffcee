"""What a report shows of fine-tuning and reinforcement learning: curves over the steps of a stage, and what was before and after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from launchers import charts, text
from launchers.charts import Band, Chart, Line
from launchers.jsonl import Row, finite, read_json, read_rows
from launchers.progress import RunProgress, StageProgress
from launchers.report_judge import judged

SMOOTH_STEPS = 5
"""A running mean covers at least so many steps, and a thirtieth of its stage."""
SHOWN_RESPONSES = 6
SHOWN_CHARACTERS = 2000
"""Of a prompt or a response; a page must not hold reasoning of thousands of tokens."""


class Section(NamedTuple):
    title: str
    caption: str
    """HTML."""
    content: str


class Curve(NamedTuple):
    """Key of a number in metrics.jsonl, its name, and the colour's number (report.LIGHT)."""

    key: str
    name: str
    color: int


def sections(progress: RunProgress) -> Iterator[Section]:
    """One for each stage of fine-tuning and reinforcement learning that has logged a step, and what became of the held-out text."""
    for s in progress.stages:
        if s.metrics and s.kind == "sft":
            yield _fine_tuning(progress, s)
        elif s.metrics and s.kind == "grpo":
            yield _reinforcement(progress, s)
    if content := _heldout_text(progress):
        caption = "nats per token and category on the held-out text of pre-training: what post-training costs"
        yield Section("Held-out text after post-training", caption, content)


# Fine-tuning


def _fine_tuning(progress: RunProgress, s: StageProgress) -> Section:
    sft = progress.recipe.sft[s.stage]
    folder = Path(progress.recipe.data.root) / "sft" / s.stage
    packs = (read_json(folder / "manifest.json") or {}).get("training") or {}
    sequences = packs.get("sequences")
    facts = [
        (f"{s.step}/{s.steps}" if s.steps else str(s.step), "steps"),
        (str(sft.epochs), f"epochs of {_count(packs.get('samples'))} samples"),
        (_count(sequences), f"packed sequences of {text.length(sft.seq_length_tokens)} tokens"),
        (f"{packs['utilisation_percent']:.2f} %" if "utilisation_percent" in packs else "-", "of their places used"),
        (f"{sft.peak_lr:.3g}", "peak learning rate"),
    ]
    steps = max(s.steps, s.step)
    bands = _epochs(sft.epochs, steps, sequences / sft.global_batch_sequences if sequences else steps)
    loss = _chart("training loss", "nats per token of the assistant", s, bands, [Curve("loss", "", 0)], smooth=True)
    rate = _chart("learning rate", "", s, bands, [Curve("lr", "", 0)], floor=0.0)
    parts = [_tiles(facts), _side_by_side([loss, rate]), _answers(s), judged(folder / "judged")]
    caption = (
        f"{escape(sft.title)}: packed conversations, loss on what the assistant says; numbers over the curves count the epochs"
    )
    return Section(f"Fine-tuning: {s.stage}", caption, "".join(parts))


def _epochs(epochs: int, steps: int, steps_per_epoch: float) -> list[Band]:
    """In steps; the last step is filled up with empty sequences and belongs to the last epoch."""
    ends = [min(number * steps_per_epoch, steps) for number in range(1, epochs)] + [steps]
    return [Band(i + 1, f"epoch {i + 1}", ends[i - 1] if i else 0, end) for i, end in enumerate(ends)]


def _answers(s: StageProgress) -> str:
    measured = [(r.get("when"), r["answers"]) for r in s.heldout if isinstance(r.get("answers"), dict)]
    columns = {f"{'before' if when == 'start' else 'after'} {s.stage}": losses for when, losses in measured}
    return _changes("held-out answers, nats per token", columns) if columns else ""


# Reinforcement learning


def _reinforcement(progress: RunProgress, s: StageProgress) -> Section:
    grpo = progress.recipe.grpo[s.stage]
    domains = sorted({d for row in s.metrics for d in row.get("reward_per_domain") or {}})
    bands = [Band(0, "", 0, max(s.steps, s.step))]
    reward = [Curve("reward", "all" if len(domains) > 1 else "", 0)]
    stop = grpo.stop
    bounds = {"stops at (mean)": stop.max_mean_gap_nats} | ({"stops at (max)": stop.max_gap_nats} if stop.max_gap_nats else {})
    figures = [
        _chart("mean reward", "", s, bands, reward, floor=0.0, domains=domains, smooth=len(domains) < 2),
        _chart(
            "gap of log-probabilities",
            "nats per token between rollout and training",
            s,
            bands,
            [Curve("mean_gap_nats", "mean", 0), Curve("max_gap_nats", "max", 1)],
            log=True,
            bounds=bounds,
        ),
        _chart("entropy", "nats per token", s, bands, [Curve("entropy_nats", "", 0)], floor=0.0),
        _chart(
            "response length",
            "tokens",
            s,
            bands,
            [Curve("response_tokens", "mean", 0), Curve("max_response_tokens", "longest", 1)],
            floor=0.0,
            bounds={"limit": grpo.rollout.max_response_tokens},
        ),
        _chart(
            "shares of groups and samples",
            "0 to 1",
            s,
            bands,
            [
                Curve("no_signal_share", "groups, no signal", 0),
                Curve("truncated_share", "truncated", 1),
                Curve("failed_reward_share", "score failed", 4),
            ],
            floor=0.0,
        ),
        _chart(
            "clipped tokens",
            "share, 0 to 1",
            s,
            bands,
            [Curve("clipped_low_share", "low", 0), Curve("clipped_high_share", "high", 1)],
            floor=0.0,
        ),
        _chart("divergence from the start", "k3, nats per token", s, bands, [Curve("divergence_nats", "", 0)], floor=0.0)
        if grpo.kl_coefficient
        else "",
        _chart(
            "seconds of a step",
            "",
            s,
            bands,
            [Curve("rollout_seconds", "rollout", 0), Curve("train_seconds", "training", 1)],
            floor=0.0,
        ),
    ]
    facts = [
        (f"{s.step}/{s.steps}", "steps"),
        (_ends(s.rewards, "reward"), "mean reward, first and last step"),
        (f"{grpo.prompts_per_step} × {grpo.samples_per_prompt}", "prompts × samples a step"),
        (f"{max((_value(r, 'max_gap_nats') or 0.0 for r in s.metrics), default=0.0):.1e}", "largest gap, nats"),
        (f"{grpo.kl_coefficient:g}", "coefficient of the divergence"),
    ]
    caption = (
        f"{escape(grpo.title)}: on-policy GRPO with the DAPO loss, learning rate {grpo.learning_rate:.3g}, clipped at "
        f"{grpo.clip_low:g} and {grpo.clip_high:g}, rollouts by {escape(grpo.rollout.engine)}"
    )
    parts = [_tiles(facts), _side_by_side(figures), _numbers(s, domains), _responses(progress, s)]
    return Section(f"Reinforcement learning: {s.stage}", caption, "".join(parts))


NUMBERS = {
    "reward": "mean reward",
    "mean_gap_nats": "gap of log-probabilities, mean, nats",
    "max_gap_nats": "gap of log-probabilities, largest, nats",
    "entropy_nats": "entropy, nats per token",
    "divergence_nats": "divergence from the start, nats per token",
    "clipped_low_share": "clipped low, share of tokens",
    "clipped_high_share": "clipped high, share of tokens",
    "response_tokens": "response, mean tokens",
    "truncated_share": "truncated, share of samples",
    "no_signal_share": "without signal, share of groups",
    "failed_reward_share": "score failed, share of samples",
}


def _numbers(s: StageProgress, domains: Sequence[str]) -> str:
    """First step, last step and the worst or best between."""
    named = [(title, [_value(row, key) for row in s.metrics]) for key, title in NUMBERS.items()]
    if len(domains) > 1:
        named[1:1] = [
            (f"mean reward, {domain}", [_value(row.get("reward_per_domain") or {}, domain) for row in s.metrics])
            for domain in domains
        ]
    rows = []
    for title, values in named:
        known = [v for v in values if v is not None]
        if known:
            cells = "".join(f"<td>{_short(v)}</td>" for v in (known[0], known[-1], min(known), max(known)))
            rows.append(f'<tr><td class="l">{escape(title)}</td>{cells}</tr>')
    head = "".join(f"<th>{name}</th>" for name in ("first step", "last step", "least", "most"))
    return f'<div class="scroll"><table><tr><th class="l">number</th>{head}</tr>{"".join(rows)}</table></div>'


def _responses(progress: RunProgress, s: StageProgress) -> str:
    """The last recorded responses, those of one step."""
    files = sorted((progress.run.stage(s.stage) / "rollouts").glob("step_*.jsonl"))
    rows = read_rows(files[-1])[:SHOWN_RESPONSES] if files else []
    parts = []
    for row in rows:
        turns = row.get("prompt") if isinstance(row.get("prompt"), list) else []
        prompt = "\n".join(str(turn.get("content", "")) for turn in turns if isinstance(turn, dict))
        reward = "failed" if row.get("reward") is None else _short(row["reward"])
        parts.append(
            f"<blockquote><b>{escape(_cut(prompt))}</b>\n{escape(_cut(str(row.get('completion', ''))))}"
            f'<span class="soft">\nreward {escape(reward)}{", truncated" if row.get("truncated") else ""}</span></blockquote>'
        )
    if not parts:
        return ""
    summary = f"What it answered in step {escape(str(rows[0].get('step')))}"
    return f"<details><summary>{summary}</summary>{''.join(parts)}</details>"


def _heldout_text(progress: RunProgress) -> str:
    """The losses that each stage of post-training began and ended with."""
    columns: dict[str, Mapping[str, Any]] = {}
    for s in progress.stages:
        if s.kind not in ("sft", "grpo"):
            continue
        for row in s.heldout:
            if isinstance(row.get("losses"), dict) and (row.get("when") == "end" or not columns):
                columns[f"{'before' if row.get('when') == 'start' else 'after'} {s.stage}"] = row["losses"]
    return _changes("category", columns) if columns else ""


# Pieces


def _changes(title: str, columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Names x columns of losses, with the change from the first column to the last."""
    tables = list(columns.values())
    rows = []
    for name in sorted({name for table in tables for name in table}):
        values = [_value(table, name) for table in tables]
        cells = "".join(f"<td>{text.loss(value)}</td>" for value in values)
        if len(tables) > 1:
            first, last = values[0], values[-1]
            change = None if first is None or last is None else last - first
            css = "" if change is None else "good" if change < 0 else "bad"
            cells += f'<td class="{css}">{"-" if change is None else f"{change:+.4f}"}</td>'
        rows.append(f'<tr><td class="l">{escape(name)}</td>{cells}</tr>')
    head = "".join(f"<th>{escape(name)}</th>" for name in columns) + ("<th>change</th>" if len(tables) > 1 else "")
    return f'<div class="scroll"><table><tr><th class="l">{escape(title)}</th>{head}</tr>{"".join(rows)}</table></div>'


def _chart(
    title: str,
    unit: str,
    s: StageProgress,
    bands: Sequence[Band],
    curves: Sequence[Curve],
    *,
    floor: float | None = None,
    log: bool = False,
    bounds: Mapping[str, float] | None = None,
    domains: Sequence[str] = (),
    smooth: bool = False,
) -> str:
    """Curves over steps; empty if none of their numbers was logged. `bounds` are dashed and named; `floor` is where the axis begins."""
    lines = [Line(_points(s.metrics, c.key), "part", c.name, f"var(--k{c.color})") for c in curves if _points(s.metrics, c.key)]
    if len(domains) > 1:
        per_domain = [(d, [r.get("reward_per_domain") or {} for r in s.metrics]) for d in domains]
        steps = [row.get("step", 0) for row in s.metrics]
        lines += [
            Line([(x, v) for x, r in zip(steps, rows, strict=True) if (v := _value(r, d)) is not None], "part", d, color)
            for (d, rows), color in zip(per_domain, (f"var(--k{i % 13 + 1})" for i in range(len(domains))), strict=True)
        ]
    values = [y for line in lines for _, y in line.points if y > 0 or not log]
    if not values:
        return ""
    dashed = {} if bounds is None else dict(bounds)
    low, high = min([*values, *dashed.values()]), max([*values, *dashed.values()])
    if log:
        low, high = low / 1.6, high * 1.6
    else:
        margin = 0.06 * (high - low if floor is None else high - floor) or 0.05
        low, high = (low - margin if floor is None else floor), high + margin
    chart = Chart(title, 210, bands, low, high, log=log, over_steps=True)
    for line in lines:
        if smooth:
            chart.add(Line(line.points, "raw"))
            chart.add(
                Line(charts.smooth(line.points, max(SMOOTH_STEPS, len(line.points) // 30)), "curve", line.name, line.color)
            )
        else:
            chart.add(line)
    for name, value in dashed.items():
        chart.add(Line([(0, value), (bands[-1].end_tokens, value)], "plan"))
        chart.label(value, f"{name} {_short(value)}", "var(--soft)")
    words = f' <span class="soft">{escape(unit)}</span>' if unit else ""
    return f"<div><h3>{escape(title)}{words}</h3>{chart.svg(_short)}</div>"


def _points(rows: Sequence[Row], key: str) -> list[tuple[float, float]]:
    return [
        (step, value) for row in rows if (step := _value(row, "step")) is not None and (value := _value(row, key)) is not None
    ]


def _side_by_side(figures: Sequence[str]) -> str:
    return f'<div class="pair">{"".join(figures)}</div>'


def _tiles(items: Sequence[tuple[str, str]]) -> str:
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in items)
        + "</div>"
    )


def _value(row: Mapping[str, Any], key: str) -> float | None:
    """The value if it is a finite number."""
    return finite(row.get(key))


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "-"


def _ends(rows: Sequence[Row], key: str) -> str:
    known = [value for row in rows if (value := _value(row, key)) is not None]
    return f"{known[0]:.3f} → {known[-1]:.3f}" if len(known) > 1 else f"{known[0]:.3f}" if known else "-"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else str(value)


def _cut(words: str) -> str:
    return words if len(words) <= SHOWN_CHARACTERS else words[:SHOWN_CHARACTERS] + " …"
