"""What a finished step leaves beside its output, so that a rerun can tell done from to do: inputs, counts, digests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from data_prep.files import FileRecord, Sha256, Strict, write_json
from data_prep.plain_files import is_whole, with_digest

Count = Annotated[int, Field(ge=0)]


class Record(Strict):
    """A JSON file written last, after the files that it describes. It carries the digest of its own content, checked when it is read."""

    inputs: Sha256
    """Digest of all that the output was made from."""

    @model_validator(mode="before")
    @classmethod
    def _whole(cls, values: Any) -> Any:
        """Records of before there were digests have none."""
        if isinstance(values, dict) and "digest" in values:
            if not is_whole(values):
                raise ValueError(f"its digest is {values['digest']}, its content has another: damaged, or edited by hand")
            return {key: value for key, value in values.items() if key != "digest"}
        return values

    @classmethod
    def read_if_valid(cls, path: Path) -> Self | None:
        """The record, or None where there is none or another version's: then the step is done again."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def write(self, path: Path) -> None:
        write_json(path, with_digest(self.model_dump(mode="json")))


class CorpusRecord(Record):
    format: Literal["quarry.corpus/1"] = "quarry.corpus/1"
    source: str
    builder: str
    documents: Count
    text_bytes: Count
    file: FileRecord


class InputFile(Strict):
    """A file of a source of kind files or indexed, as it was when it was read."""

    path: str
    mtime_ns: int
    """An unchanged size and time stand for unchanged content; a changed one costs a new digest."""
    record: FileRecord


class TokenizerFile(Record):
    format: Literal["quarry.tokenizer/1"] = "quarry.tokenizer/1"
    kind: Literal["sentencepiece", "huggingface"]
    path: str
    """Relative to the data root."""
    sha256: Sha256
    vocab_size: Count
    eod_id: Count
    special_ids: dict[str, int]
    trained_on: dict[str, Count] | None
    """Source -> bytes of its text in the training sample; None for a tokenizer that was given."""


class TokenizedRecord(Record):
    format: Literal["quarry.tokenized/1"] = "quarry.tokenized/1"
    source: str
    tokenizer_sha256: Sha256
    dtype: Literal["uint16", "int32"]
    documents: Count
    tokens: Count
    max_token_id: Annotated[int, Field(ge=-1)]
    """Over documents and held-out documents."""
    bin: FileRecord
    idx: FileRecord
    heldout_documents: Count
    heldout_tokens: Count
    heldout_bin: FileRecord
    heldout_idx: FileRecord
    text_bytes: Count
    """UTF-8 text of all documents; 0 for sources that come tokenized."""
    empty_documents: Count
    quarantined_lines: Count
    files: list[InputFile]
    """Kinds files and indexed."""
