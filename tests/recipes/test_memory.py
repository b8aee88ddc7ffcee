"""The account of a rank's memory by itself: every parameter has one owner, and each setting moves what it should.

That its parts are Megatron's: tests/recipes/test_against_megatron.py.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes import activations, memory
from recipes.flops import parameters
from recipes.job_options import Parallel, Precision
from recipes.memory import RankMemory, rank_memory
from recipes.schema import Recipe

BF16 = Precision(name="bf16", dtype="bf16")
FP8 = Precision(name="fp8", dtype="bf16", fp8="tensorwise", fp8_format="hybrid")
GRADIENTS = BF16.model_copy(update={"gradients_dtype": "bf16"})
BASE = {"gpus": 64, "tensor": 2, "sequence_parallel": True}


def need(recipe: Recipe, layout: dict[str, Any], precision: Precision = BF16, **settings: Any) -> RankMemory:
    parallel = Parallel(name="test", **BASE | layout)
    optimizer = recipe.optimizer.model_copy(update=settings.pop("optimizer", {}))
    return rank_memory(recipe.model, parallel, precision, optimizer, **{"seq_length_tokens": 8192} | settings)


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(1, 5000), st.booleans()), min_size=1, max_size=8),
    st.one_of(st.none(), st.integers(1, 9000)),
    st.integers(1, 40),
)
def test_every_parameter_has_one_owner_per_element(sizes: list[tuple[int, bool]], bucket: int | None, ranks: int) -> None:
    weights = [memory.Weight(numel, shared_embedding=shared) for numel, shared in sizes]
    made = memory.buckets(weights, bucket, ranks)
    assert all(b.size % ranks == 0 and b.size % 128 == 0 for b in made)
    assert sum(len(b.ranges) for b in made) == len(weights)
    owned = [memory.owned_elements(made, ranks, rank) for rank in range(ranks)]
    assert sum(owned) == sum(w.numel for w in weights)
    assert memory.most_owned_elements(made, ranks) == max(owned)


def test_the_total_is_the_sum_with_the_larger_of_what_is_never_together(five_phase: Recipe) -> None:
    rank = need(five_phase, {})
    parts = [value for name, value in vars(rank).items() if name.endswith("_bytes")]
    assert rank.total_bytes == sum(parts) - min(rank.logits_bytes, rank.workspace_bytes)


def test_fp32_copies_in_the_optimizers_step_count_where_they_exceed_the_passes(five_phase: Recipe) -> None:
    alone = {"gpus": 1, "tensor": 1, "sequence_parallel": False}
    owned = parameters(five_phase.model)
    full = need(five_phase, alone | {"recompute": "full"}, GRADIENTS)
    assert full.optimizer_step_bytes == 4 * owned == full.fullest_bytes > full.activations_bytes + full.passing_bytes
    assert full.total_bytes == full.parameters_bytes + full.gradients_bytes + 16 * owned + full.allowance_bytes
    many = need(five_phase, {}, GRADIENTS)
    assert many.fullest_bytes == many.activations_bytes + many.passing_bytes > many.optimizer_step_bytes > 0


AWARE = {"precision_aware": True}
MOMENTS = {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}


@pytest.mark.parametrize(
    ("fp8", "optimizer", "state", "step"),
    [
        # bytes per parameter that a rank owns: the optimizer's state, and fp32 copies while it makes a step; gradients are in bf16
        (None, {}, 12, 4),
        (None, AWARE, 12, 0),
        (None, AWARE | MOMENTS, 8, 0),
        (None, AWARE | {"exp_avg_dtype": "bf16"}, 10, 4),
        (None, AWARE | MOMENTS | {"main_params_dtype": "fp16"}, 6, 4),
        (None, AWARE | {"main_params_dtype": "fp16", "exp_avg_dtype": "fp16", "exp_avg_sq_dtype": "fp16"}, 6, 12),
        ("delayed", AWARE | MOMENTS, 8, 0),
        ("tensorwise", AWARE | MOMENTS, 8, 4),
        ("blockwise", AWARE | MOMENTS | {"main_params_dtype": "fp16"}, 6, 4),
    ],
)
def test_bytes_of_a_precision_aware_optimizer(
    five_phase: Recipe, fp8: str | None, optimizer: dict[str, Any], state: int, step: int
) -> None:
    owned = parameters(five_phase.model)
    precision = GRADIENTS.model_copy(update={"fp8": fp8})
    rank = need(five_phase, {"gpus": 1, "tensor": 1, "sequence_parallel": False}, precision, optimizer=optimizer)
    scales = 3 * 4 * 400  # fewer than 400 tensors, each state with a scale of four bytes
    assert 0 <= rank.optimizer_bytes - state * owned < scales
    assert rank.optimizer_step_bytes == step * owned


def test_a_rank_alone_holds_the_whole_model(five_phase: Recipe) -> None:
    count = parameters(five_phase.model)
    rank = need(five_phase, {"gpus": 1, "tensor": 1, "sequence_parallel": False})
    padding = 200 * 128  # elements: fewer than 200 buckets
    assert 0 <= rank.parameters_bytes - 2 * count < 2 * padding
    assert 0 <= rank.gradients_bytes - 4 * count < 4 * padding
    assert rank.optimizer_bytes == 12 * count
    assert rank.communication_bytes == 0


@pytest.mark.parametrize(
    ("part", "more", "less"),
    [
        ("activations_bytes", {}, {"recompute": "selective", "recompute_modules": ["mlp"]}),
        ("activations_bytes", {"recompute": "selective", "recompute_modules": ["mlp"]}, {"recompute": "full"}),
        ("activations_bytes", {"recompute": "full"}, {"recompute": "full", "recompute_num_layers": 4}),
        ("activations_bytes", {}, {"recompute": "full", "recompute_method": "block", "recompute_num_layers": 10}),
        ("activations_bytes", {"sequence_parallel": False}, {}),
        ("activations_bytes", {}, {"tensor": 4}),
        ("activations_bytes", {}, {"context": 2}),
        ("activations_bytes", {}, {"offload_layers": 20}),
        ("activations_bytes", {"micro_batch_samples": 2}, {}),
        ("logits_bytes", {}, {"loss_chunk_tokens": 1024}),
        ("optimizer_bytes", {}, {"gpus": 128}),
        ("parameters_bytes", {}, {"pipeline": 2}),
        ("workspace_bytes", {"context": 16, "context_communication": "p2p"}, {"context": 16, "context_communication": "a2a"}),
    ],
)
def test_settings_move_what_they_are_for(five_phase: Recipe, part: str, more: dict[str, Any], less: dict[str, Any]) -> None:
    assert getattr(need(five_phase, more, seq_length_tokens=65536), part) > getattr(
        need(five_phase, less, seq_length_tokens=65536), part
    )


def test_recomputing_fused_attention_saves_nothing(five_phase: Recipe) -> None:
    """Its scores are never kept; what is kept is the projection's whole output instead of the value alone."""
    assert need(five_phase, {"recompute": "selective"}).activations_bytes > need(five_phase, {}).activations_bytes


def test_the_fullest_stage_is_the_one_that_is_named(five_phase: Recipe) -> None:
    layout = {"pipeline": 4}
    stages = [need(five_phase, layout, pipeline_rank=rank) for rank in range(4)]
    fullest = need(five_phase, layout)
    assert fullest == max(stages, key=lambda stage: stage.total_bytes)
    assert [stage.logits_bytes > 0 for stage in stages] == [False, False, False, True]
    falling = [stage.activations_bytes for stage in stages]
    assert falling == sorted(falling, reverse=True)
    assert need(five_phase, layout, micro_batches=1, pipeline_rank=0).activations_bytes < falling[0] / 3


def test_attention_across_ranks_needs_keys_of_the_whole_sequence_and_no_square(five_phase: Recipe) -> None:
    model, parallel = five_phase.model, Parallel(name="test", gpus=32, tensor=4, context=8, sequence_parallel=True)
    sizes = [activations.attention_bytes(model, parallel, BF16, tokens) for tokens in (4096, 8192)]
    assert sizes[1] == 2 * sizes[0]
    keys_and_values = 2 * 2 * 8 * 4096 * model.num_query_groups // 4 * model.head_dim
    assert sizes[0] > keys_and_values


def test_fp8_keeps_two_copies_of_the_matrices_or_one_beside_parameters_in_fp8(five_phase: Recipe) -> None:
    model = five_phase.model
    norms = (2 * model.num_layers + 1) * model.hidden_size
    matrices = (parameters(model) - norms - model.vocab_size * model.hidden_size) // 2
    kept, gathered = FP8, FP8.model_copy(update={"fp8_param_gather": True})
    assert need(five_phase, {}).fp8_weights_bytes == 0
    assert need(five_phase, {}, kept).fp8_weights_bytes == 2 * matrices
    assert need(five_phase, {}, gathered).fp8_weights_bytes == matrices
    assert need(five_phase, {}, kept).parameters_bytes - need(five_phase, {}, gathered).parameters_bytes == matrices
    assert need(five_phase, {}, kept).activations_bytes < need(five_phase, {}).activations_bytes
    mxfp8 = gathered.model_copy(update={"fp8": "mxfp8"})
    assert need(five_phase, {}, mxfp8).fp8_weights_bytes == 2 * matrices * 33 // 32
    assert need(five_phase, {}, mxfp8).parameters_bytes == need(five_phase, {}, gathered).parameters_bytes - matrices


# Llama 3.1 8B in bf16 on 8 GPUs at 8K, from the logs that NVIDIA/dgxc-benchmarking shows in llama3.1/README.md; its gradients are in bf16.
# v25.04, H100, CP2, micro batch 1 (NeMo): memory_allocated 44271689728 after a step, peak_memory_usage 70833405952.
# v25.12, micro batch 4 (Megatron Bridge): mem-max-allocated-gigabytes 194.41; its loss takes Transformer Engine's fused kernel, which
# writes the gradient over the logits: two bytes each and no fp32 copy.
LLAMA = {
    "num_layers": 32,
    "ffn_hidden_size": 14336,
    "vocab_size": 128256,
    "tied_embeddings": False,
    "published_parameters": None,
}


def test_nvidias_published_memory(five_phase: Recipe) -> None:
    llama = five_phase.model_copy(update={"model": five_phase.model.model_copy(update=LLAMA)})
    one = {"tensor": 1, "sequence_parallel": False, "gpus": 8, "overlap_grad_reduce": True}
    rank = need(llama, one | {"context": 2}, GRADIENTS)
    state = rank.parameters_bytes + rank.gradients_bytes + rank.optimizer_bytes
    assert state == pytest.approx(44_271_689_728, rel=0.005)
    assert state + rank.activations_bytes + rank.passing_bytes == pytest.approx(70_833_405_952, rel=0.05)
    rank = need(llama, one | {"micro_batch_samples": 4}, GRADIENTS)
    logits = 2 * 4 * 8192 * LLAMA["vocab_size"]
    assert state + rank.activations_bytes + logits == pytest.approx(194.41e9, rel=0.05)
