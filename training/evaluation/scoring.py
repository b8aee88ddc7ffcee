"""Log-probabilities and greedy tokens behind a long prompt, by a transformers model, with the prompt computed once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

PREFILL_TOKENS = 8192
"""Of a prompt at once: bounds activations, not the key/value cache."""


def load(folder: Path, device: str, dtype: str) -> Any:
    """The causal language model in `folder`, in evaluation mode. Safetensors only, and no code from the folder."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    network = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), trust_remote_code=False, use_safetensors=True, local_files_only=True
    )
    return network.to(device).eval()


def choose(device: str, saved_dtype: str | None) -> tuple[str, str]:
    """(device, dtype) of an evaluation: on a GPU what was saved, on a CPU float32, which it is fastest and most exact in."""
    found = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    return found, ("bfloat16" if found == "cuda" and saved_dtype == "bfloat16" else "float32")


@torch.inference_mode()
def score(network: Any, prompt: np.ndarray, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum of log-probabilities of each candidate behind `prompt`, float64 [choices], and the greedy continuation, int64 [n].

    prompt: int64 [s], s >= 1; candidates: int64 [choices, n]. The cache holds s + n tokens.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=network.config)
    ids = torch.from_numpy(prompt)[None].to(network.device)
    for part in ids.split(PREFILL_TOKENS, dim=1):
        logits = network(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    last = logits[0, -1].float().log_softmax(-1)
    sums = []
    # One after the other: a batch would need a copy of the cache for each, at 128K tokens 20 GB for the 8B.
    for candidate in torch.from_numpy(candidates).to(network.device):
        total = last[candidate[0]].double()
        if len(candidate) > 1:
            rest = (
                network(input_ids=candidate[None, :-1], past_key_values=cache, use_cache=True).logits[0].float().log_softmax(-1)
            )
            total = total + rest.gather(1, candidate[1:, None]).double().sum()
            cache.crop(1 - len(candidate))  # negative: how many tokens to take away
        sums.append(total.item())
    greedy = [last.argmax()]
    while len(greedy) < candidates.shape[1]:
        step = network(input_ids=greedy[-1].view(1, 1), past_key_values=cache, use_cache=True)
        greedy.append(step.logits[0, -1].argmax())
    return np.asarray(sums), torch.stack(greedy).cpu().numpy()
