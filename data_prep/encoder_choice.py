"""Which encoder a tokenizer gets, found out once per tokenizer and library versions and kept on disk.

Finding out takes seconds (both tokenizers over every code point), reading the result milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import unicodedata
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from data_prep.cuts import Cutter, SpaceCutter
from data_prep.encoders import (
    Encoder,
    GigatokenEncoder,
    HuggingFaceReference,
    ReferenceEncoder,
    SentencePieceReference,
    gigatoken_engine,
)
from data_prep.errors import DataError
from data_prep.gigatoken_engine import Engine
from data_prep.plain_files import atomic_write, digest_of
from data_prep.small_reference import SmallReference, merge_array, skeleton
from data_prep.token_table import TokenTable

CHECK_VERSION = 3
"""Of what is found out here; raise it when the same tokenizer would give another result."""
TABLE_ARRAYS = tuple(field.name for field in fields(TokenTable))
UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
ControlTokens = Literal["as_ids", "as_text"]


@dataclass(frozen=True)
class Choice:
    """How to encode with one tokenizer; plain values, so that it can be handed to another process."""

    kind: str
    path: str
    """The .model or tokenizer.json that encodes."""
    sha256: str
    control_tokens: ControlTokens
    gigatoken: bool
    why_not: str = ""
    prefix: tuple[int, ...] = ()
    """Ids that the tokenizer puts before every document (as_ids: its post-processor)."""
    suffix: tuple[int, ...] = ()
    normalizer: str | None = None
    exact_cuts: bool = False
    unbroken: tuple[str, ...] = ()
    """Of the Cutter."""
    table: str = ""
    """The .npz with the token table and the merges."""
    skeleton: str = ""
    """Of the small reference; empty where there can be none."""
    different_points: int = 0
    """Assigned code points that gigatoken and the reference read differently."""
    seconds: float = 0.0
    """That finding out took; 0 when it was known."""

    @property
    def why_not_slow(self) -> str:
        """Why a Hugging Face tokenizer goes without gigatoken; empty where that is as expected."""
        return self.why_not if self.kind == "huggingface" and not self.gigatoken else ""


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "quarry" / "tokenizers"


def versions() -> dict[str, str]:
    """Versions that the result depends on."""
    found = {"unicode": unicodedata.unidata_version, "check": str(CHECK_VERSION)}
    return found | {name: _installed_version(name) for name in ("gigatoken", "tokenizers", "sentencepiece")}


@cache
def _installed_version(name: str) -> str:
    """Version of a package, "none" where it is not installed."""
    # The names of the folders say it; importing importlib.metadata (it reads mail headers) takes as long as encoding 4 MB.
    for folder in filter(os.path.isdir, sys.path):
        found = [entry for entry in os.listdir(folder) if entry.startswith(f"{name}-") and entry.endswith(".dist-info")]
        if len(found) == 1:
            return found[0][len(name) + 1 : -len(".dist-info")]
    import importlib.metadata

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def tokenizer_sha256(path: Path) -> str:
    """SHA-256 of a tokenizer's file, read once while its size and time stay; DataError when it cannot be read."""
    try:
        stat = path.stat()
        return _sha256(str(path), stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise DataError(
            f"{path}: the tokenizer cannot be read ({error.strerror}); name a folder with tokenizer.json or a .model"
        ) from None


@cache
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def choose(kind: str, path: Path, control_tokens: ControlTokens) -> Choice:
    """How to encode with the .model or tokenizer.json at `path`."""
    sha256 = tokenizer_sha256(path)
    if kind == "sentencepiece":
        return Choice(kind, str(path), sha256, control_tokens, False, "a SentencePiece model")
    key = digest_of({"sha256": sha256, "control_tokens": control_tokens, "versions": versions()})
    file = cache_folder() / f"{key[:32]}.json"
    try:
        known = json.loads(file.read_bytes())
        known |= {name: tuple(known[name]) for name in ("prefix", "suffix", "unbroken")}
        choice = Choice(**{**known, "path": str(path), "seconds": 0.0})
        if not choice.gigatoken or Path(choice.table).is_file():
            return choice
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        pass  # not known yet, or written by another version
    started = time.monotonic()
    choice, table, merges = _find_out(path.read_bytes(), str(path), sha256, control_tokens, file.with_suffix(".npz"))
    if table is not None:
        with atomic_write(Path(choice.table)) as f:
            arrays = {name: getattr(table, name) for name in TABLE_ARRAYS}
            np.savez(f, **arrays, merges=np.zeros((0, 3), np.int32) if merges is None else merges)
    choice = Choice(**{**asdict(choice), "seconds": round(time.monotonic() - started, 2)})
    with atomic_write(file) as f:
        f.write(json.dumps(asdict(choice)).encode())
    return choice


def _find_out(
    content: bytes, path: str, sha256: str, control_tokens: ControlTokens, table_path: Path
) -> tuple[Choice, TokenTable | None, np.ndarray | None]:
    from data_prep import equality  # seldom needed

    config = json.loads(content)
    as_text = control_tokens == "as_text"
    reference = HuggingFaceReference(content, control_as_text=as_text)
    try:
        reference.tokenizer  # noqa: B018
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path}: not a tokenizer of the `tokenizers` library ({error})") from None
    prefix, suffix = ((), ()) if as_text else _affixes(reference)
    cutter = Cutter.of(config)
    base = Choice(
        "huggingface",
        path,
        sha256,
        control_tokens,
        False,
        prefix=prefix,
        suffix=suffix,
        exact_cuts=cutter.exact,
        unbroken=cutter.unbroken,
    )

    def refuse(why: str) -> tuple[Choice, None, None]:
        return Choice(**{**asdict(base), "why_not": why}), None, None

    normalizer = config.get("normalizer")
    form = normalizer.get("type") if normalizer else None
    if form is not None and form not in UNICODE_FORMS:
        return refuse(f"its normalizer is {form}")
    added = config.get("added_tokens") or []
    if any(
        token.get("special") is False and (token.get("lstrip") or token.get("rstrip") or token.get("single_word"))
        for token in added
    ):
        return refuse("it has ordinary added tokens that take white space or whole words")
    engine = gigatoken_engine(content, 1 << 40)
    if isinstance(engine, str):
        return refuse(f"gigatoken cannot load it: {engine}")
    if getattr(engine.backend, "encode_no_normalize", None) is not None:
        return refuse("it is no byte-level BPE tokenizer")
    points, suspects = equality.assigned_points()
    different = _different_points(engine, reference, points, sha256)
    if len(different) > len(points) // 20:
        return refuse(f"gigatoken reads {len(different)} of {len(points)} code points differently")
    suspects = np.sort(np.concatenate((suspects, different)))
    control = [token["id"] for token in added if token.get("special", False) or as_text]
    table = TokenTable.build(engine.vocab, control, suspects)
    merges = merge_array(config)
    small = None if merges is None else SmallReference(skeleton(config), table, merges, control_as_text=as_text)
    encoder = GigatokenEncoder(engine, table, reference, cutter, "text", form, small)
    unequal = equality.differences(encoder, list(equality.awkward_texts(added)))
    if unequal:
        return refuse(f"gigatoken encodes {len(unequal)} test strings differently, the first: {unequal[0]!r}")
    chosen = Choice(
        **asdict(base)
        | {
            "gigatoken": True,
            "normalizer": form,
            "table": str(table_path),
            "skeleton": "" if merges is None else skeleton(config),
            "different_points": len(different),
        }
    )
    return chosen, table, merges


def _different_points(engine: Engine, reference: HuggingFaceReference, points: np.ndarray, sha256: str) -> np.ndarray:
    """Kept apart from the rest: the same for both policies of control tokens."""
    file = cache_folder() / f"{digest_of({'sha256': sha256, 'versions': versions()})[:32]}.points.npy"
    try:
        return np.load(file)
    except (FileNotFoundError, ValueError):
        from data_prep import equality

        found = equality.differing_points(engine, reference, points)
        with atomic_write(file) as f:
            np.save(f, found)
        return found


def _affixes(reference: HuggingFaceReference) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that the post-processor puts before and behind a text; DataError when they depend on the text."""
    found = set()
    for text in ("a", "b c", "1"):
        bare = reference.tokenizer.encode(text, add_special_tokens=False).ids
        full = reference.tokenizer.encode(text, add_special_tokens=True).ids
        starts = [n for n in range(len(full) - len(bare) + 1) if full[n : n + len(bare)] == bare]
        if not starts:
            raise DataError(
                f"the tokenizer's post-processor changes the tokens of {text!r}; use one that only adds tokens around a text"
            )
        found.add((tuple(full[: starts[0]]), tuple(full[starts[0] + len(bare) :])))
    if len(found) != 1:
        raise DataError("the tokenizer's post-processor adds other tokens to each text; use one that adds the same ones to all")
    return found.pop()


def make_encoder(choice: Choice, text_key: str, threads: int, memory_bytes: int) -> Encoder:
    """The encoder that was chosen; loads what it needs."""
    if choice.kind == "sentencepiece":
        return ReferenceEncoder(SentencePieceReference(choice.path, threads), SpaceCutter.of(Path(choice.path).read_bytes()))
    content = Path(choice.path).read_bytes()
    if tokenizer_sha256(Path(choice.path)) != choice.sha256:
        raise DataError(f"{choice.path}: the file changed while it was in use; run the command again")
    reference = HuggingFaceReference(content, control_as_text=choice.control_tokens == "as_text")
    cutter = Cutter(choice.exact_cuts, choice.unbroken)
    if not choice.gigatoken:
        return ReferenceEncoder(reference, cutter)
    engine = gigatoken_engine(content, memory_bytes)
    if isinstance(engine, str):
        raise DataError(f"{choice.path}: gigatoken cannot load it ({engine}), though it could before; delete {choice.table}")
    with np.load(choice.table) as arrays:
        table = TokenTable(**{name: arrays[name] for name in TABLE_ARRAYS})
        merges = arrays["merges"]
    as_text = choice.control_tokens == "as_text"
    small = SmallReference(choice.skeleton, table, merges, control_as_text=as_text) if choice.skeleton else None
    return GigatokenEncoder(engine, table, reference, cutter, text_key, choice.normalizer, small)
