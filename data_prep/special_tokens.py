"""The tokens that are no text: which ones a vocabulary reserves, in which order, by its size.

Names and order are those of Granite 4: a byte-level vocabulary of 100,352 trained here has 100,256 entries of text, then `<|pad|>` at
100256, `<|end_of_text|>` at 100257 and so on, id by id as published.
"""

from __future__ import annotations

PAD, END, UNKNOWN = "<|pad|>", "<|end_of_text|>", "<|unk|>"
SP_UNKNOWN, SP_BEGIN, SP_PAD = "<unk>", "<|start_of_text|>", "<pad>"
"""Pieces that every SentencePiece model trained here has, at ids 0, 1 and 3; 2 is the end of text."""
ROLES = ("<|start_of_role|>", "<|end_of_role|>")
"""Around the name of whoever speaks, in the chat format."""
FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>")
"""Fill in the middle."""
CODE = ("<|filename|>", "<|reponame|>")
TOOLS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
OTHER = (
    "<think>",
    "</think>",
    "<think_on>",
    "<think_off>",
    "<schema>",
    "</schema>",
    "<tools>",
    "</tools>",
    "<documents>",
    "</documents>",
)
GRANITE = (
    PAD, END, *FIM, *CODE, *ROLES, "<|unused_1|>", "<|start_of_plugin|>", "<|end_of_plugin|>", UNKNOWN, *TOOLS, *OTHER,
)  # fmt: skip
"""[published: the added tokens of Granite 4, in the order of their ids]"""
ROLES_FROM_VOCAB = 1024
"""Smaller vocabularies have an end of text and a pad token only: an entry for a role costs them an entry for text."""
GRANITE_FROM_VOCAB = 8192
"""From here the 28 named tokens are less than 0.4% of the vocabulary."""
BLOCK_FROM_VOCAB, BLOCK = 32_768, 96
"""From here the block is 96 tokens, the rest of it reserved for later uses: 0.3% of the smallest, and 100352 - 256 - 100000 of Granite's."""


def special_tokens(vocab_size: int) -> tuple[str, ...]:
    """Special tokens of a vocabulary of `vocab_size` entries, in the order of their ids; `<|unused_N|>` are reserved."""
    if vocab_size < ROLES_FROM_VOCAB:
        return (PAD, END)
    if vocab_size < GRANITE_FROM_VOCAB:
        return (PAD, END, *ROLES)
    if vocab_size < BLOCK_FROM_VOCAB:
        return GRANITE
    return (*GRANITE, *(f"<|unused_{number}|>" for number in range(2, 2 + BLOCK - len(GRANITE))))
