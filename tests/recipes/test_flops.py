"""FLOPs of documents that see only themselves, and of one sequence. That they are Megatron's: tests/recipes/test_against_megatron.py."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.flops import attention_flops_per_token_squared, document_flops, flops_per_token, matrix_flops_per_token, parameters
from recipes.schema import Recipe

lengths = st.lists(st.integers(0, 600_000), max_size=20)


@settings(max_examples=30)
@given(lengths)
def test_a_histogram_counts_as_the_list_it_stands_for(five_phase: Recipe, lengths_tokens: list[int]) -> None:
    assert document_flops(five_phase.model, Counter(lengths_tokens)) == document_flops(five_phase.model, lengths_tokens)


@settings(max_examples=30)
@given(lengths, lengths)
def test_documents_add_up(five_phase: Recipe, some: list[int], others: list[int]) -> None:
    model = five_phase.model
    assert document_flops(model, some + others) == document_flops(model, some) + document_flops(model, others)


@settings(max_examples=30)
@given(st.integers(1, 600_000), st.integers(1, 600_000))
def test_cutting_a_document_saves_exactly_the_attention_across_the_cut(five_phase: Recipe, first: int, second: int) -> None:
    model = five_phase.model
    across = 2 * first * second * attention_flops_per_token_squared(model)
    assert document_flops(model, [first + second]) - document_flops(model, [first, second]) == across


@settings(max_examples=30)
@given(st.integers(1, 600_000))
def test_one_document_is_a_sequence(five_phase: Recipe, length: int) -> None:
    assert document_flops(five_phase.model, [length]) == length * flops_per_token(five_phase.model, length)


def test_matrices_are_six_per_weight_but_norms(five_phase: Recipe) -> None:
    model = five_phase.model
    norms = (2 * model.num_layers + 1) * model.hidden_size
    assert model.tied_embeddings
    assert matrix_flops_per_token(model) == 6 * (parameters(model) - norms)


@pytest.mark.parametrize("lengths_tokens", [[5, -1], {5: -1}, {-5: 1}])
def test_refuses_negative_lengths(five_phase: Recipe, lengths_tokens: object) -> None:
    with pytest.raises(ValueError, match="cannot be negative|neither can be negative"):
        document_flops(five_phase.model, lengths_tokens)
