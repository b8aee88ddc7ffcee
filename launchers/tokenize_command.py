"""`quarry tokenize`: text files to one Megatron .bin/.idx pair."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_prep.reading_process import Early

EPILOG = """examples:
  quarry tokenize --input 'web/*.jsonl.gz' --tokenizer granite/ --output tokens/web --append-eod
  quarry tokenize --input a.jsonl b.parquet --tokenizer tokenizer.model --output tokens/all --append-eod --workers 16

Writes <output>.bin, .idx, .json (what was done) and, where needed, .quarantine.jsonl (file, line and reason of everything that is no
document). Run it again after anything: it goes on where it was, and does nothing when all is done. The bytes are those that Megatron's
tools/preprocess_data.py writes for the same lines; that tool, too, turns a control token spelled in a text into its id (the record
counts them; --control-tokens as_text keeps them text). Exit code 2: refused, with the reason and a remedy.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "tokenize",
        help="tokenize text files for Megatron",
        description="Tokenize JSON lines (plain, .gz, .zst) and Parquet into one Megatron .bin/.idx pair.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="GLOB", help="files or glob patterns; read sorted by path")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="FOLDER_OR_MODEL",
        help="folder with tokenizer.json, or a SentencePiece .model",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="PREFIX", help="path of the output without .bin/.idx")
    parser.add_argument(
        "--text-key", default="text", metavar="KEY", help="JSON key or Parquet column of the text (default: text)"
    )
    parser.add_argument("--append-eod", action="store_true", help="end every document with the tokenizer's end-of-document id")
    parser.add_argument("--workers", type=int, metavar="N", help="threads that encode (default: all cores)")
    parser.add_argument(
        "--control-tokens",
        choices=("as_ids", "as_text"),
        default="as_ids",
        help="what a control token spelled in a text becomes (default: as_ids, as in Megatron's tool)",
    )
    parser.add_argument(
        "--memory-mb", type=int, metavar="MB", help="memory of each process of up to eight workers (default: 700)"
    )
    parser.add_argument(
        "--max-bad-percent",
        type=float,
        metavar="PERCENT",
        help="refuse when more lines than this are no documents (default: 1)",
    )
    parser.add_argument(
        "--max-damaged-files",
        type=int,
        metavar="N",
        help="refuse when more files than this cannot be read to their end (default: 0)",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Returns 0; DataError (exit code 2) when the input or the tokenizer is refused."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy starts threads for linear algebra, which there is none of here
    from data_prep.blocks import THREADS_PER_PROCESS
    from data_prep.errors import DataError
    from data_prep.reading_process import Early
    from data_prep.text_files import expand

    workers = args.workers if args.workers is not None else len(os.sched_getaffinity(0))
    if workers < 1:
        raise DataError(f"--workers is {workers}; use at least 1")
    paths = expand(args.input, "--input")
    is_new = args.output.name and not any(
        args.output.with_name(args.output.name + suffix).exists() for suffix in (".json", ".shards")
    )
    with Early.start(paths, args.text_key) if is_new and workers <= THREADS_PER_PROCESS else Early() as early:
        return _tokenize(args, paths, workers, early)


def _tokenize(args: argparse.Namespace, paths: list[Path], workers: int, early: Early) -> int:
    # The rest is imported while the reading begins.
    from data_prep import tokenize_files
    from data_prep.progress import Shown
    from data_prep.tokenizer_facts import facts

    progress = Shown()
    given = {name: getattr(args, name) for name in ("memory_mb", "max_bad_percent", "max_damaged_files")}
    record = tokenize_files.tokenize_files(
        paths,
        facts(args.tokenizer),
        args.output,
        text_key=args.text_key,
        append_eod=args.append_eod,
        workers=workers,
        control_tokens=args.control_tokens,
        progress=progress,
        early=early,
        **{name: value for name, value in given.items() if value is not None},
    )
    progress.message(f"{args.output}.bin/.idx: {record.documents:,} documents, {record.tokens:,} tokens ({record.encoder})")
    if record.bad:
        reasons = ", ".join(f"{count:,} {kind}" for kind, count in record.bad.items())
        progress.message(f"left out: {reasons}; see {tokenize_files.quarantine_path(args.output)}")
    if record.control_tokens_in_text:
        progress.message(
            f"{record.control_tokens_in_text:,} control tokens were spelled in texts and became ids, as in Megatron's tool; "
            "--control-tokens as_text keeps them text"
        )
    return 0
