"""Megatron's Granite equals Hugging Face's and itself in every layout, forward and backward."""

from __future__ import annotations

import pytest
import torch

from tests.model.conftest import FAMILIES, LAYOUTS, Family, Workspace

pytestmark = pytest.mark.multirank

TOLERANCE = 1e-5


def logits(ranks: Workspace, name: str) -> torch.Tensor:
    """[B, S, V] of a job, its context-parallel pieces put back into order."""
    fields = LAYOUTS[name.split(".")[1]]
    last = fields.get("pipeline", 1) - 1
    parts = [ranks.load(f"{name}.logits.0{last}{cp}") for cp in range(fields.get("context", 1))]
    if len(parts) == 1:
        return parts[0]
    pieces: dict[int, torch.Tensor] = {}
    for cp, part in enumerate(parts):
        pieces[cp], pieces[2 * len(parts) - 1 - cp] = part.chunk(2, dim=1)
    return torch.cat([pieces[i] for i in sorted(pieces)], dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_hugging_faces(ranks: Workspace, families: dict[str, Family], family: str) -> None:
    ours, theirs = logits(ranks, f"{family}.one"), families[family].logits
    assert theirs.abs().max() > 0.5  # a difference would show
    assert (ours - theirs).abs().max() < TOLERANCE
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "one"])
def test_logits_are_the_same_in_every_layout(ranks: Workspace, layout: str) -> None:
    assert (logits(ranks, f"3b.{layout}") - logits(ranks, "3b.one")).abs().max() < 2e-6


def test_untied_pipeline_gives_the_same_logits(ranks: Workspace, families: dict[str, Family]) -> None:
    assert (logits(ranks, "untied.pp2") - families["untied"].logits).abs().max() < TOLERANCE


def shard(name: str, full: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """What tensor-parallel rank `rank` of `size` holds of a parameter."""
    if "layernorm" in name:
        return full
    if "linear_fc1" in name:  # gate and up are each cut
        return torch.cat([half.chunk(size)[rank] for half in full.chunk(2)])
    return full.chunk(size, dim=1 if "linear_proj" in name or "linear_fc2" in name else 0)[rank]


@pytest.mark.parametrize("layout", ["tp2_sp", "cp2", "cp2_recompute", "tp2_cp2_sp"])
def test_gradients_are_the_same_in_every_layout(ranks: Workspace, layout: str) -> None:
    fields = LAYOUTS[layout]
    reference = ranks.load("3b.one.grads.000.0")
    assert len(reference) == 2 + 6 * 4
    assert all(g.abs().max() > 0 for g in reference.values())
    tensor = fields.get("tensor", 1)
    for tp in range(tensor):
        for cp in range(fields.get("context", 1)):
            found = ranks.load(f"3b.{layout}.grads.{tp}0{cp}.0")
            assert found.keys() == reference.keys()
            for name, gradient in found.items():
                expected = shard(name, reference[name], tp, tensor)
                torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("layout", ["one", "tp2"])
def test_logits_with_a_key_value_cache_are_those_without(ranks: Workspace, layout: str) -> None:
    decoded = ranks.load(f"3b.{layout}.decoded.000")
    assert (decoded - logits(ranks, "3b.one")).abs().max() < 2e-6
