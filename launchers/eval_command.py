"""`quarry eval`: held-out loss, retrieval in long context and benchmarks of a finished model, in a process of its own that has torch."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

EPILOG = """examples:
  quarry eval runs/smoke-tiny/stages/final_annealing                     held-out loss and needle test of a stage's checkpoint
  quarry eval runs/smoke-tiny/stages/export --tasks needle --needle-lengths 128 256 --needle-depths 0 50 100
  quarry eval /models/granite-8b --tasks granite_4_1_base --lm-eval lm-eval/bin/python --run-generated-code
  quarry eval /models/granite-8b --tasks gsm8k_cot --lm-eval lm-eval/bin/python --limit 20           any task of lm-eval, tried out

MODEL is a Hugging Face folder or a Megatron checkpoint (stage, checkpoints or iter_* folder), which is exported to FOLDER/hf first. TASKS are
heldout, needle, lists of benchmarks (recipes/evaluation: smoke, granite_4_1_base, granite_4_1_instruct) and tasks of lm-eval 0.4.13, which runs
in an environment of its own, offline. docs/evaluation.md says how to make that environment and bring the data sets. Run the same command
again after anything: what was measured is not measured again. Exit code 1: the export has not the checkpoint's held-out loss; 78: refused.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "eval",
        help="evaluate a finished model, beside the published numbers",
        description="Evaluate a finished model: held-out loss, retrieval in long context, benchmarks beside the published numbers.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="Hugging Face folder, or stage or checkpoint of a run")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="what to measure (default: heldout needle)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where everything is written (default: MODEL-eval)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: a GPU where there is one")
    heldout = parser.add_argument_group("heldout")
    heldout.add_argument(
        "--heldout-data", type=Path, metavar="ROOT", help="data root of `quarry prep` (default: that of the run)"
    )
    heldout.add_argument("--heldout-samples", type=int, metavar="N", help="sequences per category (default: as in the recipe)")
    needle = parser.add_argument_group("needle")
    needle.add_argument(
        "--needle-lengths", type=int, nargs="+", metavar="TOKENS", help="default: half and all of the model's context"
    )
    needle.add_argument("--needle-depths", type=float, nargs="+", metavar="PERCENT", help="default: 0 25 50 75 100")
    needle.add_argument("--needle-samples", type=int, metavar="N", help="texts per length and depth (default: 8)")
    needle.add_argument("--needle-choices", type=int, metavar="N", help="answer and distractors; chance is 1/N (default: 8)")
    needle.add_argument("--needle-keys", type=int, metavar="N", help="facts of one kind in a text (default: 4)")
    needle.add_argument("--seed", type=int, metavar="N", help="of the texts (default: 0)")
    benchmarks = parser.add_argument_group("benchmarks")
    benchmarks.add_argument("--lm-eval", type=Path, metavar="PYTHON", help="Python of the environment with lm-eval 0.4.13")
    benchmarks.add_argument("--include-path", type=Path, metavar="FOLDER", help="lm-eval task files of yours, with local data")
    benchmarks.add_argument("--skip", nargs="+", metavar="BENCHMARK", help="benchmarks of a list that are left out")
    benchmarks.add_argument("--batch-size", type=int, metavar="N", help="default: 4")
    benchmarks.add_argument("--limit", type=int, metavar="N", help="documents per task, to try it; marked in the results")
    benchmarks.add_argument(
        "--run-generated-code", action="store_true", help="allow benchmarks that execute what the model writes; use a container"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Exit code of the evaluation: 0 done, 1 checkpoint and export differ, 78 refused (the reason is on stderr)."""
    needle = {
        "lengths_tokens": args.needle_lengths,
        "depths_percent": args.needle_depths,
        "samples": args.needle_samples,
        "choices": args.needle_choices,
        "keys": args.needle_keys,
        "seed": args.seed,
    }
    request = {
        "model": str(args.model),
        "output": str(args.output or _beside(args.model)),
        "tasks": args.tasks,
        "device": args.device,
        "heldout_data": _text(args.heldout_data),
        "heldout_samples": args.heldout_samples,
        "needle": _given(needle),
        "lm_eval": _text(args.lm_eval),
        "include_path": _text(args.include_path),
        "skip": args.skip,
        "batch_size": args.batch_size,
        "limit": args.limit,
        "run_generated_code": args.run_generated_code,
    }
    command = [sys.executable, "-W", "ignore", "-m", "training.evaluation", "--request", json.dumps(_given(request))]
    return subprocess.run(command, check=False).returncode


def _beside(model: Path) -> Path:
    """runs/x/stages/export -> runs/x/stages/export-eval: inside it would change the folder's digest or a stage's files."""
    whole = model.resolve()
    return whole.with_name(f"{whole.name}-eval")


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Without what the command line does not say, so that the defaults are those of the request."""
    return {name: value for name, value in values.items() if value is not None}


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
