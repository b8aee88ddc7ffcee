"""A gate in a recipe: how a curriculum says it, what its arms are, what the linter refuses, and what it hands on to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launchers.slurm_script import nodes_of
from recipes.ab_arms import arm_recipe, layout, shortened
from recipes.ab_table import verdict_lines
from recipes.compose import compose
from recipes.docker_options import layout_of
from recipes.lint import lint
from recipes.plan import notes
from recipes.schema import Recipe

CURRICULUM = """# @package _global_
defaults:
  - five_phase
  - /ab@ab.fp8_gate: fp8
  - override /precision: fp8_tensorwise
  - override /precision@phase.final_annealing.precision: bf16
  - _self_
name: fp8
stages: [fp8_gate, foundation, capability, final_annealing, export]
ab: {fp8_gate: {phase: foundation, steps: 200}}
"""


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """What docs/fp8.md shows."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "curriculum").mkdir()
    (folder / "curriculum" / "fp8.yaml").write_text(CURRICULUM)
    return compose(["curriculum=fp8", "phase.final_annealing.rope_base=10000.0"], [folder])


def changed(recipe: Recipe, **values: Any) -> Recipe:
    raw = recipe.model_dump()
    for key, value in values.items():
        node = raw
        *path, last = key.split("__")
        for part in path:
            node = node[part]
        node[last] = value
    return Recipe.model_validate(raw)


def test_a_curriculum_with_a_gate_and_bf16_for_the_final_annealing(gated: Recipe) -> None:
    assert lint(gated) == []
    assert gated.stage_kind("fp8_gate") == "ab"
    assert [gated.phase[s].precision.name for s in ("foundation", "capability", "final_annealing")] == [
        "fp8_tensorwise",
        "fp8_tensorwise",
        "bf16",
    ]
    assert any("fp8_gate: gate, 200 steps of foundation with bf16" in note for note in notes(gated))
    assert any("bf16 in final_annealing" in note for note in notes(gated))


def test_the_arms_are_the_recipe_up_to_the_phase(gated: Recipe) -> None:
    a, b = (arm_recipe(gated, "fp8_gate", name) for name in ("a", "b"))
    assert a.stages == b.stages == ["foundation"]
    assert a.ab == {}
    assert a.phase["foundation"].precision.name == "bf16"
    assert b.phase["foundation"] == gated.phase["foundation"]
    assert a.phase["foundation"].model_dump(exclude={"precision"}) == b.phase["foundation"].model_dump(exclude={"precision"})
    short = shortened(b, "foundation", 200).phase["foundation"]
    assert (short.steps, short.samples, short.log_interval_steps) == (200, 200 * 1024, 1)


def test_a_gate_hands_on_and_in_front_of_the_first_phase_nothing(gated: Recipe) -> None:
    assert gated.previous("fp8_gate") is None
    assert gated.previous("foundation") is None
    later = changed(gated, stages=["foundation", "fp8_gate", "capability", "export"], ab__fp8_gate__phase="capability")
    assert lint(later) == []
    assert later.previous("fp8_gate") == "foundation"
    assert later.previous("capability") == "fp8_gate"
    assert later.tokens_before("capability") == later.phase["foundation"].tokens
    assert arm_recipe(later, "fp8_gate", "b").previous("capability") == "foundation"


def test_a_job_has_room_for_the_larger_arm(gated: Recipe) -> None:
    small = gated.phase["foundation"].parallel.model_copy(update={"gpus": 8, "tensor": 1, "sequence_parallel": False})
    both = changed(gated, ab__fp8_gate__a__parallel=small.model_dump())
    whole = gated.phase["foundation"].parallel.gpus
    assert layout(both, "fp8_gate").gpus == layout_of(both, "fp8_gate").gpus == whole  # type: ignore[union-attr]
    assert nodes_of(both, "fp8_gate") == whole // 8


PRECISION = {"name": "odd", "dtype": "bf16", "fp8": "mxfp8", "fp8_format": "e4m3"}
FP16 = {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1, "clip_grad_norm": 1.0, "precision_aware": True,
        "exp_avg_dtype": "fp16"}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "elsewhere": ({"stages": ["foundation", "fp8_gate", "capability", "export"]}, "ab.fp8_gate.phase", "in front", "phase=capability"),
    "last": ({"stages": ["foundation", "fp8_gate"]}, "ab.fp8_gate.phase", "directly in front", "nothing comes after it"),
    "few steps": ({"ab__fp8_gate__steps": 3}, "ab.fp8_gate.steps", "last quarter", "from 4 to"),
    "many steps": ({"ab__fp8_gate__steps": 10**9}, "ab.fp8_gate.steps", "last quarter", "from 4 to"),
    "lacking": ({"ab__fp8_gate__b__precision": PRECISION}, "ab.fp8_gate.b.precision.fp8", "h100 does not have", "precision=bf16"),
    "local FP8": ({"ab__fp8_gate__b__transformer_impl": "local"}, "ab.fp8_gate.b.transformer_impl", "Transformer Engine's", "null"),
    "optimizer": ({"ab__fp8_gate__b__optimizer": FP16}, "ab.fp8_gate.b.optimizer.exp_avg_dtype", "without its scale", "bf16"),
    "emulated": ({"ab__fp8_gate__b__emulated_fp8": {}}, "ab.fp8_gate.b.emulated_fp8", "h100 has FP8", "ab.fp8_gate.b.precision"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_refusals_name_key_rule_and_remedy(gated: Recipe, name: str) -> None:
    values, key, rule, remedy = REFUSED[name]
    said = [p for p in lint(changed(gated, **values)) if p.key == key]
    assert any(rule in p.rule and remedy in p.remedy for p in said), said


def test_random_weights_and_nodes_must_be_the_same_in_both_arms(gated: Recipe) -> None:
    parallel = gated.phase["foundation"].parallel.model_dump()
    said = lint(changed(gated, ab__fp8_gate__b__parallel={**parallel, "tensor": 4, "gpus": 256}))
    assert {"ab.fp8_gate.b.parallel.tensor", "ab.fp8_gate.b.parallel.gpus"} <= {p.key for p in said}


def test_te_needs_a_gpu(smoke: Recipe) -> None:
    gate = {"title": "x", "phase": "capability", "steps": 8, "b": {"transformer_impl": "transformer_engine"}}
    stages = ["foundation", "g", "capability", "export"]
    said = lint(changed(smoke, stages=stages, ab={"g": gate}))
    assert [p.key for p in said] == ["ab.g.b.transformer_impl"]
    assert lint(changed(smoke, stages=stages, ab={"g": {**gate, "b": {"emulated_fp8": {}}}})) == []


def test_a_failed_verdict_says_so_in_its_last_lines() -> None:
    criterion = {"name": "loss", "a": 4.0, "b": 4.2, "relative_percent": 5.0, "limit_percent": 0.25, "passed": False}
    arm = {"what": "bf16, DP1", "steps": [1], "losses": [4.0], "seconds": 2.0, "emulated": True}
    lines = verdict_lines(
        {
            **{"stage": "g", "phase": "p", "steps": 1, "start": "random weights of seed 1", "criteria": [criterion]},
            **{"statistics": None, "data": None, "verdict": "fail", "final": True, "reasons": ["too far"], "arms": {"a": arm, "b": arm}},
        }
    )  # fmt: skip
    assert "FAILS" in "\n".join(lines)
    assert "says nothing about FP8 on a GPU" in "\n".join(lines)
    assert lines[-2:] == ["  verdict: FAIL", "    too far"]


def test_the_shipped_gate_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "fp8.md").read_text()
    assert CURRICULUM.split("defaults:")[1].split("name:")[0].strip() in text
