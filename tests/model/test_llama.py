"""A Llama becomes a Granite with neutral multipliers, and computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model.convert import export, import_hf
from model.errors import ModelError


def make_llama(folder: Path, **changes: Any) -> torch.Tensor:
    """A random Llama with 64 channels in `folder`; its logits for a fixed text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, initializer_range=0.1, rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        **{"tie_word_embeddings": True, **changes})  # fmt: skip
    network = LlamaForCausalLM(config).float().eval()
    for name, p in network.named_parameters():
        if name.endswith("norm.weight"):
            p.data.uniform_(0.5, 1.5)
    network.save_pretrained(folder)
    with torch.no_grad():
        return network(torch.arange(40)[None] * 7 % 96).logits


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": False}, {"head_dim": 32}], ids=["tied", "untied", "wide heads"]
)
def test_the_granite_computes_what_the_llama_did(tmp_path: Path, changes: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    expected = make_llama(tmp_path / "llama", **changes)
    import_hf(tmp_path / "llama", tmp_path / "megatron")
    export(tmp_path / "megatron", tmp_path / "granite")
    granite = AutoModelForCausalLM.from_pretrained(tmp_path / "granite", dtype=torch.float32).eval()
    assert type(granite).__name__ == "GraniteForCausalLM"
    with torch.no_grad():
        found = granite(torch.arange(40)[None] * 7 % 96).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}, "rope_theta": None}, "rope_type is 'llama3'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"residual_multiplier": 0.22}, "LlamaForCausalLM with residual_multiplier"),
        ({"model_type": "mistral"}, "model_type 'mistral'"),
    ],
)
def test_a_llama_that_is_no_granite_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    make_llama(tmp_path / "llama")
    path = tmp_path / "llama" / "config.json"
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not None}))
    with pytest.raises(ModelError, match=message):
        import_hf(tmp_path / "llama", tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()
