"""Attention that needs no kernel library and still runs under context parallelism: torch's SDPA behind Megatron's core-attention slot.

Megatron's own core attention without Transformer Engine materialises the scores and refuses context parallelism. This one all-gathers keys
and values over the context-parallel group and lets every rank compute its two zig-zag pieces of the sequence.

Zig-zag order (Megatron's and Transformer Engine's): the sequence is cut into 2 * cp pieces, and rank r holds pieces r and 2 * cp - 1 - r, so
that causal attention costs every rank the same. Shape suffixes: S sequence, B batch, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank, get_pg_size
from torch.nn.functional import scaled_dot_product_attention


class _GatherSequence(torch.autograd.Function):
    """Zig-zag shards [S/cp, ...] of every rank -> the whole sequence [S, ...] in natural order; backward sums over the ranks."""

    @staticmethod
    def forward(ctx: Any, shard: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        shards = [torch.empty_like(shard) for _ in range(group.size())]
        dist.all_gather(shards, shard.contiguous(), group=group)
        first, second = zip(*(s.chunk(2) for s in shards), strict=True)
        return torch.cat([*first, *reversed(second)])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        # All-reduce and slice instead of reduce-scatter, which gloo does not have for every dtype.
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        pieces, rank = gradient.chunk(2 * ctx.group.size()), ctx.group.rank()
        return torch.cat([pieces[rank], pieces[-1 - rank]]), None


@functools.lru_cache(maxsize=64)
def _mask(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """[queries, keys] bool, True where query i, the i-th last of `keys` positions, may see key j."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale * Q K^T + causal) V for the last `query` positions of the sequence that `key` holds.

    query [Sq, B, H, D], key and value [Sk, B, G, D] with Sk >= Sq and G dividing H; returns [Sq, B, H, D].
    """
    queries, keys = query.size(0), key.size(0)
    # A mask only where none of SDPA's own cases fits: square causal has is_causal (half the work), one query sees every key.
    mask = None if queries in (1, keys) else _mask(queries, keys, query.device)
    q_BHSD, k_BGSD, v_BGSD = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    out_BHSD = scaled_dot_product_attention(
        q_BHSD,
        k_BGSD,
        v_BGSD,
        attn_mask=mask,
        is_causal=1 < queries == keys,
        scale=scale,
        enable_gqa=key.size(2) != query.size(2),
    )
    return out_BHSD.permute(2, 0, 1, 3)


class SDPAttention(MegatronModule):
    """Causal self-attention with GQA for the core-attention slot of Megatron's SelfAttention. Holds no parameters."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        if softmax_scale is None:
            raise ValueError("SDPAttention: softmax_scale is not set; Granite's attention_multiplier belongs there")
        if attn_mask_type is not AttnMaskType.causal or attention_type != "self":
            raise ValueError(
                f"SDPAttention is causal self-attention, asked for {attn_mask_type.name} {attention_type}-attention"
            )
        if attention_dropout or config.attention_dropout:
            raise ValueError(f"SDPAttention has no dropout, attention_dropout is {config.attention_dropout}; set it to 0")
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["cp"])
        self.context_group = groups.cp
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """query [S/cp, B, H/tp, D], key and value [S/cp, B, G/tp, D] -> [S/cp, B, H/tp * D].

        With a key/value cache, key and value are longer than query and end at the same position. `attention_mask` is not read, as in
        Transformer Engine's causal attention. `attn_mask_type` no_mask is what Megatron says in a decoding step; it means the same here.
        Raises ValueError for packed sequences and attention biases.
        """
        if packed_seq_params is not None or attention_bias is not None:
            raise ValueError(
                "SDPAttention takes neither packed sequences nor an attention bias; use Transformer Engine for these"
            )
        ranks, rank = get_pg_size(self.context_group), get_pg_rank(self.context_group)
        if ranks == 1:
            return causal_attention(query, key, value, self.softmax_scale).flatten(2)
        length = key.size(0) * ranks
        key, value = _GatherSequence.apply(torch.stack([key, value], dim=1), self.context_group).unbind(1)
        piece = length // (2 * ranks)
        ends = (piece * (rank + 1), piece * (2 * ranks - rank))
        pieces = zip(query.chunk(2), ends, strict=True)
        return torch.cat([causal_attention(q, key[:end], value[:end], self.softmax_scale) for q, end in pieces]).flatten(2)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        """Nothing to save."""
        return {}
