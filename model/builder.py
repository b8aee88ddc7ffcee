"""The only place that names Megatron's model class: GPTModel is deprecated in 0.19.2, and its successor will be a change in this file."""

from __future__ import annotations

from functools import partial

from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from model.chunked_loss import ChunkedLossGPTModel
from model.config import check, transformer_config
from model.errors import ModelError
from model.spec import block_spec
from recipes.schema import Model


def build(
    config: TransformerConfig,
    model: Model,
    *,
    rope_base: float,
    max_sequence_length: int,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    pg_collection: ProcessGroupCollection | None = None,
    parallel_output: bool = True,
    loss_chunk_tokens: int | None = None,
) -> GPTModel:
    """One pipeline stage (or virtual stage) of `model`, for Megatron's `get_model`, which passes pre_process to pg_collection.

    `max_sequence_length` is in tokens of the whole sequence, before context parallelism. `parallel_output` False gathers the logits
    [B, S, V] over tensor parallelism. `loss_chunk_tokens`: see model/chunked_loss.py; None: all logits at once.
    Raises ModelError if `config` is not `model`'s.
    """
    check(config, model)
    if model.vocab_size % config.tensor_model_parallel_size:
        raise ModelError(
            f"model '{model.name}': vocab_size {model.vocab_size} is not divisible by {config.tensor_model_parallel_size} tensor-parallel "
            "ranks; the rows are not padded, choose a divisor"
        )
    model_class = GPTModel if loss_chunk_tokens is None else partial(ChunkedLossGPTModel, loss_chunk_tokens=loss_chunk_tokens)
    return model_class(
        config,
        block_spec(config, model.residual_multiplier, vp_stage=vp_stage, pg_collection=pg_collection),
        vocab_size=model.vocab_size,
        max_sequence_length=max_sequence_length,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=parallel_output,
        share_embeddings_and_output_weights=model.tied_embeddings,
        position_embedding_type="rope",
        rotary_percent=1.0,
        rotary_base=rope_base,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )


def count_parameters(model: Model) -> int:
    """Parameters of the whole model as Megatron builds it, counted on the meta device: nothing is allocated, no process group needed."""
    import torch

    groups = ProcessGroupCollection()
    groups.tp = groups.pp = groups.cp = groups.embd = groups.dp_cp = None
    config = transformer_config(model, perform_initialization=False, init_model_with_meta_device=True)
    with torch.device("meta"):
        built = build(config, model, rope_base=1e4, max_sequence_length=4096, pg_collection=groups)
    return sum(p.numel() for p in built.parameters())
