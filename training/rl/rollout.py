"""The rollout engine that samples inside the training processes, with Megatron-Core's inference.

Of Megatron-Core 0.19.2 the static path is used: its key/value cache (StaticInferenceContext) and its forward pass over tensor and pipeline
parallelism (GPTInferenceWrapper), in which attention runs through the model's own core attention. The dynamic engine needs flash
attention and ignores `config.softmax_scale`, which is wrong for every Granite; the static engine's controller draws from a global
generator. So the loop over tokens is here, with training.rl.sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state as mpu
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.utils import InferenceMode
from megatron.core.transformer.utils import set_model_to_sequence_parallel
from megatron.core.utils import get_model_config, unwrap_model

from recipes.posttrain import Rollout
from training.rl.engine import Completion, Request
from training.rl.sampling import sample_tokens, uniforms


class MegatronEngine:
    """Samples from the very parameters that are trained; nothing is copied."""

    def __init__(self, model: list[Any], settings: Rollout, *, seed: int, end_id: int) -> None:
        """`model` is Megatron's list of (wrapped) chunks; one chunk, as the interleaved schedule has no inference."""
        assert len(model) == 1, "checked by training.rl.job"
        self._core = unwrap_model(model[0])
        self._settings = settings
        self._seed = seed
        self._end_id = end_id

    def update_weights(self, step: int) -> None:
        """Nothing to do: the weights are shared."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        size = self._settings.batch_samples
        # Alike lengths together: a batch prefills up to its shortest prompt and decodes from there.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        done: dict[int, Completion] = {}
        config = get_model_config(self._core)
        sequence_parallel, was_training = config.sequence_parallel, self._core.training
        self._core.eval()
        if sequence_parallel:
            # One token cannot be cut over ranks; parameters are the same either way.
            set_model_to_sequence_parallel(self._core, False)
        try:
            with InferenceMode.active(), torch.no_grad():
                for start in range(0, len(order), size):
                    batch = order[start : start + size]
                    done.update(zip(batch, self._decode([requests[i] for i in batch]), strict=True))
        finally:
            if sequence_parallel:
                set_model_to_sequence_parallel(self._core, True)
            self._core.train(was_training)
        return [done[i] for i in range(len(requests))]

    def _decode(self, requests: list[Request]) -> list[Completion]:
        device = torch.cuda.current_device()
        limit = self._settings.max_response_tokens
        lengths = [len(r.prompt_ids) for r in requests]
        longest = max(lengths) + limit
        tokens_BS = torch.zeros(len(requests), longest, dtype=torch.int64)
        for row, request in enumerate(requests):
            tokens_BS[row, : lengths[row]] = torch.tensor(request.prompt_ids)
        numbers_BT = torch.from_numpy(np.stack([uniforms(self._seed, r.position, r.number, limit) for r in requests]))
        tokens_BS, numbers_BT = tokens_BS.to(device), numbers_BT.to(device)
        lengths_B = torch.tensor(lengths, device=device)
        logprobs_BT = torch.zeros(len(requests), limit, dtype=torch.float32, device=device)
        counts_B = torch.zeros_like(lengths_B)
        ended_B = torch.zeros(len(requests), dtype=torch.bool, device=device)
        rows_B = torch.arange(len(requests), device=device)

        wrapper = GPTInferenceWrapper(self._core, StaticInferenceContext(len(requests), longest))
        wrapper.prep_model_for_inference()
        start, end = 0, min(lengths)
        while True:
            logits_BV = self._forward(wrapper, tokens_BS, start, end)
            generating_B = (lengths_B <= end) & (counts_B < limit) & ~ended_B
            numbers_B = numbers_BT[rows_B, counts_B.clamp(max=limit - 1)]
            next_B, logprob_B = self._agree(logits_BV, numbers_B)
            logprobs_BT[rows_B[generating_B], counts_B[generating_B]] = logprob_B[generating_B]
            tokens_BS[generating_B, end] = next_B[generating_B]
            counts_B += generating_B
            ended_B |= generating_B & (next_B == self._end_id)
            if bool((ended_B | (counts_B == limit)).all()):
                break
            start, end = end, end + 1
            if bool((lengths_B <= start).all()):
                wrapper.inference_context.enable_decode_mode()
        counts, ended = counts_B.tolist(), ended_B.tolist()
        tokens, logprobs = tokens_BS.cpu().numpy().astype(np.int32), logprobs_BT.cpu().numpy()
        return [
            Completion(tokens[row, n : n + count].copy(), logprobs[row, :count].copy(), not done)
            for row, (n, count, done) in enumerate(zip(lengths, counts, ended, strict=True))
        ]

    @staticmethod
    def _forward(wrapper: GPTInferenceWrapper, tokens_BS: torch.Tensor, start: int, end: int) -> torch.Tensor | None:
        """Logits [B, V] of position `end` - 1, over the whole vocabulary; None on pipeline stages before the last."""
        piece = tokens_BS[:, start:end]
        positions = torch.arange(start, end, device=piece.device).expand_as(piece)
        # The attention is causal by construction, as in training: no mask.
        given = {"tokens": piece, "position_ids": positions, "attention_mask": None}
        # Not run_one_forward_step: it works in torch's inference mode, whose tensors (RoPE's are cached) training may not touch.
        if mpu.get_pipeline_model_parallel_world_size() > 1:
            logits = wrapper.forward_pass_with_pipeline_parallel(given)
        else:
            logits = wrapper.forward_pass_without_pipeline_parallel(given)
        return None if logits is None else logits[:, -1]

    def _agree(self, logits_BV: torch.Tensor | None, uniforms_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample on the last pipeline stage and tell the other ranks of the replica: all must go on with the same tokens."""
        packed = torch.zeros(2, len(uniforms_B), dtype=torch.float64, device=uniforms_B.device)
        if logits_BV is not None:
            tokens, logprobs = sample_tokens(logits_BV, uniforms_B, self._settings.temperature)
            packed[0], packed[1] = tokens, logprobs  # a token id is exact in float64
        group = mpu.get_model_parallel_group()
        if group.size() > 1:
            torch.distributed.broadcast(packed, last_stage_rank(), group=group)
        return packed[0].long(), packed[1].float()


def last_stage_rank() -> int:
    """Global rank of tensor-parallel rank 0 in the last pipeline stage of this replica."""
    # The ranks of this pipeline (same tensor-parallel rank) in order of stages; ours differ from rank 0's by our tensor-parallel rank.
    last = torch.distributed.get_process_group_ranks(mpu.get_pipeline_model_parallel_group())[-1]
    tensor_ranks = torch.distributed.get_process_group_ranks(mpu.get_tensor_model_parallel_group())
    return last - (tensor_ranks[mpu.get_tensor_model_parallel_rank()] - tensor_ranks[0])
