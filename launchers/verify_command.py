"""`quarry verify`: read prepared data to the last byte and say everything that is wrong with it."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_prep.verification import Verification

EPILOG = """examples:
  quarry verify data/smoke                                    a whole data root
  quarry verify data/smoke/views/foundation                   what one phase reads, and the sources and cache behind it
  quarry verify data/smoke/tokenized/web.bin                  one .bin/.idx pair, by its prefix or either file
  quarry verify tokens/web --workers 8                        the output of `quarry tokenize`, eight files at a time
  quarry verify tokens --full                                 all that was tokenized into one folder, and its input again

Checked: digests and sizes against the records, records against each other, pointers, document bounds and ends, every token id against
the vocabulary, views against their sources and against what is held out, index caches against the views, leftovers.
Exit codes: 0 nothing found; 1 findings, each with file, what, expected, found and remedy; 2 there is nothing to verify at PATH.
"""
EXIT_FINDINGS = 1


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "verify",
        help="read prepared data to the last byte and say what is wrong with it",
        description="Verify a data root or a part of it. Every byte is read once; nothing is changed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "path",
        type=Path,
        metavar="PATH",
        help="data root, folder or manifest of a part of it, .bin/.idx pair, or folder of such pairs",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="files read at the same time (default: one per core)")
    parser.add_argument(
        "--full",
        action="store_true",
        help="also read your own input files, which lie outside of the data root, against their record",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Returns 0 or EXIT_FINDINGS; DataError (exit code 2) when there is nothing to verify at the path."""
    from data_prep.errors import DataError
    from data_prep.progress import Shown
    from data_prep.verify import inspect

    if args.workers is not None and args.workers < 1:
        raise DataError(f"--workers is {args.workers}; give at least 1")
    began = time.monotonic()
    verification = inspect(args.path, workers=args.workers, progress=Shown(), full=args.full)
    show(verification, time.monotonic() - began)
    return EXIT_FINDINGS if verification.findings else 0


def show(verification: Verification, seconds: float) -> None:
    """Findings by file, then one line of what was verified."""
    from rich.console import Console

    console = Console(highlight=False)

    def line(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, soft_wrap=True)

    last = None
    for finding in verification.findings:
        if finding.file != last:
            line(finding.file, "bold")
            last = finding.file
        line(f"  {finding.what}: expected {finding.expected}, found {finding.found}", "red")
        line(f"    {finding.remedy}")
    for note in verification.notes:
        line(f"not verified: {note}", "yellow")
    files = len({finding.file for finding in verification.findings})
    number = len(verification.findings)
    outcome = "nothing found" if not number else f"{number} finding{'s' * (number != 1)} in {files} file{'s' * (files != 1)}"
    size = verification.read_bytes
    line(
        f"{outcome}; read {size / 1e9:.3f} GB, {verification.tokens:,} token ids, in {seconds:.1f} s ({size / 1e9 / seconds:.2f} GB/s)",
        "bold red" if number else "bold green",
    )
