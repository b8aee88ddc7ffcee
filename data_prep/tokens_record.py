"""What tokenizing leaves beside its output: one record per shard while a job runs, one for all in the end."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from data_prep.encoder_choice import ControlTokens
from data_prep.files import Sha256, Strict
from data_prep.records import Count, Record

Xxh3 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class PieceRecord(Strict):
    """Part of an input file as it was read."""

    file: Count
    start: Count
    end: Count
    xxh3: Xxh3
    """Of the bytes read, of a packed file as it lies on disk."""
    lines: Count
    """Blank ones too; rows of a Parquet file."""


class ShardRecord(Strict):
    """Written last, beside NNNNNN.bin (tokens), NNNNNN.lengths (int32 [documents]) and NNNNNN.bad.jsonl (piece, line, kind, reason)."""

    format: Literal["quarry.shard/1"] = "quarry.shard/1"
    settings: Sha256
    pieces: list[PieceRecord]
    documents: Count
    tokens: Count
    text_bytes: Count
    max_token_id: Annotated[int, Field(ge=-1)]
    bytes: Count
    xxh3: Xxh3
    """Of the .bin."""
    lengths_xxh3: Xxh3
    bad: dict[str, Count]
    """Kind of reason -> lines that are no document."""
    bad_xxh3: Xxh3
    """Of the .bad.jsonl."""
    reference_documents: dict[str, Count]
    """Cause -> documents that the reference tokenizer encoded because gigatoken might differ."""
    control_tokens: Count
    """Control tokens that text spelled."""


class Written(Strict):
    """A file of the output; the digest says that it is the one recorded (it is no protection against forgery)."""

    bytes: Count
    xxh3: Xxh3


class TokenizedInput(Strict):
    path: str
    bytes: Count
    mtime_ns: int


class TokensRecord(Record):
    """Beside the .bin/.idx pair: what it was made of, and what happened."""

    format: Literal["quarry.tokens/1"] = "quarry.tokens/1"
    tokenizer_kind: str
    tokenizer_sha256: Sha256
    """Of the file that defines the ids."""
    vocab_size: Count
    eod_id: Count | None
    """Appended to every document; None: nothing is."""
    control_tokens: ControlTokens
    text_key: str
    encoder: str
    why_not_gigatoken: str | None
    dtype: Literal["uint16", "int32"]
    documents: Count
    tokens: Count
    max_token_id: Annotated[int, Field(ge=-1)]
    text_bytes: Count
    """UTF-8 text of all documents."""
    control_tokens_in_text: Count
    """Control tokens that documents spelled and that became ids (control_tokens: as_ids)."""
    reference_documents: dict[str, Count]
    """Cause -> documents that the reference tokenizer encoded."""
    bad: dict[str, Count]
    """Reason -> lines that are no document; each is in the quarantine file."""
    empty_documents: Count
    quarantined_lines: Count
    """Without empty documents."""
    files: list[TokenizedInput]
    shards: list[list[PieceRecord]]
    """Digests of the input as it was read."""
    bin: Written
    idx: Written
