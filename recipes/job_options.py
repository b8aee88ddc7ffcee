"""What every kind of training job has: its layout over ranks, its precision and its optimizer. Part of the schema, see recipes/schema.py."""

from __future__ import annotations

from typing import Literal

from recipes.fields import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Strict


class Parallel(Strict):
    """Layout of one job over its GPUs (ranks)."""

    name: str
    gpus: PositiveInt
    """World size in ranks; data parallelism is gpus / (tensor * pipeline * context)."""
    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    virtual_pipeline: PositiveInt | None = None
    """Model chunks per pipeline rank (interleaved schedule); None: no interleaving."""
    context: PositiveInt = 1
    sequence_parallel: bool = False
    micro_batch_samples: PositiveInt = 1
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_num_layers: PositiveInt | None = None
    """Layers per recomputed chunk with `full` (Megatron's uniform method); None: 1."""
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False

    @property
    def model_parallel(self) -> int:
        return self.tensor * self.pipeline * self.context

    @property
    def data(self) -> int:
        """Data-parallel ranks; only meaningful on a layout that the linter has passed."""
        return self.gpus // self.model_parallel


class Precision(Strict):
    name: str
    dtype: Literal["fp32", "bf16"]
    fp8: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] | None = None
    """Transformer Engine's FP8 recipe; None: no FP8."""
    fp8_format: Literal["hybrid", "e4m3"] | None = None
    """hybrid: E4M3 forward, E5M2 for gradients."""
    fp8_amax_history_steps: PositiveInt | None = None
    """Length of the amax history (delayed scaling only)."""
    fp8_param_gather: bool = False
    """Keep parameters in FP8 for the distributed optimizer's all-gather."""
    bf16_layers_at_start: NonNegativeInt = 0
    bf16_layers_at_end: NonNegativeInt = 0


class Optimizer(Strict):
    """AdamW, sharded over data parallelism (Megatron's distributed optimizer)."""

    beta1: PositiveFloat
    beta2: PositiveFloat
    epsilon: PositiveFloat
    weight_decay: NonNegativeFloat
    clip_grad_norm: PositiveFloat
