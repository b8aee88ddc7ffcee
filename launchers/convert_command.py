"""`quarry convert`: between a Megatron checkpoint and a Hugging Face folder, in a process of its own because the work needs torch."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "convert",
        help="convert a checkpoint to a Hugging Face folder, or back",
        description="Convert a Megatron checkpoint to a Hugging Face folder, or a Hugging Face Granite to a checkpoint. "
        "The direction follows from --from.",
    )
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        type=Path,
        metavar="CHECKPOINT_OR_HF",
        help="a stage folder of a run, its checkpoints folder, an iter_* folder, or a Hugging Face folder with safetensors",
    )
    parser.add_argument("--to", dest="target", required=True, type=Path, metavar="FOLDER", help="new folder; must not exist")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="dtype of the written weights; default: that of the source")
    return parser


def run(args: argparse.Namespace) -> int:
    """Exit code of the conversion: 0 done, 78 refused (the reason is on stderr)."""
    command = [sys.executable, "-m", "model.convert", "--from", str(args.source), "--to", str(args.target)]
    if args.dtype:
        command += ["--dtype", args.dtype]
    return subprocess.run(command, check=False).returncode
