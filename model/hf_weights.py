"""Which tensor of Megatron is which of Hugging Face: names, shapes, and the two places where one splits into several.

- Megatron's QKV matrix holds, per key/value group, the rows of its query heads, then its key's, then its value's.
- Megatron's first MLP matrix (SwiGLU) is the gate's rows, then the up projection's, also in a checkpoint that tensor-parallel ranks wrote.
- Layers lie stacked in one tensor [layers, ...] (the usual, homogeneous checkpoint) or one by one under `decoder.layers.<i>.`.
- The norms lie under Transformer Engine's names or under the local spec's own, depending on what saved them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from model.checkpoint import Checkpoint
from model.errors import ModelError
from recipes.schema import Model

EMBEDDING = "embedding.word_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
OUTPUT = "output_layer.weight"
LAYERS = "decoder.layers."
QKV = "self_attention.linear_qkv.weight"
PROJ = "self_attention.linear_proj.weight"
FC1 = "mlp.linear_fc1.weight"
FC2 = "mlp.linear_fc2.weight"
ATTENTION_NORM = "self_attention.linear_qkv.layer_norm_weight"
MLP_NORM = "mlp.linear_fc1.layer_norm_weight"
# Where a spec saves the norms under names of their own.
_OTHER_NAME = {ATTENTION_NORM: "input_layernorm.weight", MLP_NORM: "pre_mlp_layernorm.weight"}
# Everything that a Megatron checkpoint calls model weights starts with one of these.
_MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")


def layer_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Megatron's name of each tensor of a layer -> shape."""
    hidden, ffn, attention = model.hidden_size, model.ffn_hidden_size, model.num_attention_heads * model.head_dim
    return {
        ATTENTION_NORM: (hidden,),
        QKV: (attention + 2 * model.num_query_groups * model.head_dim, hidden),
        PROJ: (hidden, attention),
        MLP_NORM: (hidden,),
        FC1: (2 * ffn, hidden),
        FC2: (hidden, ffn),
    }


def whole_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Megatron's name of each tensor outside of the layers -> shape."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (model.vocab_size, model.hidden_size), FINAL_NORM: (model.hidden_size,)}
    if not model.tied_embeddings:
        shapes[OUTPUT] = (model.vocab_size, model.hidden_size)
    return shapes


def hf_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Hugging Face's name of every tensor, in the order in which they are written -> shape."""
    hidden, ffn, head = model.hidden_size, model.ffn_hidden_size, model.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model.vocab_size, hidden)}
    for i in range(model.num_layers):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm.weight": (hidden,),
            layer + "self_attn.q_proj.weight": (model.num_attention_heads * head, hidden),
            layer + "self_attn.k_proj.weight": (model.num_query_groups * head, hidden),
            layer + "self_attn.v_proj.weight": (model.num_query_groups * head, hidden),
            layer + "self_attn.o_proj.weight": (hidden, model.num_attention_heads * head),
            layer + "post_attention_layernorm.weight": (hidden,),
            layer + "mlp.gate_proj.weight": (ffn, hidden),
            layer + "mlp.up_proj.weight": (ffn, hidden),
            layer + "mlp.down_proj.weight": (hidden, ffn),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not model.tied_embeddings:
        shapes["lm_head.weight"] = (model.vocab_size, hidden)
    return shapes


def split_qkv(qkv: torch.Tensor, model: Model) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[(heads + 2 * groups) * head_dim, hidden] in Megatron's order -> q [heads * head_dim, hidden], k and v [groups * head_dim, hidden]."""
    per_group = model.num_attention_heads // model.num_query_groups
    heads = qkv.view(model.num_query_groups, per_group + 2, model.head_dim, -1)
    q, k, v = heads.split([per_group, 1, 1], dim=1)
    return tuple(t.reshape(-1, qkv.size(-1)) for t in (q, k, v))


def join_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, model: Model) -> torch.Tensor:
    """Inverse of `split_qkv`."""
    parts = [t.reshape(model.num_query_groups, -1, model.head_dim, q.size(-1)) for t in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(-1, q.size(-1))


def _find(checkpoint: Checkpoint, name: str, layer: int) -> tuple[str, bool] | None:
    """Key of tensor `name` of `layer`, and whether it is the stacked one; None if neither it nor its other name is there."""
    for candidate in (name, _OTHER_NAME.get(name, name)):
        for key, stacked in ((LAYERS + candidate, True), (f"{LAYERS}{layer}.{candidate}", False)):
            if key in checkpoint.tensors:
                return key, stacked
    return None


def check_checkpoint(checkpoint: Checkpoint, model: Model) -> None:
    """Raise ModelError naming every tensor of `model` that `checkpoint` lacks, has in another shape, or has beyond the model."""
    problems: list[str] = []
    known: set[str] = set()

    def expect(key: str, shape: tuple[int, ...]) -> None:
        known.add(key)
        found = checkpoint.tensors.get(key)
        if found is None:
            problems.append(f"'{key}' is missing")
        elif found.shape != shape:
            hint = "; a vocabulary that was padded is not converted" if key in (EMBEDDING, OUTPUT) else ""
            problems.append(f"'{key}' has shape {found.shape}, model '{model.name}' has {shape}{hint}")

    for key, shape in whole_shapes(model).items():
        expect(key, shape)
    for name, shape in layer_shapes(model).items():
        for layer in range(model.num_layers):
            key, stacked = _find(checkpoint, name, layer) or (LAYERS + name, True)
            if key not in known:
                expect(key, (model.num_layers, *shape) if stacked else shape)
    extra = [k for k in checkpoint.tensors if k.startswith(_MODEL_PREFIXES) and k not in known and "_extra_state" not in k]
    problems += [f"'{k}' has no place in a Granite" for k in sorted(extra)]
    if problems:
        raise ModelError(f"{checkpoint.folder}: {'; '.join(problems[:20])}{' ...' if len(problems) > 20 else ''}")


def read_hf_tensors(checkpoint: Checkpoint, model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor under its Hugging Face name, in the order of `hf_shapes`, read when it is asked for."""

    def of_layer(name: str, layer: int) -> torch.Tensor:
        found = _find(checkpoint, name, layer)
        assert found is not None, name  # check_checkpoint has seen it
        key, stacked = found
        if not stacked:
            return checkpoint.read(key)
        shape = checkpoint.tensors[key].shape[1:]
        return checkpoint.read(key, (layer, *(0 for _ in shape)), (1, *shape))[0]

    yield "model.embed_tokens.weight", checkpoint.read(EMBEDDING)
    for i in range(model.num_layers):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", of_layer(ATTENTION_NORM, i)
        q, k, v = split_qkv(of_layer(QKV, i), model)
        yield layer + "self_attn.q_proj.weight", q
        yield layer + "self_attn.k_proj.weight", k
        yield layer + "self_attn.v_proj.weight", v
        del q, k, v
        yield layer + "self_attn.o_proj.weight", of_layer(PROJ, i)
        yield layer + "post_attention_layernorm.weight", of_layer(MLP_NORM, i)
        gate, up = of_layer(FC1, i).chunk(2)
        yield layer + "mlp.gate_proj.weight", gate.clone()
        yield layer + "mlp.up_proj.weight", up.clone()
        del gate, up
        yield layer + "mlp.down_proj.weight", of_layer(FC2, i)
    yield "model.norm.weight", checkpoint.read(FINAL_NORM)
    if not model.tied_embeddings:
        yield "lm_head.weight", checkpoint.read(OUTPUT)
