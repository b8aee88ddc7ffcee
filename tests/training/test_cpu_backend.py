"""The CPU backend: every CUDA spelling lands on the CPU, forked ranks talk, AdamW is torch's, and heavy imports stay out."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training import cpu_backend, cpu_optimizer, fast_import

cpu_backend.install()


@pytest.mark.parametrize(
    ("given_device", "expected"),
    [
        ("cuda", "cpu"),
        ("cuda:3", "cpu"),
        ("cpu", "cpu"),
        ("meta", "meta"),
        (None, None),
        (torch.bool, torch.bool),
        (torch.device("cuda", 1), torch.device("cpu")),
        (torch.device("meta"), torch.device("meta")),
        (0, torch.device("cpu")),
    ],
)
def test_devices_are_mapped(given_device: object, expected: object) -> None:
    assert cpu_backend.to_cpu(given_device) == expected


def test_every_way_to_a_cuda_tensor_gives_a_cpu_tensor() -> None:
    index = torch.device("cuda", torch.cuda.current_device())
    base = torch.arange(3.0)
    made = [
        torch.zeros(3, device="cuda"),
        torch.tensor([1], device=index),
        torch.empty_like(base, device="cuda:0"),
        torch.rand(2, device=0, pin_memory=True),
        base.new_zeros(2, device="cuda"),
        base.to("cuda"),
        base.to(index),
        base.to(device="cuda", dtype=torch.bfloat16),
        base.to(base),
        base.cuda(),
        base.pin_memory(),
        torch.nn.Linear(2, 2, device="cuda").weight,
        torch.nn.Linear(2, 2).cuda().weight,
        torch.nn.Linear(2, 2).to("cuda").weight,
    ]
    assert [t.device.type for t in made] == ["cpu"] * len(made)
    assert base.to("cuda", torch.float64).dtype == torch.float64
    assert torch.empty(1, device="meta").device.type == "meta"


def test_a_default_device_still_redirects_factories() -> None:
    with torch.device("meta"):
        made = [
            torch.empty(2),
            torch.arange(3),
            torch.rand(2),
            torch.tensor([1.0]),
            torch.full((2,), 1.0),
            torch.nn.Linear(2, 2).weight,
        ]
        on_cuda = torch.zeros(2, device="cuda")
    assert [t.device.type for t in made] == ["meta"] * len(made)
    assert on_cuda.device.type == "cpu"
    assert torch.empty(1).device.type == "cpu"


def test_types_name_cuda_for_the_optimizers_gate_and_still_convert() -> None:
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64


def test_random_state_of_cuda_is_that_of_the_cpu() -> None:
    torch.cuda.manual_seed(7)
    state = torch.cuda.get_rng_state()
    first = torch.rand(4, device="cuda")
    torch.cuda.random.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)
    generator = torch.Generator(device="cuda")
    assert generator.device.type == "cpu"
    assert torch.equal(
        torch.rand(3, generator=generator.manual_seed(1)), torch.rand(3, generator=torch.Generator().manual_seed(1))
    )


def test_load_maps_cuda_to_cpu() -> None:
    stream = io.BytesIO()
    torch.save({"a": torch.ones(2)}, stream)
    stream.seek(0)
    assert torch.load(stream, map_location="cuda:0", weights_only=True)["a"].device.type == "cpu"


def test_streams_events_and_statistics_answer() -> None:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    end.record()
    assert start.elapsed_time(end) >= 0
    assert torch.cuda.memory_stats()["anything"] == 0
    assert torch.cuda.is_available()
    assert torch.compile(abs) is abs
    assert torch.compile(mode="max-autotune")(abs) is abs


def test_install_is_idempotent() -> None:
    before = torch.Tensor.to, torch.zeros, torch.compile
    cpu_backend.install()
    assert (torch.Tensor.to, torch.zeros, torch.compile) == before


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_install_after_megatron_is_refused() -> None:
    done = _python(
        "import sys, types; sys.modules['megatron.core'] = types.ModuleType('x')\n"
        "from training import cpu_backend; cpu_backend.install()"
    )
    assert done.returncode != 0
    assert "call install() before the first import" in done.stderr


FORKED = """
import os, sys
from training import cpu_backend, cpu_optimizer, fast_import
with fast_import.quick_imports():
    cpu_backend.install()
    import megatron.training
cpu_optimizer.install()
fast_import.results_stay_in_process()
import torch
from torch.utils.checkpoint import checkpoint
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1], WORLD_SIZE="4", LOCAL_WORLD_SIZE="4")
children = []
for rank in range(4):
    pid = os.fork()
    if pid == 0:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        torch.distributed.init_process_group("gloo")
        assert torch.cuda.device_count() == 4
        x = torch.full((2,), float(rank), device="cuda", requires_grad=True)
        y = checkpoint(lambda t: (t * t).sum(), x, use_reentrant=True)
        y.backward()
        total = x.grad.detach().clone()
        torch.distributed.all_reduce(total)
        assert total.tolist() == [12.0, 12.0], total     # 2 * (0 + 1 + 2 + 3)
        optimizer = cpu_optimizer.FusedAdam([{"params": [x]}], lr=0.1)
        optimizer.step()
        optimizer.zero_grad()
        heavy = [m for m in ("torch._dynamo", "torch._inductor", "transformers") if m in sys.modules]
        assert not heavy, heavy
        fast_import.leave(rank)
    children.append(pid)
assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 1, 2, 3]
import transformers
assert transformers.__version__
print("all ranks fine")
"""


@pytest.mark.multirank
def test_four_forked_ranks_reduce_recompute_and_step_without_heavy_imports() -> None:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    done = _python(FORKED.replace("sys.argv[1]", repr(str(port))))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all ranks fine" in done.stdout


def _train(optimizer: torch.optim.Optimizer, params: list[torch.Tensor], gradients: list[list[torch.Tensor]]) -> None:
    for step in gradients:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_equals_torchs_bit_for_bit(decoupled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=generator) for s in ((3, 5), (7,), (1,))]
    gradients = [[torch.randn(p.shape, generator=generator) for p in start] for _ in range(6)]
    ours, theirs = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    options = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.1}
    _train(cpu_optimizer.FusedAdam(ours, adam_w_mode=decoupled, **options), ours, gradients)
    _train((torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs, foreach=False, **options), theirs, gradients)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@settings(max_examples=25, deadline=None)
@given(elements=st.integers(2, 70), data=st.data())
def test_an_update_does_not_depend_on_the_sharding(elements: int, data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, elements - 1))
    generator = torch.Generator().manual_seed(elements)
    whole = torch.randn(elements, generator=generator)
    gradients = [torch.randn(elements, generator=generator) for _ in range(3)]
    one = [whole.clone().requires_grad_()]
    two = [whole[:cut].clone().requires_grad_(), whole[cut:].clone().requires_grad_()]
    _train(cpu_optimizer.FusedAdam(one, lr=0.01, weight_decay=0.1), one, [[g] for g in gradients])
    _train(cpu_optimizer.FusedAdam(two, lr=0.01, weight_decay=0.1), two, [[g[:cut], g[cut:]] for g in gradients])
    assert torch.equal(one[0], torch.cat(two))


def test_adam_keeps_fused_adams_state_layout() -> None:
    used, unused = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = cpu_optimizer.FusedAdam([{"params": [used]}, {"params": [unused]}, {"params": []}])
    _train(optimizer, [used], [[torch.ones(2)], [torch.ones(2)]])
    assert optimizer.param_groups[0]["step"] == 2
    assert set(optimizer.state[used]) == {"exp_avg", "exp_avg_sq"}
    assert not optimizer.state[unused]
    assert "step" not in optimizer.param_groups[2]


def test_adam_refuses_what_it_would_ignore() -> None:
    with pytest.raises(ValueError, match="master_weights"):
        cpu_optimizer.FusedAdam([torch.ones(1)], master_weights=True)
    with pytest.raises(ValueError, match="bias_correction"):
        cpu_optimizer.FusedAdam([torch.ones(1)], bias_correction=False)


def test_megatron_takes_the_optimizer() -> None:
    import megatron.core.optimizer as optimizer
    from megatron.core.optimizer import distrib_optimizer

    cpu_optimizer.install()
    assert optimizer.Adam is distrib_optimizer.Adam is cpu_optimizer.FusedAdam
    assert distrib_optimizer.HAVE_APEX_OR_TE
    assert not optimizer.USING_PYTORCH_OPTIMIZER


def test_quick_imports_restores_the_collector() -> None:
    import gc

    with fast_import.quick_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.unfreeze()
