"""Typed settings of a gate: the first steps of a phase, taken twice in two ways, and how far the two may part. Part of the schema."""

from __future__ import annotations

from typing import Literal

from recipes.fields import PositiveFloat, PositiveInt, Strict
from recipes.job_options import Optimizer, Parallel, Precision

TOLERANCE_PERCENT = 0.25
"""[published] DeepSeek-V3 (arXiv 2412.19437, section 3.3 and appendix B.1) compares FP8 with bf16 training on 16B and 230B parameters: the
relative error of the loss stays below 0.25%, "well within the acceptable range of training randomness"."""
STEP_TOLERANCE_PERCENT = 2.5
"""[assumed: ten times that. A single step is no mean over a quarter of the run, but both arms see the same samples, so that what is
left is an arm that parts from the other for a while, as after an overflow of a scale.]"""


class EmulatedFp8(Strict):
    """E4M3 and E5M2 casts of a layer's matrix products, on CPU, to try the gate itself; says nothing about FP8 on a GPU."""

    scale_error: PositiveFloat = 1.0
    """Factor on the right scale: above 1 the largest values saturate, far below 1 the small ones vanish. A fault to be found."""


class Arm(Strict):
    """One of the two ways, as what differs from the phase; None: as the phase has it."""

    precision: Precision | None = None
    parallel: Parallel | None = None
    optimizer: Optimizer | None = None
    transformer_impl: Literal["local", "transformer_engine"] | None = None
    """Megatron's own layers or Transformer Engine's; None: Transformer Engine's on GPUs, Megatron's own on CPU."""
    emulated_fp8: EmulatedFp8 | None = None


class Ab(Strict):
    """A gate in front of a phase. Passed, it hands on what it was handed; failed, it stops the chain."""

    title: str
    phase: str
    """The phase whose first steps both arms take: same checkpoint, same samples in the same order, same learning rates."""
    a: Arm = Arm()
    """What is trusted."""
    b: Arm = Arm()
    """What is to be shown equal enough."""
    steps: PositiveInt
    tolerance_percent: PositiveFloat = TOLERANCE_PERCENT
    """Of the mean training loss over the last quarter of the steps, and of the held-out loss behind them (mean over categories): largest
    difference between the arms, relative to a."""
    step_tolerance_percent: PositiveFloat = STEP_TOLERANCE_PERCENT
    """The same for the training loss of every single step."""
