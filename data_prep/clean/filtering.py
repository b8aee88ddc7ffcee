"""One shard: read, filtered, decontaminated, masked, written, and signed for deduplication. What a datatrove task of the first stage does."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import orjson
import zstandard
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter, get_filter_result
from datatrove.pipeline.filters.c4_filters import CITATION_REGEX

from data_prep.clean import filters
from data_prep.clean.decontamination import Decontaminator, Hit, Index
from data_prep.clean.masking import Mask
from data_prep.clean.minhash import Signatures, pack_signatures
from data_prep.clean.records import PieceLines, ShardRecord, Tally
from data_prep.clean.shards import LineCount, Shard, read_piece
from data_prep.clean.words import WordHashes, word_hashes
from data_prep.files import atomic_write, record_file, write_bytes
from data_prep.text_files import BadLine
from recipes.cleaning import Cleaning, Filters

ZSTD_LEVEL = 3
"""zstandard's default: a third of the size at a few hundred MB/s, far above the filters."""
OTHERS = ("exact", "minhash", "removed.jsonl.zst", "quarantine.jsonl")
"""Suffixes of a shard's files beside the documents that stay; some have no quarantine or no signatures."""
EXACT_HASH_BYTES = 16
"""128 bits: among 10^10 documents two different texts have the same hash with probability 10^-19."""
BATCH_CHARACTERS = 1 << 18
"""Decontaminated together: for short documents the calls cost more than the work."""


@dataclass(frozen=True)
class FilterStage:
    """What the first stage is made from; sent to every worker."""

    root: Path
    cleaning: Cleaning
    categories: dict[str, str]
    """Source -> category."""
    tokenizer: tuple[str, str] | None
    """Path and kind of the recipe's tokenizer where it names one."""
    index: Path | None
    """Of the benchmarks."""
    work: Path
    shards: tuple[Shard, ...]
    inputs: dict[str, str]
    """Source -> digest of its text and of all that acts on it alone."""


def filtered_path(root: Path, shard: Shard, suffix: str) -> Path:
    """clean/<source>/filtered/<number>.<suffix>: kept.jsonl.zst, removed.jsonl.zst, quarantine.jsonl, exact, minhash, json (last)."""
    return root / "clean" / shard.source / "filtered" / f"{shard.name}.{suffix}"


class FilterShards(PipelineStep):
    """datatrove step without input: its rank says which shard."""

    type = "CLEAN"
    name = "filters, decontamination, masking, signatures"

    def __init__(self, stage: FilterStage):
        super().__init__()
        self.stage = stage

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        filter_shard(self.stage, self.stage.shards[rank])


def filter_shard(stage: FilterStage, shard: Shard) -> ShardRecord:
    """Write the shard's files, the record last."""
    record_path = filtered_path(stage.root, shard, "json")
    record_path.unlink(missing_ok=True)
    work = _ShardWork(stage, shard)
    signing = stage.work / "signing" / f"{shard.rank:05d}"
    shutil.rmtree(signing, ignore_errors=True)
    with ExitStack() as stack:
        work.open(stack)
        near = stage.cleaning.near_duplicates
        if near is not None and work.category not in near.exempt:
            signatures = Signatures(near, signing, work.hashes_of)
            signatures.run(work.kept(), rank=0)
            signed = pack_signatures(near, signing, filtered_path(stage.root, shard, "minhash"))
        else:
            signed = 0
            for _ in work.kept():
                pass
            filtered_path(stage.root, shard, "minhash").unlink(missing_ok=True)
        write_bytes(filtered_path(stage.root, shard, "exact"), work.exact)
    shutil.rmtree(signing, ignore_errors=True)
    if work.quarantine:
        write_bytes(filtered_path(stage.root, shard, "quarantine.jsonl"), work.quarantine)
    else:
        filtered_path(stage.root, shard, "quarantine.jsonl").unlink(missing_ok=True)
    record = ShardRecord(
        inputs=stage.inputs[shard.source],
        documents_in=work.documents_in,
        bytes_in=work.bytes_in,
        bad_lines=work.bad_lines,
        damaged_files=work.damaged,
        empty_documents=work.empty,
        pieces=work.pieces,
        steps={name: tally.count() for name, tally in work.tallies.items()},
        documents=work.documents,
        bytes=work.bytes,
        signatures=signed,
        kept=record_file(filtered_path(stage.root, shard, "kept.jsonl.zst")),
        others={suffix: record_file(path) for suffix in OTHERS if (path := filtered_path(stage.root, shard, suffix)).exists()},
    )
    record.write(record_path)
    return record


class _ShardWork:
    """State of one shard: documents in, files out, counts."""

    def __init__(self, stage: FilterStage, shard: Shard):
        self.stage, self.shard = stage, shard
        self.category = stage.categories[shard.source]
        cleaning = stage.cleaning
        self.chain = _chain(cleaning.filters[self.category].model_dump_json(), stage.tokenizer)
        self.decontaminator = _decontaminator(str(stage.index)) if stage.index is not None else None
        masking = cleaning.masking
        self.mask = Mask(masking) if masking is not None and self.category not in masking.exempt else None
        names = ["text", *(name for name, _ in self.chain if name != "text")]
        names += ["decontamination"] * (self.decontaminator is not None) + ["masking"] * (self.mask is not None)
        self.tallies = {name: Tally() for name in names}
        self.documents_in = self.bytes_in = self.bad_lines = self.damaged = self.empty = self.documents = self.bytes = 0
        self.pieces: list[PieceLines] = []
        self.exact, self.quarantine = bytearray(), bytearray()
        self.hashes: WordHashes | None = None

    def open(self, stack: ExitStack) -> None:
        def packed(suffix: str) -> IO[bytes]:
            file = stack.enter_context(atomic_write(filtered_path(self.stage.root, self.shard, suffix)))
            return stack.enter_context(zstandard.ZstdCompressor(ZSTD_LEVEL).stream_writer(file, closefd=False))

        self.kept_file, self.removed_file = packed("kept.jsonl.zst"), packed("removed.jsonl.zst")

    def kept(self) -> Iterator[Document]:
        """Documents that stay, after they were written; everything else is counted and written on the way."""
        batch: list[tuple[Document, dict[str, Any]]] = []
        size = 0
        for id, text, carried in self._documents():
            self.documents_in += 1
            self.bytes_in += _size(text)
            document = Document(text=text, id=id)
            if self._passes(document):
                batch.append((document, carried))
                size += len(document.text)
                if size >= BATCH_CHARACTERS:
                    yield from self._rest_of(batch)
                    batch, size = [], 0
        yield from self._rest_of(batch)

    def _rest_of(self, batch: list[tuple[Document, dict[str, Any]]]) -> Iterator[Document]:
        """What follows the filters."""
        exact = self.stage.cleaning.exact_duplicates
        texts = [document.text for document, _ in batch]
        hashes: list[WordHashes | None] = [None] * len(batch)
        hits: list[Hit | None] = [None] * len(batch)
        if self.decontaminator is not None:
            hashes = [word_hashes(text) for text in texts]
            hits = self.decontaminator.find(texts, [h.exact for h in hashes])
        for (document, carried), hit, self.hashes in zip(batch, hits, hashes, strict=True):
            if hit is not None:
                self._remove("decontamination", document, hit.benchmark, f"{hit.item}: {hit.words}")
                continue
            self._mask(document)
            self.documents += 1
            self.bytes += _size(document.text)
            self.kept_file.write(json_line({"id": document.id, "text": document.text, **carried}))
            if exact is not None:
                same = " ".join(document.text.split()) if exact.ignore_whitespace else document.text
                self.exact += hashlib.blake2b(same.encode(), digest_size=EXACT_HASH_BYTES).digest()
            yield document

    def hashes_of(self, text: str) -> WordHashes:
        """Of the document that `kept` gave last."""
        return self.hashes if self.hashes is not None else word_hashes(text)

    def _documents(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """(id, text, carried keys) of the shard's documents; bad lines go to the quarantine."""
        number = 0
        for piece in self.shard.pieces:
            count = LineCount()
            for found in read_piece(piece, self.shard.text_key, ("id", *self.shard.carry), count):
                if isinstance(found, BadLine):
                    self.empty += found.empty
                    self.bad_lines += not found.empty
                    self.damaged += found.damaged
                    entry = {"file": found.file, "line": found.line, "start_byte": piece.start, "reason": found.reason}
                    if found.damaged:
                        entry["damaged"] = True
                    self.quarantine += json_line(entry)
                    continue
                values = found.record or {}
                id = values.get("id")
                carried = {key: values[key] for key in self.shard.carry if key in values and _writable(values[key])}
                yield (
                    str(id)
                    if isinstance(id, str | int) and _writable(id)
                    else f"{self.shard.source}/{self.shard.name}/{number}",
                    found.text,
                    carried,
                )
                number += 1
            if piece.stop is not None:
                self.pieces.append(PieceLines(file=piece.shown, start_byte=piece.start, lines=count.lines))

    def _passes(self, document: Document) -> bool:
        """Run the filters on one document; they may change its text."""
        if not document.text.strip():
            self._remove("text", document, "blank")
            return False
        for name, step in self.chain:
            before = document.text
            stays, reason = get_filter_result(step.filter(document))
            if stays and not document.text.strip():
                document.text, stays, reason = before, False, "blank"
            if not stays:
                self._remove(name, document, reason or name)
                return False
            if document.text != before:
                lines = removed_lines(before, document.text)
                if lines.strip():
                    self._record({"id": document.id, "step": name, "reason": "lines", "kept": True, "text": lines})
                reason = "lines" if lines.strip() else "white_space"
                self.tallies[name].changed(_size(before) - _size(document.text), [reason], document.id, lines.strip())
        return True

    def _mask(self, document: Document) -> None:
        if self.mask is None:
            return
        before = document.text
        document.text = self.mask.format(before)
        if self.mask.kinds:
            self.hashes = None
            # No example: it would show what was masked.
            self.tallies["masking"].changed(_size(before) - _size(document.text), self.mask.kinds, document.id, "")

    def _remove(self, step: str, document: Document, reason: str, detail: str | None = None) -> None:
        self.tallies[step].removed(_size(document.text), reason, document.id, document.text, detail)
        entry = {"id": document.id, "step": step, "reason": reason, "text": document.text}
        self._record(entry if detail is None else {**entry, "detail": detail})

    def _record(self, entry: dict[str, Any]) -> None:
        self.removed_file.write(json_line(entry))


def removed_lines(before: str, after: str) -> str:
    """Lines of `before` that are not in `after`, which is a subsequence of its lines, stripped and without citations."""
    kept = iter(after.split("\n"))
    waited, gone = next(kept, None), []
    for line in before.splitlines():
        if waited is not None and CITATION_REGEX.sub("", line.strip()).strip() == waited.strip():
            waited = next(kept, None)
        else:
            gone.append(line)
    return "\n".join(gone)


@cache
def _chain(config: str, tokenizer: tuple[str, str] | None) -> list[tuple[str, BaseFilter]]:
    """Built once per process and category: models and patterns are the same for all shards."""
    chain = filters.build(Filters.model_validate_json(config), tokenizer)
    for _, step in chain:
        step.stat_update = (
            _no_statistics  # C4 counts every line, which takes a third of its time; what is shown is counted here
        )
    return chain


def _no_statistics(*labels: str, value: int = 1, unit: str | None = None) -> None:
    """In the place of datatrove's counters."""


@cache
def _decontaminator(index: str) -> Decontaminator:
    return Decontaminator(Index.read(Path(index)))


def _size(text: str) -> int:
    """Bytes of UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


_dumps: Callable[..., bytes] = orjson.dumps


def _writable(value: Any) -> bool:
    """Whether a value as JSON spelled it can be written: a string may hold a lone surrogate."""
    try:
        _dumps(value)
    except TypeError:
        return False
    return True


def json_line(value: dict[str, Any]) -> bytes:
    """One JSON line, newline included."""
    return _dumps(value, option=orjson.OPT_APPEND_NEWLINE)
