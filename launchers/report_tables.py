"""The tables and texts of a report. Everything that comes from a run's files is escaped here."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from launchers import text
from launchers.journal import seconds_between
from launchers.jsonl import Row
from launchers.progress import RunProgress, StageProgress
from launchers.view import learned
from recipes.schedules import first_peak_last
from recipes.schema import Parallel, Recipe

MARKS = {"waiting": "·", "running": "▶", "finished": "✓", "failed": "✗", "interrupted": "‖"}

STAGE_COLUMNS = (
    ("", ""),
    ("stage", "l"),
    ("layout", "l"),
    ("tokens", ""),
    ("steps", ""),
    ("batch × length", ""),
    ("RoPE base", ""),
    ("learning rate", ""),
    ("loss or reward", ""),
    ("tokens/s", ""),
    ("tokens/s/{processor}", ""),
    ("MFU", ""),
    ("memory/rank", ""),
    ("time", ""),
    ("", "l"),
)
"""Title and CSS class of each column of the table of stages."""

OFF_PERCENT = 1.0
"""A drawn share that is this far from the planned one, and more than one sample, is marked."""


def tiles(progress: RunProgress) -> str:
    trained = sum(s.stage_tokens for s in progress.stages if s.kind == "phase")
    model = progress.recipe.model
    phases = [s for s in progress.stages if s.kind == "phase" and s.loss is not None]
    items = [
        (f"{text.tokens(trained)} / {text.tokens(progress.recipe.total_tokens)}", "tokens trained"),
        (text.loss(phases[-1].loss if phases else None), "training loss, nats per token"),
        (_mean_heldout(progress), "held-out loss, mean over categories"),
        (text.duration(progress.wall_seconds), "wall time in stages"),
        (model.name, f"{model.num_layers} layers, width {model.hidden_size}, {model.num_attention_heads} heads"),
    ]
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for v, k in items)
        + "</div>"
    )


def _mean_heldout(progress: RunProgress) -> str:
    measured = [s.own_heldout for s in progress.stages if s.own_heldout]
    means = [sum(h.values()) / len(h) for h in measured]
    if not means:
        return "-"
    return f"{means[0]:.3f} → {means[-1]:.3f}" if len(means) > 1 else f"{means[0]:.3f}"


def stages(progress: RunProgress) -> str:
    """One row per stage, with what its time went into."""
    longest = max((s.wall_seconds for s in progress.stages), default=0.0) or 1.0
    rows, number = [], 0
    for s in progress.stages:
        number += s.kind == "phase"
        rows.append(_stage_row(progress.recipe, s, number if s.kind == "phase" else None, longest))
    header = "".join(f'<th class="{css}">{name.format(processor=progress.processor)}</th>' for name, css in STAGE_COLUMNS)
    return f'<div class="scroll"><table><tr>{header}</tr>{"".join(rows)}</table></div>'


def _stage_row(recipe: Recipe, s: StageProgress, number: int | None, longest: float) -> str:
    cells: list[str] = [str(number or ""), f"{_mark(s)} <b>{escape(s.stage)}</b>"]
    if s.kind == "phase":
        phase = recipe.phase[s.stage]
        first, peak, last = first_peak_last(recipe, s.stage)
        rates = [first, last] if peak in (first, last) else [first, peak, last]
        cells += [
            escape(layout(phase.parallel)),
            text.tokens(phase.tokens),
            f"{s.step}/{s.steps}" if s.state != "finished" else str(s.steps),
            f"{phase.global_batch_samples} × {text.length(phase.seq_length_tokens)}",
            text.tokens(phase.rope_base),
            " → ".join(f"{r:.3g}" for r in rates),
        ]
    elif s.kind in ("sft", "grpo"):
        cells += _post_training(recipe, s)
    if s.gpus:
        cells += [
            escape(learned(s)) or "-",
            text.tokens(s.tokens_per_second),
            text.tokens(s.tokens_per_second_per_gpu),
            text.percent(s.model_flops_utilisation),
        ]
    else:
        words = "Hugging Face folder"
        if s.kind == "merge":
            words = " + ".join(f"{w:.3g} {name}" for name, w in recipe.merge[s.stage].inputs.items())
        elif s.kind == "ab":
            gate = recipe.ab[s.stage]
            words = f"gate: {gate.steps:,} steps of {gate.phase} in two ways, apart by at most {gate.tolerance_percent:g}%"
        cells += [f'<span class="soft">{escape(words)}</span>', *[""] * 9]
    memory = f"{s.max_rss_bytes / 2**30:.1f} GiB" if s.max_rss_bytes else ""
    cells += [memory, text.duration(s.wall_seconds) if s.wall_seconds else "", _time_bar(s, longest)]
    columns = zip(cells, STAGE_COLUMNS, strict=True)
    return "<tr>" + "".join(f'<td class="{css}">{cell}</td>' for cell, (_, css) in columns) + "</tr>"


def _post_training(recipe: Recipe, s: StageProgress) -> list[str]:
    """Layout, tokens, steps, batch x length, RoPE base and learning rate of fine-tuning or reinforcement learning."""
    base = s.handoff.get("rope_base") if s.handoff else None
    if s.kind == "sft":
        sft = recipe.sft[s.stage]
        batch, rates, parallel = (
            f"{sft.global_batch_sequences} × {text.length(sft.seq_length_tokens)}",
            (sft.peak_lr, sft.end_lr),
            sft.parallel,
        )
        base = sft.rope_base or base
    else:
        grpo = recipe.grpo[s.stage]
        batch, rates, parallel = (
            f"{grpo.samples_per_step} × {text.length(grpo.seq_length_tokens)}",
            (grpo.learning_rate,),
            grpo.parallel,
        )
        base = grpo.rope_base or base
    return [
        escape(layout(parallel)),
        text.tokens(s.stage_tokens),
        f"{s.step}/{s.steps or '?'}" if s.state != "finished" else str(s.step),
        batch,
        text.tokens(base) if base else "",
        " → ".join(f"{rate:.3g}" for rate in rates),
    ]


def _mark(s: StageProgress) -> str:
    css = {"finished": "good", "failed": "bad", "interrupted": "bad"}.get(s.state, "soft")
    words = s.state + (f" after {s.attempts} starts" if s.attempts > 1 else "") + (f": {s.reason}" if s.reason else "")
    return f'<span class="{css}" title="{escape(words, quote=True)}">{MARKS[s.state]}</span>'


def _time_bar(s: StageProgress, longest: float) -> str:
    if not s.wall_seconds:
        return ""
    parts = (("start-up", s.startup_seconds), ("training", s.training_seconds), ("evaluate, save", s.other_seconds))
    title = ", ".join(f"{name} {text.duration(v)}" for name, v in parts)
    bars = "".join(f'<i class="t{i}" style="width:{100 * v / longest:.2f}%"></i>' for i, (_, v) in enumerate(parts))
    return f'<div class="time" title="{title}">{bars}</div>'


def layout(p: Parallel) -> str:
    """`4 ranks: TP2 CP2 +SP`; what is 1 is left out."""
    axes = [("DP", p.data), ("TP", p.tensor), ("PP", p.pipeline), ("VPP", p.virtual_pipeline or 1), ("CP", p.context)]
    words = [f"{name}{size}" for name, size in axes if size > 1]
    return (
        f"{p.gpus} rank{'s' if p.gpus > 1 else ''}"
        + (": " + " ".join(words) if words else "")
        + (" +SP" if p.sequence_parallel else "")
    )


def heldout(progress: RunProgress, colors: dict[str, str]) -> str:
    """Categories x boundaries, with the change from the first phase to the last."""
    measured = [s for s in progress.stages if s.own_heldout]
    if not measured:
        return ""
    tables = [s.own_heldout or {} for s in measured]
    categories = [c for c in colors if any(c in t for t in tables)] + sorted({c for t in tables for c in t} - set(colors))
    head = "".join(f"<th>{escape(s.stage)}</th>" for s in measured) + ("<th>change</th>" if len(tables) > 1 else "")
    rows = []
    for c in categories:
        cells = "".join(f"<td>{text.loss(t.get(c))}</td>" for t in tables)
        if len(tables) > 1:
            both = c in tables[0] and c in tables[-1]
            change = tables[-1][c] - tables[0][c] if both else 0.0
            cells += f'<td class="{"good" if change < 0 else "bad"}">{change:+.4f}</td>' if both else "<td>-</td>"
        rows.append(f'<tr><td class="l">{_swatch(colors.get(c))}{escape(c)}</td>{cells}</tr>')
    return f'<div class="scroll"><table><tr><th class="l">after stage</th>{head}</tr>{"".join(rows)}</table></div>'


def drawn_shares(progress: RunProgress) -> dict[str, dict[str, float]]:
    """Phase -> category -> percent of the tokens that were drawn, from the last ledger."""
    ledger = _ledger(progress)
    result: dict[str, dict[str, float]] = {}
    for phase, sources in ledger.items():
        total = sum(drawn["tokens"] for drawn in sources.values())
        shares: dict[str, float] = {}
        for source, drawn in sources.items():
            known = progress.recipe.data.sources.get(source)
            category = known.category if known else source
            shares[category] = shares.get(category, 0.0) + 100 * drawn["tokens"] / (total or 1)
        result[phase] = shares
    return result


def _ledger(progress: RunProgress) -> dict[str, dict[str, Row]]:
    merged: dict[str, dict[str, Row]] = {}
    for s in progress.stages:
        merged.update((s.handoff or {}).get("ledger") or {})
    return merged


def mixture(progress: RunProgress, colors: dict[str, str]) -> str:
    """Categories x phases: percent planned, and drawn where a phase has handed off."""
    phases = [s.stage for s in progress.stages if s.kind == "phase"]
    drawn = drawn_shares(progress)
    rows = []
    for c, color in colors.items():
        cells = []
        for p in phases:
            planned = progress.recipe.phase[p].mixture.shares_percent.get(c, 0.0)
            found = drawn.get(p, {}).get(c, 0.0) if p in drawn else None
            if not planned and not found:
                cells.append('<td class="soft">·</td>')
            elif found is None:
                cells.append(f'<td class="soft">{planned:.1f}</td>')
            else:
                css = ' class="off"' if abs(found - planned) > max(OFF_PERCENT, 100 / progress.recipe.phase[p].samples) else ""
                cells.append(f'<td{css}><span class="of">{planned:.1f}</span> {found:.1f}</td>')
        rows.append(f'<tr><td class="l">{_swatch(color)}{escape(c)}</td>{"".join(cells)}</tr>')
    head = "".join(f"<th>{escape(p)}</th>" for p in phases)
    return f'<div class="scroll"><table><tr><th class="l">percent of tokens</th>{head}</tr>{"".join(rows)}</table></div>'


def sources(progress: RunProgress) -> str:
    """Tokens drawn from every source, per phase and in total."""
    ledger = _ledger(progress)
    if not ledger:
        return ""
    names = sorted({name for drawn in ledger.values() for name in drawn})
    head = "".join(f"<th>{escape(p)}</th>" for p in ledger)
    rows = []
    for name in names:
        counts = [(ledger[p].get(name) or {}).get("tokens", 0) for p in ledger]
        known = progress.recipe.data.sources.get(name)
        cells = "".join(f"<td>{text.tokens(n)}</td>" if n else '<td class="soft">·</td>' for n in counts)
        category = escape(known.category if known else "")
        rows.append(
            f'<tr><td class="l">{escape(name)}</td><td class="l soft">{category}</td>{cells}<td>{text.tokens(sum(counts))}</td></tr>'
        )
    head = f'<th class="l">source</th><th class="l">category</th>{head}<th>all</th>'
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def samples(progress: RunProgress) -> str:
    """Prompts and what the exported model wrote."""
    parts = []
    for s in progress.stages:
        if s.kind != "export":
            continue
        folder = progress.run.stage(s.stage)
        for path in (folder / "hf" / "sample.json", folder / "sample.json"):
            if path.is_file():
                for sample in json.loads(path.read_bytes()):
                    parts.append(
                        f"<blockquote><b>{escape(str(sample['prompt']))}</b>{escape(str(sample['completion']))}</blockquote>"
                    )
                break
    return "".join(parts)


def provenance(progress: RunProgress) -> str:
    """Where the run lies, what it was made with, and its digests."""
    last = next((s.handoff for s in reversed(progress.stages) if s.handoff), None) or {}
    launches = [row for row in progress.journal.rows if row["event"] == "launch"]
    items: list[tuple[str, Any]] = [("folder", progress.run.path.resolve()), ("recipe digest", progress.recipe.digest())]
    if last.get("data_digest"):
        items.append(("data digest", last["data_digest"]))
    items += [(name, version) for name, version in sorted((last.get("versions") or {}).items())]
    if launches:
        ended = progress.journal.rows[-1]
        items.append(
            (
                "launched",
                f"{launches[0]['time']} on {launches[0].get('host')}, {len(launches)} launch{'es' if len(launches) > 1 else ''}",
            )
        )
        items.append(
            ("last event", f"{ended['time']} ({text.duration(seconds_between(launches[0], ended))} after the first launch)")
        )
    return "<dl>" + "".join(f"<dt>{escape(str(k))}</dt><dd><code>{escape(str(v))}</code></dd>" for k, v in items) + "</dl>"


def resolved_recipe(progress: RunProgress) -> str:
    return f"<pre>{escape(json.dumps(progress.recipe.model_dump(mode='json'), indent=2))}</pre>"


def _swatch(color: str | None) -> str:
    return f'<span class="swatch" style="--c:{color}"></span>' if color else ""
