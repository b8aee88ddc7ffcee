"""The model of step time: what it says of simple cases, and that every saving saves."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.flops import flops_per_token
from recipes.gpus import GPUS, PEAK_BF16_FLOPS
from recipes.job_options import Parallel, Precision
from recipes.memory import rank_memory
from recipes.schema import Model, Recipe
from recipes.throughput import ATTENTION_BACKWARD, CONSTANTS, Job, fp8_share, offload_waits_seconds, step_time

BF16 = Precision(name="bf16", dtype="bf16")
FP8 = Precision(name="fp8", dtype="bf16", fp8="tensorwise", bf16_layers_at_start=1, bf16_layers_at_end=1)


@pytest.fixture(scope="module")
def model(five_phase: Recipe) -> Model:
    return five_phase.model


def job(model: Model, gpu: str = "h100", precision: Precision = BF16, length: int = 4096, batch: int = 512, **layout) -> Job:
    values = {"gpus": 64, "overlap_grad_reduce": True, "overlap_param_gather": True, **layout}
    values.setdefault("sequence_parallel", values.get("tensor", 1) > 1)
    return Job(model, Parallel(name="x", **values), precision, length, batch, GPUS[gpu])


def seconds(*args, **kwargs) -> float:
    return step_time(job(*args, **kwargs)).total


LAYOUTS = st.fixed_dictionaries(
    {
        "tensor": st.sampled_from([1, 2, 4, 8]),
        "context": st.sampled_from([1, 2, 4]),
        "micro_batch_samples": st.sampled_from([1, 2]),
        "stages": st.sampled_from([(1, None), (2, None), (2, 5), (2, 20)]),
    }
)


def split(layout: dict) -> dict:
    pipeline, virtual = layout["stages"]
    return {k: v for k, v in layout.items() if k != "stages"} | {"pipeline": pipeline, "virtual_pipeline": virtual}


def test_speed_and_utilisation_follow_from_the_time(model: Model) -> None:
    time = step_time(job(model, tensor=2, length=8192, batch=256))
    assert time.total == pytest.approx(sum(time.parts().values()))
    assert time.tokens_per_second_per_gpu == pytest.approx(256 * 8192 / time.total / 64)
    assert time.mfu == pytest.approx(time.tokens_per_second_per_gpu * flops_per_token(model, 8192) / 989e12)


def test_attention_alone_is_its_flops_over_its_rate(model: Model) -> None:
    time = step_time(job(model, length=32768, batch=64, context=4))
    # A sample's causal scores: half of 4 x length^2 x width, per layer; forward and 2.5 times as much backward, over all GPUs.
    flops = 2 * 32768**2 * model.num_attention_heads * model.head_dim * model.num_layers * (1 + ATTENTION_BACKWARD) * 64
    assert time.attention == pytest.approx(flops / 64 / (989e12 * CONSTANTS.attention_hopper))


def test_the_bubble_is_what_1f1b_leaves_idle(model: Model) -> None:
    time = step_time(job(model, pipeline=4, batch=16 * 16))
    stage = sum(time.parts()[name] for name in ("matmul", "attention", "elementwise")) / 16
    assert time.pipeline_bubble == pytest.approx(3 * stage)
    assert step_time(job(model, pipeline=4, virtual_pipeline=5, batch=256)).pipeline_bubble == pytest.approx(3 * stage / 5)


def test_more_micro_batches_dilute_bubble_and_optimizer(model: Model) -> None:
    speeds = [step_time(job(model, pipeline=4, batch=16 * n)).tokens_per_second_per_gpu for n in (4, 8, 32)]
    assert speeds == sorted(speeds)


@settings(max_examples=40, deadline=None)
@given(layout=LAYOUTS, fp8=st.booleans(), length=st.sampled_from([4096, 16384, 131072]))
def test_more_recomputation_takes_longer_and_less_memory(five_phase: Recipe, layout: dict, fp8: bool, length: int) -> None:
    precision = FP8 if fp8 else BF16
    kinds = [{}, {"recompute": "selective", "recompute_modules": ["mlp"]}, {"recompute": "full"}]
    jobs = [job(five_phase.model, precision=precision, length=length, **split(layout), **kind) for kind in kinds]
    times = [step_time(j).total for j in jobs]
    assert times == sorted(times)
    assert times[0] < times[1] < times[2]
    memories = [
        rank_memory(j.model, j.parallel, precision, five_phase.optimizer, seq_length_tokens=length).activations_bytes
        for j in jobs
    ]
    assert memories == sorted(memories, reverse=True)


@settings(max_examples=40, deadline=None)
@given(
    layout=LAYOUTS,
    name=st.sampled_from(
        [
            "peak_bf16_flops",
            "peak_fp8_flops",
            "memory_bytes_per_second",
            "nvlink_bytes_per_second",
            "network_bytes_per_second",
            "host_bytes_per_second",
        ]
    ),
)
def test_a_better_gpu_is_never_slower(five_phase: Recipe, layout: dict, name: str) -> None:
    slow = job(five_phase.model, precision=FP8, length=16384, **split(layout))
    fast = replace(slow, gpu=replace(slow.gpu, **{name: 2 * getattr(slow.gpu, name)}))
    assert step_time(fast).total <= step_time(slow).total
    assert step_time(fast).total > step_time(slow).total / 2


@settings(max_examples=30, deadline=None)
@given(layout=LAYOUTS)
def test_overlap_helps_and_chunks_and_offload_cost(five_phase: Recipe, layout: dict) -> None:
    plain = job(five_phase.model, **split(layout))
    time = step_time(plain).total
    bare = plain.parallel.model_copy(update={"overlap_grad_reduce": False, "overlap_param_gather": False})
    assert step_time(replace(plain, parallel=bare)).total >= time
    assert step_time(replace(plain, tensor_overlap=True)).total <= time
    chunked = plain.parallel.model_copy(update={"loss_chunk_tokens": 512})
    assert step_time(replace(plain, parallel=chunked)).total > time
    if plain.parallel.pipeline == 1:
        offload = plain.parallel.model_copy(update={"offload_layers": 20})
        assert step_time(replace(plain, parallel=offload)).total >= time


@settings(max_examples=60, deadline=None)
@given(layers=st.integers(3, 40), part=st.floats(0.01, 0.99), transfer=st.floats(0.01, 20), backward=st.floats(0.5, 3))
def test_waiting_for_the_host(layers: int, part: float, transfer: float, backward: float) -> None:
    """One forward pass of a layer is the unit of time."""
    away = max(1, min(layers - 1, round(part * layers)))
    sent, fetched = offload_waits_seconds(layers, away, transfer, 1.0, backward)
    # All must go behind all layers but the first and the last, one behind those that come between it and the layer that takes its place.
    least = max(0.0, away * transfer - (layers - 2), transfer - (layers - away - 1))
    assert sent >= least - 1e-9
    assert fetched >= max(0.0, away * transfer - (layers - 1) * backward, transfer - (layers - away) * backward) - 1e-9
    assert max(sent, fetched) <= away * transfer + 1e-9  # nothing is hidden
    if 2 * away <= layers:  # what goes first is away before a layer waits that goes itself
        assert sent == pytest.approx(least, abs=1e-9)


def test_recomputing_some_layers_costs_their_part(model: Model) -> None:
    whole = step_time(job(model, recompute="full")).recompute
    block = step_time(job(model, recompute="full", recompute_method="block", recompute_num_layers=10)).recompute
    assert block == pytest.approx(whole / 4)
    assert step_time(job(model)).recompute == 0


def test_fp8_is_faster_and_layers_in_bf16_are_not_in_it(model: Model) -> None:
    bf16, fp8 = step_time(job(model)), step_time(job(model, precision=FP8))
    assert fp8.tokens_per_second_per_gpu > 1.2 * bf16.tokens_per_second_per_gpu
    assert fp8.head == bf16.head
    assert fp8_share(job(model, precision=FP8)) == pytest.approx(38 / 40)
    assert fp8_share(job(model)) == 0


def test_ways_of_context_parallelism(model: Model) -> None:
    def context(kind: str, hierarchy: list[int] | None = None, size: int = 8) -> float:
        return step_time(
            job(model, length=131072, context=size, context_communication=kind, context_hierarchy=hierarchy, batch=64)
        ).context_parallel

    assert context("p2p", size=1) == 0
    # At 128K the ring hides behind attention; a gather does not.
    assert context("p2p") < context("all_gather")
    assert context("a2a+p2p", [8, 1]) == pytest.approx(context("a2a"))
    assert context("a2a+p2p", [2, 4]) > 0


def test_tensor_parallelism_over_the_network_would_be_slow(model: Model) -> None:
    inside = job(model, tensor=8)
    outside = replace(inside, gpus_per_node=4)
    assert step_time(outside).tensor_parallel > 4 * step_time(inside).tensor_parallel
    # A rack of GB200 is one NVLink domain, whatever its nodes are.
    assert replace(job(model, gpu="gb200"), gpus_per_node=4).nvlink_gpus == 72


def test_gpus_are_those_of_the_schema() -> None:
    assert set(GPUS) == {"h100", "h200", "b200", "gb200"} == set(PEAK_BF16_FLOPS)
    for name, gpu in GPUS.items():
        assert gpu.name == name
        assert gpu.peak_fp8_flops == pytest.approx(2 * gpu.peak_bf16_flops, rel=0.01)
        assert gpu.network_bytes_per_second < gpu.nvlink_bytes_per_second < gpu.memory_bytes_per_second
