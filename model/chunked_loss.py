"""Output layer and cross entropy in chunks of tokens, so that the logits of a long sequence never exist whole.

The logits of 512K tokens over 100352 entries are 105 GB in bf16, and cross entropy needs several times that. Here only one chunk's exist
at a time: the forward pass keeps the log of each token's partition sum, the backward pass computes a chunk's logits again and turns them
into their gradient in place. That costs one more product with the output matrix: 2 * hidden * vocabulary FLOPs per token, of 8B about
1.5% of a step at 4K and less at every greater length.

megatron-core 0.19.2 has two fusions of cross entropy (`native`, `te`), which take whole logits, and nothing that joins it with the output
layer. The product and its gradients are Megatron's own here (sequence parallelism, gradient accumulation into main_grad), cross entropy is
written out: its formula keeps the dtype of float64, and it needs the partition sum that Megatron's does not return.

Shape suffixes: S tokens of this context-parallel rank, B samples, T = S * B tokens, C tokens of a chunk, H hidden size, V entries of the
vocabulary on this tensor-parallel rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.utils import VocabUtility
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank, get_pg_size

from model.errors import ModelError


def _logits(hidden_CH: torch.Tensor, weight_VH: torch.Tensor, layer: ColumnParallelLinear) -> torch.Tensor:
    """One chunk's product with the output matrix, [C, V]; communication is left to the caller, who does it once for all chunks."""
    return linear_with_grad_accumulation_and_async_allreduce(
        hidden_CH,
        weight_VH,
        None,
        gradient_accumulation_fusion=layer.gradient_accumulation_fusion,
        allreduce_dgrad=False,
        sequence_parallel=False,
        tp_group=layer.tp_group,
    )


def _scaled(logits_CV: torch.Tensor, scale: float) -> torch.Tensor:
    """The chunk's logits, multiplied, in at least float32; written over where the dtype is that already."""
    wide_CV = logits_CV if logits_CV.dtype == torch.float64 else logits_CV.float()
    return wide_CV.mul_(scale)


def _targets(labels_C: torch.Tensor, entries: int, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """(column of each label in this rank's part of the vocabulary, whether it is there); a label of another rank has column 0."""
    first, last = VocabUtility.vocab_range_from_per_partition_vocab_size(entries, get_pg_rank(group), get_pg_size(group))
    here_C = (labels_C >= first) & (labels_C < last)
    return torch.where(here_C, labels_C - first, 0).unsqueeze(1), here_C


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        labels_T: torch.Tensor,
        layer: ColumnParallelLinear,
        scale: float,
        chunk_tokens: int,
    ) -> torch.Tensor:
        group = layer.tp_group
        wide = torch.float64 if hidden_TH.dtype == torch.float64 else torch.float32
        losses_T = torch.empty(len(hidden_TH), dtype=wide, device=hidden_TH.device)
        log_sums_T = torch.empty_like(losses_T)
        for start in range(0, len(hidden_TH), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits_CV = _scaled(_logits(hidden_TH[part], weight_VH, layer), scale)
            highest_C = logits_CV.amax(-1)
            if get_pg_size(group) > 1:
                dist.all_reduce(highest_C, op=dist.ReduceOp.MAX, group=group)
            columns_C1, here_C = _targets(labels_T[part], logits_CV.size(1), group)
            logits_CV.sub_(highest_C.unsqueeze(1))
            predicted_C = logits_CV.gather(1, columns_C1).squeeze(1).mul_(here_C)
            sums_2C = torch.stack([predicted_C, logits_CV.exp_().sum(-1)])
            if get_pg_size(group) > 1:
                dist.all_reduce(sums_2C, group=group)
            log_sums_C = sums_2C[1].log()
            losses_T[part] = log_sums_C - sums_2C[0]
            log_sums_T[part] = log_sums_C + highest_C
            del logits_CV  # before the next chunk's are made
        ctx.save_for_backward(hidden_TH, weight_VH, labels_T, log_sums_T)
        ctx.layer, ctx.scale, ctx.chunk_tokens = layer, scale, chunk_tokens
        return losses_T

    @staticmethod
    def backward(ctx: Any, gradient_T: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_TH, weight_VH, labels_T, log_sums_T = ctx.saved_tensors
        layer, scale, chunk_tokens = ctx.layer, ctx.scale, ctx.chunk_tokens
        hidden_gradient_TH = torch.empty_like(hidden_TH)
        weight_gradient_VH: torch.Tensor | None = None
        for start in range(0, len(hidden_TH), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            with torch.enable_grad():
                hidden_CH = hidden_TH[part].detach().requires_grad_()
                logits_CV = _logits(hidden_CH, weight_VH, layer)
            slopes_CV = _scaled(logits_CV.detach(), scale)
            columns_C1, here_C = _targets(labels_T[part], slopes_CV.size(1), layer.tp_group)
            slopes_CV.sub_(log_sums_T[part].unsqueeze(1)).exp_()  # the probabilities
            slopes_CV.scatter_add_(1, columns_C1, -here_C.to(slopes_CV.dtype).unsqueeze(1))
            slopes_CV.mul_((gradient_T[part] * scale).unsqueeze(1))
            # Megatron's backward of the product. With gradient accumulation fusion it has added the weight's gradient to main_grad
            # itself and returns a placeholder for it.
            gradients = torch.autograd.grad(logits_CV, (hidden_CH, weight_VH), slopes_CV.to(logits_CV.dtype))
            hidden_gradient_TH[part] = gradients[0]
            if layer.gradient_accumulation_fusion:
                weight_gradient_VH = gradients[1]
            elif weight_gradient_VH is None:
                # In float32, because a sum of many chunks in bf16 would lose what each of them adds.
                weight_gradient_VH = gradients[1] if len(hidden_TH) <= chunk_tokens else _wide(gradients[1])
            else:
                weight_gradient_VH.add_(gradients[1])
            del logits_CV, slopes_CV, gradients
        if weight_gradient_VH is not None:
            weight_gradient_VH = weight_gradient_VH.to(weight_VH.dtype)
        return hidden_gradient_TH, weight_gradient_VH, None, None, None, None


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def chunked_cross_entropy(
    hidden_SBH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_BS: torch.Tensor,
    layer: ColumnParallelLinear,
    *,
    scale: float,
    chunk_tokens: int,
) -> torch.Tensor:
    """Cross entropy in nats of each token, [B, S], float32 (float64 for float64): -log softmax(scale * hidden weight^T)[label].

    hidden_SBH: [S, B, H], or [S / tensor ranks, B, H] where `layer.sequence_parallel`; weight_VH: this rank's rows of the output matrix,
    `layer`'s own or the embedding's; labels_BS: int64, of the whole vocabulary. `layer` says how tensor parallelism communicates and
    whether gradients are accumulated by its kernel. At most `chunk_tokens` x V logits exist at once, in either pass.
    """
    if layer.sequence_parallel:
        hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, tensor_parallel_output_grad=True, group=layer.tp_group)
    elif get_pg_size(layer.tp_group) > 1:
        hidden_SBH = copy_to_tensor_model_parallel_region(hidden_SBH, group=layer.tp_group)
    tokens, samples = hidden_SBH.shape[:2]
    losses_T = _ChunkedCrossEntropy.apply(
        hidden_SBH.reshape(tokens * samples, -1),
        weight_VH,
        labels_BS.transpose(0, 1).reshape(-1),
        layer,
        scale,
        chunk_tokens,
    )
    return losses_T.view(tokens, samples).transpose(0, 1).contiguous()


class ChunkedLossGPTModel(GPTModel):
    """Megatron's model; where labels are given its loss is computed in chunks of `loss_chunk_tokens` tokens."""

    def __init__(self, config: TransformerConfig, *args: Any, loss_chunk_tokens: int, **kwargs: Any) -> None:
        if config.defer_embedding_wgrad_compute:
            raise ModelError(
                "defer_embedding_wgrad_compute keeps the gradients of all logits, which loss_chunk_tokens is there to avoid; "
                "turn one of them off"
            )
        super().__init__(config, *args, **kwargs)
        self.loss_chunk_tokens = loss_chunk_tokens

    def forward(self, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        """As GPTModel.forward: losses [B, S] with labels, logits [B, S, V] without."""
        if labels is not None:
            # Megatron's own hook between the last layer and the output layer.
            kwargs.setdefault("output_processor", self._chunked_loss)
        return super().forward(*args, labels=labels, **kwargs)

    def _chunked_loss(
        self,
        *,
        hidden_states: torch.Tensor,
        output_layer: ColumnParallelLinear,
        output_weight: torch.Tensor | None,
        labels: torch.Tensor,
        **_: Any,
    ) -> torch.Tensor:
        return chunked_cross_entropy(
            hidden_states,
            output_layer.weight if output_weight is None else output_weight,
            labels,
            output_layer,
            scale=self.config.mup_output_mult if self.config.use_mup else 1.0,
            chunk_tokens=self.loss_chunk_tokens,
        )
