"""What tokenizing leaves beside its output: one record per shard while a job runs, one for all in the end.

Dataclasses, which pydantic reads strictly but which are written without it: importing it and building such models takes a quarter of
a second, and a fresh run reads none.
"""

from __future__ import annotations

import dataclasses
import json
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from data_prep.encoder_choice import ControlTokens
from data_prep.plain_files import is_whole, with_digest, write_json

DIGEST_DIGITS = {"xxh3": 32, "lengths_xxh3": 32, "bad_xxh3": 32, "settings": 64, "inputs": 64, "tokenizer_sha256": 64}
LOWEST = {"max_token_id": -1, "mtime_ns": None}
"""Of integers; otherwise 0. None: any."""


class _Checked:
    """Checks digests and counts; of what is read, pydantic checks names and types."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012  # pydantic's name, a class attribute

    def __post_init__(self) -> None:
        """ValueError for a negative count or a malformed digest."""
        for name, value in vars(self).items():
            lowest = LOWEST.get(name, 0)
            for number in value.values() if isinstance(value, dict) else (value,):
                if isinstance(number, int) and lowest is not None and number < lowest:
                    raise ValueError(f"{name} is {number}, less than {lowest}")
            digits = DIGEST_DIGITS.get(name)
            if digits and not (len(value) == digits and set(value) <= set(string.hexdigits.lower())):
                raise ValueError(f"{name} is {value!r}, not {digits} hexadecimal digits")

    @classmethod
    def from_json(cls, content: bytes) -> Self:
        """ValueError when it is another version's or damaged."""
        from pydantic import TypeAdapter

        values = json.loads(content)
        if isinstance(values, dict) and "digest" in values:  # records of before there were digests have none
            if not is_whole(values):
                raise ValueError(f"its digest is {values['digest']}, its content has another: damaged, or edited by hand")
            del values["digest"]
        return TypeAdapter(cls).validate_json(json.dumps(values))

    def as_json(self) -> dict[str, Any]:
        """The values and the digest of them all."""
        return with_digest(dataclasses.asdict(self))  # type: ignore[call-overload]  # the subclasses are dataclasses


@dataclass(frozen=True, kw_only=True)
class PieceRecord(_Checked):
    """Part of an input file as it was read."""

    file: int
    start: int
    end: int
    xxh3: str
    """Of the bytes read, of a packed file as it lies on disk."""
    lines: int
    """Blank ones too; rows of a Parquet file."""


@dataclass(frozen=True, kw_only=True)
class ShardRecord(_Checked):
    """Written last, beside NNNNNN.bin (tokens), NNNNNN.lengths (int32 [documents]) and NNNNNN.bad.jsonl (piece, line, kind, reason)."""

    format: Literal["quarry.shard/1"] = "quarry.shard/1"
    settings: str
    pieces: list[PieceRecord]
    documents: int
    tokens: int
    text_bytes: int
    max_token_id: int
    bytes: int
    xxh3: str
    """Of the .bin."""
    lengths_xxh3: str
    bad: dict[str, int]
    """Kind of reason -> lines that are no document."""
    bad_xxh3: str
    """Of the .bad.jsonl."""
    reference_documents: dict[str, int]
    """Cause -> documents that the reference tokenizer encoded because gigatoken might differ."""
    control_tokens: int
    """Control tokens that text spelled."""


@dataclass(frozen=True, kw_only=True)
class Written(_Checked):
    """A file of the output; the digest says that it is the one recorded (it is no protection against forgery)."""

    bytes: int
    xxh3: str


@dataclass(frozen=True, kw_only=True)
class TokenizedInput(_Checked):
    path: str
    bytes: int
    mtime_ns: int


@dataclass(frozen=True, kw_only=True)
class TokensRecord(_Checked):
    """Beside the .bin/.idx pair, written last: what it was made of, and what happened."""

    inputs: str
    """Digest of all that the output was made from."""
    format: Literal["quarry.tokens/1"] = "quarry.tokens/1"
    tokenizer_kind: str
    tokenizer_sha256: str
    """Of the file that defines the ids."""
    vocab_size: int
    eod_id: int | None
    """Appended to every document; None: nothing is."""
    control_tokens: ControlTokens
    text_key: str
    encoder: str
    why_not_gigatoken: str | None
    dtype: Literal["uint16", "int32"]
    documents: int
    tokens: int
    max_token_id: int
    text_bytes: int
    """UTF-8 text of all documents."""
    control_tokens_in_text: int
    """Control tokens that documents spelled and that became ids (control_tokens: as_ids)."""
    reference_documents: dict[str, int]
    """Cause -> documents that the reference tokenizer encoded."""
    bad: dict[str, int]
    """Reason -> lines that are no document; each is in the quarantine file."""
    empty_documents: int
    quarantined_lines: int
    """Without empty documents."""
    files: list[TokenizedInput]
    shards: list[list[PieceRecord]]
    """Digests of the input as it was read."""
    bin: Written
    idx: Written

    @classmethod
    def read_if_valid(cls, path: Path) -> Self | None:
        """The record, or None where there is none or another version's: then the step is done again."""
        try:
            return cls.from_json(path.read_bytes())
        except (FileNotFoundError, ValueError):
            return None

    def write(self, path: Path) -> None:
        write_json(path, self.as_json())
