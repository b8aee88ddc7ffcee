"""One verification: what must be read and compared is collected first, then every file is read once, then the rest is compared.

Nothing here raises for what is wrong with the data; each thing becomes a Finding, and the next one is looked for.
"""

from __future__ import annotations

import json
import os
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import DataError
from data_prep.files import FileRecord
from data_prep.indexed import Index, bin_path, idx_path, optimal_dtype
from data_prep.progress import Progress
from data_prep.verify_reading import Finding, Look, Reading, read_all

REMEDY = "run `quarry prep`, which makes again what is not as recorded"


@dataclass(frozen=True)
class Digest:
    """What a record says of a file's content."""

    algorithm: str
    """sha256 or xxh3"""
    value: str
    bytes: int | None = None

    @property
    def label(self) -> str:
        return "SHA-256" if self.algorithm == "sha256" else "XXH3"

    @classmethod
    def of(cls, record: FileRecord) -> Digest:
        return cls("sha256", record.sha256, record.bytes)

    @classmethod
    def find(cls, values: object) -> Digest | None:
        """The one in a JSON object {"bytes", "sha256" or "xxh3"}; None where it is none."""
        if isinstance(values, dict) and isinstance(values.get("bytes"), int):
            for algorithm in ("sha256", "xxh3"):
                if isinstance(values.get(algorithm), str):
                    return cls(algorithm, values[algorithm], values["bytes"])
        return None


@dataclass(frozen=True)
class Recorded:
    """A file, what is recorded of it, and where."""

    path: Path
    digest: Digest
    said_by: Path
    remedy: str


@dataclass(frozen=True)
class PairRecord:
    """What a record says of a .bin/.idx pair; None: nothing."""

    said_by: Path
    documents: int | None = None
    tokens: int | None = None
    dtype: str | None = None
    bin: Digest | None = None
    idx: Digest | None = None


class Verification:
    """Collects expectations, reads, compares. `base` is what names of files are shown relative to."""

    def __init__(self, base: Path, *, workers: int, progress: Progress, full: bool = False) -> None:
        self.base = base
        self.workers = workers
        self.progress = progress
        self.full = full
        self.remedy = REMEDY
        """Of findings that name no other."""
        self.notes: list[str] = []
        """What could not be verified, for want of a record; no findings."""
        self.findings: list[Finding] = []
        self.wants_heads = False
        """Whether the beginnings of documents are kept, to compare documents of different files; set before collecting."""
        self.files = self.documents = self.tokens = 0
        self.read_bytes = 0
        self._readings: dict[Path, Reading] = {}
        self._recorded: list[Recorded] = []
        self._later: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._resolved: dict[Path, Path] = {}

    # --- collecting ------------------------------------------------------------------------------------------------------------

    def shown(self, path: Path) -> str:
        for base in (self.base, self.real(self.base)):
            if path.is_relative_to(base):
                return str(path.relative_to(base))
        return str(path)

    def find(self, path: Path, what: str, expected: object, found: object, remedy: str | None = None) -> None:
        with self._lock:
            self.findings.append(Finding(self.shown(path), what, str(expected), str(found), remedy or self.remedy))

    def refused(self, path: Path, error: DataError, remedy: str | None = None) -> None:
        """A DataError of a reader of ours, as a finding."""
        message = str(error).removeprefix(f"{path}: ")
        self.find(path, "content", "what its format says", message, remedy)

    def later(self, check: Callable[[], None]) -> None:
        """Do `check` when all files have been read; it may run beside others."""
        self._later.append(check)

    def file(self, path: Path, digest: Digest, said_by: Path, remedy: str | None = None) -> bool:
        """`path` must be as recorded; False where there is no such file."""
        if not path.is_file():
            found = f"a link to {os.readlink(path)}, which does not exist" if path.is_symlink() else "no such file"
            self.find(path, f"file that {self.shown(said_by)} names", "a file", found, remedy)
            return False
        self._reading(path).digests[digest.algorithm] = ""
        self._recorded.append(Recorded(path, digest, said_by, remedy or self.remedy))
        return True

    def _reading(self, path: Path) -> Reading:
        """The one reading of the file that `path` is or links to."""
        real = self.real(path)
        return self._readings.setdefault(real, Reading(real))

    def real(self, path: Path) -> Path:
        """What `path` is or links to, looked up once."""
        if path not in self._resolved:
            self._resolved[path] = path.resolve()
        return self._resolved[path]

    def look_of(self, path: Path) -> Look | None:
        reading = self._readings.get(self.real(path))
        return reading.look if reading else None

    def text_is_ours(self, path: Path) -> bool:
        """A record must be spelled as we write it: a changed space or `1e0` for `1.0` reads the same but is not what was written."""
        try:
            content = path.read_bytes()
            written = json.dumps(json.loads(content), indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"
        except (OSError, ValueError):
            return False  # its own reader says what is wrong
        if content != written:
            self.find(path, "spelling", "sorted keys, one per line, as `quarry prep` writes it", "another: edited by hand?")
        return content == written

    def pair(
        self, prefix: Path, record: PairRecord, *, vocab_size: int | None, eod_id: int | None, remedy: str | None = None
    ) -> Index | None:
        """Check a .bin/.idx pair and look at all its tokens; the index where it can be read."""
        idx, bin_ = idx_path(prefix), bin_path(prefix)
        there = []
        for path, of in ((idx, record.idx), (bin_, record.bin)):
            if of is not None:
                there.append(self.file(path, of, record.said_by, remedy))
            else:
                there.append(path.is_file())
                if not there[-1]:
                    self.find(path, "file of a .bin/.idx pair", "a file", "no such file", remedy)
        if not there[0]:
            return None
        try:
            index = Index.read(idx)
        except DataError as error:
            self.refused(idx, error, remedy)
            return None
        expected = (
            ("documents", record.documents, index.documents),
            ("tokens", record.tokens, index.tokens),
            ("dtype", record.dtype, index.dtype.name),
            ("dtype for its vocabulary", optimal_dtype(vocab_size).name if vocab_size else None, index.dtype.name),
        )
        for what, want, found in expected:
            if want is not None and want != found:
                self.find(idx, f"{what}, by {self.shown(record.said_by)}", want, found, remedy)
        if there[1]:
            size = bin_.stat().st_size
            if index.end_bytes > size:
                self.find(idx, f"pointers into {bin_.name}", f"at most its {size} bytes", f"byte {index.end_bytes}", remedy)
            if size % index.dtype.itemsize:
                self.find(bin_, "size in bytes", f"a multiple of {index.dtype.itemsize}", size, remedy)
            self._look(bin_, index, vocab_size, eod_id, remedy)
        self.documents += index.documents
        return index

    def _look(self, bin_: Path, index: Index, vocab_size: int | None, eod_id: int | None, remedy: str | None) -> None:
        reading = self._reading(bin_)
        if index.dtype.kind not in "iu":
            return self.find(idx_path(bin_.with_suffix("")), "dtype", "integers", index.dtype.name, remedy)
        if reading.look is None:
            reading.look = Look(index.dtype, vocab_size, eod_id, wants_heads=self.wants_heads)
            self.later(lambda: self._tokens_found(reading.path, reading.look, remedy))
        if reading.look.dtype == index.dtype:
            reading.look.add(index)
            # One promise holds for all that is in the file.
            reading.look.vocab_size = reading.look.vocab_size or vocab_size
            reading.look.eod_id = eod_id if reading.look.eod_id is None else reading.look.eod_id
        return None

    def _tokens_found(self, bin_: Path, look: Look, remedy: str | None) -> None:
        if look.over:
            position, token = look.first_over
            self.find(
                bin_,
                f"token ids ({look.over} of them, the first at token {position})",
                f"below {look.vocab_size}",
                token,
                remedy,
            )
        if look.unended:
            start, token = look.first_unended
            self.find(
                bin_,
                f"last id of documents ({look.unended} of them, the first begins at token {start})",
                f"{look.eod_id}, the end of a document",
                token,
                remedy,
            )

    # --- reading and comparing -------------------------------------------------------------------------------------------------

    def run(self) -> list[Finding]:
        """Read, compare, and return all findings, by file."""
        total = sum(path.stat().st_size for path in self._readings)
        with self.progress.step(f"reading {len(self._readings)} files", total) as done:
            read_all(self._readings.values(), self.workers, done)
        self.files = len(self._readings)
        self.read_bytes = sum(reading.size for reading in self._readings.values())
        self.tokens = sum(r.size // r.look.dtype.itemsize for r in self._readings.values() if r.look)
        self._compare()
        with ThreadPoolExecutor(max(1, self.workers), thread_name_prefix="verify") as pool:
            for check in [pool.submit(check) for check in self._later]:
                check.result()
        self.findings = sorted(set(self.findings), key=lambda finding: (finding.file, finding.what))
        return self.findings

    def _compare(self) -> None:
        for reading in self._readings.values():
            if reading.error:
                self.find(reading.path, "reading", "all of it", reading.error, f"look at the disk; then {self.remedy}")
        of_file: dict[Path, list[Recorded]] = defaultdict(list)
        for recorded in self._recorded:
            of_file[self.real(recorded.path)].append(recorded)
        for real, records in of_file.items():
            if not self._readings[real].error:
                self._compare_file(real, self._readings[real], records)

    def _compare_file(self, real: Path, reading: Reading, records: list[Recorded]) -> None:
        """One file against all that is recorded of it, through whatever links; an altered file is one finding, not one per link."""

        def agrees(recorded: Recorded) -> bool:
            digest = recorded.digest
            return reading.digests[digest.algorithm] == digest.value and digest.bytes in (None, reading.size)

        wrong = [recorded for recorded in records if not agrees(recorded)]
        altered = len(wrong) == len(records)
        if altered:
            best = "sha256" if any(recorded.digest.algorithm == "sha256" for recorded in wrong) else "xxh3"
            wrong = [recorded for recorded in wrong if recorded.digest.algorithm == best]
        told: set[str] = set()
        for recorded in wrong:
            digest = recorded.digest
            if digest.value in told:
                continue
            told.add(digest.value)
            # Where another record agrees with the content, it is the link or the record that is wrong, not the file.
            path = real if altered else recorded.path
            said_by = f"recorded in {self.shown(recorded.said_by)}"
            if digest.bytes not in (None, reading.size):
                self.find(path, f"size in bytes, {said_by}", digest.bytes, reading.size, recorded.remedy)
            value = reading.digests[digest.algorithm]
            if value != digest.value:
                others = {self.shown(self.real(r.path)) for r in self._recorded if r.digest.value == value} - {self.shown(real)}
                found = f"{value}{f' (that of {min(others)}: swapped?)' if others else ''}"
                self.find(path, f"{digest.label}, {said_by}", digest.value, found, recorded.remedy)
