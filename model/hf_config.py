"""A Granite's `config.json` for Hugging Face, and back, so that no multiplier, base or switch is lost or guessed on the way.

Every multiplier of GraniteConfig has a default of 1, so a loader that overlooks one gets a model that runs and is wrong. Here every value
is written, and on the way in every value that Quarry's model cannot represent is refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import ModelError
from recipes.schema import Model

ARCHITECTURE = "GraniteForCausalLM"
LLAMA = "LlamaForCausalLM"
# Under this key config.json keeps what Quarry knows and GraniteConfig has no field for; Hugging Face carries it along unread.
QUARRY_KEY = "quarry"
# Fields of schema.Model that GraniteConfig has no place for.
_OURS = ("name", "mup_base_hidden_size", "published_parameters", "released_rope_base", "released_max_position_tokens")


@dataclass(frozen=True)
class HFModel:
    """What a Hugging Face folder says about its model."""

    model: Model
    rope_base: float
    max_position_tokens: int
    token_ids: dict[str, int]
    """bos_token_id, eos_token_id and pad_token_id where the config has them."""


def to_hf_config(
    model: Model, *, rope_base: float, max_position_tokens: int, dtype: str, token_ids: Mapping[str, int | None]
) -> dict[str, Any]:
    """Content of config.json. `dtype` is "float32" or "bfloat16"; `token_ids` has any of bos_token_id, eos_token_id, pad_token_id.

    Raises ModelError for a token id outside of the vocabulary.
    """
    ids = {name: token_ids.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, value in ids.items():
        if value is not None and not 0 <= value < model.vocab_size:
            raise ModelError(
                f"model '{model.name}': {name} is {value}, the vocabulary has {model.vocab_size} entries; use its tokenizer"
            )
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "model_type": "granite",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "hidden_act": "silu",
        "max_position_embeddings": max_position_tokens,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_epsilon,
        "use_cache": True,
        **ids,
        "tie_word_embeddings": model.tied_embeddings,
        # transformers 5 reads rope_parameters; 4.x and other loaders read rope_theta.
        "rope_parameters": {"rope_type": "default", "rope_theta": float(rope_base)},
        "rope_theta": float(rope_base),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "embedding_multiplier": model.embedding_multiplier,
        "residual_multiplier": model.residual_multiplier,
        "attention_multiplier": model.attention_multiplier,
        "logits_scaling": model.logits_scaling,
        "dtype": dtype,
        QUARRY_KEY: {name: getattr(model, name) for name in _OURS},
    }
    if model.head_dim * model.num_attention_heads != model.hidden_size:
        config["head_dim"] = model.head_dim
    return config


def to_generation_config(token_ids: Mapping[str, int | None]) -> dict[str, Any]:
    """Content of generation_config.json: where generation begins and ends."""
    return {"_from_model_config": True, **{k: v for k, v in token_ids.items() if v is not None}}


def read_hf_config(folder: Path) -> HFModel:
    """The model that `folder`/config.json describes.

    Raises ModelError naming every key that is missing, malformed, or asks for what Quarry's Granite does not have.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist; --from needs a checkpoint or a Hugging Face folder") from None
    except ValueError as error:
        raise ModelError(f"{path} is no JSON: {error}") from None
    architectures = raw.get("architectures")
    if architectures == [LLAMA] and raw.get("model_type") == "llama":
        raw = _llama_as_granite(raw)
        architectures = raw["architectures"]
    if architectures != [ARCHITECTURE] or raw.get("model_type") != "granite":
        raise ModelError(
            f"{path}: architectures is {architectures} and model_type {raw.get('model_type')!r}; only {ARCHITECTURE} (model_type 'granite') "
            f"and {LLAMA} (model_type 'llama') are converted"
        )
    problems = _unsupported(raw)
    if problems:
        raise ModelError(f"{path}: {'; '.join(problems)}")
    try:
        rope_base = float(_rope(raw).get("rope_theta", 10000.0))  # GraniteConfig's default
        model = _model(raw, rope_base, folder.resolve().name)
    except KeyError as error:
        raise ModelError(f"{path}: {error.args[0]} is missing; it has no default that could be trusted") from None
    except ValueError as error:  # pydantic's ValidationError is one
        raise ModelError(f"{path}: {error}") from None
    ids = {n: raw[n] for n in ("bos_token_id", "eos_token_id", "pad_token_id") if isinstance(raw.get(n), int)}
    return HFModel(model, rope_base, raw["max_position_embeddings"], ids)


def _llama_as_granite(raw: dict[str, Any]) -> dict[str, Any]:
    """A Llama is a Granite whose multipliers are neutral: tensors have the same names, shapes and meaning, softmax has 1/sqrt(head size)."""
    heads, hidden = raw.get("num_attention_heads"), raw.get("hidden_size")
    head_dim = raw.get("head_dim") or (hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads else 1)
    neutral = {
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1 / math.sqrt(head_dim),
        "logits_scaling": 1.0,
    }
    if own := [key for key in neutral if key in raw]:
        return raw | {"architectures": [f"{LLAMA} with {', '.join(own)}"]}  # Llama's code does not read them: which is meant?
    return raw | neutral | {"architectures": [ARCHITECTURE], "model_type": "granite"}


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    """RoPE settings in one form: transformers 5 has rope_parameters, 4.x has rope_theta and rope_scaling beside each other."""
    rope = dict(raw.get("rope_scaling") or {}) | dict(raw.get("rope_parameters") or {})
    if "rope_theta" not in rope and "rope_theta" in raw:
        rope["rope_theta"] = raw["rope_theta"]
    if "partial_rotary_factor" in raw:
        rope["partial_rotary_factor"] = raw["partial_rotary_factor"]
    return rope


def _unsupported(raw: dict[str, Any]) -> list[str]:
    problems = []
    only = {
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "quantization_config": None,
        "sliding_window": None,
    }
    for key, value in only.items():
        if raw.get(key, value) != value:
            problems.append(f"{key} is {raw[key]!r}, Quarry's Granite has only {value!r}")
    for key in ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"):
        value = raw.get(key)
        if key not in raw:
            problems.append(f"{key} is missing: GraniteConfig would take 1.0, which is rarely meant; write it out")
        elif not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
            problems.append(f"{key} is {value!r}, must be a positive number")
    rope = _rope(raw)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        problems.append(f"rope_type is {kind!r}, only 'default' (no scaling) is trained and converted")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"partial_rotary_factor is {rope['partial_rotary_factor']!r}, only 1.0 (the whole head) is supported")
    theta = rope.get("rope_theta")
    if "rope_theta" in raw and theta != raw["rope_theta"]:
        problems.append(f"rope_theta is {raw['rope_theta']!r} and rope_parameters.rope_theta is {theta!r}; make them agree")
    if theta is not None and (not isinstance(theta, int | float) or not theta > 0 or theta != int(theta)):
        problems.append(f"rope_theta is {theta!r}; Megatron's --rotary-base takes positive whole numbers")
    heads, groups = raw.get("num_attention_heads"), raw.get("num_key_value_heads", raw.get("num_attention_heads"))
    hidden, head_dim = raw.get("hidden_size"), raw.get("head_dim")
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        problems.append(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    if isinstance(heads, int) and isinstance(hidden, int) and head_dim is None and hidden % heads:
        problems.append(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and head_dim is not given")
    effective = head_dim or (hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads else 2)
    if effective % 2:
        problems.append(f"head_dim is {effective}; RoPE rotates pairs, it must be even")
    return problems


def _model(raw: dict[str, Any], rope_base: float, folder_name: str) -> Model:
    ours = raw.get(QUARRY_KEY) or {}
    heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
    return Model(
        num_layers=raw["num_hidden_layers"],
        hidden_size=hidden,
        ffn_hidden_size=raw["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or hidden // heads,
        vocab_size=raw["vocab_size"],
        tied_embeddings=raw.get("tie_word_embeddings", False),  # GraniteConfig's default
        embedding_multiplier=raw["embedding_multiplier"],
        residual_multiplier=raw["residual_multiplier"],
        attention_multiplier=raw["attention_multiplier"],
        logits_scaling=raw["logits_scaling"],
        norm_epsilon=raw["rms_norm_eps"],
        init_std=raw["initializer_range"],
        name=ours.get("name") or folder_name,
        mup_base_hidden_size=ours.get("mup_base_hidden_size"),
        released_rope_base=ours.get("released_rope_base", rope_base),
        released_max_position_tokens=ours.get("released_max_position_tokens", raw["max_position_embeddings"]),
        published_parameters=ours.get("published_parameters"),
    )
