"""Before a long job: gigatoken against the reference on lines of the very input, from all over it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from data_prep.encoder_choice import Choice
from data_prep.encoders import Encoder, GigatokenEncoder
from data_prep.equality import differences
from data_prep.text_files import DamagedFile, Text, chunks, is_packed, is_parquet, parquet_rows, parse_line

SAMPLE_LINES = 256
"""From positions evenly spaced over the input; a difference that shows in 2 % of the documents is missed once in 200 jobs."""
SAMPLE_LINE_BYTES = 8192
"""Text beyond this is cut off, so that the check takes a second: the reference encodes 2 MB of it."""


def prove_on_sample(choice: Choice, encoder: Encoder, paths: Sequence[str], text_key: str) -> Choice:
    """The choice as it is, or without gigatoken when it differs from the reference on the sample."""
    if not isinstance(encoder, GigatokenEncoder):
        return choice
    unequal = differences(encoder, list(sample(paths, text_key)))
    if not unequal:
        return choice
    why = f"it encodes {len(unequal)} documents of a sample differently, the first begins {unequal[0]!r}"
    return replace(choice, gigatoken=False, why_not=why)


def sample(paths: Sequence[str], text_key: str) -> Iterator[str]:
    """Up to SAMPLE_LINES texts: from plain files the lines behind evenly spaced positions, from others their first."""
    plain = [(path, Path(path).stat().st_size) for path in paths if not (is_packed(Path(path)) or is_parquet(Path(path)))]
    total = sum(size for _, size in plain)
    for path, size in plain:
        share = max(1, SAMPLE_LINES * size // max(1, total))
        with open(path, "rb") as f:
            for number in range(min(share, SAMPLE_LINES)):
                f.seek(size * number // share)
                if number:
                    f.readline(1 << 22)
                parsed = parse_line(f.readline(1 << 22), text_key)
                if isinstance(parsed, Text):
                    yield parsed.text[:SAMPLE_LINE_BYTES]
    others = [path for path in paths if is_packed(Path(path)) or is_parquet(Path(path))][:: max(1, len(paths) // 8)]
    for path in others[:8]:
        yield from _first_texts(Path(path), text_key)


def _first_texts(path: Path, text_key: str) -> Iterator[str]:
    try:
        if is_parquet(path):
            rows = next(parquet_rows(path, text_key), ([], 0))[0]
        else:
            rows = [parse_line(line, text_key) for line in next(chunks(path), b"").split(b"\n")[:-1]]
    except DamagedFile:
        return  # the job itself will say so
    yield from (row.text[:SAMPLE_LINE_BYTES] for row in rows[: SAMPLE_LINES // 8] if isinstance(row, Text))
