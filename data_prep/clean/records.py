"""What cleaning leaves beside its files: counts that add up, examples, digests."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from data_prep.files import FileRecord, Sha256, Strict
from data_prep.records import Count, Record

EXAMPLES_PER_STEP = 3
EXCERPT_CHARACTERS = 160


class Example(Strict):
    """A document that a step removed, or changed."""

    id: str
    reason: str
    detail: str | None
    """What it equals, or which words of which benchmark's item it holds."""
    excerpt: str
    """The start of the text, white space collapsed."""


class StepCount(Strict):
    """What one step did to the documents that came to it; bytes are of UTF-8 text."""

    removed_documents: Count = 0
    removed_bytes: Count = 0
    changed_documents: Count = 0
    """Kept, with lines removed or personal data masked."""
    shrunk_bytes: int = 0
    """By which the changed documents became shorter (negative: longer)."""
    reasons: dict[str, Count] = Field(default_factory=dict)
    """Why documents were removed or changed -> documents."""
    examples: list[Example] = Field(default_factory=list)


class PieceLines(Strict):
    """Lines of a byte range of a file; what gives the lines of the next range their numbers."""

    file: str
    start_byte: Count
    lines: Count


class ShardRecord(Record):
    """One shard after its filters: written last, after the shard's files."""

    format: Literal["quarry.filtered/1"] = "quarry.filtered/1"
    documents_in: Count
    bytes_in: Count
    bad_lines: Count
    damaged_files: Count = 0
    """Of these lines, those that stand for the rest of a file."""
    empty_documents: Count
    pieces: list[PieceLines]
    steps: dict[str, StepCount]
    """Steps up to masking, in their order."""
    documents: Count
    """That stay."""
    bytes: Count
    signatures: Count
    """Documents with MinHash signatures: at least one n-gram long."""
    kept: FileRecord
    others: dict[str, FileRecord] = Field(default_factory=dict)
    """Suffix -> the shard's further files: hashes and signatures that later runs compare, what was removed, the quarantine."""


class AppliedShard(Record):
    """One shard after deduplication."""

    format: Literal["quarry.deduplicated/1"] = "quarry.deduplicated/1"
    documents: Count
    bytes: Count
    steps: dict[str, StepCount]
    file: FileRecord
    duplicates: FileRecord


class CleanFile(Strict):
    """A file of documents that stay, with what was removed from it."""

    path: str
    """Relative to the data root, as all paths here."""
    documents: Count
    record: FileRecord
    filtered: str
    """Compressed JSON lines of what filters, decontamination and masking removed."""
    duplicates: str
    duplicates_record: FileRecord


class CleanRecord(Record):
    """A cleaned source. documents_in = documents + sum of removed_documents over `steps`, and bytes_in = bytes + sum of removed_bytes
    + sum of shrunk_bytes; `documents_in` counts neither bad lines nor empty documents."""

    format: Literal["quarry.clean/1"] = "quarry.clean/1"
    source: str
    category: str
    filtered: Sha256
    """Digest of the input and of all that acts on this source alone; equal: its filters need not run again."""
    documents_in: Count
    bytes_in: Count
    documents: Count
    bytes: Count
    quarantined_lines: Count
    empty_documents: Count
    steps: dict[str, StepCount]
    files: list[CleanFile]


class DeduplicatedRecord(Record):
    """The deduplication of all sources together; its `inputs` are those of the whole cleaning."""

    format: Literal["quarry.cleaning/1"] = "quarry.cleaning/1"
    sources: dict[str, Sha256]
    """Source -> `inputs` of its CleanRecord."""
    priority: list[str]
    """Sources, best first."""
    benchmarks: dict[str, dict[str, Count]]
    """Benchmark -> items, and texts too short to be matched."""


def add_counts(total: StepCount, more: StepCount) -> StepCount:
    """Sums; of the examples up to EXAMPLES_PER_STEP, of different reasons first."""
    reasons = dict(total.reasons)
    for reason, count in more.reasons.items():
        reasons[reason] = reasons.get(reason, 0) + count
    return StepCount(
        removed_documents=total.removed_documents + more.removed_documents,
        removed_bytes=total.removed_bytes + more.removed_bytes,
        changed_documents=total.changed_documents + more.changed_documents,
        shrunk_bytes=total.shrunk_bytes + more.shrunk_bytes,
        reasons=dict(sorted(reasons.items())),
        examples=choose_examples([*total.examples, *more.examples]),
    )


def choose_examples(candidates: list[Example]) -> list[Example]:
    """The first of each reason, then the next ones, in the order of the documents."""
    seen: set[str] = set()
    first, rest = [], []
    for example in candidates:
        (rest if example.reason in seen else first).append(example)
        seen.add(example.reason)
    chosen = (first + rest)[:EXAMPLES_PER_STEP]
    return [example for example in candidates if any(example is c for c in chosen)]


class Tally:
    """A StepCount that grows document by document."""

    def __init__(self) -> None:
        self.removed_documents = self.removed_bytes = self.changed_documents = self.shrunk_bytes = 0
        self.reasons: dict[str, int] = {}
        self._examples: list[Example] = []

    def removed(self, size: int, reason: str, id: str, text: str, detail: str | None = None) -> None:
        self.removed_documents += 1
        self.removed_bytes += size
        self._note(reason, id, text, detail)

    def changed(self, shrunk: int, reasons: list[str], id: str, text: str) -> None:
        """`text`: what the example shows; none is kept for an empty one."""
        self.changed_documents += 1
        self.shrunk_bytes += shrunk
        for reason in reasons:
            self._note(reason, id, text, None)

    def _note(self, reason: str, id: str, text: str, detail: str | None) -> None:
        seen = self.reasons.get(reason, 0)
        self.reasons[reason] = seen + 1
        # More than are shown in the end, because another shard may have the same reasons.
        if seen < EXAMPLES_PER_STEP and text:
            self._examples.append(Example(id=id, reason=reason, detail=detail, excerpt=excerpt(text)))

    def count(self) -> StepCount:
        return StepCount(
            removed_documents=self.removed_documents,
            removed_bytes=self.removed_bytes,
            changed_documents=self.changed_documents,
            shrunk_bytes=self.shrunk_bytes,
            reasons=dict(sorted(self.reasons.items())),
            examples=choose_examples(self._examples),
        )


def excerpt(text: str) -> str:
    short = " ".join(text[: 4 * EXCERPT_CHARACTERS].split())
    return short if len(short) <= EXCERPT_CHARACTERS else short[: EXCERPT_CHARACTERS - 1] + "…"
