"""Documents apart over Transformer Engine: losses in a packed sequence are those of each document alone, and the stage command trains so.

Unproven on hardware so far: written against the sources of megatron-core 0.19.2 and Transformer Engine 2.17. Context parallelism needs
more than one GPU and is not tried here.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.gpu import test_spec
from tests.gpu.stages import WIDER, rows, run_stage
from tests.training.factory import make_data, make_recipe

make = test_spec.make
LENGTHS = (37, 1, 100, 5, 114)
"""Two samples of this, their last labels included."""
BF16_NATS = 2e-2
"""Of a mean over a document, as the gate at a hand-off has it."""


def packed_losses(net, text, restart):
    """[b, s] nats of every token of `text` [b, s + 1], 0 where there is no loss."""
    from training import documents

    positions, mask = (torch.from_numpy(a) for a in documents.positions_and_loss_mask(np.array(LENGTHS)))
    rows_ = len(text)
    sample = {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": mask.repeat(rows_, 1)}
    sample[documents.POSITIONS_KEY] = positions.repeat(rows_, 1)
    args = SimpleNamespace(
        context_parallel_size=1, tensor_model_parallel_size=1, sequence_parallel=False, fp8=None, seq_length=text.size(1) - 1
    )
    whole, bounds = documents.pack(sample, 1, documents.grain_tokens(args))
    batch, packed = documents.on_this_rank(whole, bounds, restart_positions=restart)
    losses = net(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=packed)
    (losses * batch["loss_mask"]).sum().backward()
    return (losses * batch["loss_mask"]).detach().float().view(rows_, -1).cpu()


@pytest.mark.parametrize("restart", [True, False])
def test_losses_are_those_of_each_document_alone(make, restart):
    text = torch.randint(0, test_spec.SHAPE["vocab_size"], (2, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    plain = make(transformer_engine=False, dtype=torch.float32)
    # Compiled so, too: the fused rotary embedding begins anew with every packed sequence (training/arguments.py).
    net = make(transformer_engine=True, **({} if restart else {"apply_rope_fusion": False}))
    found = packed_losses(net, text, restart)
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())
    for row in range(2):
        start = 0
        for length in LENGTHS:
            ids = text[row, start : start + length].cuda()[None]
            if length > 1:
                places = torch.arange(length - 1).cuda()[None]
                with torch.no_grad():
                    alone = plain(ids[:, :-1], places, None, labels=ids[:, 1:]).float().cpu()[0]
                own = found[row, start : start + length - 1]
                assert own.mean().item() == pytest.approx(alone.mean().item(), abs=BF16_NATS)
            start += length
    others = text.clone()
    others[:, 38:138] = (others[:, 38:138] + 1) % test_spec.SHAPE["vocab_size"]
    changed = packed_losses(net, others, restart)
    kept = torch.ones(text.size(1) - 1, dtype=torch.bool)
    kept[38:138] = False
    assert torch.equal(changed[:, kept], found[:, kept])
    assert not torch.equal(changed, found)


def test_a_phase_trains_with_documents_apart(tmp_path):
    make_data(tmp_path / "data")
    run = tmp_path / "run"
    run.mkdir()
    recipe = make_recipe(tmp_path / "data", {"gpus": 1}, "single", documents_apart=True, restart_positions=True)
    values = recipe.model_dump(mode="json")
    values["cluster"]["gpu"] = "h100"
    values["model"].update(WIDER, attention_multiplier=1 / 64)
    for phase in values["phase"].values():
        phase["precision"] = {"name": "bf16", "dtype": "bf16"}
    type(recipe).model_validate(values).write(run / "recipe.json")
    for stage in ("first", "second"):
        code, output = run_stage(run, stage)
        assert code == 0, output
    found = rows(run, "second")
    assert found[-1]["loss"] < found[0]["loss"]
