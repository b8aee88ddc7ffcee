"""Planning and building views for ten trillion tokens from 400 sources: time and memory at fractions of it, and what they come to in full.

The sources are index files without tokens, which is all that the planner and the views read. A fraction (1/1000, 1/300 ...) has that
part of the documents, of the tokens and of every phase's tokens; sources, phases and lengths of documents stay.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from benchmarks.measure import measure
from data_prep.files import FileRecord, write_bytes, write_json
from data_prep.indexed import idx_path, index_writer
from data_prep.manifest import TokenizerRecord
from data_prep.plan import make_plan
from data_prep.views import build_views, source_lengths
from recipes.compose import compose
from recipes.schema import Mixture, Phase, Recipe, Source

DOCUMENTS = 10_000_000_000
"""Of the full corpus."""
SOURCES = 400
MEDIAN_TOKENS, SPREAD = 465, 1.4
"""Lengths are log-normal: 1,240 tokens on average, so 12.4T in all; an eighth of them in documents of 16K and more."""
MIN_TOKENS, MAX_TOKENS = 16, 1 << 20
SHARES = {"web": 45.0, "code": 20.0, "math": 15.0, "technical": 10.0, "multilingual": 5.0, "books": 5.0}
PHASES = (  # name, tokens, length, shortest document
    ("foundation", 10_000_000_000_000, 4096, 0),
    ("capability", 2_000_000_000_000, 4096, 0),
    ("annealing", 2_000_000_000_000, 4096, 0),
    ("long", 1_000_000_000_000, 32768, 16384),
    ("final", 500_000_000_000, 4096, 0),
)
"""15.5T tokens, as the default curriculum: the corpus is read 1.25 times."""
BATCH_TOKENS = 1 << 17
"""Small, so that a phase of a ten-thousandth still is whole steps."""
TABLE_LENGTHS = 1 << 20
EPILOG = """example (about 20 GB of disk for 1/30, some minutes on two cores):
  python -m benchmarks.plan_scale --work /tmp/scale --divisors 1000 300 100 30 --workers 1 2 --markdown plan_scale.md
"""


@dataclass(frozen=True)
class Size:
    """How large a simulated corpus is."""

    divisor: int
    sources: int

    def documents(self) -> dict[str, int]:
        """Source -> documents: a category's share, divided among its sources as one over their rank."""
        names = list(self.categories())
        ranks = {name: 1 + number // len(SHARES) for number, name in enumerate(names)}
        whole = {c: sum(1 / ranks[n] for n in names if self.categories()[n] == c) for c in SHARES}
        parts = {name: SHARES[c] / 100 / ranks[name] / whole[c] for name, c in self.categories().items()}
        return {name: max(1, round(DOCUMENTS / self.divisor * part)) for name, part in parts.items()}

    def categories(self) -> dict[str, str]:
        kinds = list(SHARES)
        return {f"s{n:03}": kinds[n % len(kinds)] for n in range(self.sources)}

    def recipe(self, root: Path) -> Recipe:
        base = compose(["curriculum=five_phase"])
        documents = self.documents()
        sources = {
            name: Source(category=category, weight=float(documents[name]), kind="files", paths=["-"])
            for name, category in self.categories().items()
        }
        phases = {name: self._phase(base.phase["foundation"], *spec) for name, *spec in PHASES}
        data = base.data.model_copy(update={"sources": sources, "root": str(root)})
        return base.model_copy(update={"stages": list(phases), "phase": phases, "data": data, "merge": {}, "export": {}})

    def _phase(self, base: Phase, tokens: int, length: int, shortest: int) -> Phase:
        steps = max(1, round(tokens / self.divisor / BATCH_TOKENS))
        return base.model_copy(
            update={
                "tokens": steps * BATCH_TOKENS,
                "steps": steps,
                "seq_length_tokens": length,
                "global_batch_samples": BATCH_TOKENS // length,
                "min_document_tokens": shortest,
                "mixture": Mixture(name="all", shares_percent=SHARES),
            }
        )


# --- the simulated corpus ----------------------------------------------------------------------------------------------------------


def make_sources(size: Size, root: Path) -> int:
    """Write the index files; their bytes in all."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        counts = sorted(size.documents().items(), key=lambda item: -item[1])
        return sum(pool.map(partial(make_source, root), [n for n, _ in counts], [c for _, c in counts]))


def make_source(root: Path, name: str, documents: int) -> int:
    """Write one index of documents that lie one after the other in a .bin that is not there."""
    table = np.exp(np.random.default_rng(0).normal(np.log(MEDIAN_TOKENS), SPREAD, TABLE_LENGTHS))
    table = np.clip(table, MIN_TOKENS, MAX_TOKENS).astype(np.int32)
    picks = np.random.default_rng(int(name[1:]))
    path, end = idx_path(root / "tokenized" / name), 0
    with index_writer(path, np.dtype(np.int32), documents) as writer:
        for start in range(0, documents, TABLE_LENGTHS):
            lengths = table[picks.integers(0, TABLE_LENGTHS, min(TABLE_LENGTHS, documents - start))]
            ends = end + np.cumsum(lengths, dtype=np.int64)
            writer.put(start, lengths, 4 * (ends - lengths))
            end = int(ends[-1])
    return path.stat().st_size


# --- one measured process ------------------------------------------------------------------------------------------------------------


def work(size: Size, root: Path, step: str, workers: int) -> dict[str, float]:
    """Plan, and with step "views" build too; seconds of each, and what came out."""
    recipe = size.recipe(root)
    started = time.perf_counter()
    made = make_plan(recipe, partial(source_lengths, root), workers=workers)
    planned = time.perf_counter()
    if made.problems:
        raise SystemExit("\n".join(made.problems))
    found = {
        "plan_seconds": planned - started,
        "source_tokens": float(sum(source.tokens for source in made.sources.values())),
        "view_documents": float(sum(draw.documents for phase in made.draws.values() for draw in phase.values())),
        "pieces": float(sum(len(draw.pieces) for phase in made.draws.values() for draw in phase.values())),
    }
    if step == "views":
        nothing = FileRecord(bytes=0, sha256="0" * 64)
        records = dict.fromkeys(size.documents(), SimpleNamespace(bin=nothing, idx=nothing, dtype="int32", max_token_id=0))
        tokenizer = TokenizerRecord(kind="huggingface", path="tokenizer", sha256="0" * 64, vocab_size=100_352, eod_id=0)
        build_views(root, recipe, made.draws, records, tokenizer, workers=workers)
        found["view_seconds"] = time.perf_counter() - planned
    return found


# --- the whole benchmark -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One fraction with one number of processes."""

    divisor: int
    workers: int
    documents: int
    source_index_bytes: int
    view_documents: int
    pieces: int
    plan_seconds: float
    plan_cpu_seconds: float
    plan_peak_bytes: int
    view_seconds: float
    view_cpu_seconds: float
    view_peak_bytes: int


def full_minutes(sizes: list[tuple[int, float]]) -> float:
    """Minutes for all DOCUMENTS, on the line through the two largest of (documents, seconds); one alone is scaled up as it is."""
    (few, short), (many, long) = [(0, 0.0), *sorted(sizes)][-2:]
    return (long + (DOCUMENTS - many) * (long - short) / (many - few)) / 60


def run(size: Size, folder: Path, workers: int, index_bytes: int) -> Result:
    """Measure planning alone and then planning and building, each in a process of its own."""
    log = folder / "log.txt"
    measured, outputs = {}, {}
    for step in ("plan", "views"):
        shutil.rmtree(folder / "views", ignore_errors=True)
        arguments = ["--step", step, "--work", str(folder), "--divisors", str(size.divisor), "--workers", str(workers)]
        command = [sys.executable, "-m", "benchmarks.plan_scale", *arguments, "--sources", str(size.sources)]
        measured[step] = measure(command, {**os.environ, "OMP_NUM_THREADS": "1"}, log)
        outputs[step] = json.loads(log.read_text().splitlines()[-1])
    found = outputs["views"]
    return Result(
        divisor=size.divisor,
        workers=workers,
        documents=sum(size.documents().values()),
        source_index_bytes=index_bytes,
        view_documents=int(found["view_documents"]),
        pieces=int(found["pieces"]),
        plan_seconds=outputs["plan"]["plan_seconds"],
        plan_cpu_seconds=measured["plan"].cpu_seconds,
        plan_peak_bytes=measured["plan"].peak_rss_bytes,
        view_seconds=found["view_seconds"],
        # That process plans first.
        view_cpu_seconds=measured["views"].cpu_seconds - measured["plan"].cpu_seconds,
        view_peak_bytes=measured["views"].peak_rss_bytes,
    )


def markdown(results: list[Result], sources: int) -> str:
    """The results as a table, and the full size extrapolated from the largest fraction."""
    lines = [
        f"Ten billion documents of {sources} sources in five phases of 15.5T tokens, in fractions. {platform.machine()}, {os.cpu_count()} "
        f"cores, Python {platform.python_version()}, numpy {version('numpy')}.",
        "",
        "| of the full size | documents | processes | plan s | CPU s | peak MB | views s | CPU s | peak MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        lines.append(
            f"| 1/{r.divisor} | {r.documents:,} | {r.workers} | {r.plan_seconds:.1f} | {r.plan_cpu_seconds:.1f} | "
            f"{r.plan_peak_bytes / 1e6:.0f} | {r.view_seconds:.1f} | {r.view_cpu_seconds:.1f} | {r.view_peak_bytes / 1e6:.0f} |"
        )
    lines.append("")
    for workers in sorted({r.workers for r in results}):
        own = [r for r in results if r.workers == workers]
        largest = max(own, key=lambda r: r.documents)
        plan, views = (largest.divisor * seconds / 60 for seconds in (largest.plan_seconds, largest.view_seconds))
        plan_cpu = full_minutes([(r.documents, r.plan_cpu_seconds) for r in own])
        views_cpu = full_minutes([(r.documents, r.view_cpu_seconds) for r in own])
        lines.append(
            f"Extrapolated with {workers} process{'es' * (workers > 1)}: the full size would take {plan_cpu:.0f} minutes of CPU to plan "
            f"and {views_cpu:.0f} to build, on the line through the two largest sizes; in time, scaled up from 1/{largest.divisor} with "
            f"this machine's disk and other load, {plan:.0f} and {views:.0f} minutes. The source indexes have "
            f"{largest.source_index_bytes * largest.divisor / 1e9:.0f} GB, those of the views "
            f"{20 * largest.view_documents * largest.divisor / 1e9:.0f} GB."
        )
    lines.append(f"The plan itself is {results[-1].pieces} intervals, whatever the size.")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "benchmarks.plan_scale", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for the simulated corpus; emptied for each size")
    parser.add_argument("--divisors", type=int, nargs="+", default=[1000, 300, 100], help="fractions of the full size")
    parser.add_argument("--workers", type=int, nargs="+", default=[1], help="processes, each measured by itself")
    parser.add_argument("--sources", type=int, default=SOURCES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--step", choices=["plan", "views"], help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.step:
        print(json.dumps(work(Size(args.divisors[0], args.sources), args.work, args.step, args.workers[0])))
        return 0
    results = []
    for divisor in args.divisors:
        size, folder = Size(divisor, args.sources), args.work / f"{divisor}"
        shutil.rmtree(folder, ignore_errors=True)
        index_bytes = make_sources(size, folder)
        for workers in args.workers:
            results.append(run(size, folder, workers, index_bytes))
            print(json.dumps(asdict(results[-1])), flush=True)
        shutil.rmtree(folder)
    text = markdown(results, args.sources)
    print(text)
    if args.markdown:
        write_bytes(args.markdown, text.encode())
    if args.json:
        write_json(args.json, [asdict(result) for result in results])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
