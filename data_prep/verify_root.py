"""What each folder of a data root must hold: tokenizer, tokenized sources, held-out sets, views, SFT data, index caches; and what is left."""

from __future__ import annotations

import functools
import importlib.metadata
import json
from collections.abc import Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError

from data_prep.errors import DataError
from data_prep.files import digest_of
from data_prep.index_caches import RECORD_NAME, IndexCache, cache_path, verify_cache
from data_prep.indexed import Index, Reader, bin_path, idx_path
from data_prep.manifest import HeldoutManifest, MixtureManifest, Signed, TokenizerRecord, ViewSource, heldout_path, mixture_path
from data_prep.plain_files import is_whole
from data_prep.records import CorpusRecord, Record, TokenizedRecord, TokenizerFile
from data_prep.verification import Digest, PairRecord, Verification
from data_prep.verify_cache import check_cache
from data_prep.verify_sft import check_sft
from recipes.schema import describe

CHANGED = "the text has changed since: `quarry prep` or `quarry tokenize`, run again, takes it anew"
DELETE = "delete it; `quarry prep` deletes what it finds of its own"
TOKENS_FORMAT = "quarry.tokens/1"
R = TypeVar("R", bound=Record)
S = TypeVar("S", bound=Signed)


class Root:
    """The checks of one data root; each of its parts can be asked for alone."""

    def __init__(self, root: Path, verification: Verification) -> None:
        self.root = root
        self.v = verification
        verification.wants_heads = True  # to find held-out documents among the others
        self._sources: dict[str, TokenizedRecord | None] = {}
        self._heldout: HeldoutManifest | None = None
        self._held: list[tuple[Path, Index]] = []
        """Prefix and index of every set of held-out documents."""
        self._views: list[tuple[Path, Index]] = []
        self._tokenizer: TokenizerFile | None = None

    def everything(self) -> None:
        self.tokenizer()
        for path in sorted((self.root / "corpus").glob("*.json")):
            self.corpus(path)
        for path in sorted((self.root / "concatenated").glob("*.json")):
            self.concatenated(path)
        for path in sorted((self.root / "clean").glob("*/record.json")):
            self.cleaned(path)
        for path in sorted((self.root / "clean").glob("*/filtered/*.json")):
            self.filtered(path)
        for path in sorted((self.root / "clean").glob("*/tokens.json")):
            self._object(path)
        for path in sorted((self.root / "tokens").glob("*.json")):
            self.tokens(path)
        for path in sorted((self.root / "tokenized").glob("*.json")):
            self.source(path.stem)
        self.heldout()
        for folder in self._folders("sft"):
            check_sft(self, folder.name)
        manifests = [self.view(folder.name) for folder in self._folders("views")]
        for manifest in manifests:
            if manifest is not None:
                self.cache(manifest)
        plan = self.root / "plan.json"
        if plan.exists() and not self._object(plan):
            self.v.find(plan, "record", "a plan", "none, or one that cannot be read")
        self.leftovers({m.phase: m for m in manifests if m is not None})

    def _folders(self, name: str) -> list[Path]:
        folder = self.root / name
        return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []

    # --- records ---------------------------------------------------------------------------------------------------------------

    def _record(self, path: Path, kind: type[R]) -> R | None:
        try:
            record = kind.model_validate_json(path.read_bytes())
            self.v.text_is_ours(path)
            return record
        except FileNotFoundError:
            self.v.find(path, "record", "a file", "no such file")
        except ValidationError as error:
            self.v.find(
                path, "record", f"a {kind.__name__} of this version", describe(error).removeprefix("recipe: Value error, ")
            )
        return None

    def _object(self, path: Path) -> dict[str, Any]:
        """The object of a JSON file, checked against its own digest where it has one; empty where there is none that can be read."""
        try:
            values = json.loads(path.read_bytes())
        except (OSError, ValueError):
            values = None
        if not isinstance(values, dict):
            return {}
        if not is_whole(values):
            self.v.find(
                path, "digest of the record", digest_of({k: v for k, v in values.items() if k != "digest"}), values["digest"]
            )
        self.v.text_is_ours(path)
        return values

    def signed(self, path: Path, kind: type[S]) -> S | None:
        try:
            manifest = kind.read(path)
        except DataError as error:
            self.v.refused(path, error)
            return None
        self.v.text_is_ours(path)
        return manifest

    def corpus(self, path: Path) -> None:
        record = self._record(path, CorpusRecord)
        if record:
            self.v.file(path.with_suffix(".jsonl"), Digest.of(record.file), path)

    def tokenizer(self) -> TokenizerFile | None:
        path = self.root / "tokenizer" / "record.json"
        if self._tokenizer is None and path.exists():
            self._tokenizer = record = self._record(path, TokenizerFile)
            if record:
                self._tokenizer_file(record.path, record.kind, record.sha256, path)
        return self._tokenizer

    def _tokenizer_file(self, name: str, kind: str, sha256: str, said_by: Path) -> None:
        target = self.root / name
        self.v.file(target / "tokenizer.json" if kind == "huggingface" else target, Digest("sha256", sha256), said_by)

    def same_tokenizer(self, said_by: Path, theirs: TokenizerRecord) -> None:
        self._tokenizer_file(theirs.path, theirs.kind, theirs.sha256, said_by)
        ours = self.tokenizer()
        if ours:
            for key in ("kind", "path", "sha256", "vocab_size", "eod_id"):
                if getattr(ours, key) != getattr(theirs, key):
                    self.v.find(said_by, f"tokenizer.{key}, by tokenizer/record.json", getattr(ours, key), getattr(theirs, key))

    def concatenated(self, path: Path) -> None:
        """The text beside its record, and the list of lines that are no document."""
        values = self._object(path)
        for key, suffix in (("file", ".jsonl"), ("quarantine", ".quarantine.jsonl")):
            digest = Digest.find(values.get(key))
            if digest:
                self.v.file(path.with_suffix(suffix), digest, path)
            elif key == "file":
                self.v.find(path, "record", "one of a text file", "none, or one that cannot be read")

    def cleaned(self, path: Path) -> None:
        """Files that a record of cleaning names: {"<name>_record": {"bytes", "sha256"}, "<name>": path below the root}, or
        {"record": ..., "path": ...}, at any depth."""
        files = list(_recorded_files(self._object(path)))
        for name, digest in files:
            self.v.file(self.root / name, digest, path)
        if not files:
            self.v.find(path, "record", "one of cleaned files", "none, or one that cannot be read")

    def filtered(self, path: Path) -> None:
        """What passed the filters of a shard, and beside it all that a later cleaning takes from this one."""
        values = self._object(path)
        others = values.get("others")
        for suffix, record in {"kept.jsonl.zst": values.get("kept"), **(others if isinstance(others, dict) else {})}.items():
            if digest := Digest.find(record):
                self.v.file(path.with_suffix(f".{suffix}"), digest, path)
            else:
                self.v.find(path, f"record of {suffix}", "size and digest", "none, or one that cannot be read")

    # --- tokens ----------------------------------------------------------------------------------------------------------------

    def tokens(self, path: Path, *, inputs: bool = False) -> None:
        """Check the .bin/.idx pair beside `path`, a record as `quarry tokenize` writes it; `inputs`: and the text that it names."""
        values = self._object(path)
        if "bin" not in values or values.get("format") != TOKENS_FORMAT:
            return self.v.find(path, "record", f"one of tokens ({TOKENS_FORMAT})", "none, or one that cannot be read")
        said = {key: values.get(key) for key in ("documents", "tokens", "dtype")}
        files = {key: Digest.find(values.get(key)) for key in ("bin", "idx")}
        prefix = path.with_suffix("")
        self.v.pair(prefix, PairRecord(path, **said, **files), vocab_size=values.get("vocab_size"), eod_id=values.get("eod_id"))
        self.v.later(partial(self._highest_id, path, values.get("max_token_id"), [bin_path(prefix)]))
        if "quarantined_lines" in values:
            self._quarantine(path, values["quarantined_lines"] + values.get("empty_documents", 0))
        tokenizer = self.tokenizer()
        if tokenizer and "tokenizer_sha256" in values and tokenizer.sha256 != values["tokenizer_sha256"]:
            self.v.find(path, "tokenizer, by tokenizer/record.json", tokenizer.sha256, values["tokenizer_sha256"])
        left = path.with_name(f"{path.stem}.shards")
        if left.exists():
            self.v.find(left, "folder of a running job", "none beside a record", "left by a run that was killed", DELETE)
        if inputs:
            self.v.later(partial(self._tokenized_inputs, path, values))
        return None

    def _tokenized_inputs(self, path: Path, values: dict[str, Any]) -> None:
        from data_prep.blocks import Piece
        from data_prep.tokenize_files import piece_digest

        files = [Path(file["path"]) for file in values.get("files", [])]
        for number, file in enumerate(files):
            if not file.is_file():
                self.v.find(file, f"input, by {self.v.shown(path)}", "a file", "no such file", CHANGED)
                continue
            for was in (piece for shard in values.get("shards", []) for piece in shard if piece["file"] == number):
                found = piece_digest(Piece(str(file), number, was["start"], was["end"]))
                if found != was["xxh3"]:
                    what = f"XXH3 of bytes {was['start']} to {was['end']}, recorded in {self.v.shown(path)}"
                    self.v.find(file, what, was["xxh3"], found, CHANGED)

    def source(self, name: str) -> TokenizedRecord | None:
        """Check a tokenized source and its held-out documents, once."""
        if name in self._sources:
            return self._sources[name]
        path = self.root / "tokenized" / f"{name}.json"
        record = self._sources[name] = self._record(path, TokenizedRecord)
        if record is None:
            return None
        if record.source != name:
            self.v.find(path, "source", name, record.source)
        tokenizer = self.tokenizer()
        if tokenizer and tokenizer.sha256 != record.tokenizer_sha256:
            self.v.find(path, "tokenizer, by tokenizer/record.json", tokenizer.sha256, record.tokenizer_sha256)
        vocab, eod = (tokenizer.vocab_size, tokenizer.eod_id) if tokenizer else (None, None)
        prefix, heldout = path.with_suffix(""), path.with_name(f"{name}.heldout")
        kept = PairRecord(path, record.documents, record.tokens, record.dtype, Digest.of(record.bin), Digest.of(record.idx))
        held = PairRecord(
            path,
            record.heldout_documents,
            record.heldout_tokens,
            record.dtype,
            Digest.of(record.heldout_bin),
            Digest.of(record.heldout_idx),
        )
        self.v.pair(prefix, kept, vocab_size=vocab, eod_id=eod)
        index = self.v.pair(heldout, held, vocab_size=vocab, eod_id=eod)
        if index is not None:
            self._held.append((heldout, index))
        self.v.later(partial(self._highest_id, path, record.max_token_id, (bin_path(prefix), bin_path(heldout))))
        self._quarantine(path, record.quarantined_lines + record.empty_documents)
        if self.v.full:
            for file in record.files:
                self.v.file(
                    Path(file.path),
                    Digest.of(file.record),
                    path,
                    CHANGED,
                )
        return record

    def _quarantine(self, path: Path, expected: int) -> None:
        """As many lines as the record counts, beside it or beside the tokens that a source was taken from."""
        name = f"{path.stem}.quarantine.jsonl"
        own, other = path.with_name(name), self.root / "tokens" / name
        quarantine = own if own.exists() or not other.exists() else other
        lines = 0
        if quarantine.exists():
            with open(quarantine, "rb") as f:
                lines = sum(1 for _ in f)
        if lines != expected:
            self.v.find(quarantine, f"lines, by {self.v.shown(path)}", expected, lines)

    def _highest_id(self, path: Path, recorded: int | None, files: Iterable[Path]) -> None:
        looks = [look for look in map(self.v.look_of, files) if look is not None]
        highest = max((look.max_token_id for look in looks), default=-1)
        if looks and recorded is not None and highest != recorded:
            self.v.find(path, "max_token_id, by the tokens themselves", highest, recorded)

    def heldout(self) -> HeldoutManifest | None:
        path = heldout_path(self.root)
        if self._heldout is not None:
            return self._heldout
        if not path.exists() and not path.parent.exists():
            return None
        manifest = self._heldout = self.signed(path, HeldoutManifest)
        if manifest is None:
            return None
        self.same_tokenizer(path, manifest.tokenizer)
        for entry in manifest.categories.values():
            prefix = self.root / entry.prefix
            record = PairRecord(path, entry.documents, entry.tokens, entry.dtype, Digest.of(entry.bin), Digest.of(entry.idx))
            # The last document is cut at the cap: no end is promised.
            index = self.v.pair(prefix, record, vocab_size=manifest.tokenizer.vocab_size, eod_id=None)
            if index is not None:
                self._held.append((prefix, index))
        return manifest

    # --- views -----------------------------------------------------------------------------------------------------------------

    def view(self, phase: str) -> MixtureManifest | None:
        """Check the views of a phase, the sources that they point into, and that no held-out document is among them."""
        path = mixture_path(self.root, phase)
        manifest = self.signed(path, MixtureManifest)
        if manifest is None:
            return None
        self.same_tokenizer(path, manifest.tokenizer)
        if manifest.phase != phase:
            self.v.find(path, "phase", phase, manifest.phase)
        # Held out of any source is held out of every view.
        for other in sorted((self.root / "tokenized").glob("*.json")):
            self.source(other.stem)
        self.heldout()
        for name, view in manifest.sources.items():
            self._view_source(path, name, view, manifest)
        return manifest

    def _view_source(self, said_by: Path, name: str, view: ViewSource, manifest: MixtureManifest) -> None:
        prefix, source = self.root / view.prefix, self.root / "tokenized" / name
        record = PairRecord(
            said_by, view.documents, view.tokens_available, view.dtype, Digest.of(view.bin), Digest.of(view.idx)
        )
        promised = manifest.tokenizer.eod_id if idx_path(source).exists() else None
        index = self.v.pair(prefix, record, vocab_size=manifest.tokenizer.vocab_size, eod_id=promised)
        if index is None:
            return
        self._views.append((prefix, index))
        if idx_path(source).exists():
            if self.v.real(bin_path(prefix)) != self.v.real(bin_path(source)):
                self.v.find(bin_path(prefix), "link", f"to tokenized/{name}.bin", f"to {self.v.real(bin_path(prefix))}")
            self.v.later(partial(self._pointers, prefix, index, source))
        if view.epochs <= 1:
            self.v.later(partial(self._no_repeats, prefix, index))
        self.v.later(partial(self._nothing_held_out, prefix, index))

    def _pointers(self, prefix: Path, index: Index, source: Path) -> None:
        """Each document of the view is one of the source's, from its first token to its last."""
        try:
            whole = Index.read(idx_path(source))
        except DataError:
            return  # found with the source
        order = np.argsort(whole.offsets, kind="stable")
        offsets = whole.offsets[order]
        place = np.minimum(np.searchsorted(offsets, index.offsets), max(0, len(offsets) - 1))
        if len(offsets):
            wrong = np.flatnonzero((offsets[place] != index.offsets) | (whole.lengths[order[place]] != index.lengths))
        else:
            wrong = np.arange(index.documents)
        if len(wrong):
            first = int(wrong[0])
            self.v.find(
                idx_path(prefix),
                f"pointers ({len(wrong)} of them, the first of document {first})",
                f"a document of {self.v.shown(idx_path(source))}",
                f"{index.lengths[first]} tokens from byte {index.offsets[first]}",
            )

    def _no_repeats(self, prefix: Path, index: Index) -> None:
        nonempty = index.offsets[index.lengths > 0]
        ordered = np.sort(nonempty)
        twice = ordered[:-1][ordered[1:] == ordered[:-1]]
        if len(twice):
            self.v.find(
                idx_path(prefix),
                "documents while the source is not used up (epochs <= 1)",
                "each once",
                f"{len(twice)} repeats, the first at byte {twice[0]}",
            )

    @cached_property
    def _held_heads(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of all held-out documents: fingerprint, number of their set in `_held`, number inside it; by fingerprint. After reading."""
        heads, sets, numbers = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for number, (prefix, index) in enumerate(self._held):
            look = self.v.look_of(bin_path(prefix))
            if look is not None and look.knows(index):
                heads.append(look.heads_of(index))
                sets.append(np.full(index.documents, number))
                numbers.append(np.arange(index.documents))
        together = np.concatenate(heads)
        order = np.argsort(together, kind="stable")
        return together[order], np.concatenate(sets)[order], np.concatenate(numbers)[order]

    def _nothing_held_out(self, prefix: Path, index: Index) -> None:
        look = self.v.look_of(bin_path(prefix))
        if look is None or not look.knows(index):
            return
        held, sets, numbers = self._held_heads
        heads = look.heads_of(index)
        first = np.searchsorted(held, heads)
        alike = np.flatnonzero((first < len(held)) & (held[np.minimum(first, len(held) - 1)] == heads)) if len(held) else ()
        reader = functools.cache(Reader)
        same = []
        for document in alike:  # with equal length and beginning; now whole
            place = int(first[document])
            while place < len(held) and held[place] == heads[document]:
                held_prefix, _ = self._held[sets[place]]
                try:
                    ours, theirs = reader(prefix), reader(held_prefix)
                except DataError:
                    return  # found with the files
                if index.lengths[document] and np.array_equal(ours[int(document)], theirs[int(numbers[place])]):
                    same.append((int(document), held_prefix, int(numbers[place])))
                place += 1
        if same:
            document, held_prefix, number = same[0]
            self.v.find(
                idx_path(prefix),
                f"held-out documents ({len(same)} of them, the first is document {document})",
                "none",
                f"document {number} of {self.v.shown(held_prefix)}",
            )

    # --- index caches ----------------------------------------------------------------------------------------------------------

    def cache(self, manifest: MixtureManifest) -> None:
        """Check the index cache that belongs to these views."""
        folder = cache_path(self.root, manifest)
        record = self.cache_folder(folder, manifest) if folder.is_dir() else None
        if not folder.is_dir():
            self.v.find(folder, "index cache of these views", "a folder", "no such folder")
        elif record is not None:
            try:
                verify_cache(self.root, manifest, read_files=False)
            except DataError as error:
                self.v.refused(folder / RECORD_NAME, error)
            except importlib.metadata.PackageNotFoundError:
                pass  # no Megatron on this machine to compare its version with

    def cache_folder(self, folder: Path, manifest: MixtureManifest | None) -> IndexCache | None:
        record = self.signed(folder / RECORD_NAME, IndexCache)
        if record is None:
            return None
        for name, file in record.files.items():
            self.v.file(folder / name, Digest.of(file), folder / RECORD_NAME)
        for path in sorted(folder.iterdir()):
            if path.name not in record.files and path.name != RECORD_NAME:
                self.v.find(path, "file", f"one that {RECORD_NAME} names", "one that it does not", DELETE)
        if manifest is not None and manifest.digest == record.manifest:
            self.v.later(partial(self._indices, folder, record, manifest))
        return record

    def _indices(self, folder: Path, record: IndexCache, manifest: MixtureManifest) -> None:
        lengths = {}
        for name, view in manifest.sources.items():
            try:
                lengths[name] = Index.read(idx_path(self.root / view.prefix)).lengths
            except DataError:
                continue  # found with the view
        check_cache(
            folder,
            record,
            manifest,
            lengths,
            lambda name, what, expected, found: self.v.find(folder / name, what, expected, found),
        )

    # --- leftovers -------------------------------------------------------------------------------------------------------------

    def leftovers(self, manifests: dict[str, MixtureManifest]) -> None:
        for path in sorted(self.root.rglob(".*.tmp")):
            self.v.find(path, "temporary file", "none", "left by a run that was killed", DELETE)
        for phase, manifest in manifests.items():
            self._only_pairs(mixture_path(self.root, phase).parent, [Path(s.prefix).name for s in manifest.sources.values()])
        if self._heldout is not None:
            self._only_pairs(self.root / "heldout", [Path(s.prefix).name for s in self._heldout.categories.values()])
        for path in sorted((self.root / "tokenized").glob("*.idx")):
            if not path.with_name(f"{path.stem.removesuffix('.heldout')}.json").exists():
                self.v.find(path, "record", "a record beside it", "none: left by a run that was killed", DELETE)
        for folder in self._folders("cache"):
            current = cache_path(self.root, manifests[folder.name]) if folder.name in manifests else None
            for path in sorted(folder.iterdir()):
                if path != current:
                    found = "of other views" if not path.name.startswith(".") else "left by a build that was killed"
                    self.v.find(path, "index cache", "only that of the present views", found, DELETE)

    def _only_pairs(self, folder: Path, names: list[str]) -> None:
        known = {"manifest.json", *(f"{name}{suffix}" for name in names for suffix in (".bin", ".idx"))}
        for path in sorted(folder.iterdir()):
            if path.name not in known and not path.name.endswith(".tmp"):
                self.v.find(path, "file", "one that manifest.json names", "one that it does not", DELETE)


def _recorded_files(values: Any) -> Iterator[tuple[str, Digest]]:
    if isinstance(values, list):
        for value in values:
            yield from _recorded_files(value)
    elif isinstance(values, dict):
        for key, value in values.items():
            name = values.get("path") if key == "record" else values.get(key.removesuffix("_record"))
            digest = Digest.find(value)
            if digest and key.endswith("record") and isinstance(name, str):
                yield name, digest
            else:
                yield from _recorded_files(value)
