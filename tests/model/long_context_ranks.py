"""Checks that tests/model/rank_worker.py runs on every rank; each writes what it found to the folder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType

from model import attention_a2a
from model.attention import SDPAttention
from model.chunked_loss import chunked_cross_entropy
from model.packing import zigzag_positions
from tests.model.test_chunked_loss import Largest, gradients, relative, sample, whole

SCALE = 1 / 16


def losses(folder: Path) -> None:
    """Two tensor-parallel ranks: the loss in chunks of every size against torch's cross entropy of the whole vocabulary. Worst relative
    differences to tp2_losses.RANK.pt."""
    group = parallel_state.get_tensor_model_parallel_group()
    rank, ranks = group.rank(), group.size()
    found: dict[str, object] = {"float64": [], "float32": []}
    for dtype in (torch.float64, torch.float32):
        worst: list[float] = []
        for sequence_parallel in (False, True):
            layer = SimpleNamespace(tp_group=group, sequence_parallel=sequence_parallel, gradient_accumulation_fusion=False)
            hidden, weight, labels, mask = sample(10, 1, 8, 24, dtype, seed=7)
            expected = whole(hidden, weight, labels, SCALE)
            wanted = gradients(expected, mask, hidden, weight)
            own = weight.detach().chunk(ranks)[rank].clone().requires_grad_()
            for chunk in range(1, 12):
                given = scatter_to_sequence_parallel_region(hidden, group=group) if sequence_parallel else hidden
                loss = chunked_cross_entropy(given, own, labels, layer, scale=SCALE, chunk_tokens=chunk)
                of_hidden, of_weight = gradients(loss, mask, hidden, own)
                worst.append(
                    max(
                        relative(loss.detach(), expected.detach()),
                        relative(of_hidden, wanted[0]),
                        relative(of_weight, wanted[1].chunk(ranks)[rank]),
                    )
                )
        found[str(dtype).removeprefix("torch.")] = worst
    # The largest tensor, where logits are what is large.
    hidden, weight, labels, mask = sample(64, 1, 2, 512, torch.float32, seed=8)
    own = weight.detach().chunk(ranks)[rank].clone().requires_grad_()
    layer = SimpleNamespace(tp_group=group, sequence_parallel=False, gradient_accumulation_fusion=False)
    with Largest() as seen:
        gradients(chunked_cross_entropy(hidden, own, labels, layer, scale=SCALE, chunk_tokens=9), mask, hidden, own)
    found |= {"largest": seen.elements, "chunk": 9, "entries_per_rank": 512 // ranks}
    torch.save(found, folder / f"tp2_losses.{rank}.pt")


def packed_attention(folder: Path) -> None:
    """Four context-parallel ranks, [2, 2]: packed samples with heads exchanged, in one level and in two, against keys and values gathered.
    Largest differences of outputs and gradients to cp4_packed.RANK.pt."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = SimpleNamespace(attention_dropout=0.0, num_attention_heads=8, num_query_groups=4, tensor_model_parallel_size=1)
    options = {"attn_mask_type": AttnMaskType.causal, "attention_type": "self", "softmax_scale": 0.3, "pg_collection": groups}
    lengths = (16, 8, 24)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    generator = torch.Generator().manual_seed(9)
    mine = zigzag_positions(bounds.tolist(), groups.cp.size(), groups.cp.rank())
    wholes = [torch.randn(sum(lengths), heads, 8, generator=generator) for heads in (8, 4, 4, 8)]
    *shards, slope = (whole[mine] for whole in wholes)

    def results(attention: SDPAttention) -> list[torch.Tensor]:
        inputs = [shard.clone().requires_grad_() for shard in shards]
        out = attention(*inputs, None, packed_seq_params=packed)
        return [out, *torch.autograd.grad((out.view_as(slope) * slope).sum(), inputs)]

    expected = results(SDPAttention(config, 1, **options))
    found = {}
    for kind in attention_a2a.KINDS:
        ours = results(attention_a2a.AllToAllAttention(config, 1, cp_comm_type=kind, **options))
        assert [o.shape for o in ours] == [e.shape for e in expected]
        found[kind] = max(float((o - e).abs().max()) for o, e in zip(ours, expected, strict=True))
    torch.save(found, folder / f"cp4_packed.{groups.cp.rank()}.pt")
