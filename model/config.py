"""One place says what makes a Megatron TransformerConfig a Granite, because Megatron drops half of it silently when a switch is off.

Training jobs derive their TransformerConfig from command-line arguments; tests, conversion and generation take `transformer_config`.
`check` holds both to the same list (`requirements`), and `model.builder.build` calls it on every build.

What `use_mup` changes in Megatron-Core 0.19.2 (width multiplier m = hidden_size / mup_base_hidden_size; 1 when the base is null):

- `mup_embedding_mult` and `mup_output_mult` take effect. Without `use_mup` both are **ignored without a word**.
- `mup_output_mult` left at exactly 1.0 becomes 1/m. A model with logits_scaling 1 and m != 1 therefore cannot be expressed; `check` says so.
- `softmax_scale` left at None becomes 1/head_dim. An explicit value wins, and Granite always gives one.
- Initial weights of the matrices inside the layers: standard deviation init_std / sqrt(m); of the two projections that write into the
  residual stream: init_std / sqrt(2 * num_layers * m) (without muP: init_std and init_std / sqrt(2 * num_layers)). Embedding: init_std.
- Adam, for matrices inside the layers only (not embedding, output or norms) and only if m != 1: learning rate / m **and epsilon / m**.
  The latter is Megatron's choice; the Power Scheduler paper (arXiv 2408.13359) does not divide epsilon.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from model.errors import ModelError
from recipes.schema import Model


def width_multiplier(model: Model) -> float:
    """m = hidden_size / mup_base_hidden_size, 1.0 without a base (arXiv 2408.13359, table 3)."""
    return model.hidden_size / (model.mup_base_hidden_size or model.hidden_size)


def requirements(model: Model) -> dict[str, Any]:
    """Attribute of TransformerConfig -> value that it must have for `model`, whatever layout and precision."""
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.head_dim,
        "softmax_scale": model.attention_multiplier,
        "use_mup": True,
        "mup_embedding_mult": model.embedding_multiplier,
        "mup_output_mult": 1.0 / model.logits_scaling,
        "mup_width_mult": width_multiplier(model),
        "init_method_std": model.init_std,
        "embedding_init_method_std": model.init_std,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_epsilon,
        "layernorm_zero_centered_gamma": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "attention_output_gate": False,
        "apply_query_key_layer_scaling": False,
        "rotary_interleaved": False,
        "apply_residual_connection_post_layernorm": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "num_moe_experts": None,
        "multi_latent_attention": False,
        "mtp_num_layers": None,
    }


def check(config: TransformerConfig, model: Model) -> None:
    """Raise ModelError naming every attribute of `config` that is not what `model` needs."""
    wrong = [
        f"{name} is {getattr(config, name)!r}, must be {value!r}"
        for name, value in requirements(model).items()
        if getattr(config, name) != value
    ]
    if wrong:
        hint = ""
        if config.mup_output_mult != 1.0 / model.logits_scaling and model.logits_scaling == 1.0:
            hint = " (Megatron's muP takes 1/logits_scaling of exactly 1 for unset: set mup_base_hidden_size to null)"
        raise ModelError(f"model '{model.name}': the TransformerConfig differs from it: {'; '.join(wrong)}{hint}")


def transformer_config(
    model: Model,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    virtual_pipeline: int | None = None,
    context: int = 1,
    sequence_parallel: bool = False,
    dtype: torch.dtype = torch.float32,
    transformer_engine: bool = False,
    **overrides: Any,
) -> TransformerConfig:
    """A TransformerConfig for `model` on a layout of `tensor` x `pipeline` x `context` ranks per replica.

    `virtual_pipeline` is the number of model chunks per pipeline rank. `dtype` is that of parameters and activations (float32 or
    bfloat16). `overrides` are fields of TransformerConfig and win. Without `transformer_engine` the configuration runs on the CPU
    too: no fused kernels, weights initialised on the CPU.
    Raises ModelError if the result does not describe `model` (an override took a requirement away).
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ModelError(f"model '{model.name}': dtype is {dtype}; use torch.float32 or torch.bfloat16")
    fused = transformer_engine
    fields: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.head_dim,
        "softmax_scale": model.attention_multiplier,
        "use_mup": True,
        "mup_base_hidden_size": model.mup_base_hidden_size or model.hidden_size,
        "mup_embedding_mult": model.embedding_multiplier,
        "mup_output_mult": 1.0 / model.logits_scaling,
        "init_method_std": model.init_std,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_epsilon,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "virtual_pipeline_model_parallel_size": virtual_pipeline,
        "context_parallel_size": context,
        "sequence_parallel": sequence_parallel,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "transformer_impl": "transformer_engine" if transformer_engine else "local",
        "use_cpu_initialization": not transformer_engine,
        "persist_layer_norm": fused,
        "bias_activation_fusion": fused,
        "bias_dropout_fusion": fused,
        "apply_rope_fusion": fused,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
    }
    config = TransformerConfig(**(fields | overrides))
    check(config, model)
    return config
