"""The parts of scripts/gguf_llama.py that need neither a GGUF file nor the package that reads one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

PATH = Path(__file__).parents[2] / "scripts" / "gguf_llama.py"
spec = importlib.util.spec_from_file_location("gguf_llama", PATH)
assert spec is not None
assert spec.loader is not None
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

FIELDS = {
    "general.architecture": "llama",
    "llama.embedding_length": 8,
    "llama.feed_forward_length": 16,
    "llama.block_count": 2,
    "llama.attention.head_count": 2,
    "llama.context_length": 64,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def field_of(**changes: Any) -> Any:
    fields = FIELDS | changes
    return lambda name, *default: fields.get(name, *default) if default else fields[name]


@given(heads=st.integers(1, 4), half=st.integers(1, 5), width=st.integers(1, 3))
def test_rows_come_back_in_the_order_that_llama_cpp_changed(heads: int, half: int, width: int) -> None:
    rows = np.arange(heads * 2 * half * width).reshape(heads * 2 * half, width)
    # `permute` of llama.cpp's convert_hf_to_gguf.py
    stored = rows.reshape(heads, 2, half, width).swapaxes(1, 2).reshape(rows.shape)
    assert np.array_equal(script.rows_as_before(stored, heads), rows)


def test_names() -> None:
    assert script.hf_name("blk.3.attn_q.weight") == "model.layers.3.self_attn.q_proj.weight"
    assert script.hf_name("output_norm.weight") == "model.norm.weight"
    for name in ("blk.3.attn_q.bias", "rope_freqs.weight", "blk.0.ffn_gate_exps.weight"):
        with pytest.raises(script.NoLlama, match=name.replace(".", r"\.")):
            script.hf_name(name)


def test_the_config_is_one_that_quarry_convert_reads(tmp_path: Path) -> None:
    import json

    from model.hf_config import read_hf_config

    config = script.config_of(field_of(), vocab_size=32, tied=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read_hf_config(tmp_path)
    assert found.model.norm_epsilon == 1e-5
    assert (found.model.num_query_groups, found.model.attention_multiplier, found.rope_base) == (2, 0.5, 10000.0)


@pytest.mark.parametrize("changes", [{"general.architecture": "gemma3"}, {"llama.rope.scaling.type": "yarn"}])
def test_what_is_no_llama_is_refused(changes: dict[str, str]) -> None:
    with pytest.raises(script.NoLlama, match=r"only"):
        script.config_of(field_of(**changes), vocab_size=32, tied=True)


def test_neither_a_file_nor_a_package() -> None:
    with pytest.raises(script.NoLlama, match="no_such_package is neither"):
        script.find("no_such_package")


def test_the_chat_template_marks_what_the_assistant_wrote() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    ((text,), (spans,)) = render_jinja_template(
        conversations=[turns], chat_template=script.CHATML, return_assistant_tokens_mask=True
    )
    assert text == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    assert [text[a:b] for a, b in spans] == ["4<|im_end|>"]
