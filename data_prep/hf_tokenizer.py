"""Writes a tokenizer as the folder that transformers' AutoTokenizer loads.

What holds, for a SentencePiece BPE model with byte fallback, without normalisation and without dummy prefix (all that are trained
here), and a text x (any Unicode without lone surrogates):

- `AutoTokenizer.from_pretrained(folder)(x, split_special_tokens=True).input_ids == ours.encode(x)`, whatever x holds;
- without `split_special_tokens` the same holds for every x that does not spell a special token. One that does gets the special id from
  transformers (chat templates need that), never from Quarry: text in a training document must not end it or open a role.

Byte-level or other Hugging Face tokenizers are copied file by file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_prep.chat_template import CHAT_TEMPLATE
from data_prep.errors import DataError
from data_prep.files import write_bytes, write_json
from data_prep.special_tokens import ROLES, SP_UNKNOWN
from data_prep.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

SPACE = "▁"
"""SentencePiece's U+2581, which stands for a space inside pieces."""
BPE, IDENTITY = 2, "identity"
"""TrainerSpec.ModelType of BPE; NormalizerSpec.name of no normalisation."""


def write(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json (or copy them); DataError for a model that cannot be."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        for file in tokenizer.files():
            write_bytes(folder / file.name, file.read_bytes())
        return
    if not isinstance(tokenizer, SentencePieceTokenizer):
        raise DataError(
            f"a tokenizer of kind '{tokenizer.kind}' cannot be written for transformers; use sentencepiece or huggingface"
        )
    names = {key: piece for key, piece in _named(tokenizer).items() if piece}
    write_config(folder, names, tuple(tokenizer.special_ids))
    write_bytes(folder / "tokenizer.json", json.dumps(_convert(tokenizer), ensure_ascii=False, indent=1).encode() + b"\n")


def write_config(folder: Path, names: dict[str, str], special: tuple[str, ...]) -> None:
    """Write what transformers reads beside tokenizer.json; the chat template where the special tokens have roles.

    `names` maps eos_token, pad_token ... to tokens; `special` are all special tokens.
    """
    extra = [piece for piece in special if piece not in names.values()]
    write_json(folder / "special_tokens_map.json", {**names, "additional_special_tokens": extra})
    if set(ROLES) <= set(special):
        write_bytes(folder / "chat_template.jinja", CHAT_TEMPLATE.encode())
    write_json(
        folder / "tokenizer_config.json",
        {
            **names,
            "additional_special_tokens": extra,
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1_000_000_000,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )


def _named(tokenizer: SentencePieceTokenizer) -> dict[str, str | None]:
    processor = tokenizer.processor
    ids = {
        "unk_token": processor.unk_id(),
        "bos_token": processor.bos_id(),
        "eos_token": processor.eos_id(),
        "pad_token": processor.pad_id(),
    }
    return {key: processor.id_to_piece(number) if number >= 0 else None for key, number in ids.items()}


def _convert(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """tokenizer.json of the `tokenizers` library with the same pieces and the same merges."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(tokenizer.path.read_bytes())
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    for what, fits in (
        ("model_type is not BPE", trainer.model_type == BPE),
        ("it has no byte fallback", trainer.byte_fallback),
        (f"its normalisation is '{normalizer.name}'", normalizer.name == IDENTITY and not normalizer.precompiled_charsmap),
        ("it adds a dummy prefix", not normalizer.add_dummy_prefix),
        ("it removes white space", not normalizer.remove_extra_whitespaces),
        ("it has user-defined symbols", not trainer.user_defined_symbols),
    ):
        if not fits:
            raise DataError(
                f"{tokenizer.path}: cannot be written for transformers exactly, because {what}; export with its own tokenizer folder"
            )
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    vocabulary = {piece.piece: number for number, piece in enumerate(model.pieces)}
    special = [(number, p.piece) for number, p in enumerate(model.pieces) if p.type in (kinds.CONTROL, kinds.UNKNOWN)]
    normal = {p.piece: p.score for p in model.pieces if p.type == kinds.NORMAL}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": piece,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for number, piece in special
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": SP_UNKNOWN if SP_UNKNOWN in vocabulary else special[0][1],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": _merges(normal),
        },
    }


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best score first.

    SentencePiece merges any neighbours whose concatenation is a piece, best score first, leftmost first; a list of all pairs in the
    order of the scores does the same. Pairs of one piece are ordered longest left half first, because neighbours that could merge both
    ways are remainders of a run merged from the left (the longer part stands left).
    """
    merges = []
    for piece, _ in sorted(scores.items(), key=lambda item: -item[1]):
        pairs = [(piece[:cut], piece[cut:]) for cut in range(len(piece) - 1, 0, -1)]
        merges += [pair for pair in pairs if pair[0] in scores and pair[1] in scores]
    return merges
