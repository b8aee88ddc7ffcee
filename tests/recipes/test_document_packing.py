"""What samples make of documents, against sums over every place at which a document can begin. Against real packing: tests/training."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.document_packing import DocumentLengths, padding_of_parts, squares_of_parts
from recipes.flops import document_flops, flops_per_token
from recipes.job_options import Parallel, Precision
from recipes.schema import Recipe

BF16 = Precision(name="bf16", dtype="bf16")


def parts(tokens: int, length: int, start: int) -> list[int]:
    """Of a document that begins at place `start` of a sample."""
    made = [min(tokens, length - start)]
    while sum(made) < tokens:
        made.append(min(length, tokens - sum(made)))
    return made


@settings(max_examples=100, deadline=None)
@given(tokens=st.integers(1, 300), length=st.integers(1, 60))
def test_squares_are_the_mean_over_all_places(tokens: int, length: int) -> None:
    total = sum(part * part for start in range(length) for part in parts(tokens, length, start))
    assert squares_of_parts(tokens, length) == pytest.approx(float(Fraction(total, length)), rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(tokens=st.integers(1, 300), pieces=st.integers(1, 30), multiple=st.sampled_from([1, 2, 4, 8]))
def test_padding_is_the_mean_over_all_places(tokens: int, pieces: int, multiple: int) -> None:
    length = pieces * multiple
    total = sum(-part % multiple for start in range(length) for part in parts(tokens, length, start))
    assert padding_of_parts(tokens, length, multiple) == pytest.approx(total / length, abs=1e-9)


def test_padding_of_a_mean_length_is_the_mean_of_its_neighbours() -> None:
    around = [padding_of_parts(n, 4096, 64) for n in range(1000, 1064)]
    assert padding_of_parts(1031.5, 4096, 64) == pytest.approx(sum(around) / 64, rel=5e-3)


def lengths(*documents: int) -> DocumentLengths:
    return DocumentLengths(tuple((float(n), 1 / sum(documents)) for n in documents), len(documents), len(documents))


def test_one_document_without_end_is_a_sample(five_phase: Recipe) -> None:
    layout = Parallel(name="x", gpus=64, tensor=2, context=8, sequence_parallel=True)
    found = lengths(1 << 34).packing(131072, layout, BF16)
    assert found.attended_tokens == pytest.approx(131072, rel=1e-4)
    assert found.padding_share < 1e-4
    assert flops_per_token(five_phase.model, found.attended_tokens) == pytest.approx(
        flops_per_token(five_phase.model, 131072), rel=1e-4
    )


def test_short_documents_cost_what_they_cost_alone(five_phase: Recipe) -> None:
    """In a sample that is far longer than they are."""
    documents = [700, 1500, 40, 3000]
    found = lengths(*documents).packing(1 << 22, Parallel(name="x", gpus=1), BF16)
    alone = document_flops(five_phase.model, documents) / sum(documents)
    assert flops_per_token(five_phase.model, found.attended_tokens) == pytest.approx(alone, rel=1e-4)
    assert found.padding_share == 0  # without context parallelism
