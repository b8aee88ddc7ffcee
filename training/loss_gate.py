"""The gate at a boundary: the held-out losses that a stage begins with are those that were handed off, or it does not begin."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from data_prep.manifest import HeldoutManifest
from recipes.schema import Recipe
from training.handoff import Handoff

# A loss may move this much across a boundary that changes nothing but the layout: 40 times what was measured in fp32 (2e-6 at most
# over all layouts), and what bf16's eight bits of mantissa leave of a mean over thousands of tokens.
GATE_NATS = {"fp32": 1e-4, "bf16": 2e-2}

# A merge may cost this much before training mends it [assumed: averages of neighbouring checkpoints usually gain].
MERGE_GATE_NATS = 0.5


class LossGate(RuntimeError):
    """The model that was loaded is not the model that was handed off."""


def evaluate_through_gate(
    recipe: Recipe, stage: str, model: list[Any], previous: Handoff | None, manifest: HeldoutManifest
) -> dict[str, float]:
    """The held-out losses that a first start of the phase `stage` begins with, nats per token by category; the same on every rank.

    Compared with the hand-off where the held-out sets are the same; LossGate, on every rank alike.
    """
    from training import heldout  # torch

    def evaluate() -> dict[str, float]:
        return heldout.evaluate(model, manifest, Path(recipe.data.root), recipe.data.heldout_batch_samples)

    phase = recipe.phase[stage]
    gated = previous is not None and previous.heldout_digest == manifest.digest
    if gated and previous.rope_base != phase.rope_base:
        # The loss that was handed off was measured with the RoPE base of then.
        with heldout.rope_base(model, recipe.model, previous.rope_base):
            check_gate(previous, evaluate(), phase.precision.dtype)
    losses = evaluate()
    if gated and previous.rope_base == phase.rope_base:
        check_gate(previous, losses, phase.precision.dtype)
    return losses


def check_gate(previous: Handoff, losses: dict[str, float], dtype: str) -> None:
    """Raise LossGate if a held-out loss is not what `previous` allows.

    After a phase: the same within what the precision explains. After a merge, whose loss nobody has measured: at most
    MERGE_GATE_NATS above the worst of its inputs.
    """
    if previous.heldout is not None:
        expected, low, high = previous.heldout, -GATE_NATS[dtype], GATE_NATS[dtype]
        rule = f"the held-out loss is not the one that '{previous.stage}' handed off (tolerance {high:g} nats in {dtype})"
        remedy = "the weights, a multiplier, the RoPE base or the held-out data are not what they were"
    elif previous.heldout_bound is not None:
        expected, low, high = previous.heldout_bound, -math.inf, MERGE_GATE_NATS
        rule = f"the held-out loss after the merge '{previous.stage}' is over {high:g} nats above the worst of its inputs"
        remedy = "the inputs lie too far apart to be averaged: weight the newest more, or drop the merge"
    else:
        return
    moved = {c: losses[c] - before for c, before in expected.items() if not low <= losses[c] - before <= high}
    if moved:
        worst = ", ".join(f"{c} {expected[c]:.4f} -> {losses[c]:.4f}" for c in sorted(moved, key=lambda c: -abs(moved[c])))
        raise LossGate(f"{rule}: {worst}; {remedy}")
