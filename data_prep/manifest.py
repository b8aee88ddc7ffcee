"""Manifests: what training may read, with the digests that prove it is what was prepared. Typed, strict, free of numpy until verified.

views/<phase>/manifest.json is a MixtureManifest, heldout/manifest.json a HeldoutManifest; both are written last, so that a manifest
that exists describes complete files. Paths inside are relative to the data root.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, ValidationError

from data_prep.errors import DataError
from data_prep.files import FileRecord, Sha256, Strict, digest_of, verify_file, write_json

__all__ = ["DataError", "HeldoutManifest", "HeldoutSet", "MixtureManifest", "TokenizerRecord", "ViewSource", "data_digest"]

Count = Annotated[int, Field(ge=0)]
REMEDY = "prepare it again with `quarry prep`"


def _inside(value: str) -> str:
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"prefix '{value}' leaves the data root")
    return value


Prefix = Annotated[str, AfterValidator(_inside)]
"""Path of a pair of files without .bin/.idx, relative to the data root, and below it."""


class TokenizerRecord(Strict):
    """The tokenizer that the tokens were made with."""

    kind: Literal["sentencepiece", "huggingface"]
    path: str
    """The .model file or the folder, relative to the data root."""
    sha256: Sha256
    """Of the .model file or of the folder's tokenizer.json."""
    vocab_size: Annotated[int, Field(gt=0)]
    eod_id: Count

    def verify(self, data_root: Path) -> None:
        from data_prep.files import file_sha256

        path = data_root / self.path
        file = path / "tokenizer.json" if self.kind == "huggingface" else path
        if not file.is_file():
            raise DataError(f"{file}: no such tokenizer file; {REMEDY}")
        found = file_sha256(file)
        if found != self.sha256:
            raise DataError(f"{file}: SHA-256 {found}, the manifest says {self.sha256}: another tokenizer; {REMEDY}")


class TokenFiles(Strict):
    """A .bin/.idx pair as recorded."""

    prefix: Prefix
    documents: Count
    max_token_id: Annotated[int, Field(ge=-1)]
    dtype: Literal["uint16", "int32"]
    bin: FileRecord
    idx: FileRecord

    def verify_files(self, data_root: Path, tokens: int, vocab_size: int, *, full: bool, seen: dict[Path, str]) -> None:
        """Digests, pointers inside the .bin, counts, dtype and token ids; DataError names the file and what differs."""
        from data_prep.indexed import Index, bin_path, idx_path, optimal_dtype

        prefix = data_root / self.prefix
        verify_file(bin_path(prefix), self.bin, remedy=REMEDY, full=full, seen=seen)
        verify_file(idx_path(prefix), self.idx, remedy=REMEDY, full=full, seen=seen)
        index = Index.read(idx_path(prefix))
        for what, expected, found in (
            ("dtype", self.dtype, index.dtype.name),
            ("dtype for its vocabulary", optimal_dtype(vocab_size).name, index.dtype.name),
            ("documents", self.documents, index.documents),
            ("tokens", tokens, index.tokens),
        ):
            if expected != found:
                raise DataError(f"{idx_path(prefix)}: {what} is {found}, the manifest says {expected}; {REMEDY}")
        if index.end_bytes > self.bin.bytes:
            raise DataError(
                f"{idx_path(prefix)}: points to byte {index.end_bytes} of {bin_path(prefix)}, which has {self.bin.bytes} bytes; {REMEDY}"
            )
        if self.max_token_id >= vocab_size:
            raise DataError(
                f"{bin_path(prefix)}: largest token id {self.max_token_id}, the vocabulary has {vocab_size} entries; tokenize it with the "
                f"recipe's tokenizer: {REMEDY}"
            )


class ViewSource(TokenFiles):
    """What one phase may see of one source."""

    category: str
    share_percent: float
    """Of the phase's tokens."""
    weight: Annotated[float, Field(gt=0, le=1)]
    """Fraction of the phase's samples; the weights of a phase sum to 1."""
    tokens_available: Count
    """In the view; at least what Megatron's blend asks for."""
    tokens_planned: Count
    """weight * the phase's tokens, rounded."""
    epochs: Annotated[float, Field(ge=0)]
    """Of the whole source, cumulative over the curriculum to the end of this phase."""


class Signed(Strict):
    """A JSON file that carries the digest of its own content: read, write, check."""

    FORMAT: ClassVar[str]

    @classmethod
    def make(cls, **values: Any) -> Self:
        """A manifest with its digest filled in."""
        unsigned = cls.model_construct(format=cls.FORMAT, digest="", **values)
        dumped = unsigned.model_dump(mode="json", exclude={"digest"}, warnings="error")
        return cls.model_validate_json(json.dumps({**dumped, "digest": digest_of(dumped)}))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and check a manifest against its own digest; DataError names the file and every wrong key."""
        try:
            content = Path(path).read_bytes()
        except FileNotFoundError:
            raise DataError(f"no manifest at {path}; prepare the data with `quarry prep`") from None
        try:
            manifest = cls.model_validate_json(content)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'manifest'}: {e['msg']}" for e in error.errors())
            raise DataError(f"{path}: {problems}; {REMEDY}") from None
        found = digest_of(manifest.model_dump(mode="json", exclude={"digest"}))
        if found != manifest.digest:  # type: ignore[attr-defined]
            raise DataError(f"{path}: its digest is {manifest.digest}, its content has {found}: edited by hand? {REMEDY}")  # type: ignore[attr-defined]
        return manifest

    def write(self, path: Path) -> None:
        write_json(path, self.model_dump(mode="json"))


class MixtureManifest(Signed):
    """The data of one phase."""

    FORMAT: ClassVar[str] = "quarry.mixture/1"

    format: Literal["quarry.mixture/1"]
    phase: str
    seed: Count
    seq_length_tokens: Annotated[int, Field(gt=0)]
    samples: Annotated[int, Field(gt=0)]
    tokens: Annotated[int, Field(gt=0)]
    recipe: dict[str, Any]
    """The keys of the recipe that decided this view."""
    inputs: Sha256
    """Digest of all that the view was computed from; equal inputs need no new view."""
    tokenizer: TokenizerRecord
    sources: dict[str, ViewSource]
    """Sorted by name; Megatron's blend numbers them in this order."""
    digest: Sha256

    def verify(self, data_root: Path, *, full: bool = False, seen: dict[Path, str] | None = None) -> None:
        """Check every file of the view and the tokenizer; the first difference is a DataError with file, expected, found, remedy.

        Files above 1 GiB are compared by sampled digest unless `full`. `seen` carries digests over to other manifests of one check.
        """
        seen = {} if seen is None else seen
        self.tokenizer.verify(data_root)
        for source in self.sources.values():
            source.verify_files(data_root, source.tokens_available, self.tokenizer.vocab_size, full=full, seen=seen)


class HeldoutSet(TokenFiles):
    """Held-out documents of one category."""

    tokens: Count


class HeldoutManifest(Signed):
    """Held-out sets, one per category; no phase trains on their documents."""

    FORMAT: ClassVar[str] = "quarry.heldout/1"

    format: Literal["quarry.heldout/1"]
    seq_length_tokens: Annotated[int, Field(gt=0)]
    inputs: Sha256
    tokenizer: TokenizerRecord
    categories: dict[str, HeldoutSet]
    digest: Sha256

    def verify(self, data_root: Path, *, full: bool = False, seen: dict[Path, str] | None = None) -> None:
        """As MixtureManifest.verify."""
        seen = {} if seen is None else seen
        self.tokenizer.verify(data_root)
        for held in self.categories.values():
            held.verify_files(data_root, held.tokens, self.tokenizer.vocab_size, full=full, seen=seen)


def is_current(
    kind: type[MixtureManifest] | type[HeldoutManifest], path: Path, data_root: Path, inputs: str, seen: dict[Path, str]
) -> bool:
    """Whether the manifest at `path` was made from `inputs` and its files are intact; `seen` as in `verify`."""
    try:
        manifest = kind.read(path)
        if manifest.inputs != inputs:
            return False
        manifest.verify(data_root, seen=seen)
    except DataError:
        return False
    return True


def mixture_path(data_root: Path, phase: str) -> Path:
    return data_root / "views" / phase / "manifest.json"


def heldout_path(data_root: Path) -> Path:
    return data_root / "heldout" / "manifest.json"


def data_digest(data_root: Path, phase: str) -> str:
    """One digest of everything that `phase` reads: its views, tokenizer and held-out sets (SHA-256, hex); for the hand-off."""
    mixture = MixtureManifest.read(mixture_path(data_root, phase))
    heldout = HeldoutManifest.read(heldout_path(data_root))
    return digest_of({"mixture": mixture.digest, "heldout": heldout.digest})
