"""What Megatron needs to know of a tokenizer when the data are token ids already.

Megatron's own NullTokenizer is the same, but building it imports transformers: two seconds of every rank, for nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any


class TokenIds:
    """Vocabulary size and end-of-document id; stands in for Megatron's tokenizer where nothing is encoded."""

    def __init__(self, vocab_size: int, eod_id: int) -> None:
        self.vocab_size = vocab_size
        self.eod = eod_id

    @property
    def pad(self) -> int:
        """No padding token: samples are always full."""
        return -1

    @property
    def unique_identifiers(self) -> OrderedDict[str, Any]:
        """Part of the key of Megatron's index caches."""
        return OrderedDict({"class": "quarry.TokenIds", "vocab_size": self.vocab_size, "eod_id": self.eod})


def install(eod_id: int) -> None:
    """Make Megatron take TokenIds(args.vocab_size) as its tokenizer; the embedding has exactly that many rows."""
    import megatron.training.global_vars as global_vars

    def build_tokenizer(args: Any) -> TokenIds:
        args.padded_vocab_size = args.vocab_size
        return TokenIds(args.vocab_size, eod_id)

    global_vars.build_tokenizer = build_tokenizer
