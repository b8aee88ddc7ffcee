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
    context_communication: Literal["p2p", "all_gather", "a2a", "a2a+p2p"] = "p2p"
    """How attention sees the other context-parallel ranks' tokens. p2p: keys and values go round a ring, behind the computation;
    all_gather: every rank gets all of them first; a2a: heads are dealt out instead of tokens (Ulysses); a2a+p2p: a2a inside groups of
    neighbouring ranks, a ring between the groups."""
    context_hierarchy: list[PositiveInt] | None = None
    """Ranks of a2a and of the ring, in this order, with a2a+p2p; their product is `context`. None otherwise."""
    sequence_parallel: bool = False
    micro_batch_samples: PositiveInt = 1
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_method: Literal["uniform", "block"] | None = None
    """With `full`. uniform: all layers, in chunks of recompute_num_layers of which only the input is kept; block: only the first
    recompute_num_layers of each pipeline stage (or chunk), each by itself. None: uniform."""
    recompute_num_layers: PositiveInt | None = None
    """With `full`: layers per chunk (uniform) or recomputed layers (block); None: 1."""
    recompute_modules: list[Literal["core_attn", "mlp"]] | None = None
    """With `selective`: the parts of every layer that are computed again. None: core_attn, whose scores fused attention computes again
    in any case; mlp is what saves memory then. (Megatron's `layernorm` does nothing where Transformer Engine has the norms in its
    products.)"""
    offload_layers: PositiveInt | None = None
    """Layers whose activations wait for the backward pass in the host's memory (Transformer Engine); None: none."""
    loss_chunk_tokens: PositiveInt | None = None
    """Tokens of a rank whose logits exist at once: output layer and cross entropy are computed in chunks of this many tokens, the logits
    again in the backward pass (model/chunked_loss.py). None: all tokens of a micro batch at once."""
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
    gradients_dtype: Literal["fp32", "bf16"] = "fp32"
    """What gradients are accumulated and reduced over data-parallel ranks in, 4 or 2 bytes per parameter of a rank. bf16 (with bf16 weights):
    Megatron's --grad-reduce-in-bf16, half the memory and half the bytes sent, with 8 bits of every sum."""


class Optimizer(Strict):
    """AdamW, sharded over data parallelism (Megatron's distributed optimizer)."""

    beta1: PositiveFloat
    beta2: PositiveFloat
    epsilon: PositiveFloat
    weight_decay: NonNegativeFloat
    clip_grad_norm: PositiveFloat
    precision_aware: bool = False
    """Transformer Engine's FusedAdam keeps its state in the dtypes below instead of 4 bytes each (--use-precision-aware-optimizer): bytes per
    parameter that a data-parallel rank owns, a dp-th of the model. Steps are computed in fp32 whatever they are."""
    main_params_dtype: Literal["fp32", "fp16"] = "fp32"
    """The weights that steps are made on, beside bf16 ones (--main-params-dtype): 4 bytes, or 2 with a scale per tensor."""
    exp_avg_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Adam's first moment (--exp-avg-dtype): 4 or 2 bytes; fp16 with a scale per tensor. (Megatron's fp8 is left out: on Hopper Transformer
    Engine keeps it twice, by rows and by columns, so that it takes 2 bytes, too.)"""
    exp_avg_sq_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Adam's second moment (--exp-avg-sq-dtype), as the first. While a step is made each state in fp16 is there in fp32 too, and so is a
    moment in bf16 unless both are."""
