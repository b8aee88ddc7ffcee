"""What long context needs, each against the plain run on one rank: communication of context parallelism, the loss in chunks over tensor
parallelism, recomputation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training import cpu_backend

cpu_backend.install()

from megatron.core.transformer.enums import AttnMaskType  # noqa: E402

from model import attention_a2a  # noqa: E402
from model.attention_a2a import AllToAllAttention, token_order  # noqa: E402
from model.errors import ModelError  # noqa: E402
from model.packing import zigzag_positions  # noqa: E402
from tests.model.conftest import Workspace  # noqa: E402
from tests.model.test_config import tiny  # noqa: E402
from tests.model.test_layouts import shard  # noqa: E402

TOKENS = 32
MODEL = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 8, "num_query_groups": 4, "head_dim": 8,
         "vocab_size": 96, "attention_multiplier": 1 / 8}  # fmt: skip
FULL = {"recompute_granularity": "full", "recompute_num_layers": 1}
JOBS: dict[str, dict[str, Any]] = {
    "one": {},
    "one_chunked": {"loss_chunk_tokens": 7},
    "untied_one": {},
    "untied_tp2_sp_chunked": {"ranks": 2, "tensor": 2, "sequence_parallel": True, "loss_chunk_tokens": 7},
    "pp2_chunked": {"ranks": 2, "pipeline": 2, "loss_chunk_tokens": 9},
    "cp2_a2a": {"ranks": 2, "context": 2, "options": {"cp_comm_type": "a2a"}},
    "tp2_sp_cp2_a2a": {"ranks": 4, "tensor": 2, "context": 2, "sequence_parallel": True, "options": {"cp_comm_type": "a2a"}},
    "cp4_a2a_p2p": {"ranks": 4, "context": 4, "context_hierarchy": [2, 2], "loss_chunk_tokens": 5,
                    "options": {"cp_comm_type": "a2a+p2p", "hierarchical_context_parallel_sizes": [2, 2]}},
    "full_uniform": {"options": {**FULL, "recompute_method": "uniform"}},
    "full_block": {"options": {**FULL, "recompute_method": "block"}},
    "selective": {"options": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}},
    "tp2_losses": {"ranks": 2, "tensor": 2, "check": "tests.model.long_context_ranks:losses"},
    "cp4_packed": {"ranks": 4, "context": 4, "context_hierarchy": [2, 2], "check": "tests.model.long_context_ranks:packed_attention"},
}  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("long-context")
    ids = torch.randint(0, MODEL["vocab_size"], (2, TOKENS), generator=torch.Generator().manual_seed(5))
    torch.save(ids, folder / "ids.pt")
    workspace = Workspace(folder, ids)
    models = {tied: tiny(**MODEL, tied_embeddings=tied).model_dump(mode="json") for tied in (True, False)}
    jobs = [{"name": name, "model": models["untied" not in name], "gradients": True, **job} for name, job in JOBS.items()]
    for job in jobs:
        if job["name"] == "one":
            job["save"] = str(folder / "one")
        elif job.get("pipeline"):  # whose stages would draw other initial weights
            job["load"] = str(folder / "one")
    workspace.run(jobs)
    return workspace


def ranks_of(job: dict[str, Any]) -> list[tuple[int, int, int]]:
    sizes = [range(job.get(name, 1)) for name in ("tensor", "pipeline", "context")]
    return [(tp, pp, cp) for tp in sizes[0] for pp in sizes[1] for cp in sizes[2]]


MULTIRANK = pytest.mark.multirank


@MULTIRANK
@pytest.mark.parametrize("name", [n for n in JOBS if ("chunked" in n or "a2a" in n) and "pp2" not in n])
def test_loss_and_gradients_are_those_of_one_rank_and_whole_logits(ran: Workspace, name: str) -> None:
    job, plain = JOBS[name], "untied_one" if "untied" in name else "one"
    reference, expected = ran.load(f"{plain}.grads.000.0"), ran.load(f"{plain}.loss.000")
    assert all(g.abs().max() > 0 for g in reference.values())
    losses = []
    for tp, pp, cp in ranks_of(job):
        losses.append(ran.load(f"{name}.loss.{tp}{pp}{cp}"))
        found = ran.load(f"{name}.grads.{tp}{pp}{cp}.0")
        assert found.keys() == reference.keys()
        for parameter, gradient in found.items():
            wanted = shard(parameter, reference[parameter], tp, job.get("tensor", 1))
            assert (gradient - wanted).norm() <= 2e-6 * wanted.norm(), parameter
    assert abs(torch.stack(losses).mean() - expected) <= 1e-6 * expected  # context-parallel ranks have as many tokens each


@MULTIRANK
def test_pipelines_accumulate_chunks_over_micro_batches(ran: Workspace) -> None:
    """Two micro batches alike, and the tied output matrix on another rank than the embedding."""
    assert abs(ran.load("pp2_chunked.loss.010") - ran.load("one.loss.000")) <= 1e-6 * ran.load("one.loss.000")
    reference, last = ran.load("one.grads.000.0"), ran.load("pp2_chunked.grads.010.0")
    for name in ("output_layer.weight", "decoder.final_layernorm.weight"):
        wanted = reference["embedding.word_embeddings.weight" if "output" in name else name]
        assert (last[name] - wanted).norm() <= 2e-6 * wanted.norm()


@MULTIRANK
@pytest.mark.parametrize("name", [n for n in JOBS if n.startswith(("full", "selective"))])
def test_recomputation_changes_no_bit(ran: Workspace, name: str) -> None:
    assert torch.equal(ran.load(f"{name}.loss.000"), ran.load("one.loss.000"))
    reference, found = ran.load("one.grads.000.0"), ran.load(f"{name}.grads.000.0")
    assert found.keys() == reference.keys()
    assert all(torch.equal(found[n], reference[n]) for n in reference)


@MULTIRANK
def test_chunks_over_tensor_parallel_ranks(ran: Workspace) -> None:
    """Every size of chunk, dividing or not: long_context_ranks.py has compared with torch's cross entropy of the whole vocabulary."""
    worst = ran.load("tp2_losses.0")
    assert len(worst["float64"]) == len(worst["float32"]) > 20
    assert max(worst["float64"]) < 1e-13
    assert max(worst["float32"]) < 1e-6
    assert worst["largest"] == worst["chunk"] * worst["entries_per_rank"]


@MULTIRANK
def test_packed_samples_with_heads_exchanged(ran: Workspace) -> None:
    for rank in range(4):
        assert max(ran.load(f"cp4_packed.{rank}").values()) < 2e-6


@given(sizes=st.sampled_from([(2, 1), (2, 2), (4, 1), (2, 4)]), lengths=st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_neighbouring_ranks_hold_the_pieces_of_one_among_fewer(sizes: tuple[int, int], lengths: list[int]) -> None:
    count, outer = sizes
    bounds = (0, *torch.tensor([2 * count * outer * n for n in lengths]).cumsum(0).tolist())
    for number in range(outer):
        held = torch.cat([zigzag_positions(bounds, count * outer, number * count + j) for j in range(count)])
        order = token_order(bounds, count * outer, number * count, count)
        assert held[order].tolist() == zigzag_positions(bounds, outer, number).tolist()


@pytest.mark.parametrize(("heads", "groups", "tensor", "message"), [
    (6, 2, 1, "6 heads / 1 tensor-parallel ranks"), (8, 2, 1, "2 key/value heads / 1"), (16, 8, 4, "8 key/value heads / 4")])  # fmt: skip
def test_heads_that_cannot_be_dealt_out_are_refused(
    heads: int, groups: int, tensor: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_a2a, "get_pg_size", lambda group: 4)
    config = SimpleNamespace(
        attention_dropout=0.0, num_attention_heads=heads, num_query_groups=groups, tensor_model_parallel_size=tensor
    )
    options = {"attn_mask_type": AttnMaskType.causal, "attention_type": "self", "softmax_scale": 1.0}
    collection = SimpleNamespace(cp=None)
    with pytest.raises(ModelError, match=message):
        AllToAllAttention(config, 1, cp_comm_type="a2a", pg_collection=collection, **options)
    with pytest.raises(ModelError, match="cp_comm_type is 'p2p'"):
        AllToAllAttention(config, 1, cp_comm_type="p2p", pg_collection=collection, **options)
