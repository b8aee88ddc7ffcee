"""`quarry report`: one self-contained HTML page about a run, finished or not."""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.run_arguments import add_run, add_runs_root

if TYPE_CHECKING:
    from launchers.progress import RunProgress

TEMPLATE = Path(__file__).with_name("report.html")
SCRIPT = Path(__file__).with_name("report.js")

LIGHT = (
    "#2563eb",
    "#ea580c",
    "#16a34a",
    "#9333ea",
    "#dc2626",
    "#0891b2",
    "#a16207",
    "#db2777",
    "#4d7c0f",
    "#475569",
    "#7c2d12",
    "#0f766e",
    "#6366f1",
    "#be185d",
)
DARK = (
    "#6ea0ff",
    "#fb923c",
    "#4ade80",
    "#c084fc",
    "#f87171",
    "#22d3ee",
    "#facc15",
    "#f472b6",
    "#a3e635",
    "#94a3b8",
    "#d6a37c",
    "#2dd4bf",
    "#a5b4fc",
    "#fda4af",
)
"""Colours of the categories, in order; a fifteenth category begins anew."""

EPILOG = """examples:
  quarry report smoke-tiny                          writes runs/smoke-tiny/report.html
  quarry report smoke-tiny --output /tmp/page.html
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "report",
        help="write a run's report, one HTML page",
        description="Write one self-contained HTML page about a run, finished or not.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run(parser)
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="where to write it (default: report.html in the run's folder)"
    )
    add_runs_root(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    from launchers.progress import RunProgress
    from launchers.runs import find_run

    progress = RunProgress(find_run(args.name, args.runs_root))
    progress.refresh()
    path = args.output or progress.run.report
    write_report(progress, path)
    print(path)
    return 0


def write_report(progress: RunProgress, path: Path) -> None:
    """Write the page for what `progress` has read, atomically; about 0.1 s."""
    page = render(progress)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(page)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def render(progress: RunProgress) -> str:
    """The page as text."""
    from launchers import report_tables as tables
    from launchers.progress import RATE_WINDOW_ROWS
    from launchers.report_evaluation import evaluations
    from launchers.report_figures import Figures
    from launchers.report_posttrain import sections

    colors = category_colors(progress)
    figures = Figures(progress, colors)
    name, recipe = progress.run.name, progress.recipe
    subtitle = f"{recipe.name}: {len(figures.phases)} phases, {len(recipe.stages)} stages, seed {recipe.seed}"
    body = [
        f'<header><h1>{escape(name)}</h1><span class="badge {progress.state}">{progress.state}</span>'
        f'<p class="sub">{escape(subtitle)}</p></header>',
        tables.tiles(progress),
        f'<section id="bar">{figures.ribbon()}<div id="readout"></div></section>' if figures.bands else "",
        _section(
            "Training loss", "nats per token, every logged step and its running mean; numbers mark the phases", figures.loss()
        ),
        _section(
            "Held-out loss",
            "nats per token and category on the same held-out text, before and after every phase, always at "
            f"{recipe.data.heldout_seq_length_tokens} tokens",
            figures.heldout() + tables.heldout(progress, colors),
        ),
        _section(
            "Learning rate",
            "base rate, before muP divides it by the width multiplier",
            figures.learning_rate() if figures.bands else "",
        ),
        _section("Sequence length", "tokens per sample", figures.length() if figures.bands else ""),
        _section("RoPE base", "never falls, so that positions once learned stay", figures.rope() if figures.bands else ""),
        _section(
            "Mixture", "percent of each phase's tokens per category, as planned", figures.mixture() if figures.bands else ""
        ),
        _section("Planned and drawn", "grey: planned; beside it: drawn, from the ledger", tables.mixture(progress, colors)),
        _section("Throughput", "tokens per second over all ranks", figures.throughput()),
        *(_section(*section) for section in sections(progress)),
        *(_section(*section) for section in evaluations(progress)),
        _section(
            "Stages",
            'time: <span class="swatch t0"></span>start-up <span class="swatch t1" style="margin-left:12px"></span>training '
            '<span class="swatch t2" style="margin-left:12px"></span>evaluate, save, hand off; tokens/s over the last '
            f"{RATE_WINDOW_ROWS} logged steps; MFU: their model FLOPs (6 N + causal attention a token, recomputation not counted) over the "
            "dense bf16 peak of the GPUs",
            tables.stages(progress),
        ),
        _section(
            "What it writes",
            "continuations of the export's prompts, sampled from the exported folder through transformers",
            tables.samples(progress),
        ),
        _details("Tokens drawn per source", tables.sources(progress)),
        _section("Made with", "", tables.provenance(progress)),
        _details("Resolved recipe", tables.resolved_recipe(progress)),
    ]
    script = SCRIPT.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    values = {
        "title": escape(f"{name} - Quarry"),
        "script_hash": f"sha256-{digest}",  # the page's policy runs this script and no other, whatever a run's text contains
        "light_colors": " ".join(f"--k{i}: {c};" for i, c in enumerate(LIGHT)),
        "dark_colors": " ".join(f"--k{i}: {c};" for i, c in enumerate(DARK)),
        "body": "\n".join(part for part in body if part),
        "data": json.dumps(figures.readout(), allow_nan=False).replace("<", "\\u003c"),
        "script": script,
    }
    pieces = TEMPLATE.read_text(encoding="utf-8").split("{{")
    page = [pieces[0]]
    for piece in pieces[1:]:  # one pass, so that text from a run is never taken for a placeholder
        key, rest = piece.split("}}", 1)
        page += [values[key], rest]
    return "".join(page)


def category_colors(progress: RunProgress) -> dict[str, str]:
    """Category -> CSS colour, in the order in which the curriculum meets them."""
    recipe = progress.recipe
    names = [
        c for s in recipe.stages if s in recipe.phase for c, share in recipe.phase[s].mixture.shares_percent.items() if share
    ]
    names += [source.category for source in recipe.data.sources.values()]
    return {c: f"var(--k{i % len(LIGHT)})" for i, c in enumerate(dict.fromkeys(names))}


def _section(title: str, caption: str, content: str) -> str:
    """Empty content, no section. `caption` is HTML of our own."""
    return f'<section><h2>{escape(title)}</h2><div class="caption">{caption}</div>{content}</section>' if content else ""


def _details(title: str, content: str) -> str:
    return f"<section><details><summary>{escape(title)}</summary>{content}</details></section>" if content else ""
