"""A check that tests/model/rank_worker.py runs on each of two tensor-parallel ranks: the loss in chunks of every size against torch's cross
entropy of the whole vocabulary. Writes the worst relative differences to FOLDER/tp2_losses.RANK.pt."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region

from model.chunked_loss import chunked_cross_entropy
from tests.model.test_chunked_loss import Largest, gradients, relative, sample, whole

SCALE = 1 / 16


def compare(folder: Path) -> None:
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
