"""Bytes that one micro batch leaves on a rank for the backward pass, and what passes through beside them: logits, a layer's backward pass,
attention across ranks.

Counted tensor by tensor from what the pinned Megatron (0.19.2) and Transformer Engine (2.17.1: module/layernorm_linear.py, module/linear.py,
attention/dot_product_attention) save, with fused attention, so that nothing grows with the square of the length. `tokens` are those of one
rank: micro batch x length / context parallelism. Tensor parallelism divides widths inside attention and SwiGLU, sequence parallelism
divides tokens outside them. `transformer_engine` False counts what plain torch saves instead (CPU runs), which fuses less; there tests
compare with autograd itself (tests/recipes/test_against_megatron.py).
"""

from __future__ import annotations

from recipes.job_options import Parallel, Precision
from recipes.schema import Model

WIDE_BYTES = {"bf16": 2, "fp32": 4}
"""Of the dtype that activations have outside FP8 products."""
FP32_BYTES = 4
OFFLOAD_LAYERS_IN_FLIGHT = 2
"""Offloaded layers whose activations are on the GPU: one goes or comes while another computes [Transformer Engine's double buffer]."""


def rank_tokens(parallel: Parallel, seq_length_tokens: int, micro_batch_samples: int) -> int:
    """Tokens of a micro batch that one rank computes on inside attention and SwiGLU."""
    return micro_batch_samples * seq_length_tokens // parallel.context


def layer_input_bytes(model: Model, parallel: Parallel, precision: Precision, tokens: int) -> int:
    """The residual stream between two layers, which a recomputed layer keeps: [tokens, hidden], split by sequence parallelism."""
    return WIDE_BYTES[precision.dtype] * outer_tokens(parallel, tokens) * model.hidden_size


def outer_tokens(parallel: Parallel, tokens: int) -> int:
    """Tokens of a rank outside attention and SwiGLU."""
    return tokens // parallel.tensor if parallel.sequence_parallel else tokens


def layer_parts_bytes(
    model: Model, parallel: Parallel, precision: Precision, tokens: int, *, fp8: bool, transformer_engine: bool = True
) -> dict[str, int]:
    """Bytes that one layer saves under the layout's selective recomputation (or none), by tensor. `fp8`: this layer computes in FP8."""
    wide, tensor, outer = WIDE_BYTES[precision.dtype], parallel.tensor, outer_tokens(parallel, tokens)
    narrow = 1 if fp8 else wide  # inputs of matrix products are kept as they enter them
    hidden, ffn, head = model.hidden_size, model.ffn_hidden_size // tensor, model.head_dim
    heads, groups = model.num_attention_heads // tensor, model.num_query_groups // tensor
    modules = (parallel.recompute_modules or ["core_attn"]) if parallel.recompute == "selective" else []
    parts = {
        "attention_input": wide * outer * hidden,  # residual stream
        "attention_norm": narrow * outer * hidden,  # input of linear_qkv
        "attention_rms": FP32_BYTES * outer,
        "query": wide * tokens * heads * head,  # after RoPE, as the key
        "key": wide * tokens * groups * head,
        "value": wide * tokens * groups * head,
        "attention_output": wide * tokens * heads * head,  # of the backward pass of attention, and input of linear_proj
        "softmax": FP32_BYTES * tokens * heads,  # log of the sum
        "mlp_input": wide * outer * hidden,
        "mlp_norm": narrow * outer * hidden,  # input of linear_fc1
        "mlp_rms": FP32_BYTES * outer,
        "swiglu_input": wide * tokens * 2 * ffn,
        "swiglu_output": narrow * tokens * ffn,  # input of linear_fc2
    }
    mixed = wide * tokens * (heads + 2 * groups) * head
    if (
        precision.fp8 == "delayed" and fp8
    ):  # the other recipes have linear_proj keep attention's output instead of a copy in FP8
        parts["projection_input"] = tokens * heads * head
    if not transformer_engine:
        parts["value"] = mixed  # a view of linear_qkv's output holds all of it
        # The norm is made of single operations in fp32: its input and normalised input are kept; in bf16 the residual stream is not.
        for norm in ("attention", "mlp"):
            parts[f"{norm}_input"] = 2 * FP32_BYTES * outer * hidden
        parts["swiglu_factors"] = 2 * wide * tokens * ffn  # silu(gate) and up, beside the product
        samples_apart = parallel.micro_batch_samples  # cos and sin of RoPE for query and key, once for all samples
        parts["rope"] = 4 * wide * (tokens // samples_apart) * head
    if "core_attn" in modules:
        parts["softmax"] = 0
        parts["value"] = mixed  # the value is kept as the view that it is of linear_qkv's output, where attention would copy it
    if "mlp" in modules:
        kept = wide * outer * hidden
        parts |= {"mlp_input": kept, "mlp_norm": 0, "mlp_rms": 0, "swiglu_input": 0, "swiglu_output": 0, "swiglu_factors": 0}
        if not transformer_engine:  # the norm is not part of what is computed again
            parts |= {"mlp_input": 2 * FP32_BYTES * outer * hidden, "mlp_norm": kept, "mlp_rms": FP32_BYTES * outer}
    return parts


def layer_bytes(
    model: Model, parallel: Parallel, precision: Precision, tokens: int, *, fp8: bool, transformer_engine: bool = True
) -> int:
    """Sum of layer_parts_bytes."""
    parts = layer_parts_bytes(model, parallel, precision, tokens, fp8=fp8, transformer_engine=transformer_engine)
    return sum(parts.values())


def chunk_bytes(
    model: Model,
    parallel: Parallel,
    precision: Precision,
    tokens: int,
    fp8_layers: list[bool],
    *,
    transformer_engine: bool = True,
) -> tuple[int, int]:
    """What the layers of one model chunk save of one micro batch, and what computing a part of them again holds beside it, at most.

    `fp8_layers` says of each layer of the chunk whether it computes in FP8.
    """
    engine = {"transformer_engine": transformer_engine}
    sizes = {fp8: layer_bytes(model, parallel, precision, tokens, fp8=fp8, **engine) for fp8 in set(fp8_layers)}
    whole = [sizes[fp8] for fp8 in fp8_layers]
    one = layer_input_bytes(model, parallel, precision, tokens)
    if parallel.recompute == "full":
        count = parallel.recompute_num_layers or 1
        if parallel.recompute_method == "block":
            return len(whole[:count]) * one + sum(whole[count:]), max(whole[:count])
        groups = [whole[i : i + count] for i in range(0, len(whole), count)]
        return len(groups) * one, max(sum(group) for group in groups)
    again = 0
    if parallel.recompute == "selective":
        without = parallel.model_copy(update={"recompute": "none"})
        again = max(layer_bytes(model, without, precision, tokens, fp8=fp8, **engine) - kept for fp8, kept in sizes.items())
    if parallel.offload_layers:
        away = whole[: parallel.offload_layers]
        return sum(sorted(away)[-OFFLOAD_LAYERS_IN_FLIGHT:]) + sum(whole[parallel.offload_layers :]), max(0, again)
    return sum(whole), max(0, again)


def head_bytes(model: Model, parallel: Parallel, precision: Precision, tokens: int, *, transformer_engine: bool = True) -> int:
    """What final norm and output layer save: the norm's input and output."""
    one = layer_input_bytes(model, parallel, precision, tokens)
    rms = FP32_BYTES * outer_tokens(parallel, tokens)
    if transformer_engine:
        return 2 * one + rms
    return one + rms + 2 * FP32_BYTES * outer_tokens(parallel, tokens) * model.hidden_size


def logits_bytes(model: Model, parallel: Parallel, precision: Precision, tokens: int) -> int:
    """Logits [tokens, vocab / tensor] at their peak, in the backward pass of the loss: probabilities in fp32, the copy of them that
    torch.compile makes where core/fusions/fused_cross_entropy.py writes in place, and the gradient in the logits' dtype.

    (In the forward pass there are logits in their dtype and one fp32 copy.) A chunked loss has only a chunk of them, keeps none for the
    backward pass, and writes in place: logits, fp32 copy and gradient (model/chunked_loss.py).
    """
    wide = WIDE_BYTES[precision.dtype]
    each = 2 * wide + FP32_BYTES if parallel.loss_chunk_tokens else 2 * FP32_BYTES + wide
    return min(tokens, parallel.loss_chunk_tokens or tokens) * (model.vocab_size // parallel.tensor) * each


def logits_kept_bytes(model: Model, parallel: Parallel, tokens: int) -> int:
    """The part of logits_bytes that is there between forward and backward pass: probabilities in fp32."""
    return 0 if parallel.loss_chunk_tokens else FP32_BYTES * tokens * (model.vocab_size // parallel.tensor)


def chunked_loss_bytes(model: Model, parallel: Parallel, precision: Precision, tokens: int) -> int:
    """What a chunked loss holds beside logits: its input gathered over tensor parallelism, and that input's gradient."""
    return 2 * WIDE_BYTES[precision.dtype] * tokens * model.hidden_size if parallel.loss_chunk_tokens else 0


def backward_bytes(model: Model, parallel: Parallel, precision: Precision, tokens: int) -> int:
    """Gradients inside one layer's backward pass at their widest: of linear_fc1's output, of its input, and that input gathered."""
    widths = 2 * model.ffn_hidden_size // parallel.tensor + 2 * model.hidden_size
    return WIDE_BYTES[precision.dtype] * tokens * widths


def attention_bytes(model: Model, parallel: Parallel, precision: Precision, tokens: int) -> int:
    """What one layer's attention holds beside what it saves, of tokens of other context-parallel ranks.

    p2p: the forward pass keeps keys and values of all ranks as they come round, and its output for each (all of full size on the last
    rank), until it adds them up. all_gather: the backward pass has keys and values of all ranks, and their gradients. a2a: inputs and
    outputs once more, dealt out by heads. Transformer Engine, attention/dot_product_attention/context_parallel.py.
    """
    if parallel.context == 1:
        return 0
    wide = WIDE_BYTES[precision.dtype]
    query = wide * tokens * model.num_attention_heads // parallel.tensor * model.head_dim
    key_value = 2 * wide * tokens * model.num_query_groups // parallel.tensor * model.head_dim
    if parallel.context_communication == "all_gather":
        return 2 * parallel.context * key_value
    if parallel.context_communication == "a2a":
        return 2 * query + key_value
    # With a2a+p2p a rank of a ring holds fewer heads of more tokens, the same in all.
    ring = parallel.context if parallel.context_hierarchy is None else parallel.context_hierarchy[1]
    softmax = FP32_BYTES * tokens * model.num_attention_heads // parallel.tensor
    sent = 0 if parallel.context_hierarchy is None else 2 * query + key_value
    return ring * (key_value + query + softmax) + sent


def sequence_bytes(model: Model, parallel: Parallel, seq_length_tokens: int, micro_batch_samples: int) -> int:
    """What every rank holds of the whole sequence: the batch before it is cut (ids, labels and positions int64, loss mask fp32), and
    RoPE's angles, made for all positions (and a half of them on the way), of which the rank's part stays."""
    batch = (3 * 8 + 4) * micro_batch_samples * seq_length_tokens
    angles = FP32_BYTES * seq_length_tokens * model.head_dim
    return batch + angles + angles // 2 + angles // parallel.context
