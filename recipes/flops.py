"""Model FLOPs, as the pinned Megatron counts them (megatron/training/training.py, num_floating_point_operations).

A matrix product of m x n with n x k is 2 m n k FLOPs, and each is done three times: forward, gradient of the input, gradient of the weight.
Causal attention is counted as half of the square, which is what NVIDIA publishes for its models; documents that do not see each other
count each the half of its own square. What recomputation does again, padding, norms, RoPE and the softmax itself are no model FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from recipes.schema import Model


def parameters(model: Model) -> int:
    """Parameters of the model: embedding, per layer attention, SwiGLU and two norms, and the final norm; no biases."""
    attention = 2 * model.hidden_size * model.head_dim * (model.num_attention_heads + model.num_query_groups)
    layer = attention + 3 * model.hidden_size * model.ffn_hidden_size + 2 * model.hidden_size
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tied_embeddings else 2)
    return embeddings + model.num_layers * layer + model.hidden_size


def matrix_flops_per_token(model: Model) -> int:
    """FLOPs of all matrix products with weights, for one token: 6 x the weights of attention, SwiGLU and head.

    The lookup of the embedding multiplies nothing; the head counts once, tied or not.
    """
    attention = 2 * model.hidden_size * model.head_dim * (model.num_attention_heads + model.num_query_groups)
    layer = attention + 3 * model.hidden_size * model.ffn_hidden_size
    return 6 * (model.num_layers * layer + model.hidden_size * model.vocab_size)


def attention_flops_per_token_squared(model: Model) -> int:
    """FLOPs of causal attention per squared token of a document: Q K^T and P V, the lower half only (6 L h, h = heads x head_dim)."""
    return 6 * model.num_layers * model.num_attention_heads * model.head_dim


def flops_per_token(model: Model, seq_length_tokens: float) -> float:
    """Model FLOPs to train on one token of a sequence in which every token sees all before it; of documents that see only themselves, with the
    mean of their lengths over all tokens (recipes/document_packing.py, attended_tokens)."""
    return matrix_flops_per_token(model) + attention_flops_per_token_squared(model) * seq_length_tokens


def document_flops(model: Model, lengths_tokens: Iterable[int] | Mapping[int, int]) -> int:
    """Model FLOPs to train once on documents that see only themselves.

    `lengths_tokens` are the documents' lengths, or a histogram length -> number of documents; padding is not part of a length.
    Raises ValueError if a length or a number is negative.
    """
    counts = lengths_tokens.items() if isinstance(lengths_tokens, Mapping) else ((length, 1) for length in lengths_tokens)
    tokens = squares = 0
    for length, count in counts:
        if length < 0 or count < 0:
            raise ValueError(f"lengths_tokens holds {count} documents of {length} tokens: neither can be negative")
        tokens += count * length
        squares += count * length * length
    return matrix_flops_per_token(model) * tokens + attention_flops_per_token_squared(model) * squares
