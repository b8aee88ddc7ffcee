"""The cleaning of all sources of a recipe: which stages have something to do, in which order, and the records at the end.

clean/<source>/filtered/   per shard what passed the filters (compressed), what did not, signatures, a record: redone when the
                           source's text or anything that acts on it alone changed
clean/.work/<digest>/      deduplication of all sources together: redone when any of them changed; removed at the end
clean/<source>/*.jsonl     what stays; duplicates/ what does not; record.json last
clean/record.json          last of all: the whole is done
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.clean import decontamination
from data_prep.clean.check import check, ordered_sources
from data_prep.clean.identity import VERSION, common_identity, filtered_digest, given_tokenizer
from data_prep.clean.offline import go_offline
from data_prep.clean.records import AppliedShard, CleanFile, CleanRecord, DeduplicatedRecord, ShardRecord, StepCount, add_counts
from data_prep.clean.shards import Shard, SourceText, plan_shards
from data_prep.errors import DataError
from data_prep.files import digest_of, verify_file, write_bytes
from data_prep.optional import need
from data_prep.progress import Done, Progress
from data_prep.sources import threads
from data_prep.text_files import MAX_BAD_FREE, MAX_BAD_PERCENT
from recipes.cleaning import Cleaning
from recipes.schema import Recipe

if TYPE_CHECKING:
    from data_prep.clean.executors import Stage


def clean(
    recipe: Recipe, root: Path, inputs: dict[str, SourceText], progress: Progress, workers: int
) -> dict[str, CleanRecord]:
    """Clean the sources in `inputs`, all that the recipe has text of, into <root>/clean; returns their records.

    What is up to date is left alone. The output depends on recipe and texts alone, not on `workers` (processes). Killed, it goes on
    where it was. The caller holds the root's lock. DataError for what a person has to mend.
    """
    job = Job.of(recipe, root, inputs)
    done = job.current()
    if done is not None:
        if job.work.parent.exists():  # killed after the record was written
            shutil.rmtree(job.work.parent)
        return done
    from data_prep.clean.executors import forget, run_local

    job.begin()
    with (
        progress.step(f"filters of {len(inputs)} sources", sum(shard.size_bytes for shard in job.shards)) as tell,
        _watched(job, tell),
    ):
        ran = run_local(job.filter_stage(), job.work, workers)
    job.refuse_bad_lines()
    for name, stages in (("duplicates", job.duplicate_stages()), ("documents that stay", [job.apply_stage()])):
        with progress.step(name, None):
            for stage in stages:
                if ran:  # what comes after it is not complete, whatever was done before
                    forget(stage, job.work)
                ran |= run_local(stage, job.work, workers)
    records = job.finish()
    for name, record in records.items():
        if record.quarantined_lines:
            progress.message(f"{name}: {record.quarantined_lines} lines are no documents; see {job.quarantine_path(name)}")
    return records


@dataclass
class Job:
    """One cleaning: its digests, shards and stages."""

    recipe: Recipe
    cleaning: Cleaning
    root: Path
    texts: dict[str, SourceText]
    """Best first."""
    filtered: dict[str, str]
    """Source -> digest of its text and all that acts on it alone."""
    inputs: str
    """Digest of the whole."""
    shards: tuple[Shard, ...]

    @classmethod
    def of(cls, recipe: Recipe, root: Path, inputs: dict[str, SourceText]) -> Job:
        """DataError for a recipe without cleaning, and as `check` does."""
        cleaning = recipe.data.cleaning
        if cleaning is None:
            raise DataError("data.cleaning is null: there is nothing to clean with; choose one, e.g. data/cleaning=granite_4_1")
        go_offline()
        need("datatrove")
        check(recipe)
        order = ordered_sources(recipe, cleaning)
        if missing := set(order) ^ set(inputs):
            raise DataError(
                f"cleaning looks for duplicates across all sources with text, and {', '.join(sorted(missing))} is in the recipe or in the "
                "inputs only; give it all of them"
            )
        for name, text in inputs.items():
            if not text.files:
                raise DataError(f"source '{name}' has no files; set data.sources.{name}.paths, or remove the source")
        texts = {name: inputs[name] for name in order}
        common = common_identity(recipe, cleaning)
        filtered = {name: filtered_digest(recipe, cleaning, name, text, common) for name, text in texts.items()}
        whole = digest_of(
            {
                "version": VERSION,
                "sources": list(filtered.items()),
                "exact": cleaning.exact_duplicates is not None,
                "near": cleaning.near_duplicates is not None,
            }
        )
        return cls(recipe, cleaning, root, texts, filtered, whole, tuple(plan_shards(texts, root)))

    # --- paths

    @property
    def work(self) -> Path:
        return self.root / "clean" / ".work" / self.inputs[:16]

    def record_path(self, source: str) -> Path:
        return self.root / "clean" / source / "record.json"

    def quarantine_path(self, source: str) -> Path:
        return self.root / "clean" / source / "quarantine" / f"{source}.jsonl"

    @property
    def whole_path(self) -> Path:
        return self.root / "clean" / "record.json"

    def shards_of(self, source: str) -> list[Shard]:
        return [shard for shard in self.shards if shard.source == source]

    # --- done or to do

    def current(self) -> dict[str, CleanRecord] | None:
        """The records, if all is as it would be made now; every file of documents is read."""
        whole = DeduplicatedRecord.read_if_valid(self.whole_path)
        if whole is None or whole.inputs != self.inputs:
            return None
        records = {}
        for name in whole.priority:
            record = CleanRecord.read_if_valid(self.record_path(name))
            if record is None or record.inputs != whole.sources[name] or not intact(self.root, record):
                return None
            records[name] = record
        return records

    def begin(self) -> None:
        """Forget what will be made again, and what other runs left half done."""
        from data_prep.clean.filtering import filtered_path

        self.whole_path.unlink(missing_ok=True)
        above = self.work.parent
        for folder in above.iterdir() if above.is_dir() else ():
            if folder != self.work:
                shutil.rmtree(folder)
        with ThreadPoolExecutor(threads()) as pool:  # hashlib releases the interpreter's lock
            reusable = list(pool.map(self._reusable, self.shards))
        for shard, is_reusable in zip(self.shards, reusable, strict=True):
            mark = self.work / "filter" / "completions" / f"{shard.rank:05d}"
            if is_reusable:
                mark.parent.mkdir(parents=True, exist_ok=True)
                mark.touch()
            else:
                mark.unlink(missing_ok=True)
                filtered_path(self.root, shard, "json").unlink(missing_ok=True)
                self.record_path(shard.source).unlink(missing_ok=True)

    def _shard_record(self, shard: Shard) -> ShardRecord | None:
        """The record of a shard whose files are there and of the recorded size."""
        from data_prep.clean.filtering import filtered_path
        from data_prep.clean.minhash import row_bytes

        record = ShardRecord.read_if_valid(filtered_path(self.root, shard, "json"))
        if record is None or record.inputs != self.filtered[shard.source]:
            return None
        near = self.cleaning.near_duplicates
        expected = {"kept.jsonl.zst": record.kept.bytes}
        if self.cleaning.exact_duplicates is not None:
            expected["exact"] = record.documents * 16
        if self._compared(shard.source):
            expected["minhash"] = record.signatures * near.buckets * row_bytes(near)
        for suffix, size in expected.items():
            path = filtered_path(self.root, shard, suffix)
            if not path.is_file() or path.stat().st_size != size:
                return None
        return record

    def _reusable(self, shard: Shard) -> bool:
        """Whether an earlier run's files of a shard are there to the last byte: what is compared and kept is taken from them."""
        from data_prep.clean.filtering import filtered_path

        record = self._shard_record(shard)
        if record is None:
            return False
        try:
            for suffix, file in {"kept.jsonl.zst": record.kept, **record.others}.items():
                verify_file(filtered_path(self.root, shard, suffix), file, remedy="")
        except DataError:
            return False
        return True

    def shard_records(self) -> list[ShardRecord]:
        records = [self._shard_record(shard) for shard in self.shards]
        for shard, record in zip(self.shards, records, strict=True):
            if record is None:
                raise DataError(
                    f"shard {shard.number} of source '{shard.source}' was altered while it was cleaned; run it again"
                )
        return records

    def _compared(self, source: str) -> bool:
        near = self.cleaning.near_duplicates
        return near is not None and self.recipe.data.sources[source].category not in near.exempt

    # --- stages

    def filter_stage(self) -> Stage:
        from data_prep.clean.executors import Stage
        from data_prep.clean.filtering import FilterShards, FilterStage

        index = None
        if self.cleaning.decontamination is not None:
            index = self.work / "benchmarks.npz"
            if not index.is_file():
                decontamination.build_index(self.cleaning.decontamination).write(index)
        stage = FilterStage(
            root=self.root,
            cleaning=self.cleaning,
            categories={name: self.recipe.data.sources[name].category for name in self.texts},
            tokenizer=given_tokenizer(self.recipe),
            index=index,
            work=self.work,
            shards=self.shards,
            inputs=self.filtered,
        )
        weights = tuple(shard.size_bytes * (1 + self._filters(shard.source)) for shard in self.shards)
        return Stage("filter", FilterShards(stage), len(self.shards), sum(shard.size_bytes for shard in self.shards), weights)

    def _filters(self, source: str) -> int:
        """How many a source has: what each costs differs less than how many there are."""
        filters = self.cleaning.filters[self.recipe.data.sources[source].category]
        return sum(config is not None for _, config in filters)

    def duplicate_stages(self) -> list[Stage]:
        """Stages that find what goes. Numbers of documents are read from the shards' records when a task runs."""
        from data_prep.clean import duplicates
        from data_prep.clean.executors import OPEN_FILES_RESERVE, Stage, raise_open_files
        from data_prep.clean.filtering import filtered_path
        from data_prep.clean.minhash import Buckets

        stages, size = [], sum(shard.size_bytes for shard in self.shards)
        if self.cleaning.exact_duplicates is not None:
            step = duplicates.ExactParts(self.root, self.shards, self.work)
            stages.append(Stage("exact", step, duplicates.exact_parts(size), size // 100))
        near = self.cleaning.near_duplicates
        if near is not None:
            if raise_open_files(len(self.shards) + OPEN_FILES_RESERVE) < len(self.shards) + OPEN_FILES_RESERVE:
                raise DataError(
                    f"{len(self.shards)} shards need as many open files at once, and this process may have fewer; raise the limit: "
                    f"ulimit -n {len(self.shards) + OPEN_FILES_RESERVE}"
                )
            compared = [shard for shard in self.shards if self._compared(shard.source)]
            signed = tuple((shard.rank, filtered_path(self.root, shard, "minhash")) for shard in compared)
            stages.append(Stage("near", Buckets(near, signed, self.work), near.buckets, size // 8))
        stages.append(Stage("removals", duplicates.Removals(self.root, self.shards, self.work), 1, 0))
        return stages

    def apply_stage(self) -> Stage:
        from data_prep.clean.applying import ApplyShards, ApplyStage
        from data_prep.clean.executors import Stage

        steps = tuple(name for name in ("exact_duplicates", "near_duplicates") if getattr(self.cleaning, name) is not None)
        stage = ApplyStage(root=self.root, shards=self.shards, steps=steps, work=self.work, inputs=self.inputs)
        return Stage("apply", ApplyShards(stage), len(self.shards), sum(shard.size_bytes for shard in self.shards) // 8)

    # --- the end

    def refuse_bad_lines(self) -> None:
        """DataError for a source with files that break off, with more bad lines than a few, or without documents."""
        by_source: dict[str, list[tuple[Shard, ShardRecord]]] = {}
        for shard, record in zip(self.shards, self.shard_records(), strict=True):
            by_source.setdefault(shard.source, []).append((shard, record))
        for name, found in by_source.items():
            bad = sum(record.bad_lines for _, record in found)
            lines = bad + sum(record.documents_in + record.empty_documents for _, record in found)
            if damaged := sum(record.damaged_files for _, record in found):
                first = next(entry for entry in self._quarantine(name) if "damaged" in entry)
                raise DataError(
                    f"source '{name}': {damaged} of {len(self.texts[name].files)} files cannot be read to their end, and nobody knows what is "
                    f"missing; the first: {first['file']}, line {first['line']}: {first['reason']}; restore them, or leave them out of "
                    f"data.sources.{name}.paths"
                )
            if bad > MAX_BAD_FREE and bad > lines * MAX_BAD_PERCENT / 100:
                first = next(self._quarantine(name), None)
                raise DataError(
                    f"source '{name}': {bad} of {lines} lines are bad, more than {MAX_BAD_PERCENT:g} %; the first: {first['file']}, "
                    f"line {first['line']}: {first['reason']}; repair the files, or set data.sources.{name}.text_key to the key of the text"
                )
            if lines == bad:
                raise DataError(f"source '{name}' has no documents; check data.sources.{name}.paths, or remove the source")

    def _quarantine(self, source: str) -> Iterator[dict]:
        """Bad lines of a source in order, with their line numbers in the whole file."""
        import json

        from data_prep.clean.filtering import filtered_path

        before: dict[tuple[str, int], int] = {}
        lines: dict[str, int] = {}
        for shard in self.shards_of(source):
            record = self._shard_record(shard)
            for piece in record.pieces if record else ():
                before[piece.file, piece.start_byte] = lines.get(piece.file, 0)
                lines[piece.file] = lines.get(piece.file, 0) + piece.lines
            path = filtered_path(self.root, shard, "quarantine.jsonl")
            for raw in path.read_bytes().splitlines() if path.exists() else ():
                entry = json.loads(raw)
                start = entry.pop("start_byte")
                yield entry | {"line": entry["line"] + before.get((entry["file"], start), 0)}

    def finish(self) -> dict[str, CleanRecord]:
        """Write the records of the sources and of the whole; remove the work folder and files of shards that are no more."""
        shard_records = self.shard_records()
        records = {}
        for name in self.texts:
            own = [(s, r) for s, r in zip(self.shards, shard_records, strict=True) if s.source == name]
            records[name] = self._finish_source(name, own)
        for name, record in records.items():
            if record.documents == 0:
                steps = ", ".join(
                    f"{step}: {count.removed_documents}" for step, count in record.steps.items() if count.removed_documents
                )
                raise DataError(
                    f"source '{name}': cleaning removed all of its {record.documents_in} documents ({steps}); widen these steps of "
                    f"data.cleaning for category '{record.category}', or remove the source"
                )
        for name, record in records.items():
            record.write(self.record_path(name))
        DeduplicatedRecord(
            inputs=self.inputs,
            sources={name: record.inputs for name, record in records.items()},
            priority=list(records),
            benchmarks=self._benchmarks(),
        ).write(self.whole_path)
        shutil.rmtree(self.work.parent)
        return records

    def _benchmarks(self) -> dict[str, dict[str, int]]:
        if self.cleaning.decontamination is None:
            return {}
        index = decontamination.Index.read(self.work / "benchmarks.npz")
        found = {
            name: {"items": 0, "texts_too_short": index.too_short.get(name, 0)}
            for name in self.cleaning.decontamination.benchmarks
        }
        for name, _ in index.names:
            found[name]["items"] += 1
        return found

    def _finish_source(self, name: str, own: list[tuple[Shard, ShardRecord]]) -> CleanRecord:
        from data_prep.clean.applying import applied_record_path, duplicates_path, final_path
        from data_prep.clean.filtering import filtered_path

        applied = [AppliedShard.model_validate_json(applied_record_path(self.work, shard).read_bytes()) for shard, _ in own]
        steps: dict[str, StepCount] = {}
        for record in [*(record for _, record in own), *applied]:
            for step, count in record.steps.items():
                steps[step] = add_counts(steps.get(step, StepCount()), count)
        self._remove_old_files(name, [shard for shard, _ in own])
        quarantine = list(self._quarantine(name))
        target = self.quarantine_path(name)
        if quarantine:
            from data_prep.clean.filtering import json_line

            write_bytes(target, b"".join(map(json_line, quarantine)))
        else:
            target.unlink(missing_ok=True)

        def relative(path: Path) -> str:
            return str(path.relative_to(self.root))

        files = [
            CleanFile(
                path=relative(final_path(self.root, shard)),
                documents=record.documents,
                record=record.file,
                filtered=relative(filtered_path(self.root, shard, "removed.jsonl.zst")),
                duplicates=relative(duplicates_path(self.root, shard)),
                duplicates_record=record.duplicates,
            )
            for (shard, _), record in zip(own, applied, strict=True)
        ]
        return CleanRecord(
            inputs=digest_of({"filtered": self.filtered[name], "files": [file.record.sha256 for file in files]}),
            source=name,
            category=self.recipe.data.sources[name].category,
            filtered=self.filtered[name],
            documents_in=sum(record.documents_in for _, record in own),
            bytes_in=sum(record.bytes_in for _, record in own),
            documents=sum(record.documents for record in applied),
            bytes=sum(record.bytes for record in applied),
            quarantined_lines=sum(record.bad_lines for _, record in own),
            empty_documents=sum(record.empty_documents for _, record in own),
            steps=steps,
            files=files,
        )

    def _remove_old_files(self, source: str, shards: list[Shard]) -> None:
        """Of a source that had more shards before."""
        names = {shard.name for shard in shards}
        folder = self.root / "clean" / source
        for path in [*folder.glob("[0-9]*.jsonl"), *folder.glob("filtered/[0-9]*"), *folder.glob("duplicates/[0-9]*")]:
            if path.name.partition(".")[0] not in names:
                path.unlink()


def intact(root: Path, record: CleanRecord, seen: dict[Path, str] | None = None) -> bool:
    """Whether the files of documents are what the record says."""
    try:
        for file in record.files:
            verify_file(root / file.path, file.record, remedy="", seen=seen)
    except DataError:
        return False
    return True


@contextlib.contextmanager
def _watched(job: Job, tell: Done, seconds: float = 0.3) -> Iterator[None]:
    """Tell, from a thread, of shards as their records appear; the workers may be other processes."""
    from data_prep.clean.filtering import filtered_path

    waiting = list(job.shards)
    ended = threading.Event()

    def look() -> None:
        for shard in list(waiting):
            record = ShardRecord.read_if_valid(filtered_path(job.root, shard, "json"))
            if record is not None and record.inputs == job.filtered[shard.source]:
                waiting.remove(shard)
                tell(shard.size_bytes, record.documents_in)

    def loop() -> None:
        while not ended.wait(seconds):
            look()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    look()
