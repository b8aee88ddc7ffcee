"""Training on one GPU: tokens/s, TFLOP/s and memory of what a recipe trains, beside Megatron's defaults and transformers with torch.compile.

Every case is a few steps of Megatron's own train_step over Quarry's model, arguments and forward step, on random tokens that lie on the
GPU. FLOPs are the model's (recipes/flops.py): causal attention as half of its square, recomputation not counted, as NVIDIA counts. The
share of the peak is of the largest matrix products measured in the same run, bf16's for bf16 and FP8's for FP8.

Writes results.jsonl (a line per case, as it ends) and, from all lines that lie there, results.json and results.md: a run that was cut
off goes on with the cases that have no result.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.train_gpu_cases import GRANITE, LLAMA, SUITES, Case, suite
from data_prep.files import write_bytes, write_json

PACKAGES = ("torch", "transformer-engine", "megatron-core", "transformers", "triton", "nvidia-cudnn-cu13", "nvidia-cublas")
BF16_SHARE, FP8_TIMES, NVIDIA_TFLOPS, NVIDIA_TOKENS = 0.70, 1.3, 744.0, 14_400.0
"""The bars; NVIDIA's are Megatron-Bridge 25.11's figures of Llama 3 8B at 8K in FP8 (current scaling) on 8 H100."""
EPILOG = """examples:
  python -m benchmarks.train_gpu --suite whole --output bench            # the bars, about 5 minutes of an H200
  python -m benchmarks.train_gpu --suite all --output bench --minutes 25
  python -m benchmarks.train_gpu --suite tiny --output /tmp/bench        # tries the script on a CPU
"""


def figures(row: dict[str, Any], peaks: dict[str, float]) -> dict[str, Any]:
    """A result line with its rates: median over the steps of tokens/s, TFLOP/s, and the share of the matmul peak of its precision."""
    if row["outcome"] != "measured":
        return row
    case = as_case(row)
    seconds = statistics.median(row["step_seconds"])
    tokens_per_second = case.tokens_per_step / seconds
    tflops = tokens_per_second * case.flops_per_token() / 1e12
    peak = peaks.get("fp8" if case.precision.startswith("fp8") else "bf16")
    return row | {
        "tokens_per_second": tokens_per_second,
        "tflops": tflops,
        "share_of_matmul_peak": tflops / peak if peak else None,
        "share_of_bf16_matmul_peak": tflops / peaks["bf16"] if peaks.get("bf16") else None,
    }


def as_case(row: dict[str, Any]) -> Case:
    values = {key: value for key, value in row["case"].items() if key != "name"}
    return Case(**values | {"extra": tuple(values["extra"])})


def read_results(path: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(matmul peaks, result lines): of a case that was measured twice the last counts, of the peaks the highest."""
    peaks: dict[str, float] = {}
    rows: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        if "matmul_tflops" in row:
            peaks = {name: max(value, peaks.get(name, 0.0)) for name, value in row["matmul_tflops"].items()}
        else:
            rows[row["case"]["name"]] = row
    return peaks, [figures(row, peaks) for row in rows.values()]


def bars(rows: list[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """(bar, demanded, measured, verdict) of one H200 at 8K, over whole models."""

    def whole(model: str, precision: str) -> dict[str, Any] | None:
        found = [
            row
            for row in rows
            if row["outcome"] == "measured"
            and (row["case"]["program"], row["case"]["model"], row["case"]["precision"]) == ("quarry", model, precision)
            and row["case"]["layers"] is None
            and row["case"]["seq_length_tokens"] == 8192
        ]
        return max(found, key=lambda row: row["tokens_per_second"], default=None)

    def bar(what: str, demanded: float, measured: float | None, show: str) -> tuple[str, str, str, str]:
        if measured is None:
            return what, f">= {show.format(demanded)}", "-", "not measured"
        return what, f">= {show.format(demanded)}", show.format(measured), "passed" if measured >= demanded else "FAILED"

    plain, llama = whole(GRANITE, "bf16"), whole(LLAMA, "fp8_tensorwise")
    fp8 = {precision: whole(GRANITE, precision) for precision in ("fp8_tensorwise", "fp8_delayed", "fp8_blockwise")}
    lines = [bar("bf16, share of the bf16 matmul peak", BF16_SHARE, plain and plain["share_of_bf16_matmul_peak"], "{:.1%}")]
    for precision, row in fp8.items():
        times = row["tokens_per_second"] / plain["tokens_per_second"] if row and plain else None
        lines.append(bar(f"{precision}, times bf16", FP8_TIMES, times, "{:.2f}"))
    lines.append(bar("Llama 3 8B, fp8_tensorwise, TFLOP/s", NVIDIA_TFLOPS, llama and llama["tflops"], "{:.0f}"))
    lines.append(
        bar("Llama 3 8B, fp8_tensorwise, tokens/s/GPU", NVIDIA_TOKENS, llama and llama["tokens_per_second"], "{:,.0f}")
    )
    return lines


def markdown(peaks: dict[str, float], rows: list[dict[str, Any]], machine: dict[str, str]) -> str:
    out = [
        "Matmul peak in this run: " + ", ".join(f"{name} {value:.3g} TFLOP/s" for name, value in peaks.items()) + ".",
        "",
        "| program | model | precision | length | sequences/step | tokens/s/GPU | TFLOP/s | of its matmul peak | peak memory GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        case = as_case(row)
        size = case.model + ("" if case.layers is None else f", {case.layers} layers")
        notes = [f"recompute {case.recompute}"] if case.recompute != "none" else []
        notes += [f"loss in chunks of {case.loss_chunk_tokens}"] if case.loss_chunk_tokens else []
        notes += ["16-bit state"] if case.small_state else []
        notes += case.extra
        cells = [
            case.program,
            "; ".join((size, *notes)),
            case.precision,
            f"{case.seq_length_tokens:,}",
            str(case.micro_batches),
        ]
        if row["outcome"] == "measured":
            share = row["share_of_matmul_peak"]
            most = max(row["memory_bytes"].get("peak_forward_backward", 0), row["memory_bytes"].get("peak_optimizer", 0))
            cells += [
                f"{row['tokens_per_second']:,.0f}",
                f"{row['tflops']:.0f}" if row["tflops"] >= 10 else f"{row['tflops']:.3g}",
                "-" if share is None else f"{share:.1%}",
                f"{most / 1e9:.1f}" if most else "-",
            ]
        else:
            cells += [row["outcome"], "-", "-", "-"]
        out.append("| " + " | ".join(cells) + " |")
    out += ["", "| bar, one H200, 8K | demanded | measured | |", "|---|---|---|---|"]
    out += ["| " + " | ".join(line) + " |" for line in bars(rows)]
    out += ["", ", ".join(f"{key} {value}" for key, value in machine.items()) + "."]
    return "\n".join(out) + "\n"


def machine() -> dict[str, str]:
    import torch

    found = {"date": datetime.datetime.now(datetime.UTC).date().isoformat()}
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def run(cases: list[Case], folder: Path, deadline: float, profiles: bool) -> None:
    """Run `cases` in worker processes until `deadline` (time.monotonic); what has a result already is not run again."""
    results = folder / "results.jsonl"
    groups = groupby(cases, key=lambda case: case.program == "hugging_face")
    first = not read_results(results)[0]
    for number, (_, group) in enumerate(groups):
        todo = list(group)
        while todo and time.monotonic() < deadline:
            path = folder / f"cases-{number}.json"
            write_json(path, [case.as_json() for case in todo])
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.train_gpu_worker"]
            command += ["--cases", str(path), "--results", str(results)]
            command += ["--matmul"] * first + (["--profiles", str(folder / "profiles")] if profiles else [])
            environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}
            with open(folder / f"worker-{number}.log", "ab") as log:
                process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
                try:
                    code = process.wait(timeout=max(1.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    return
            first = False
            done = {row["case"]["name"] for row in read_results(results)[1]}
            left = [case for case in todo if case.name not in done]
            if code == 0:
                break
            # The process died, and with it the case that ran: say so, and go on behind it.
            if left:
                row = {
                    "case": left[0].as_json(),
                    "outcome": "failed",
                    "reason": f"the process ended with {code}",
                    "seconds": 0.0,
                }
                with open(results, "a", encoding="utf-8") as out:
                    out.write(json.dumps(row) + "\n")
            todo = left[1:]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_gpu",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--suite", choices=list(SUITES), nargs="+", default=["all"])
    parser.add_argument("--only", metavar="REGEX", help="of the suite, the cases whose name has this")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results; may hold those of an earlier run")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin nothing after so many minutes, and end what runs")
    parser.add_argument(
        "--profile", action="store_true", help="of every case one step more, and its kernels as a table in profiles/"
    )
    options = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * options.minutes
    options.output.mkdir(parents=True, exist_ok=True)
    cases = [case for name in options.suite for case in suite(name) if re.search(options.only or "", case.name)]
    if not cases:
        parser.error(f"--only {options.only}: no case of {', '.join(options.suite)} has it in its name")
    done = {row["case"]["name"] for row in read_results(options.output / "results.jsonl")[1] if row["outcome"] == "measured"}
    run([case for case in cases if case.name not in done], options.output, deadline, options.profile)
    peaks, rows = read_results(options.output / "results.jsonl")
    where = machine()
    text = markdown(peaks, rows, where)
    write_json(options.output / "results.json", {"machine": where, "matmul_tflops": peaks, "cases": rows})
    write_bytes(options.output / "results.md", text.encode())
    print(text)
    missing = [case.name for case in cases if case.name not in {row["case"]["name"] for row in rows}]
    failed = [row["case"]["name"] for row in rows if row["outcome"] == "failed"]
    for what, names in (("not run", missing), ("failed", failed)):
        if names:
            print(f"{what}: {'; '.join(names)}", file=sys.stderr)
    return 1 if missing or failed else 0


if __name__ == "__main__":
    sys.exit(main())
