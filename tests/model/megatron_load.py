"""Loads a checkpoint with Megatron's own `load_checkpoint` as a job would, and writes the logits.

python -m tests.model.megatron_load CHECKPOINTS_FOLDER IDS.pt LOGITS.pt
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from training import cpu_backend, fast_import

with fast_import.quick_imports():
    cpu_backend.install()
    import torch
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import core_transformer_config_from_args
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import get_model

    from model import builder
    from model.convert import Description


def main(checkpoints: Path, ids_path: Path, output: Path) -> None:
    described = Description.find(checkpoints)
    model = described.model
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    sys.argv = ["job", *f"""
        --num-layers {model.num_layers} --hidden-size {model.hidden_size} --ffn-hidden-size {model.ffn_hidden_size}
        --num-attention-heads {model.num_attention_heads} --group-query-attention --num-query-groups {model.num_query_groups}
        --kv-channels {model.head_dim} --seq-length 64 --max-position-embeddings 64 --normalization RMSNorm
        --norm-epsilon {model.norm_epsilon} --swiglu --disable-bias-linear --position-embedding-type rope --rotary-base 10000
        --init-method-std {model.init_std} --hidden-dropout 0 --attention-dropout 0 --use-mup --mup-base-hidden-size {model.hidden_size}
        --mup-embedding-mult {model.embedding_multiplier} --mup-output-mult {1 / model.logits_scaling!r}
        --tokenizer-type NullTokenizer --vocab-size {model.vocab_size} --make-vocab-size-divisible-by 1
        --micro-batch-size 2 --train-iters 1 --eval-iters 0 --lr 1e-3 --distributed-backend gloo --use-cpu-initialization
        --transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion
        --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion --ckpt-format torch_dist --verify-integrity
        --dist-ckpt-strictness raise_unexpected
        --load {checkpoints} --finetune --exit-on-missing-checkpoint --no-load-rng""".split()]  # fmt: skip

    def more(parser):
        parser.add_argument("--softmax-scale", type=float, default=model.attention_multiplier)
        return parser

    args = parse_and_validate_args(more)
    args.padded_vocab_size = model.vocab_size
    initialize_megatron()

    def provide(pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None):
        return builder.build(
            core_transformer_config_from_args(args), model, rope_base=described.rope_base, max_sequence_length=64,
            pre_process=pre_process, post_process=post_process, vp_stage=vp_stage, pg_collection=pg_collection)  # fmt: skip

    networks = get_model(
        provide,
        ModelType.encoder_or_decoder,
        wrap_with_ddp=False,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    step, _ = load_checkpoint(networks, None, None)
    assert step == 0, step
    ids = torch.load(ids_path, weights_only=True)
    with torch.no_grad():
        torch.save(networks[0].eval()(ids, torch.arange(ids.size(1)).expand(ids.size(0), -1), None), output)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
    fast_import.leave(0)
