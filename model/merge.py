"""The weighted average of checkpoints, written so that Megatron resumes from it as from any other checkpoint of the curriculum.

Weights are averaged; Adam's moments, step count, RNG states and everything else are those of the last input, the newest model. Where the
optimizer keeps float32 main parameters, these are averaged and the weights are rounded from them, which is what Megatron does after every
step. Sums are float64. One chunk is in memory at a time; neither Megatron nor a process group is started, and the inputs may have been
saved in different layouts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from model.checkpoint import INTEGRITY, METADATA, Checkpoint, Chunk, Writer
from model.errors import ModelError

OPTIMIZER = "optimizer."
# Where Megatron keeps float32 main parameters: the distributed optimizer, fully reshardable; the optimizer that is not distributed.
MAIN_PARAMETERS = ("optimizer.state.param.", "optimizer.state.fp32_param.")
MOMENTS = ("optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.")


def merge(inputs: Mapping[Path, float], output: Path, *, replace: bool = False) -> None:
    """Average the checkpoints `inputs` (iter_* folder -> weight, the newest last) into the checkpoint folder `output`.

    The weights are positive and sum to 1 (within 1e-6; they are normalised). `replace` allows `output` to exist. `output` gets its name only
    when it is complete. Raises ModelError if the inputs hold different tensors, shapes or dtypes, if an optimizer's state was saved in a
    form that is bound to its layout, or if an average is not finite.
    """
    check_weights(inputs)
    total = math.fsum(inputs.values())
    checkpoints = [Checkpoint(path) for path in inputs]
    shares = [weight / total for weight in inputs.values()]
    newest = checkpoints[-1]
    for checkpoint in checkpoints:
        _check_optimizer(checkpoint)
        _check_same(checkpoint, newest)

    def average(key: str, chunk: Chunk, dtype: torch.dtype) -> torch.Tensor:
        total = torch.zeros(chunk.sizes, dtype=torch.float64)
        for checkpoint, share in zip(checkpoints, shares, strict=True):
            total.add_(checkpoint.read(key, chunk.offsets, chunk.sizes), alpha=share)
        if not total.isfinite().all():
            raise ModelError(f"the average of '{key}' is not finite; one of {', '.join(map(str, inputs))} has diverged")
        return total.to(dtype)

    with Writer(output, replace=replace) as writer:
        written: set[tuple[str, Chunk]] = set()
        for key, tensor in newest.tensors.items():
            main = _main_parameter(newest, key)
            for chunk in tensor.chunks:
                if (key, chunk) in written:
                    continue
                if main is None and not _averaged(key):
                    writer.copy_chunk(key, newest, chunk)
                    continue
                value = average(main or key, chunk, newest.tensors[main or key].dtype)
                if main is not None:
                    # The main parameter is usually saved in the same chunks: averaged once, written as both.
                    twin = next(
                        (c for c in newest.tensors[main].chunks if (c.offsets, c.sizes) == (chunk.offsets, chunk.sizes)), None
                    )
                    if twin is not None:
                        writer.add_chunk(main, value, shape=tensor.shape, offsets=chunk.offsets)
                        written.add((main, twin))
                # float64 to the main parameter, the main parameter to the weight: rounded twice, as in training.
                writer.add_chunk(key, value.to(tensor.dtype), shape=tensor.shape, offsets=chunk.offsets)
        for key, place in newest.objects.items():
            writer.add_object(key, newest.read_bytes(place))
        for path in sorted(newest.folder.iterdir()):  # common.pt of an older Megatron
            if path.is_file() and path.suffix != ".distcp" and path.name not in (METADATA, INTEGRITY, "metadata.json"):
                writer.add_file(path.name, path.read_bytes())


def check_weights(inputs: Mapping[Path, float]) -> None:
    """Raise ModelError unless `inputs` is a weighted average."""
    if not inputs:
        raise ModelError("merge has no inputs; name at least one checkpoint")
    wrong = [f"{path}: {weight}" for path, weight in inputs.items() if not (math.isfinite(weight) and weight > 0)]
    if wrong:
        raise ModelError(f"merge weights must be positive: {'; '.join(wrong)}")
    total = math.fsum(inputs.values())
    if abs(total - 1) > 1e-6:
        raise ModelError(f"merge weights sum to {total:.9g}, must be 1; divide each by {total:.9g}")


def _averaged(key: str) -> bool:
    return key.startswith(MAIN_PARAMETERS) or not key.startswith(OPTIMIZER)


def _main_parameter(checkpoint: Checkpoint, key: str) -> str | None:
    """Key of the float32 main parameter behind the weight `key`."""
    return next((prefix + key for prefix in MAIN_PARAMETERS if prefix + key in checkpoint.tensors), None)


def _check_optimizer(checkpoint: Checkpoint) -> None:
    """Refuse optimizer states that cannot be read by parameter: their tensors are flat buffers of one data-parallel layout."""
    known = (*MAIN_PARAMETERS, *MOMENTS)
    bound = [key for key in checkpoint.tensors if key.startswith(OPTIMIZER) and not key.startswith(known)]
    if bound:
        raise ModelError(
            f"{checkpoint.folder}: '{bound[0]}' is bound to the layout that saved it; save with --dist-ckpt-optim-fully-reshardable"
        )


def _check_same(checkpoint: Checkpoint, newest: Checkpoint) -> None:
    """Raise ModelError naming the tensors to be averaged that differ in presence, shape or dtype."""
    ours = {key: (t.shape, t.dtype) for key, t in newest.tensors.items() if _averaged(key)}
    theirs = {key: (t.shape, t.dtype) for key, t in checkpoint.tensors.items() if _averaged(key)}
    problems = [f"'{key}' is only in {newest.folder}" for key in ours if key not in theirs]
    problems += [f"'{key}' is only in {checkpoint.folder}" for key in theirs if key not in ours]
    problems += [
        f"'{key}' is {theirs[key][1]} {theirs[key][0]} in {checkpoint.folder} and {shape_and_dtype[1]} {shape_and_dtype[0]} in {newest.folder}"
        for key, shape_and_dtype in ours.items()
        if key in theirs and theirs[key] != shape_and_dtype
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ModelError(f"only checkpoints of one architecture and precision are merged: {'; '.join(problems[:5])}{more}")
