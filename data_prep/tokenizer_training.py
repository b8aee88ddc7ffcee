"""Trains tokenizers: SentencePiece BPE with byte fallback, or byte-level BPE for the `tokenizers` library.

Cost is bounded by the text that is given (`sample` takes a stated number of bytes), not by the corpus. Equal texts give equal files.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from data_prep.errors import DataError
from data_prep.files import write_bytes
from data_prep.hf_tokenizer import write_config
from data_prep.special_tokens import END, PAD, SP_BEGIN, SP_PAD, SP_UNKNOWN, UNKNOWN, special_tokens

Kind = Literal["sentencepiece", "huggingface"]
TRAINING_VERSION = 2
"""Of sample() and train(); raise it when the same text would give another tokenizer."""
SAMPLE_DOCUMENT_CHARS = 16_000
"""Of one document at most this much goes into the training sample, so that a few long ones do not fill it."""
BYTES = 256
MIN_MERGES = 64
"""Entries beyond bytes and special tokens that a vocabulary has at least: fewer are a mistake in the recipe."""
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""[published] The cl100k split, which Granite's tokenizer.json carries: contractions, words with the character before them, up to three
digits, runs of signs, line breaks, blanks. Merges never cross these borders."""


def sample(documents: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Documents, each cut to SAMPLE_DOCUMENT_CHARS, up to `max_bytes` of UTF-8 in all."""
    total = 0
    for text in documents:
        text = text[:SAMPLE_DOCUMENT_CHARS]
        total += len(text.encode())
        if total > max_bytes:
            return
        yield text


def train(texts: Iterable[str], kind: Kind, vocab_size: int, destination: Path, *, show_progress: bool = False) -> None:
    """Train a tokenizer of exactly `vocab_size` entries, special tokens included (data_prep.special_tokens).

    kind sentencepiece: `destination` is the .model file; needs the texts in memory. huggingface: the folder for tokenizer.json and the files
    that transformers reads beside it; texts are counted as they come, memory grows with the number of different words. `show_progress`
    shows the bars of the `tokenizers` library on stderr. DataError for too small a vocabulary or too little text.
    """
    fixed = (
        BYTES + len(_sentencepiece_control(vocab_size)) + 4
        if kind == "sentencepiece"
        else BYTES + len(special_tokens(vocab_size))
    )
    if vocab_size < fixed + MIN_MERGES:
        raise DataError(
            f"data.tokenizer.vocab_size is {vocab_size}: 256 bytes and {fixed - BYTES} special tokens leave too little; "
            f"use at least {fixed + MIN_MERGES}"
        )
    if kind == "sentencepiece":
        write_bytes(destination, _sentencepiece(list(texts), vocab_size))
    else:
        _byte_level(texts, vocab_size, destination, show_progress)


def _no_text() -> DataError:
    return DataError("there is no text to train the tokenizer on; check data.sources of the first phase (--input, --text-key)")


def _too_little(what: str, size: int, reason: str) -> DataError:
    return DataError(
        f"{what} of {size} bytes of text ({reason}); raise data.tokenizer.train_max_bytes (--max-mb), give the first phase's "
        "sources (--input) more text, or lower data.tokenizer.vocab_size (--vocab-size)"
    )


def _byte_level(texts: Iterable[str], vocab_size: int, folder: Path, show_progress: bool) -> None:
    """Byte-level BPE: 256 bytes, merges in the order of their frequency, then the special tokens with the highest ids (as Granite's)."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    special = special_tokens(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    size = 0

    def counted() -> Iterator[str]:
        nonlocal size
        for text in texts:
            size += len(text.encode())
            yield text

    tokenizer.train_from_iterator(counted(), trainer)
    if size == 0:
        raise _no_text()
    found = tokenizer.get_vocab_size() + len(special)
    if found != vocab_size:
        raise _too_little(f"cannot make {vocab_size} entries", size, f"every pair is merged at {found}")
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    write_config(folder, {"bos_token": END, "eos_token": END, "pad_token": PAD}, special)
    # Last: a folder is a tokenizer when it has this file.
    write_bytes(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode() + b"\n")


def _sentencepiece_control(vocab_size: int) -> list[str]:
    """Special tokens of a SentencePiece model beside its four own ones."""
    return [token for token in special_tokens(vocab_size) if token not in (PAD, END, UNKNOWN)]


def _sentencepiece(texts: Sequence[str], vocab_size: int) -> bytes:
    """A byte-fallback BPE model.

    No normalisation at all: identity, no dummy prefix, white space kept, so that code survives. Line breaks may be inside of
    pieces. Characters get pieces of their own while they fit into a quarter of the vocabulary, most frequent first; the rest are bytes.
    """
    import sentencepiece

    control = _sentencepiece_control(vocab_size)
    # SentencePiece drops a sentence with a tab, and joins nothing over a NUL: cut there. Tabs get their piece by required_chars.
    pieces = [part for text in texts for part in text.replace("\0", "\t").split("\t") if part]
    if not pieces:
        raise _no_text()
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(pieces),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            required_chars="\t",
            character_coverage=_coverage(pieces, max(MIN_MERGES, (vocab_size - BYTES - 4 - len(control)) // 4)),
            max_sentence_length=1 << 30,
            control_symbols=control,
            unk_id=0, bos_id=1, eos_id=2, pad_id=3,
            unk_piece=SP_UNKNOWN, bos_piece=SP_BEGIN, eos_piece=END, pad_piece=SP_PAD,
            num_threads=1,  # more threads do not change the result, one makes that plain
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        size = sum(len(piece.encode()) for piece in pieces)
        raise _too_little(f"SentencePiece cannot make {vocab_size} pieces", size, str(error)) from None
    return model.getvalue()


def _coverage(texts: Sequence[str], characters: int) -> float:
    """The share of all characters that the `characters` most frequent ones make up (SentencePiece's character_coverage)."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    ordered = sorted(counts.values(), reverse=True)
    if len(ordered) <= characters:
        return 1.0
    return min(1.0, sum(ordered[:characters]) / sum(ordered))
