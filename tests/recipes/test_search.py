"""The search finds what NVIDIA found, refuses only what breaks a rule, and ranks the same way every time."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.planner import read_rows
from recipes.estimates import job_memory_bytes
from recipes.lint_layout import phase_layout_rules
from recipes.schema import Recipe, RecipeError
from recipes.search import SearchResult, search, with_stage
from recipes.search_text import as_data, describe, explain, print_search
from recipes.throughput import step_time

OURS = {"4k": "foundation", "32k": "long_32k", "128k": "long_128k", "512k": "long_512k"}


@pytest.fixture(scope="module")
def found(five_phase: Recipe) -> dict[str, SearchResult]:
    return {length: search(with_stage(five_phase, stage, gpus=512), stage) for length, stage in OURS.items()}


def published(five_phase: Recipe, row_id: str, gradients: str = "bf16") -> tuple[Recipe, tuple[int, int, int]]:
    """A recipe whose phase `foundation` is a published run, and the run's (tensor, pipeline, context)."""
    job = next(row.job for row in read_rows() if row.id == row_id)
    layout = job.parallel
    values = {
        "seq_length_tokens": job.seq_length_tokens,
        "global_batch_samples": job.global_batch_samples,
        "precision": job.precision.model_copy(update={"gradients_dtype": gradients}),
        "parallel": layout,
    }
    cluster = five_phase.cluster.model_copy(update={"gpu": job.gpu.name, "gpus_per_node": min(8, layout.gpus)})
    phase = five_phase.phase["foundation"].model_copy(update=values)
    changed = {"model": job.model, "cluster": cluster, "phase": {**five_phase.phase, "foundation": phase}}
    return five_phase.model_copy(update=changed), (layout.tensor, layout.pipeline, layout.context)


@pytest.mark.parametrize(
    "row",
    [
        "8b-bf16-128-2504",
        "8b-fp8-8-2504",
        *(f"8b-fp8-{length}k-b200" for length in (8, 16, 32, 64, 128, 256, 512, 1024)),
        *(f"7b-fp8-{length}k-2403" for length in (4, 8, 256, 512, 1024)),
    ],
)
def test_published_layouts_are_among_the_best_five(five_phase: Recipe, row: str) -> None:
    """Llama 3 8B at 8K on H100 (DGXC 25.04) and at 8K to 1024K on B200, Llama 2 7B on H100 (NeMo's long-sequence tables), with NVIDIA's
    settings: tensor parallelism's communication overlapped, rings, no loss in chunks, gradients in bf16."""
    recipe, shape = published(five_phase, row)
    result = search(recipe, "foundation", tensor_overlap=True, chunked_loss=False, ring_only=True)
    assert shape in [candidate.shape for candidate in result.ranked[:5]], [describe(c) for c in result.ranked[:8]]


def test_gradients_in_bf16_are_what_nvidias_fp8_layout_fits_by(five_phase: Recipe) -> None:
    """CP2 and nothing else at 8K: fp32 gradients leave no room for its activations, so that layers would be computed again."""
    places, found = {}, {}
    for gradients in ("fp32", "bf16"):
        recipe, shape = published(five_phase, "8b-fp8-128-2504", gradients)
        ranked = search(recipe, "foundation", tensor_overlap=True, chunked_loss=False, ring_only=True).ranked
        places[gradients] = [candidate.shape for candidate in ranked].index(shape) + 1
        found[gradients] = ranked[places[gradients] - 1]
    assert places["bf16"] <= 5 < places["fp32"]
    assert found["bf16"].saving == "no recompute"
    assert "again" in found["fp32"].saving
    assert found["bf16"].speed > 1.1 * found["fp32"].speed
    # As few layers as are enough, and no more.
    layout = found["fp32"].layout
    fewer = layout.model_copy(update={"recompute_num_layers": layout.recompute_num_layers - 1})
    fp32, _ = published(five_phase, "8b-fp8-128-2504", "fp32")
    assert layout.recompute_method == "block"
    assert job_memory_bytes(fp32, replace(found["fp32"].job, parallel=fewer)) > 80e9 >= found["fp32"].memory_bytes


@pytest.mark.parametrize("length", OURS)
def test_the_recipes_layouts_are_close_to_the_best(five_phase: Recipe, found: dict[str, SearchResult], length: str) -> None:
    result, layout = found[length], five_phase.phase[OURS[length]].parallel
    speeds = {candidate.shape: candidate.speed for candidate in result.ranked}
    assert speeds[(layout.tensor, layout.pipeline, layout.context)] > 0.95 * result.ranked[0].speed


def test_the_ranking_is_that_of_speed_and_the_same_every_time(five_phase: Recipe, found: dict[str, SearchResult]) -> None:
    result = found["512k"]
    speeds = [candidate.speed for candidate in result.ranked]
    assert speeds == sorted(speeds, reverse=True)
    shapes = [candidate.shape for candidate in result.ranked]
    assert len(set(shapes)) == len(shapes)
    assert search(with_stage(five_phase, "long_512k", gpus=512), "long_512k") == result


def test_what_is_ranked_is_valid_and_fits(five_phase: Recipe, found: dict[str, SearchResult]) -> None:
    for length, stage in OURS.items():
        result = found[length]
        for candidate in result.ranked[:: max(1, len(result.ranked) // 8)]:
            phase = five_phase.phase[stage].model_copy(update={"parallel": candidate.layout})
            assert list(phase_layout_rules(five_phase, stage, phase)) == []
            assert candidate.layout.gpus == 512
            assert job_memory_bytes(five_phase, candidate.job) == candidate.memory_bytes <= 80e9


def test_what_is_refused_breaks_the_rule_that_it_names(five_phase: Recipe, found: dict[str, SearchResult]) -> None:
    families = {each.family: each for each in found["128k"].rejected}
    assert "crosses the node of 8 GPUs" in families["TP 16"].reason
    assert 512 % 5
    assert families["PP 5"].reason == "does not divide 512 GPUs"
    assert 40 % 16
    assert "40 layers do not divide" in families["PP 16"].reason
    assert "32 samples" in families["more ranks than samples"].reason
    # 32 samples, DP 16 and one sample per micro batch are 2 micro batches; four interleaved stages need a multiple of 4.
    assert "no multiple of 4" in families["interleaved PP 4"].reason
    best = found["128k"].ranked[0].layout
    for values in ({"tensor": 1, "context": 8, "pipeline": 5}, {"pipeline": 16, "tensor": 1, "context": 1}):
        phase = five_phase.phase["long_128k"].model_copy(update={"parallel": best.model_copy(update=values)})
        assert list(phase_layout_rules(five_phase, "long_128k", phase))


def test_what_is_too_large_needs_more_than_there_is(found: dict[str, SearchResult]) -> None:
    for result in found.values():
        assert result.fitting >= len(result.ranked) > 10
        if result.faster is not None:
            assert result.faster.memory_bytes > 80e9
            assert result.faster.speed > result.ranked[0].speed
        for each in result.too_large:
            assert float(each.reason.split(" GB")[0]) >= 80
    assert any(each.family.startswith("no recompute at TP 1 PP 1") for each in found["128k"].too_large)


def test_the_winner_is_explained_in_three_lines(found: dict[str, SearchResult]) -> None:
    for result in found.values():
        first, second, third = explain(result)
        assert first.startswith(f"time of {describe(result.ranked[0])}: ")
        assert describe(result.ranked[1]) in second
        assert "would be" in third or "nothing faster" in third


def test_ways_of_context_parallelism_are_tried_and_the_fastest_taken(found: dict[str, SearchResult]) -> None:
    exchanged = next(c for c in found["4k"].ranked if c.shape == (1, 1, 8))
    assert exchanged.layout.context_communication == "a2a"
    ring = exchanged.layout.model_copy(update={"context_communication": "p2p"})
    assert step_time(replace(exchanged.job, parallel=ring)).total > exchanged.time.total
    assert "CP8 by a2a DP64" in describe(exchanged)
    # Documents stay apart at 128K, not at 4K.
    refused = {each.family for each in found["128k"].rejected_ways if "packed samples" in each.reason}
    assert refused == {"all_gather", "a2a+p2p"}
    assert not any("packed samples" in each.reason for each in found["4k"].rejected_ways)


def test_the_host_is_used_by_request(five_phase: Recipe) -> None:
    recipe = with_stage(five_phase, "long_32k", gpus=32)
    offered = search(recipe, "long_32k", offload=True)
    used = [candidate for candidate in offered.ranked if candidate.layout.offload_layers]
    assert used
    for candidate in used:
        layout = candidate.layout
        phase = recipe.phase["long_32k"].model_copy(update={"parallel": layout})
        assert list(phase_layout_rules(recipe, "long_32k", phase)) == []
        assert f"{layout.offload_layers} layers on the host" in candidate.saving
        if layout.offload_layers > 1:
            fewer = layout.model_copy(update={"offload_layers": layout.offload_layers - 1})
            assert job_memory_bytes(recipe, replace(candidate.job, parallel=fewer)) > 80e9
    none = search(recipe, "long_32k")
    assert not any(candidate.layout.offload_layers for candidate in none.ranked)
    assert offered.ranked[0].speed >= none.ranked[0].speed


def test_a_larger_gpu_is_never_worse(five_phase: Recipe, changed, found: dict[str, SearchResult]) -> None:
    recipe = with_stage(changed(five_phase, **{"cluster.gpu": "h200"}), "long_512k", gpus=512)
    larger = search(recipe, "long_512k")
    assert larger.ranked[0].speed >= found["512k"].ranked[0].speed
    assert len(larger.ranked) >= len(found["512k"].ranked)


def test_another_length_keeps_the_tokens_of_a_step(five_phase: Recipe) -> None:
    phase = with_stage(five_phase, "foundation", gpus=64, seq_length_tokens=65536).phase["foundation"]
    assert phase.tokens_per_step == five_phase.phase["foundation"].tokens_per_step
    assert (phase.seq_length_tokens, phase.parallel.gpus) == (65536, 64)


def test_nothing_fits_one_gpu(five_phase: Recipe) -> None:
    result = search(with_stage(five_phase, "foundation", gpus=1), "foundation")
    assert result.ranked == []
    assert result.too_large
    assert explain(result)[0].startswith("no layout fits")


@pytest.mark.parametrize(
    ("stage", "gpus", "length", "message"),
    [
        ("sft", 64, None, "--stage sft: only phases"),
        ("foundation", 0, None, "--gpus 0: a layout needs at least one"),
        ("foundation", 64, 5000, "--seq-length 5000: a step of foundation has 4194304 tokens"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    five_phase: Recipe, stage: str, gpus: int, length: int | None, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        with_stage(five_phase, stage, gpus=gpus, seq_length_tokens=length)


def test_there_is_no_search_on_cpu(smoke: Recipe) -> None:
    with pytest.raises(RecipeError, match="name one, e.g. --gpu h100"):
        search(smoke, "foundation")


def test_json_and_print(found: dict[str, SearchResult]) -> None:
    from rich.console import Console

    data = json.loads(json.dumps(as_data(found["128k"])))
    assert data["format"] == "quarry.search/1"
    assert data["ranked"][0]["layout"]["tensor"] == found["128k"].ranked[0].layout.tensor
    assert len(data["explanation"]) == 3
    console = Console(width=120, record=True)
    print_search(found["128k"], console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 120
    assert len(text.splitlines()) < 45
    assert "not allowed:" in text
    assert "TP 16: crosses the node" in text
