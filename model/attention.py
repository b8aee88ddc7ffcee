"""Attention that needs no kernel library and still runs under context parallelism: torch's SDPA behind Megatron's core-attention slot.

Megatron's own core attention without Transformer Engine materialises the scores and refuses context parallelism. This one all-gathers keys
and values over the context-parallel group and lets every rank compute its two zig-zag pieces of the sequence.

Zig-zag order (Megatron's and Transformer Engine's): the sequence is cut into 2 * cp pieces, and rank r holds pieces r and 2 * cp - 1 - r, so
that causal attention costs every rank the same. Of packed samples each is cut so by itself.

Packed samples (`packed_seq_params`, Megatron's thd format) are attended to one by one, which is what a block-diagonal mask means: no
sample sees another, bit for bit. Shape suffixes: S sequence, B batch, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import functools
import itertools
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
from torch.utils.checkpoint import checkpoint

from model.packing import zigzag_positions


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


class _GatherPacked(torch.autograd.Function):
    """The same for packed samples: shards [T/cp, ...] of every rank -> all tokens [T, ...] in natural order. `places` [cp, T/cp] int64
    says where each rank's tokens belong."""

    @staticmethod
    def forward(ctx: Any, shard: torch.Tensor, places: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group, ctx.places = group, places
        shards = [torch.empty_like(shard) for _ in range(group.size())]
        dist.all_gather(shards, shard.contiguous(), group=group)
        whole = shard.new_empty(places.numel(), *shard.shape[1:])
        whole[places.flatten()] = torch.cat(shards)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient[ctx.places[ctx.group.rank()]], None, None


BLOCK_QUERIES = 256
"""Rows of a mask at most: so many queries see up to Sk keys at once, where a context-parallel rank's piece is not the whole of them."""
KEPT_MASK_BYTES = 2**20
"""Larger masks are made again each time."""


@functools.lru_cache(maxsize=64)
def _mask(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """[queries, keys] bool, True where query i, the i-th last of `keys` positions, may see key j."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale * Q K^T + causal) V for the last `query` positions of the sequence that `key` holds.

    query [Sq, B, H, D], key and value [Sk, B, G, D] with Sk >= Sq and G dividing H; returns [Sq, B, H, D]. Neither scores nor masks of
    Sq x Sk exist at any time, forward or backward: SDPA goes over them by blocks, and a mask has BLOCK_QUERIES rows at most.
    """
    queries, keys = query.size(0), key.size(0)
    if BLOCK_QUERIES < queries < keys:
        out, end = [], keys - queries
        for block in query.split(BLOCK_QUERIES):
            end += block.size(0)
            # Recomputed for the backward pass: SDPA would keep the masks of all blocks for it, together as large as the whole.
            out.append(
                checkpoint(
                    causal_attention, block, key[:end], value[:end], scale, use_reentrant=False, preserve_rng_state=False
                )
            )
        return torch.cat(out)
    # A mask only where none of SDPA's own cases fits: square causal has is_causal (half the work), one query sees every key.
    make = _mask if queries * keys <= KEPT_MASK_BYTES else _mask.__wrapped__
    mask = None if queries in (1, keys) else make(queries, keys, query.device)
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
        """query [S/cp, B, H/tp, D], key and value [S/cp, B, G/tp, D] -> [S/cp, B, H/tp * D]; packed [T/cp, H/tp, D] -> [T/cp, H/tp, D].

        With a key/value cache, key and value are longer than query and end at the same position. `attention_mask` is not read, as in
        Transformer Engine's causal attention. `attn_mask_type` no_mask is what Megatron says in a decoding step; it means the same here.
        Of `packed_seq_params` only cu_seqlens_q is read: bounds of the samples over all T tokens, each a multiple of 2 * cp long.
        Raises ValueError for other packed formats and attention biases.
        """
        if attention_bias is not None:
            raise ValueError("SDPAttention takes no attention bias; use Transformer Engine for it")
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        ranks, rank = get_pg_size(self.context_group), get_pg_rank(self.context_group)
        if ranks == 1:
            return causal_attention(query, key, value, self.softmax_scale).flatten(2)
        length = key.size(0) * ranks
        key, value = _GatherSequence.apply(torch.stack([key, value], dim=1), self.context_group).unbind(1)
        piece = length // (2 * ranks)
        ends = (piece * (rank + 1), piece * (2 * ranks - rank))
        pieces = zip(query.chunk(2), ends, strict=True)
        return torch.cat([causal_attention(q, key[:end], value[:end], self.softmax_scale) for q, end in pieces]).flatten(2)

    def _packed(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSeqParams) -> torch.Tensor:
        if packed.qkv_format != "thd" or packed.cu_seqlens_q_padded is not None:
            raise ValueError(
                f"SDPAttention takes packed samples in thd format without padding between them, not {packed.qkv_format}"
            )
        bounds = packed.cu_seqlens_q.tolist()
        ranks, rank = get_pg_size(self.context_group), get_pg_rank(self.context_group)
        if ranks > 1:
            places = torch.stack([zigzag_positions(bounds, ranks, r) for r in range(ranks)]).to(query.device)
            key, value = _GatherPacked.apply(torch.stack([key, value], dim=1), places, self.context_group).unbind(1)
        out, taken = [], 0
        for start, end in itertools.pairwise(bounds):
            piece = (end - start) // (2 * ranks) if ranks > 1 else end - start
            # Without context parallelism the whole sample is one piece; with it a rank has two, each seeing the sample up to its own end.
            for until in (start + piece * (rank + 1), start + piece * (2 * ranks - rank)) if ranks > 1 else (end,):
                q = query[taken : taken + piece].unsqueeze(1)
                out.append(
                    causal_attention(q, key[start:until].unsqueeze(1), value[start:until].unsqueeze(1), self.softmax_scale)
                )
                taken += piece
        if taken != query.size(0):
            raise ValueError(f"bounds of {bounds[-1]} packed tokens for {query.size(0)} on each of {ranks} ranks")
        return torch.cat(out).squeeze(1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        """Nothing to save."""
        return {}
