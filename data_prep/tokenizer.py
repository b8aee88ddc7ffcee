"""One small interface over SentencePiece models and Hugging Face tokenizers.

Control tokens (end of text, roles) never come out of a document's text: a document that spells `<|end_of_text|>` gets ordinary pieces.
They enter training data only where code puts them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_prep.errors import DataError
from data_prep.files import file_sha256

HF_END_CANDIDATES = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>")
HF_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
            "vocab.json", "merges.txt")  # fmt: skip


class Tokenizer(Protocol):
    """Text to token ids and back."""

    kind: str
    """sentencepiece or huggingface"""
    path: Path
    """The .model file, or the folder with tokenizer.json."""
    vocab_size: int
    eod_id: int
    """Appended to every document."""

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        """Ids of each text, int32 [length], no id appended."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    @property
    def digest(self) -> str:
        """SHA-256 of the file that defines the ids."""
        ...

    @property
    def special_ids(self) -> dict[str, int]: ...

    def files(self) -> list[Path]:
        """Files that have to be copied with the tokenizer."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece .model. decode(encode(x)) == x for models trained here and text without U+2581 (which reads back as a space)."""

    kind = "sentencepiece"

    def __init__(self, path: Path) -> None:
        import sentencepiece

        if not path.is_file():
            raise DataError(
                f"{path}: no such SentencePiece model; set data.tokenizer.path to a .model file, or to null to train one"
            )
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except RuntimeError as error:
            raise DataError(f"{path}: not a SentencePiece model ({error}); set data.tokenizer.path to a .model file") from None
        self.path = path
        self.vocab_size = self.processor.vocab_size()
        self.eod_id = self.processor.eos_id()
        if self.eod_id < 0:
            raise DataError(f"{path}: the model has no end-of-sentence piece to end documents with; train it with eos_id set")

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        return [np.array(ids, dtype=np.int32) for ids in self.processor.encode(list(texts), num_threads=threads)]

    def decode(self, ids: Sequence[int]) -> str:
        return self.processor.decode([int(i) for i in ids])

    @property
    def digest(self) -> str:
        return file_sha256(self.path)

    @property
    def special_ids(self) -> dict[str, int]:
        return {
            self.processor.id_to_piece(i): i
            for i in range(self.vocab_size)
            if self.processor.is_control(i) or self.processor.is_unknown(i)
        }

    def files(self) -> list[Path]:
        return [self.path]


class HuggingFaceTokenizer:
    """A folder with tokenizer.json (or that file), read by the `tokenizers` library; special tokens in text stay text."""

    kind = "huggingface"

    def __init__(self, path: Path) -> None:
        import tokenizers

        self.path = path.parent if path.name == "tokenizer.json" else path
        file = self.path / "tokenizer.json"
        # A missing path must not be looked up as a model's name on a hub.
        if not file.is_file():
            raise DataError(f"{file}: no such file; set data.tokenizer.path to a folder with a tokenizer.json")
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{file}: not a tokenizer of the `tokenizers` library ({error})") from None
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.vocab_size = self.tokenizer.get_vocab_size(with_added_tokens=True)
        self.eod_id = self._end_of_document()

    def _end_of_document(self) -> int:
        config = self.path / "tokenizer_config.json"
        names: list[str] = []
        if config.is_file():
            token = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
            token = token.get("content") if isinstance(token, dict) else token
            names = [token] if token else []
        for name in [*names, *HF_END_CANDIDATES]:
            found = self.tokenizer.token_to_id(name)
            if found is not None:
                return found
        raise DataError(
            f"{self.path}: no token that ends documents: tokenizer_config.json names no eos_token, and none of {', '.join(HF_END_CANDIDATES)} "
            "is in the vocabulary; add eos_token to tokenizer_config.json"
        )

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        # The library's threads follow RAYON_NUM_THREADS, read once per process; `threads` cannot be handed to it.
        return [
            np.array(e.ids, dtype=np.int32) for e in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    @property
    def digest(self) -> str:
        return file_sha256(self.path / "tokenizer.json")

    @property
    def special_ids(self) -> dict[str, int]:
        return {
            token.content: number
            for number, token in sorted(self.tokenizer.get_added_tokens_decoder().items())
            if token.special
        }

    def files(self) -> list[Path]:
        return [self.path / name for name in HF_FILES if (self.path / name).is_file()]


def load_tokenizer(path: Path, kind: str | None = None) -> Tokenizer:
    """The tokenizer at `path`: a SentencePiece .model file, or a folder with tokenizer.json (or that file).

    `kind` ('sentencepiece' or 'huggingface') refuses the other one; None takes what the path is.
    """
    found = "huggingface" if path.is_dir() or path.name == "tokenizer.json" else "sentencepiece"
    if kind not in (None, found):
        raise DataError(f"{path} looks like a {found} tokenizer, data.tokenizer.kind says {kind}; change the one or the other")
    return SentencePieceTokenizer(path) if found == "sentencepiece" else HuggingFaceTokenizer(path)


def write_hf_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write what transformers.AutoTokenizer loads; see data_prep.hf_tokenizer for what equality holds."""
    from data_prep import hf_tokenizer

    hf_tokenizer.write(tokenizer, folder)


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a manifest or a model.json records of a tokenizer, the path left out."""
    return {"kind": tokenizer.kind, "sha256": tokenizer.digest, "vocab_size": tokenizer.vocab_size, "eod_id": tokenizer.eod_id}
