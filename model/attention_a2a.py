"""Context parallelism that deals out heads instead of tokens, for the CPU: what Transformer Engine calls `a2a` (DeepSpeed Ulysses,
arXiv 2309.14509) and, with a ring between groups of such ranks, `a2a+p2p`.

Each rank of a group gives its tokens' queries, keys and values away by heads and gets every rank's tokens of its own heads, attends to
them, and gives the result back. Of A neighbouring ranks the zig-zag pieces are together the pieces of one rank among 1/A as many, so that
what happens in between is model.attention's work with the ring as its group, or with none.

Shape suffixes: S tokens of this rank, A ranks of a group, B batch, H heads, D head dim.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank, get_pg_size

from model.attention import SDPAttention
from model.errors import ModelError
from model.packing import zigzag_positions

KINDS = ("a2a", "a2a+p2p")


def _heads_for_tokens(x_SBHD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[S, B, H, D] of all heads -> [A * S, B, H/A, D] of all ranks' tokens, rank by rank."""
    parts = x_SBHD.unflatten(2, (group.size(), -1)).movedim(2, 0).contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received.flatten(0, 1)


def _tokens_for_heads(x_SBHD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The way back: [A * S, B, H/A, D] -> [S, B, H, D]."""
    parts = x_SBHD.unflatten(0, (group.size(), -1)).contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received.movedim(0, 2).flatten(2, 3)


class _Exchange(torch.autograd.Function):
    """One of the two above; the gradient goes the other way, because an exchange only moves values."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, back: bool) -> torch.Tensor:
        ctx.group, ctx.back = group, back
        return _tokens_for_heads(x, group) if back else _heads_for_tokens(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return (_heads_for_tokens if ctx.back else _tokens_for_heads)(gradient, ctx.group), None, None


@functools.lru_cache(maxsize=8)
def token_order(bounds: tuple[int, ...], ranks: int, first: int, count: int) -> torch.Tensor:
    """Order in which the tokens of `count` neighbouring ranks from `first` on, of `ranks` in all, stand in their samples; [A * S] int64.

    `bounds` are those of model.packing.zigzag_positions: 0 and the length for one sequence.
    """
    return torch.cat([zigzag_positions(bounds, ranks, rank) for rank in range(first, first + count)]).argsort()


class AllToAllAttention(SDPAttention):
    """SDPAttention whose context-parallel ranks exchange heads for tokens, all of them (a2a) or in groups (a2a+p2p)."""

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, *args, cp_comm_type=cp_comm_type, pg_collection=pg_collection, **kwargs)
        whole = self.context_group
        if cp_comm_type == "a2a":
            self.heads_group, self.context_group = whole, None
        elif cp_comm_type == "a2a+p2p":
            groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["hcp"])
            self.heads_group, self.context_group = groups.hcp
        else:
            raise ModelError(f"AllToAllAttention: cp_comm_type is {cp_comm_type!r}; use one of {', '.join(KINDS)}")
        self.ranks, size = get_pg_size(whole), get_pg_size(self.heads_group)
        self.first = get_pg_rank(whole) - get_pg_rank(self.heads_group)  # of this rank's group, whose ranks are neighbours
        for name, heads in (("heads", config.num_attention_heads), ("key/value heads", config.num_query_groups)):
            if heads // config.tensor_model_parallel_size % size:
                raise ModelError(
                    f"cp_comm_type {cp_comm_type}: {heads} {name} / {config.tensor_model_parallel_size} tensor-parallel ranks cannot be "
                    f"dealt out to {size} context-parallel ranks; use fewer, p2p or all_gather"
                )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As SDPAttention.forward, with its shapes and errors."""
        packed = packed_seq_params is not None
        bounds = tuple(packed_seq_params.cu_seqlens_q.tolist()) if packed else (0, len(query) * self.ranks)
        order = token_order(bounds, self.ranks, self.first, get_pg_size(self.heads_group)).to(query.device)

        def gathered(x: torch.Tensor) -> torch.Tensor:
            x_SBHD = _Exchange.apply(x.unsqueeze(1) if packed else x, self.heads_group, False)[order]
            return x_SBHD.squeeze(1) if packed else x_SBHD

        out = super().forward(
            gathered(query),
            gathered(key),
            gathered(value),
            attention_mask,
            *args,
            packed_seq_params=packed_seq_params,
            **kwargs,
        )
        out_SBHD = out.view(len(out), 1 if packed else query.size(1), -1, value.size(-1))
        out_SBHD = _Exchange.apply(out_SBHD[order.argsort()], self.heads_group, True)
        return out_SBHD.squeeze(1) if packed else out_SBHD.flatten(2)
