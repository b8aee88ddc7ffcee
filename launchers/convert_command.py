"""`quarry convert`: between a Megatron checkpoint and a Hugging Face folder, in a process of its own because the work needs torch.

The tokenizer is handled here, since model/ knows none: its files are prepared in a temporary folder and travel with the model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

EPILOG = """examples:
  quarry convert --from runs/smoke-tiny/stages/foundation --to /tmp/foundation-hf   a stage's model for transformers
  quarry convert --from /tmp/foundation-hf --to /tmp/foundation-megatron            and back; a chain can begin with it (docs/sft.md)
"""


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "convert",
        help="convert a checkpoint to a Hugging Face folder, or back",
        description="Convert a Megatron checkpoint to a Hugging Face folder, or a Hugging Face Granite, or Llama, to a checkpoint.\n"
        "The direction follows from --from.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    """Exit code of the conversion: 0 done, 78 refused (the reason is on stderr). DataError for a tokenizer that does not fit."""
    command = [sys.executable, "-m", "model.convert", "--from", str(args.source), "--to", str(args.target)]
    if args.dtype:
        command += ["--dtype", args.dtype]
    with tempfile.TemporaryDirectory() as temporary:
        command += _tokenizer(args.source, Path(temporary))
        code = subprocess.run(command, check=False).returncode
    if code == 0 and "--tokenizer-record" in command:
        # A stage can begin with it (sft.STAGE.initial): its digests are taken now.
        return subprocess.run([sys.executable, "-m", "training.imported", str(args.target)], check=False).returncode
    return code


def _tokenizer(source: Path, folder: Path) -> list[str]:
    """Fill `folder` with the files of the tokenizer that belongs to `source`; returns the arguments that hand them on."""
    from data_prep import tokenizer as tokenizers
    from data_prep.errors import DataError

    if (source / "config.json").is_file():
        if not (source / "tokenizer.json").is_file():
            return []
        tokenizer = tokenizers.load_tokenizer(source, "huggingface")
        for path in tokenizer.files():
            shutil.copyfile(path, folder / path.name)
        return ["--tokenizer-files", str(folder), "--tokenizer-record", json.dumps(tokenizers.describe(tokenizer))]
    described = next((f / "model.json" for f in (source, *source.resolve().parents[:2]) if (f / "model.json").is_file()), None)
    record = json.loads(described.read_bytes()).get("tokenizer") if described else None
    if record is None:
        return []
    tokenizer = tokenizers.load_tokenizer(Path(record["path"]), record["kind"])
    if tokenizer.digest != record["sha256"]:
        raise DataError(
            f"{record['path']}: its SHA-256 is {tokenizer.digest}, {described} says {record['sha256']}; it is not the tokenizer that the "
            "model was trained with, restore that one"
        )
    tokenizers.write_hf_tokenizer(tokenizer, folder)
    return ["--tokenizer-files", str(folder)]
