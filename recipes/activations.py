"""Bytes that one micro batch leaves on a rank for the backward pass, and what the loss, the backward pass and communication need beside them.

Counted from what the pinned Megatron and Transformer Engine save (the comments name the tensors), in bf16 with fused attention: nothing grows
with the square of the length. Tokens are those of one rank: micro batch x length / context parallelism; tensor parallelism divides widths
inside attention and SwiGLU, sequence parallelism divides tokens outside them.
"""

from __future__ import annotations

from recipes.job_options import Parallel, Precision
from recipes.schema import Model

BF16_BYTES = 2
FP32_BYTES = 4


def rank_tokens(parallel: Parallel, seq_length_tokens: int, micro_batch_samples: int) -> int:
    """Tokens of a micro batch that one rank computes on inside attention and SwiGLU."""
    return micro_batch_samples * seq_length_tokens // parallel.context


def layer_input_bytes(model: Model, parallel: Parallel, precision: Precision, tokens: int) -> int:
    """The residual stream between two layers, which a recomputed layer keeps: [tokens, hidden], split by sequence parallelism."""
    width = FP32_BYTES if precision.dtype == "fp32" else BF16_BYTES
    return width * tokens * model.hidden_size // (parallel.tensor if parallel.sequence_parallel else 1)


def layer_parts_bytes(model: Model, parallel: Parallel, precision: Precision, tokens: int, *, fp8: bool) -> dict[str, int]:
    """Bytes that one layer saves, by the part of it that recomputation can drop. `fp8`: whether this layer computes in FP8."""
    wide = FP32_BYTES if precision.dtype == "fp32" else BF16_BYTES
    narrow = 1 if fp8 else wide  # inputs of matrix products are saved as they enter them
    tensor = parallel.tensor
    outer = tokens // tensor if parallel.sequence_parallel else tokens
    hidden, ffn = model.hidden_size, model.ffn_hidden_size // tensor
    heads, groups = model.num_attention_heads // tensor, max(1, model.num_query_groups // tensor)
    out = tokens * heads * model.head_dim
    return {
        "attention_input": wide * outer * hidden + FP32_BYTES * outer,  # residual stream, 1 / rms
        "attention_norm": narrow * outer * hidden,  # input of linear_qkv
        "qkv": wide * tokens * (heads + 2 * groups) * model.head_dim,  # q, k after RoPE and v
        "attention_output": wide * out + (out if fp8 else 0),  # kept by attention; linear_proj keeps its own FP8 copy
        "softmax": FP32_BYTES * tokens * heads,  # log-sum-exp
        "mlp_input": wide * outer * hidden + FP32_BYTES * outer,
        "mlp_norm": narrow * outer * hidden,  # input of linear_fc1
        "swiglu_input": wide * tokens * 2 * ffn,
        "swiglu_output": narrow * tokens * ffn,  # input of linear_fc2
    }


def layer_bytes(model: Model, parallel: Parallel, precision: Precision, tokens: int, *, fp8: bool) -> int:
    """Bytes that one layer saves under the layout's selective recomputation (or none)."""
    parts = layer_parts_bytes(model, parallel, precision, tokens, fp8=fp8)
    if parallel.recompute == "selective":
        modules = parallel.recompute_modules or ["core_attn"]
        if "core_attn" in modules:
            parts["softmax"] = 0  # q, k and v stay as inputs, the output as linear_proj's input
        if "layernorm" in modules:
            parts["attention_norm"] = parts["mlp_norm"] = 0
        if "mlp" in modules:
            parts["mlp_norm"] = parts["swiglu_input"] = parts["swiglu_output"] = 0
    return sum(parts.values())


def chunk_bytes(model: Model, parallel: Parallel, precision: Precision, tokens: int, fp8_layers: list[bool]) -> tuple[int, int]:
    """What the layers of one model chunk save for one micro batch, and what recomputing them holds beside it, at most.

    `fp8_layers` says of each layer of the chunk whether it computes in FP8.
    """
    whole = [layer_bytes(model, parallel, precision, tokens, fp8=fp8) for fp8 in fp8_layers]
    if parallel.recompute != "full":
        return sum(whole), 0
    one = layer_input_bytes(model, parallel, precision, tokens)
    count = parallel.recompute_num_layers or 1
    if parallel.recompute_method == "block":
        recomputed = whole[:count]
        return len(recomputed) * one + sum(whole[count:]), max(recomputed)
    groups = [whole[i : i + count] for i in range(0, len(whole), count)]
    return len(groups) * one, max(sum(group) for group in groups)


def logits_bytes(model: Model, parallel: Parallel, precision: Precision, tokens: int) -> int:
    """Logits [tokens, vocab / tensor] at their peak: as computed, and as fp32 from which loss and gradient are made in place.

    In the backward pass the gradient takes the place of the logits. With a chunked loss only a chunk of them exists.
    """
    at_once = min(tokens, parallel.loss_chunk_tokens or tokens)
    wide = FP32_BYTES if precision.dtype == "fp32" else BF16_BYTES
    return at_once * (model.vocab_size // parallel.tensor) * (wide + FP32_BYTES)


def backward_bytes(model: Model, parallel: Parallel, precision: Precision, tokens: int) -> int:
    """Gradients inside one layer's backward pass at their widest: of linear_fc1's output, and of its input with that input gathered."""
    wide = FP32_BYTES if precision.dtype == "fp32" else BF16_BYTES
    return wide * tokens * (2 * model.ffn_hidden_size // parallel.tensor + 2 * model.hidden_size)
