"""One input file of chat samples -> tokens, masks and a table on disk, in memory that does not grow with the file.

The files of a shard appear under their names only when whole, the record last; a shard whose record names the same inputs is kept, so
that a killed preparation goes on with the file that it was in.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from data_prep.errors import DataError
from data_prep.files import atomic_write, digest_of, file_sha256, record_file, verify_file, write_json
from data_prep.indexed import Writer, bin_path, idx_path
from data_prep.optional import need
from data_prep.sft_manifest import REMEDY, TABLE, SampleFile, mask_path, refused_path, table_path
from data_prep.sft_render import Rendered, Renderer
from data_prep.sft_samples import check, control_tokens, from_parquet
from data_prep.text_files import CHUNK_BYTES, DamagedFile, Reason, chunks, is_parquet, lines

BATCH_SAMPLES = 256
"""Rendered and encoded together: enough for the tokenizer's threads, some MB of text."""
RULES = 1
"""Raised whenever `check` or the files change their meaning, so that what was made before is made again."""


def read_records(path: Path) -> Iterator[tuple[int, Any]]:
    """(line or row from 1, parsed JSON value or Reason) of every record; blank lines are passed over.

    A file that breaks off ends with a Reason for the line that it breaks in.
    """
    number = 0
    try:
        if is_parquet(path):
            for number, row in enumerate(_rows(path), 1):
                yield number, from_parquet(row)
            return
        loads = need("orjson").loads
        for number, raw in enumerate(lines(chunks(path)), 1):
            if isinstance(raw, Reason):
                yield number, raw
            elif raw.strip():
                try:
                    yield number, loads(raw)
                except ValueError as error:
                    yield number, Reason("not JSON", str(error))
    except DamagedFile as error:
        yield number + 1, Reason("damaged file", str(error))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    pyarrow, parquet = need("pyarrow"), need("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=CHUNK_BYTES) as file:
            for batch in file.iter_batches(BATCH_SAMPLES):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DamagedFile(f"the Parquet file cannot be read ({str(error).splitlines()[0]}); what follows is lost") from None


def render_file(
    path: Path, data_root: Path, prefix: str, renderer: Renderer, allowed: Collection[str], ignored: Collection[str]
) -> SampleFile:
    """Write the shard `prefix` (below `data_root`) of the samples in `path`, or keep the one that is there; returns its record.

    `allowed` and `ignored`: see sft_samples.check.
    """
    target = data_root / prefix
    source_digest = file_sha256(path)
    rules = {"rules": RULES, "allowed": sorted(allowed), "ignored": sorted(ignored)}
    inputs = digest_of({**rules, "file": source_digest, "renderer": renderer.digest})
    kept = _current(target, inputs, data_root)
    if kept is not None:
        return kept.model_copy(update={"input": str(path)})
    pattern = control_tokens(renderer.special)
    counts: Counter[str] = Counter()
    read = learned_tokens = 0
    rows: list[tuple[int, int, int]] = []
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(Writer(target, renderer.vocab_size))
        mask = stack.enter_context(atomic_write(mask_path(target)))
        refused = stack.enter_context(atomic_write(refused_path(target)))

        def refuse(line: int, reason: Reason) -> None:
            counts[reason.kind] += 1
            refused.write(
                json.dumps({"line": line, "reason": reason.kind, "detail": reason.detail}, ensure_ascii=True).encode() + b"\n"
            )

        for group in batched(read_records(path), BATCH_SAMPLES):
            read += len(group)
            for line, result in _rendered(group, renderer, pattern, allowed, ignored):
                if isinstance(result, Reason):
                    refuse(line, result)
                    continue
                places = np.flatnonzero(result.learned[1:])  # nothing predicts the first token
                if not len(places):
                    refuse(line, Reason("nothing learned", "no token of an assistant, so no loss"))
                    continue
                writer.add(result.tokens)
                mask.write(result.learned.tobytes())
                rows.append((_hash(result), int(places[0]) + 1, len(places)))
                learned_tokens += len(places)
        with atomic_write(table_path(target)) as f:
            np.save(f, np.array(rows, dtype=TABLE), allow_pickle=False)
    record = SampleFile(
        input=str(path),
        input_sha256=source_digest,
        prefix=prefix,
        read=read,
        samples=len(rows),
        tokens=sum(writer.lengths),
        learned_tokens=learned_tokens,
        max_token_id=writer.max_token_id,
        refused=dict(sorted(counts.items())),
        inputs=inputs,
        files={
            suffix: record_file(make(target))
            for suffix, make in (
                (".bin", bin_path), (".idx", idx_path), (".mask", mask_path), (".table.npy", table_path), (".refused.jsonl", refused_path),
            )
        },
    )  # fmt: skip
    write_json(_record_path(target), record.model_dump(mode="json"))
    return record


def _rendered(
    group: Iterable[tuple[int, Any]], renderer: Renderer, pattern: Any, allowed: Collection[str], ignored: Collection[str]
) -> Iterator[tuple[int, Rendered | Reason]]:
    """Records checked and rendered, in their order."""
    checked = [(line, value if isinstance(value, Reason) else check(value, pattern, allowed, ignored)) for line, value in group]
    rendered = iter(renderer.render([sample for _, sample in checked if not isinstance(sample, Reason)]))
    for line, sample in checked:
        yield line, sample if isinstance(sample, Reason) else next(rendered)


def _hash(rendered: Rendered) -> int:
    digest = hashlib.blake2b(np.ascontiguousarray(rendered.tokens, dtype="<i4").data, digest_size=8)
    digest.update(rendered.learned.data)
    return int.from_bytes(digest.digest(), "little")


def _record_path(target: Path) -> Path:
    return target.with_name(target.name + ".json")


def _current(target: Path, inputs: str, data_root: Path) -> SampleFile | None:
    """The record of a shard that is there, whole, and of these inputs."""
    try:
        record = SampleFile.model_validate_json(_record_path(target).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    if record.inputs != inputs:
        return None
    try:
        for suffix, file in record.files.items():
            verify_file(data_root / (record.prefix + suffix), file, remedy=REMEDY)
    except DataError:
        return None  # altered since: made again
    return record
