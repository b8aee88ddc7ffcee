"""Held-out losses of a finished checkpoint by Megatron itself, on one rank. Started by training.evaluation.heldout.

python -m training.evaluation.megatron_heldout --checkpoint ITER_FOLDER --data-root ROOT --samples N --gpu cpu --dtype float32 --output FILE

One rank holds the model: a GPU of 80 GB takes the 30B in bf16. The checkpoint may have been written in any layout.
"""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass
from pathlib import Path

from data_prep.files import write_json
from data_prep.manifest import HeldoutManifest, heldout_path
from training import arguments, fast_import, one_rank
from training.stage import free_port

MICRO_BATCH_SAMPLES = 1
"""On a GPU (training.heldout takes 8 on CPU): held-out sequences are short, and a loss without gradients waits for nothing."""


@dataclass(frozen=True)
class _Length:
    """The two fields of a phase that Megatron's arguments of a model depend on."""

    rope_base: float
    seq_length_tokens: int


def compile_arguments(model: object, rope_base: float, length_tokens: int, checkpoint: Path, gpu: str, dtype: str) -> list[str]:
    """Megatron's arguments for a forward pass over `length_tokens` with the weights of `checkpoint` (an iter_* folder)."""
    number = re.fullmatch(r"iter_(\d+)", checkpoint.name)
    out = arguments._model(model, _Length(rope_base, length_tokens))  # type: ignore[arg-type]
    out += arguments._values(
        micro_batch_size=MICRO_BATCH_SAMPLES,
        train_iters=1,
        eval_iters=0,
        lr=arguments.NOMINAL_LR,
        ckpt_format="torch_dist",
        load=checkpoint.parent if number else checkpoint,
    )
    if number:
        out += arguments._values(ckpt_step=int(number[1]))
    # --finetune: weights only. Without the second flag a missing checkpoint means random weights and no error.
    out += arguments._flags("finetune", "exit-on-missing-checkpoint", "no-load-rng", "no-load-optim", "verify-integrity")
    if dtype == "bfloat16":
        out += arguments._flags("bf16")
    if gpu == "cpu":
        return [*out, *arguments._cpu()]
    return [*out, *arguments._values(distributed_backend="nccl", transformer_impl="transformer_engine")]


def measure(checkpoint: Path, root: Path, samples: int, gpu: str, dtype: str) -> dict[str, float]:
    """Mean loss in nats per token of each category of `root`/heldout/manifest.json."""
    one_rank.import_megatron_on(gpu)
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import get_model

    from model.convert import Description
    from training import heldout

    described = Description.find(checkpoint)
    manifest = HeldoutManifest.read(heldout_path(root))
    length = manifest.seq_length_tokens
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1"
    )
    words = compile_arguments(described.model, described.rope_base, length, checkpoint, gpu, dtype)
    args = one_rank.parse_arguments("heldout", words, eod_id=manifest.tokenizer.eod_id, stage_dir=None)
    initialize_megatron()
    provide = one_rank.model_provider(described.model, args, rope_base=described.rope_base, max_sequence_length_tokens=length)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    network = get_model(provide, ModelType.encoder_or_decoder, wrap_with_ddp=False, pg_collection=groups)
    load_checkpoint(network, None, None)
    return heldout.evaluate(network, manifest, root, samples)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.evaluation.megatron_heldout", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--samples", type=int, required=True, help="sequences per category")
    parser.add_argument("--gpu", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(argv)
    losses = measure(options.checkpoint, options.data_root, options.samples, options.gpu, options.dtype)
    write_json(options.output, losses)
    return 0


if __name__ == "__main__":
    fast_import.leave(main())
