"""The reference tokenizer cut down to what a few short texts need: exact, and made in milliseconds instead of a third of a second.

A byte-level BPE tokenizer can put only such tokens into a text as occur in it, and apply only such merges as make one of them. With
all other tokens and merges left out, and the rest in their order, it takes the same steps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_prep.token_table import TokenTable

MAX_BYTES = 8192
"""Texts of one call; of longer ones the whole tokenizer is as fast."""


def byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies: itself where it is printable, otherwise one from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(rest)) for byte in range(256)]


def merge_array(config: dict[str, Any]) -> np.ndarray | None:
    """The merges of a tokenizer.json as token ids, int32 [merges, 3] (left, right, merged); None where the tokenizer is another kind."""
    model, vocab = config["model"], config["model"].get("vocab")
    plain = not any(
        model.get(key)
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges", "byte_fallback")
    )
    if model.get("type") != "BPE" or not plain or config.get("normalizer") is not None:
        return None
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    try:
        return np.array([(vocab[a], vocab[b], vocab[a + b]) for a, b in pairs], dtype=np.int32).reshape(-1, 3)
    except (KeyError, ValueError):
        return None


def skeleton(config: dict[str, Any]) -> str:
    """A tokenizer.json without what is in the table and the merges."""
    kept = {key: config.get(key) for key in ("version", "added_tokens", "pre_tokenizer")}
    return json.dumps(kept | {"model": {k: v for k, v in config["model"].items() if k not in ("vocab", "merges")}})


class SmallReference:
    """Encodes short texts as the whole tokenizer would."""

    def __init__(self, skeleton: str, table: TokenTable, merges: np.ndarray, *, control_as_text: bool) -> None:
        self._config, self._table, self._control_as_text = json.loads(skeleton), table, control_as_text
        self._left, self._right, self._merged = map(np.ascontiguousarray, merges.T)
        self._pairs = np.stack([table.pairs(self._merged, place) for place in (0, 1, -2)])
        self._characters = byte_characters()

    def takes(self, texts: Sequence[str]) -> bool:
        return sum(map(len, texts)) <= MAX_BYTES // 4

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text (uint32 [tokens])."""
        import tokenizers

        tokens, merges = self._needed("\n".join(texts).encode())
        spelled = {int(number): self._spelled(int(number)) for number in tokens}
        # Added tokens keep their ids only when the model knows them.
        vocab = {text: number for number, text in spelled.items()} | {
            t["content"]: t["id"] for t in self._config["added_tokens"] or []
        }
        pairs = [
            [spelled[a], spelled[b]] for a, b in zip(self._left[merges].tolist(), self._right[merges].tolist(), strict=True)
        ]
        config = self._config | {"model": self._config["model"] | {"vocab": vocab, "merges": pairs}}
        small = tokenizers.Tokenizer.from_str(json.dumps(config))
        small.encode_special_tokens = self._control_as_text
        return [np.array(e.ids, dtype=np.uint32) for e in small.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _needed(self, content: bytes) -> tuple[np.ndarray, np.ndarray]:
        """(tokens that can be made of `content`, merges among them in their order)."""
        present = np.zeros(len(self._table.lengths), dtype=bool)
        singles = self._table.single_bytes
        present[singles] = [spelled in content for spelled in self._table.many_bytes(singles)]
        # What a merge makes can only occur where its first, second and last two bytes do: that rules out nearly all of the vocabulary.
        pairs = np.zeros(1 << 16, dtype=bool)
        points = np.frombuffer(content, np.uint8).astype(np.uint16)
        pairs[(points[:-1] << 8) | points[1:]] = True
        candidates = np.arange(len(self._merged))
        for some in self._pairs:
            candidates = candidates[pairs[some[candidates]]]
        made = self._merged[candidates]
        present[made] = [spelled in content for spelled in self._table.many_bytes(made)]
        usable = present[made] & present[self._left[candidates]] & present[self._right[candidates]]
        return np.flatnonzero(present), candidates[usable]

    def _spelled(self, number: int) -> str:
        return "".join(self._characters[byte] for byte in self._table.bytes(number))
