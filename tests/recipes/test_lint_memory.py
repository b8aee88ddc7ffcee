"""A rank must fit its GPU: what is refused, in which words, and that the offered change fits."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from recipes.gpus import GPUS
from recipes.lint import lint
from recipes.lint_memory import memory_rules, parts_text, phase_memory
from recipes.schema import Recipe
from tests.recipes.conftest import Rule

F = "phase.foundation.parallel"

RULES: dict[str, Rule] = {
    "too large a micro batch": (
        "five_phase",
        {f"{F}.tensor": 1, f"{F}.sequence_parallel": False},
        F,
        "granite_4_1_8b/4k",
        "the H100 has 80.0 GB: activations 42.8 GB, gradients 33.5 GB, weights 16.8 GB",
        f"{F}.micro_batch_samples=1 needs",
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_refuses(refused: Callable[[Rule], None], name: str) -> None:
    refused(RULES[name])


def test_what_is_offered_fits(five_phase: Recipe, changed: Callable[..., Recipe]) -> None:
    bad = changed(five_phase, **{f"{F}.micro_batch_samples": 8, "stages": ["foundation"]})
    [problem] = memory_rules(bad)
    offers = dict(part.split("=") for part in problem.remedy.split(" needs ")[0].split())
    mended = changed(bad, **{key: int(value) for key, value in offers.items()})
    assert list(memory_rules(mended)) == []
    phase = mended.phase["foundation"]
    assert phase_memory(mended, phase, phase.parallel).total_bytes <= GPUS["h100"].memory_bytes


def test_says_so_where_no_single_change_helps(five_phase: Recipe, changed: Callable[..., Recipe]) -> None:
    [problem] = memory_rules(changed(five_phase, **{"stages": ["foundation"], "phase.foundation.seq_length_tokens": 2**22}))
    assert "quarry plan --search" in problem.remedy


def test_what_is_there_at_the_fullest_moment_is_named(five_phase: Recipe) -> None:
    phase = five_phase.phase["foundation"]
    alone = phase.parallel.model_copy(update={"gpus": 1, "tensor": 1, "sequence_parallel": False, "recompute": "full"})
    assert "activations" in parts_text(phase_memory(five_phase, phase, alone))
    precision = phase.precision.model_copy(update={"gradients_dtype": "bf16"})
    text = parts_text(phase_memory(five_phase, phase.model_copy(update={"precision": precision}), alone))
    assert "fp32 copies in the optimizer's step 33.5 GB" in text
    assert "activations" not in text


def test_a_larger_gpu_takes_it_and_cpus_are_not_planned(five_phase: Recipe, changed: Callable[..., Recipe]) -> None:
    values = {f"{F}.tensor": 1, f"{F}.sequence_parallel": False}
    assert [p.key for p in lint(changed(five_phase, **values))] == [F]
    assert lint(changed(five_phase, **values, **{"cluster.gpu": "h200"})) == []
