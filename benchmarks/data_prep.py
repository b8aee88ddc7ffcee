"""Quarry's tokenizing against its peers: one run, same corpus, same tokenizer, interleaved, whole processes, and the bars that it must hold."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from benchmarks.comparison import Documents, differing_documents, read, same_bytes
from benchmarks.measure import CommandFailed, Measurement, measure
from data_prep.files import file_sha256, write_bytes, write_json

QUARRY, MEGATRON, FAST, DATATROVE, LIMIT = (
    "quarry tokenize",
    "preprocess_data.py",
    "preprocess_data_fast.py",
    "datatrove",
    "gigatoken alone",
)
SLOW = (MEGATRON, DATATROVE)
STARTUP_LINES = 10
FULL_SIZE_MB = 200
"""Text below which the bars say nothing: start-up dominates."""
EPILOG = """example (the material first, then everything; about half an hour on two cores; /tmp/bench/megatron-lm is a checkout of Megatron-LM):
  python -m benchmarks.corpus --output /tmp/bench/corpus.jsonl --size-mb 300
  quarry tokenizer train --input /tmp/bench/corpus.jsonl --kind huggingface --vocab-size 100352 --max-mb 100 --output /tmp/bench/tokenizer
  python -m benchmarks.data_prep --corpus /tmp/bench/corpus.jsonl --tokenizer /tmp/bench/tokenizer --megatron-lm /tmp/bench/megatron-lm \\
      --work /tmp/bench/work --json results.json --markdown results.md

Quick look without the slow peers:  ... --only quarry fast gigatoken --size-mb 60
Exit code 0: all bars held (or could not be judged), 1: a bar was missed, 2: something needed is not there.
"""
SHORT = {"quarry": QUARRY, "megatron": MEGATRON, "fast": FAST, "datatrove": DATATROVE, "gigatoken": LIMIT}


@dataclass
class Peer:
    """A program that is measured."""

    name: str
    command: list[str]
    environment: dict[str, str]
    outputs: list[Path]
    """Prefixes of the indexed data sets that it writes, in the order of the corpus."""
    runs: list[Measurement] = field(default_factory=list)
    startup: Measurement | None = None
    differing: int | None = None

    def median(self, key: str) -> float:
        return statistics.median(getattr(run, key) for run in self.runs)


@dataclass(frozen=True)
class Corpus:
    """The input and what is in it."""

    path: Path
    documents: int
    text_bytes: int
    parts: Path
    """Folder with the same lines in as many files as there are workers: datatrove reads a file per task."""


@dataclass(frozen=True)
class Bar:
    name: str
    demanded: str
    measured: str
    held: bool | None
    """None: a program that it needs was not run."""


def prepare_corpus(source: Path, work: Path, workers: int, size_mb: float | None) -> Corpus:
    """Cut `source` to `size_mb` of text (None: all of it) and write it once whole and once in parts."""
    parts = work / "parts"
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir(parents=True)
    lines, documents, text_bytes = [], 0, 0
    limit = float("inf") if size_mb is None else size_mb * 1e6
    with open(source, "rb") as f:
        for line in f:
            size = len(json.loads(line)["text"].encode())
            if text_bytes + size > limit:
                break
            documents += 1
            text_bytes += size
            lines.append(len(line))
    whole, bounds = work / "corpus.jsonl", [documents * i // workers for i in range(workers + 1)]
    with open(source, "rb") as f, open(whole, "wb") as all_lines:
        for worker in range(workers):
            with open(parts / f"{worker:05d}.jsonl", "wb") as part:
                for length in lines[bounds[worker] : bounds[worker + 1]]:
                    line = f.read(length)
                    part.write(line)
                    all_lines.write(line)
    return Corpus(whole, documents, text_bytes, parts)


def startup_corpus(corpus: Corpus, work: Path, workers: int) -> Corpus:
    """The first lines of the corpus: what is left of a run on them is start-up."""
    folder = work / "startup"
    folder.mkdir(parents=True, exist_ok=True)
    with open(corpus.path, "rb") as f:
        head = b"".join(f.readline() for _ in range(STARTUP_LINES))
    (folder / "head.jsonl").write_bytes(head)
    return prepare_corpus(folder / "head.jsonl", folder, workers, None)


def peers(corpus: Corpus, tokenizer: Path, megatron: Path | None, work: Path, workers: int, end: str) -> Iterator[Peer | str]:
    """The programs on one corpus; a line instead of one that cannot be run here."""
    base = {
        # Byte code is kept as for any user, that of the checkout too: the start-up runs, which come first, write it.
        **{key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"},
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
        "TOKENIZERS_PARALLELISM": "true",
        "OMP_NUM_THREADS": "1",
    }
    threads = {**base, "RAYON_NUM_THREADS": str(workers)}
    single = {**base, "RAYON_NUM_THREADS": "1"}  # of each of the worker processes
    file, python = str(tokenizer / "tokenizer.json"), sys.executable
    out = {name: work / "out" / key for key, name in SHORT.items()}
    common = ["--input", str(corpus.path), "--append-eod"]
    yield Peer(
        QUARRY,
        [python, "-m", "launchers.cli", "tokenize", *common, "--tokenizer", str(tokenizer), "--output", str(out[QUARRY] / "data"),
         "--workers", str(workers)],
        threads,
        [out[QUARRY] / "data"],
    )  # fmt: skip
    hf = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)]
    for name, extra, environment in ((MEGATRON, ["--workers", str(workers)], single), (FAST, ["--use-gigatoken"], threads)):
        tool = None if megatron is None else megatron / "tools" / name
        if tool is None or not tool.is_file():
            yield f"{name}: left out, " + ("--megatron-lm was not given" if tool is None else f"{tool} does not exist")
            continue
        yield Peer(
            name,
            [python, str(tool), *common, "--output-prefix", str(out[name] / "data"), *hf, *extra],
            {**environment, "PYTHONPATH": str(megatron)},
            [out[name] / "data_text_document"],
        )
    if find_spec("datatrove") is None:
        yield f"{DATATROVE}: left out, the package is not installed"
    else:
        target = out[DATATROVE]
        yield Peer(
            DATATROVE,
            [python, "-m", "benchmarks.peers", "datatrove", str(corpus.parts), file, end, str(workers), str(target)],
            single,
            [target / "tokens" / f"{i:05d}_tokens" for i in range(workers)],
        )
    if find_spec("gigatoken") is None:
        yield f"{LIMIT}: left out, the package is not installed"
    else:
        yield Peer(LIMIT, [python, "-m", "benchmarks.peers", "gigatoken", str(corpus.path), file], threads, [])


def run(peer: Peer, work: Path) -> Measurement:
    """One measurement, the output of an earlier one removed (Quarry would find its work done)."""
    name = next(key for key, value in SHORT.items() if value == peer.name)
    folder = work / "out" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.sync()  # what the one before left to be written is not this one's
    return measure(peer.command, peer.environment, work / f"{name}.log")


def rounds(chosen: list[Peer], repetitions: int, slow_repetitions: int) -> list[Peer]:
    """Who runs when: in each round everyone once, beginning with another one each time."""
    order = []
    for number in range(max(repetitions, slow_repetitions)):
        turn = number % len(chosen)
        for peer in chosen[turn:] + chosen[:turn]:
            if number < (slow_repetitions if peer.name in SLOW else repetitions):
                order.append(peer)
    return order


def measure_startup(chosen: list[Peer], short: list[Peer | str], work: Path) -> None:
    """Run each chosen program once on a few lines (`short`: the same programs on these)."""
    by_name = {peer.name: peer for peer in short if isinstance(peer, Peer)}
    for peer in chosen:
        print(f"start-up of {peer.name} ...", file=sys.stderr)
        try:
            peer.startup = run(by_name[peer.name], work)
        except CommandFailed:
            if peer.name == QUARRY:
                raise  # a peer fails again on the whole corpus, and is left out there


def measure_all(chosen: list[Peer], work: Path, repetitions: int, slow_repetitions: int) -> list[str]:
    """Run everyone in turn. A peer that fails is left out from then on, with a line that is returned; CommandFailed when Quarry fails."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    order = rounds(chosen, repetitions, slow_repetitions)
    failed: dict[str, str] = {}
    for number, peer in enumerate(order, 1):
        if peer.name in failed:
            continue
        with console.status(f"{number}/{len(order)} {peer.name} ..."):
            try:
                peer.runs.append(run(peer, work))
            except CommandFailed as error:
                if peer.name == QUARRY:
                    raise
                failed[peer.name] = f"{peer.name}: left out, it failed: {error}"
                console.print(failed[peer.name], markup=False, soft_wrap=True)
                continue
        last = peer.runs[-1]
        console.print(
            f"{number:3}/{len(order)}  {peer.name:<24} {last.wall_seconds:8.2f} s  {last.peak_rss_bytes / 1e6:7.0f} MB",
            markup=False,
        )
    chosen[:] = [peer for peer in chosen if peer.name not in failed]
    return [line.splitlines()[0] for line in failed.values()]


def compare(chosen: list[Peer]) -> bool | None:
    """Count for each peer the documents that differ from preprocess_data.py's; returns whether Quarry's bytes are the same (None: unknown)."""
    by_name = {peer.name: peer for peer in chosen}
    if MEGATRON not in by_name:
        return None
    reference: Documents = read(by_name[MEGATRON].outputs)
    for peer in chosen:
        if peer.outputs and peer.name != MEGATRON:
            peer.differing = differing_documents(reference, read(peer.outputs))
    if QUARRY not in by_name:
        return None
    return same_bytes(by_name[QUARRY].outputs[0], by_name[MEGATRON].outputs[0])


def bars(chosen: list[Peer], same: bool | None) -> list[Bar]:
    """What is demanded of Quarry and what this run gave."""
    by_name = {peer.name: peer for peer in chosen}
    if QUARRY not in by_name:
        return []
    quarry = by_name[QUARRY]
    out = []
    for other, times, text in (
        (MEGATRON, 50, "times as fast as"),
        (FAST, 4, "times as fast as"),
        (LIMIT, 0.85, "of the speed of"),
    ):
        demanded = f"{times:.0%}" if times < 1 else f"{times} times"
        if other not in by_name:
            out.append(Bar(f"{text} {other}", f">= {demanded}", "not run", None))
            continue
        ratio = by_name[other].median("wall_seconds") / quarry.median("wall_seconds")
        out.append(
            Bar(f"{text} {other}", f">= {demanded}", f"{ratio:.1%}" if times < 1 else f"{ratio:.1f} times", ratio >= times)
        )
    peak = max(run.peak_rss_bytes for run in quarry.runs) / 1e6
    out.append(Bar("peak memory, largest of all runs", "< 800 MB", f"{peak:.0f} MB", peak < 800))
    known = {None: "not run", True: "yes", False: "no"}
    out.append(Bar(f"same .bin and .idx as {MEGATRON}", "yes", known[same], same))
    differing = quarry.differing
    out.append(
        Bar(
            "documents that differ",
            "0",
            "not run" if differing is None else f"{differing:,}",
            None if differing is None else differing == 0,
        )
    )
    return out


def versions(megatron: Path | None) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("quarry", "gigatoken", "tokenizers", "transformers", "datatrove", "awkward", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    info = megatron / "megatron" / "core" / "package_info.py" if megatron else None
    if info and info.is_file():
        values = dict(re.findall(r"^(MAJOR|MINOR|PATCH|PRE_RELEASE) = ['\"]?([\w.]*)['\"]?", info.read_text(), re.MULTILINE))
        found["megatron-lm"] = f"{values['MAJOR']}.{values['MINOR']}.{values['PATCH']}{values.get('PRE_RELEASE', '')}"
        head = megatron / ".git" / "HEAD" if megatron else None
        if head and head.is_file():
            found["megatron-lm"] += f" ({_commit(head)})"
    return found


def _commit(head: Path) -> str:
    text = head.read_text().strip()
    reference = head.parent / text.removeprefix("ref: ")
    return (reference.read_text().strip() if text.startswith("ref: ") and reference.is_file() else text)[:12]


def machine() -> dict[str, str | int]:
    cpu = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": cpu.group(1) if cpu else "unknown",
        "memory_gb": round(int(memory.group(1)) * 1024 / 1e9) if memory else 0,
        "system": f"{platform.system()} {platform.release()}",
        "load_average_at_start": f"{os.getloadavg()[0]:.2f}",
    }


def table(chosen: list[Peer], corpus: Corpus) -> str:
    """Markdown: one row per program, ratios from this run."""
    quarry = next((peer for peer in chosen if peer.name == QUARRY), None)
    rows = [
        "| program | wall s (median) | min-max | runs | start-up s | CPU s | MB/s | documents/s | peak MB | differing documents "
        "| Quarry is faster by |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for peer in sorted(chosen, key=lambda peer: -peer.median("wall_seconds")):
        wall = peer.median("wall_seconds")
        walls = [run.wall_seconds for run in peer.runs]
        differing = "reference" if peer.name == MEGATRON else "-" if peer.differing is None else f"{peer.differing:,}"
        ratio = "-" if quarry is None or peer is quarry else f"{wall / quarry.median('wall_seconds'):.2f}x"
        rows.append(
            f"| {peer.name} | {wall:.2f} | {min(walls):.2f}-{max(walls):.2f} | {len(walls)} "
            f"| {'-' if peer.startup is None else f'{peer.startup.wall_seconds:.2f}'} | {peer.median('cpu_seconds'):.1f} "
            f"| {corpus.text_bytes / 1e6 / wall:.1f} | {corpus.documents / wall:,.0f} "
            f"| {max(run.peak_rss_bytes for run in peer.runs) / 1e6:.0f} | {differing} | {ratio} |"
        )
    return "\n".join(rows)


def report(chosen: list[Peer], left_out: list[str], corpus: Corpus, found: list[Bar], about: dict[str, object]) -> str:
    """The whole Markdown text."""
    held = {None: "not judged", True: "passed", False: "FAILED"}
    lines = [
        f"{corpus.documents:,} unique documents, {corpus.text_bytes / 1e6:.1f} MB of text in {corpus.path.stat().st_size / 1e6:.1f} MB of JSON "
        f"lines; tokenizer of {about['vocab_size']:,} entries; {about['workers']} workers; whole processes, interleaved.",
        "",
        table(chosen, corpus),
        "",
        *(f"- {line}" for line in left_out),
        "",
        *(["| bar | demanded | measured | |", "|---|---|---|---|"] if found else []),
        *(f"| {bar.name} | {bar.demanded} | {bar.measured} | {held[bar.held]} |" for bar in found),
        "",
    ]
    if corpus.text_bytes < FULL_SIZE_MB * 1e6:
        lines += [f"The bars are stated for 300 MB; with {corpus.text_bytes / 1e6:.0f} MB start-up weighs more.", ""]
    place, used = about["machine"], about["versions"]
    assert isinstance(place, dict)
    assert isinstance(used, dict)
    lines += [
        f"Machine: {place['cores']} cores of {place['cpu']}, {place['memory_gb']} GB, {place['system']}, "
        f"load {place['load_average_at_start']} at the start. "
        f"Versions: {', '.join(f'{name} {value}' for name, value in used.items())}.",
    ]
    return "\n".join(line for i, line in enumerate(lines) if line or (i and lines[i - 1])) + "\n"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data_prep",
        description="Measure `quarry tokenize` against Megatron's tools, datatrove and gigatoken, and check its output against theirs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--corpus", type=Path, required=True, help="JSON lines with `text` (benchmarks.corpus makes them)")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json and tokenizer_config.json")
    parser.add_argument("--megatron-lm", type=Path, help="a checkout of Megatron-LM; its two tools are left out without it")
    parser.add_argument("--work", type=Path, default=Path("/tmp/quarry-benchmark"), help="folder for copies, outputs and logs")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="of every program (default: all cores)"
    )
    parser.add_argument("--repetitions", type=int, default=5, help="runs of each program (default: 5)")
    parser.add_argument(
        "--slow-repetitions", type=int, default=3, help=f"runs of {' and '.join(SLOW)}, minutes each (default: 3)"
    )
    parser.add_argument("--size-mb", type=float, help="take only this much text from the beginning of the corpus")
    parser.add_argument("--only", nargs="+", choices=list(SHORT), default=list(SHORT), help="programs to run (default: all)")
    parser.add_argument(
        "--no-startup", action="store_true", help=f"do not measure {STARTUP_LINES} lines for the start-up column"
    )
    parser.add_argument("--json", type=Path, help="write every measurement here")
    parser.add_argument("--markdown", type=Path, help="write the tables here too")
    options = parser.parse_args(argv)
    for path, remedy in (
        (options.corpus, "make it with `python -m benchmarks.corpus`"),
        (options.tokenizer / "tokenizer.json", "train one with `quarry tokenizer train`"),
    ):
        if not path.is_file():
            parser.error(f"{path} does not exist; {remedy}")
    if options.workers < 1 or options.repetitions < 1 or options.slow_repetitions < 1:
        parser.error("--workers, --repetitions and --slow-repetitions are 1 at least")
    return options


def main(argv: list[str] | None = None) -> int:
    from data_prep.tokenizer import load_tokenizer

    options = arguments(argv)
    work, workers = options.work.resolve(), options.workers
    tokenizer, megatron = options.tokenizer.resolve(), options.megatron_lm.resolve() if options.megatron_lm else None
    about: dict[str, object] = {"machine": machine(), "versions": versions(megatron), "workers": workers}
    loaded = load_tokenizer(tokenizer, "huggingface")
    end = next(name for name, number in loaded.special_ids.items() if number == loaded.eod_id)
    about["vocab_size"] = loaded.vocab_size
    work.mkdir(parents=True, exist_ok=True)
    print(f"cutting the corpus for {workers} workers ...", file=sys.stderr)
    corpus = prepare_corpus(options.corpus, work, workers, options.size_mb)
    wanted = {SHORT[name] for name in options.only}
    listed = list(peers(corpus, tokenizer, megatron, work, workers, end))
    left_out = [line for line in listed if isinstance(line, str)]
    chosen = [peer for peer in listed if isinstance(peer, Peer) and peer.name in wanted]
    for line in left_out:
        print(line, file=sys.stderr)
    if not chosen:
        print("none of the programs can be run here", file=sys.stderr)
        return 2
    try:
        if not options.no_startup:
            small = startup_corpus(corpus, work, workers)
            measure_startup(chosen, list(peers(small, tokenizer, megatron, small.path.parent, workers, end)), small.path.parent)
        started = time.time()
        left_out += measure_all(chosen, work, options.repetitions, options.slow_repetitions)
    except CommandFailed as error:
        print(error, file=sys.stderr)
        return 2
    print("comparing the outputs ...", file=sys.stderr)
    found = bars(chosen, compare(chosen))
    text = report(chosen, left_out, corpus, found, about)
    print(text)
    if options.markdown:
        write_bytes(options.markdown, text.encode())
    if options.json:
        values = {
            **about,
            "started_unix_seconds": started,
            "corpus": {"sha256": file_sha256(corpus.path), "documents": corpus.documents, "text_bytes": corpus.text_bytes},
            "tokenizer_sha256": loaded.digest,
            "left_out": left_out,
            "programs": {
                peer.name: {
                    "runs": [vars(run) for run in peer.runs],
                    "startup": vars(peer.startup) if peer.startup else None,
                    "differing_documents": peer.differing,
                }
                for peer in chosen
            },
            "bars": [vars(bar) for bar in found],
        }
        write_json(options.json, values)
    return 1 if any(bar.held is False for bar in found) else 0


if __name__ == "__main__":
    sys.exit(main())
