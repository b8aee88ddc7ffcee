"""Prompts of a reinforcement-learning stage: read from JSON lines, checked, and put into an order that depends on the seed alone.

A line holds `prompt` (text, continued as it stands) or `messages` (a conversation, which the tokenizer's chat template turns into a
prompt for the assistant); and optionally `reference` (whatever the reward compares with), `domain` (for the health numbers and the choice
of a reward) and `metadata` (for the reward).
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.tokenizer import Tokenizer, write_hf_tokenizer

KEYS = {"prompt", "messages", "reference", "domain", "metadata"}


class PromptError(ValueError):
    """A prompt file that cannot be trained on; the message names file, line and remedy."""


@dataclass(frozen=True)
class Prompt:
    ids: tuple[int, ...]
    """Token ids that the response continues."""
    turns: tuple[tuple[str, str], ...]
    """(role, text) of each turn; a prompt given as text is one turn of the user."""
    reference: Any = None
    domain: str = "default"
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One response to one prompt."""

    prompt: Prompt
    position: int
    """Of the prompt in the endless order of `PromptOrder`."""
    number: int
    """Of the sample in its group."""
    completion_ids: np.ndarray
    """int32 [tokens], the end-of-text token included where the response ended by itself."""
    logprobs: np.ndarray
    """float32 [tokens], nats, as the rollout engine saw them."""
    truncated: bool
    """The generation limit cut it off."""
    completion: str
    """Text of `completion_ids` without the end-of-text token."""


@dataclass(frozen=True)
class Prompts:
    items: list[Prompt]
    digest: str
    """SHA-256 over the files' content, in hex: with the seed it decides what comes when."""


def chat_encoder(tokenizer: Tokenizer) -> Callable[[list[dict[str, str]]], list[int]]:
    """Messages -> ids of the conversation and the header of the assistant's turn, by the tokenizer's chat template.

    Raises PromptError if the tokenizer has none.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="quarry-chat-") as folder:
        # For a SentencePiece model too; the ids are the same (data_prep/hf_tokenizer.py says for which text).
        write_hf_tokenizer(tokenizer, Path(folder))
        template = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not template.chat_template:
        raise PromptError(
            f"{tokenizer.path} has no chat template: take a tokenizer with Granite's role tokens, add chat_template.jinja, or give prompts "
            "as text ('prompt')"
        )
    special = sorted(tokenizer.special_ids)

    def encode(messages: list[dict[str, str]]) -> list[int]:
        for message in messages:
            found = [token for token in special if token in message["content"]]
            if found:
                # The template's text is tokenized as a whole: a role marker inside a message would begin a turn.
                raise PromptError(f"a message holds the control token {found[0]}: remove it, or spell it differently")
        return template.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)

    return encode


def read_prompts(paths: Sequence[Path], tokenizer: Tokenizer, *, max_prompt_tokens: int) -> Prompts:
    """All prompts of `paths`, in order. Raises PromptError naming file and line of whatever cannot be used; nothing is left out."""
    items: list[Prompt] = []
    digest = hashlib.sha256()
    chat: Callable[[list[dict[str, str]]], list[int]] | None = None
    for path in paths:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise PromptError(f"prompts {path}: {error.strerror}; prepare them, or correct the path") from None
        digest.update(hashlib.sha256(content).digest())
        for number, line in enumerate(content.splitlines(), 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            record = _parse(line, where)
            try:
                if "messages" in record:
                    chat = chat or chat_encoder(tokenizer)
                    ids = chat(record["messages"])
                    turns = tuple((m["role"], m["content"]) for m in record["messages"])
                else:
                    ids, turns = tokenizer.encode(record["prompt"]), (("user", record["prompt"]),)
            except PromptError as error:
                raise PromptError(f"{where}: {error}") from None
            if not 1 <= len(ids) <= max_prompt_tokens:
                raise PromptError(
                    f"{where}: the prompt has {len(ids)} tokens; between 1 and {max_prompt_tokens} fit beside the response "
                    "(seq_length_tokens - rollout.max_response_tokens): shorten it or raise the length"
                )
            items.append(
                Prompt(tuple(ids), turns, record.get("reference"), record.get("domain", "default"), record.get("metadata", {}))
            )
    if not items:
        raise PromptError(
            f"no prompts in {', '.join(map(str, paths)) or 'an empty list of files'}; name a JSON-lines file that has some"
        )
    return Prompts(items, digest.hexdigest())


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise PromptError(f"{where}: not JSON ({error})") from None
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise PromptError(f"{where}: must be an object with either 'prompt' or 'messages'")
    if unknown := sorted(set(record) - KEYS):
        raise PromptError(f"{where}: unknown key '{unknown[0]}'; known: {', '.join(sorted(KEYS))}")
    types: list[tuple[str, type]] = [("prompt", str), ("messages", list), ("domain", str), ("metadata", dict)]
    for key, kind in types:
        if key in record and not isinstance(record[key], kind):
            raise PromptError(f"{where}: '{key}' is a {type(record[key]).__name__}, must be a {kind.__name__}")
    for message in record.get("messages", ()):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise PromptError(f"{where}: each message needs 'role' and 'content' as text")
    return record


class PromptOrder:
    """The endless order of prompts: each epoch is a permutation of all of them that follows from seed and epoch."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed
        self._epoch = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.count)

    def __getitem__(self, position: int) -> int:
        """Index of the prompt at `position` (0, 1, ...)."""
        epoch, place = divmod(position, self.count)
        return int(self._epoch(epoch)[place])
