"""The layers a Granite is made of: Megatron's own spec with a residual multiplier, over Transformer Engine or over plain torch.

Both specs write the same checkpoint keys (the norms under TE's names, `self_attention.linear_qkv.layer_norm_weight`), so that a model trained
on GPUs loads on a laptop and back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.jit import jit_fuser
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.utils import get_pg_rank

from model import attention_a2a
from model.attention import SDPAttention
from model.errors import ModelError


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm that knows sequence parallelism: each tensor-parallel rank sees a part of the sequence, so that the weight's
    gradient must be summed over them, which Megatron does for parameters marked `sequence_parallel`."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class FinalRMSNorm(RMSNorm):
    """The norm behind the last layer. Transformer Engine's saves an extra state, which is empty for a norm, and a load asks for it by key:
    without it a checkpoint made on CPUs would not load on GPUs. The layers' norms are part of a linear layer there, which has the key."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(config, hidden_size, eps)
        # As Megatron's linear layers do it: a state dict without the entry loads, too.
        self._register_load_state_dict_pre_hook(lambda state, prefix, *_: state.setdefault(f"{prefix}_extra_state"))

    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, state: None) -> None:
        """Nothing to restore."""


BiasDropoutAdd = Callable[[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor, float], torch.Tensor]


def _scaled_add(x: torch.Tensor, residual: torch.Tensor, multiplier: float) -> torch.Tensor:
    # Not torch.add(alpha=multiplier), which is one kernel: on the CPU it rounds alpha to the tensors' dtype, so that 0.22 becomes
    # 0.2197 in bf16.
    return residual + x * multiplier


_fused_scaled_add = jit_fuser(_scaled_add)


def scaled_bias_dropout_add(multiplier: float) -> Callable[[bool, bool], BiasDropoutAdd]:
    """residual + multiplier * dropout(x + bias), in Megatron's bias-dropout-add slot. `fused` (bias_dropout_fusion) makes it one kernel."""

    def get_bias_dropout_add(training: bool, fused: bool) -> BiasDropoutAdd:
        add = _fused_scaled_add if fused else _scaled_add

        def bias_dropout_add(
            x_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, prob: float
        ) -> torch.Tensor:
            x, bias = x_with_bias
            if bias is not None:
                x = x + bias
            if training and prob > 0.0:
                x = torch.nn.functional.dropout(x, p=prob)
            return add(x, residual, multiplier)

        return bias_dropout_add

    return get_bias_dropout_add


def block_spec(
    config: TransformerConfig,
    residual_multiplier: float,
    *,
    vp_stage: int | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> TransformerBlockSubmodules:
    """Layers and final norm of this pipeline stage (and model chunk `vp_stage` of it).

    `config.transformer_impl` chooses: "transformer_engine" or "local". Raises ModelError for another, or if Transformer Engine is missing.
    """
    if config.transformer_impl == "transformer_engine":
        layer, norm = _transformer_engine_layer(config)
    elif config.transformer_impl == "local":
        layer, norm = _local_layer(config), FinalRMSNorm
    else:
        raise ModelError(f"transformer_impl is {config.transformer_impl!r}; use 'transformer_engine' or 'local'")
    layer.self_attn_bda = layer.mlp_bda = scaled_bias_dropout_add(residual_multiplier)
    pp_rank = None if pg_collection is None else get_pg_rank(pg_collection.pp)
    spec = ModuleSpec(module=TransformerLayer, submodules=layer)
    return TransformerBlockSubmodules(
        layer_specs=[spec] * get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank), layer_norm=norm
    )


def _transformer_engine_layer(config: TransformerConfig) -> tuple[TransformerLayerSubmodules, type]:
    if not HAVE_TE:
        raise ModelError(
            "transformer_impl is 'transformer_engine', which is not installed; install the extra `gpu`, or use 'local' (no FP8)"
        )
    from megatron.core.extensions.transformer_engine import TENorm

    if config.fused_residual_rmsnorm:
        # That norm adds the residual itself, without the multiplier.
        raise ModelError("fused_residual_rmsnorm is on: it leaves out Granite's residual multiplier; turn it off")
    return get_gpt_layer_with_transformer_engine_submodules(use_te_activation_func=config.use_te_activation_func), TENorm


def _local_layer(config: TransformerConfig) -> TransformerLayerSubmodules:
    layer = get_gpt_layer_local_submodules(normalization="RMSNorm")
    # Megatron's torch norm refuses sequence parallelism, its attention context parallelism.
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    exchanges_heads = config.context_parallel_size > 1 and config.cp_comm_type in attention_a2a.KINDS
    layer.self_attention.submodules.core_attention = attention_a2a.AllToAllAttention if exchanges_heads else SDPAttention
    return layer
