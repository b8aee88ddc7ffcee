"""A tiny Granite as Hugging Face folder, with a tokenizer made on the spot, its Megatron checkpoint, and held-out sets; made once."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.files import record_file
from data_prep.indexed import Writer, bin_path, idx_path
from data_prep.manifest import HeldoutManifest, HeldoutSet, TokenizerRecord, heldout_path

VOCABULARY = 384
CONTEXT_TOKENS = 320
HELDOUT_TOKENS = 48


@dataclass(frozen=True)
class World:
    folder: Path
    hf: Path
    megatron: Path
    data: Path


def make_tokenizer(folder: Path) -> None:
    """Byte-level BPE of at most VOCABULARY entries; most codes of five digits become five tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|end_of_text|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(
        ["The access code of the language reference is this, and that is the code of it."] * 9, trainer
    )
    end = "<|end_of_text|>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token=end, pad_token=end).save_pretrained(folder)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    from data_prep import tokenizer as tokenizers
    from model import convert

    folder = tmp_path_factory.mktemp("evaluation")
    hf, megatron, data = folder / "hf", folder / "imported", folder / "data"
    make_model(hf)
    make_tokenizer(hf)
    tokenizer = tokenizers.load_tokenizer(hf, "huggingface")
    record = {**tokenizers.describe(tokenizer), "path": str(hf)}
    convert.import_hf(hf, megatron, tokenizer=record)
    make_heldout(data, record, hf)
    return World(folder, hf, megatron, data)


def make_model(folder: Path) -> None:
    """Random, but for the norms: an initial norm is all ones, and any mix-up of two would go unseen."""
    import torch
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS, embedding_multiplier=12.0, attention_multiplier=1 / 16, residual_multiplier=0.7,
        logits_scaling=2.0, initializer_range=0.1, rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})  # fmt: skip
    network = GraniteForCausalLM(config).float()
    for name, parameter in network.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.uniform_(0.5, 1.5)
    network.save_pretrained(folder)


def make_heldout(data: Path, record: dict[str, Any], hf: Path) -> None:
    import shutil

    (data / "tokenizer").mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(hf / name, data / "tokenizer" / name)
    described = TokenizerRecord(**{**record, "path": "tokenizer"})
    sets = {}
    for number, category in enumerate(("code", "web")):
        rng = np.random.default_rng(number)
        prefix = data / "heldout" / category
        prefix.parent.mkdir(exist_ok=True)
        with Writer(prefix, record["vocab_size"]) as writer:
            for _ in range(9):
                writer.add(rng.integers(1, record["vocab_size"], int(rng.integers(5, 60))).astype(np.uint16))
        sets[category] = HeldoutSet(
            prefix=f"heldout/{category}",
            documents=9,
            max_token_id=writer.max_token_id,
            dtype="uint16",
            bin=record_file(bin_path(prefix)),
            idx=record_file(idx_path(prefix)),
            tokens=sum(writer.lengths),
        )
    manifest = HeldoutManifest.make(seq_length_tokens=HELDOUT_TOKENS, inputs="0" * 64, tokenizer=described, categories=sets)
    manifest.write(heldout_path(data))


class StandIn:
    """An executable that answers as the Python of an environment with lm-eval does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "python"
        script = Path(__file__).with_name("lm_eval_stand_in.py")
        self.python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{script}" "{folder}" "$@"\n')
        self.python.chmod(0o755)
        self.orders(tasks={"quarry_smoke_choice": {"known": True, "tasks": ["quarry_smoke_choice"], "unsafe_code": False}})

    def orders(self, **what: Any) -> None:
        (self.folder / "stand_in.json").write_text(json.dumps(what))

    def calls(self) -> list[dict[str, Any]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def stand_in(tmp_path: Path) -> StandIn:
    folder = tmp_path / "lm-eval-env"
    folder.mkdir()
    return StandIn(folder)
