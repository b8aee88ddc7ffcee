"""Held-out loss per category of a finished model, once by Megatron from its checkpoint and once by transformers from its export.

The two share the token files and nothing else: other readers, other models, other losses. What they agree on is the model's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import DataError
from data_prep.indexed import Reader
from data_prep.manifest import HeldoutManifest, heldout_path
from training.evaluation.errors import EvaluationError
from training.evaluation.source import Source

TOLERANCE_NATS = {"float32": 1e-4, "bfloat16": 2e-2}
"""How far the two may be apart: as training.loss_gate.GATE_NATS, for the same reasons."""
DEFAULT_SAMPLES = 64
MAX_LOGITS = 1 << 28
"""Logits of one batch, as float32: 1 GiB, for a vocabulary of 100,352 about 2,600 tokens."""


def manifest_for(source: Source, data_root: Path | None) -> tuple[Path, HeldoutManifest]:
    """Data root and held-out manifest; EvaluationError or DataError where they are missing or belong to another tokenizer."""
    root = data_root or (Path(source.recipe.data.root) if source.recipe is not None else None)
    if root is None:
        raise EvaluationError(
            f"heldout: {source.given} lies in no run whose recipe names the data; give --heldout-data with the data root of "
            "`quarry prep`, or leave heldout out of --tasks"
        )
    if data_root is None and not heldout_path(root).is_file():
        raise EvaluationError(
            f"heldout: the run's recipe says data.root is {root}, where no {heldout_path(Path())} is (a relative one counts from where the run "
            "was launched); give --heldout-data, or prepare the data with `quarry prep`"
        )
    manifest = HeldoutManifest.read(heldout_path(root))
    manifest.verify(root)
    if source.tokenizer_sha256 not in (None, manifest.tokenizer.sha256):
        raise DataError(
            f"{heldout_path(root)}: its tokenizer has SHA-256 {manifest.tokenizer.sha256}, the model was trained with "
            f"{source.tokenizer_sha256}; name the data root that belongs to the model"
        )
    vocabulary = source.config.get("vocab_size")
    largest = max(held.max_token_id for held in manifest.categories.values())
    if not isinstance(vocabulary, int) or largest >= vocabulary:
        raise DataError(
            f"{heldout_path(root)}: token {largest} occurs, the vocabulary of {source.hf} has {vocabulary} entries; name the data "
            "root that belongs to the model"
        )
    return root, manifest


def samples_for(source: Source, asked: int | None) -> int:
    if asked is not None:
        return asked
    return source.recipe.data.heldout_batch_samples if source.recipe is not None else DEFAULT_SAMPLES


def sequences(prefix: Path, count: int, length_tokens: int) -> np.ndarray:
    """The first `count` sequences of `length_tokens` + 1 tokens of the documents laid end to end, [n, length + 1] int64, n <= count.

    Neighbours share one token, the label of the one and the first input of the other. DataError if there is not one.
    """
    reader = Reader(prefix)
    stream = np.zeros(0, np.int64)
    for document in range(len(reader)):
        stream = np.append(stream, reader[document].astype(np.int64))
        if len(stream) > count * length_tokens:
            break
    n = min(count, (len(stream) - 1) // length_tokens)
    if n < 1:
        raise DataError(
            f"{prefix}: {len(stream)} tokens are less than one sequence of {length_tokens}; raise data.heldout_percent"
        )
    return np.lib.stride_tricks.sliding_window_view(stream, length_tokens + 1)[::length_tokens][:n].copy()


def from_transformers(
    network: Any,
    root: Path,
    manifest: HeldoutManifest,
    samples: int,
    done: Callable[[int], None] = lambda tokens: None,
) -> dict[str, float]:
    """Mean loss in nats per token of each category by `network`, a transformers model; `done` is told tokens as they are scored."""
    import torch

    length = manifest.seq_length_tokens
    batch = max(1, MAX_LOGITS // (network.config.vocab_size * length))
    losses = {}
    for category, held in manifest.categories.items():
        rows = torch.from_numpy(sequences(root / held.prefix, samples, length))
        total = 0.0
        for part in rows.split(batch):
            ids = part.to(network.device)
            with torch.inference_mode():
                logits = network(input_ids=ids[:, :-1], use_cache=False).logits
                picked = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            total += picked.double().sum().item()
            done(part.shape[0] * length)
        losses[category] = total / (len(rows) * length)
    return losses


def from_megatron(source: Source, root: Path, samples: int, device: str, dtype: str) -> dict[str, float]:
    """The same by Megatron, from the checkpoint, on one rank in a process of its own; EvaluationError with its last words if it fails."""
    if source.checkpoint is None:
        raise EvaluationError(f"{source.given} is a Hugging Face folder: there is no Megatron checkpoint to measure")
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "losses.json"
        command = [sys.executable, "-W", "ignore", "-m", "training.evaluation.megatron_heldout"]
        command += ["--checkpoint", str(source.checkpoint), "--data-root", str(root), "--samples", str(samples)]
        command += ["--gpu", "cpu" if device == "cpu" else "cuda", "--dtype", dtype, "--output", str(result)]
        process = subprocess.run(command, check=False, capture_output=True, text=True)
        if process.returncode != 0 or not result.is_file():
            words = (process.stderr or process.stdout).strip()[-3000:]
            raise EvaluationError(
                f"heldout: Megatron could not measure {source.checkpoint} (exit {process.returncode}):\n{words}"
            )
        return json.loads(result.read_bytes())


def compare(megatron: dict[str, float], transformers: dict[str, float], dtype: str) -> dict[str, Any]:
    """Whether the export is the model that Megatron has: the largest difference over the categories, and the tolerance."""
    if megatron.keys() != transformers.keys():
        raise ValueError(f"categories differ: {sorted(megatron)} and {sorted(transformers)}")
    worst = max(megatron, key=lambda c: abs(megatron[c] - transformers[c]))
    difference = abs(megatron[worst] - transformers[worst])
    tolerance = TOLERANCE_NATS[dtype]
    # NaN compares false: a loss that is no number agrees with nothing.
    return {
        "category": worst,
        "difference_nats": difference,
        "tolerance_nats": tolerance,
        "agrees": bool(difference <= tolerance),
    }
