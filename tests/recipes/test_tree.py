"""The published tree: every curriculum, model and precision composes and lints; numbers are the published ones and say where from."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import yaml

from recipes.compose import TREE, compose, known_options
from recipes.flops import parameters
from recipes.lint import lint
from recipes.lint_memory import phase_memory
from recipes.schema import Recipe

GRANITE = ("granite_4_1_3b", "granite_4_1_8b", "granite_4_1_30b")
LARGE = ("five_phase", "granite_4_1", "granite_4_1_128k")
HOPPER = ("bf16", "fp8_tensorwise", "fp8_delayed", "fp8_blockwise")
BLACKWELL = ("bf16", "fp8_tensorwise", "fp8_delayed", "mxfp8")
FILES = sorted(p for p in TREE.rglob("*.yaml"))
PROVENANCE = re.compile(r"#.*\[(published|granite-3\.0|derived|assumed(: [^\]]+)?)\]")


def test_the_lists_of_this_test_are_complete() -> None:
    assert set(known_options("curriculum")) == {*LARGE, "smoke"}
    assert set(known_options("model")) == {*GRANITE, "tiny"}
    assert set(known_options("precision")) == {"fp32", "bf16_gradients", *HOPPER, *BLACKWELL}  # fp32 is for CPUs


@pytest.mark.parametrize(("curriculum", "model"), list(itertools.product(LARGE, GRANITE)))
def test_every_curriculum_model_and_precision_is_clean_on_h100(curriculum: str, model: str) -> None:
    for precision in HOPPER:
        recipe = compose([f"curriculum={curriculum}", f"model={model}", f"precision={precision}"])
        assert lint(recipe) == [], precision
        assert all(p.parallel.name.startswith(f"{model}/") for p in recipe.phase.values())
        assert all(p.precision.name == precision for p in recipe.phase.values())


def test_gradients_and_optimizer_states_in_bf16_are_choices(five_phase: Recipe) -> None:
    recipe = compose(["precision=bf16_gradients", "optimizer=adamw_precision_aware"])
    assert lint(recipe) == []
    smaller, usual = (phase_memory(r, p, p.parallel) for r in (recipe, five_phase) for p in [r.phase["foundation"]])
    assert usual.gradients_bytes == 2 * smaller.gradients_bytes
    assert usual.optimizer_bytes == pytest.approx(12 / 8 * smaller.optimizer_bytes, rel=1e-3)
    assert smaller.optimizer_step_bytes == 0
    assert {phase.precision.name for phase in recipe.phase.values()} == {"bf16_gradients"}


@pytest.mark.parametrize("precision", BLACKWELL)
def test_every_precision_of_blackwell_is_clean_there(precision: str) -> None:
    assert lint(compose([f"precision={precision}", "cluster.gpu=b200"])) == []


def test_smoke_is_clean_here_on_slurm_and_with_fp8_on_a_gpu() -> None:
    assert lint(compose(["curriculum=smoke", "cluster=local"])) == []
    assert lint(compose(["curriculum=smoke", "cluster=slurm"])) == []
    assert lint(compose(["curriculum=smoke", "cluster=docker", "precision=fp8_tensorwise"])) == []


def test_smoke_has_the_stages_of_the_default_and_changes_the_layout_at_each_hand_off(smoke: Recipe, five_phase: Recipe) -> None:
    left_out = {"multi_domain", "rlhf", "identity"}
    assert smoke.stages == [stage for stage in five_phase.stages if stage not in left_out]
    later = [smoke.phase["final_annealing"].parallel.name, smoke.sft["sft"].parallel.name, smoke.grpo["math"].parallel.name]
    assert all(a != b for a, b in itertools.pairwise(later))
    layouts = [smoke.phase[s].parallel for s in smoke.stages if s in smoke.phase]
    assert all(a.name != b.name for a, b in itertools.pairwise(layouts))
    assert {p.name for p in layouts} == {"single", "dp2", "tp2_sp", "pp2", "cp2", "tp2_cp2"}
    assert {s.category for s in smoke.data.sources.values()} >= {
        c for p in smoke.phase.values() for c in p.mixture.shares_percent
    }


def test_orders_of_the_phases(five_phase: Recipe, granite_4_1: Recipe) -> None:
    long = ["long_32k", "merge_32k", "long_128k", "merge_128k", "long_512k", "merge_512k"]
    start = ["foundation", "capability", "annealing"]
    post = ["sft", "multi_domain", "rlhf", "identity", "math", "export"]
    assert five_phase.stages == [*start, *long, "final_annealing", *post]
    assert granite_4_1.stages == [*start, "final_annealing", *long, *post]


def test_tokens_are_the_published_ones(five_phase: Recipe, granite_4_1: Recipe) -> None:
    asked = {s: p.tokens_requested for s, p in five_phase.phase.items()}
    assert [asked[s] for s in ("foundation", "capability", "annealing", "final_annealing")] == [
        10**13,
        2 * 10**12,
        2 * 10**12,
        5 * 10**11,
    ]
    assert sum(asked[s] for s in asked if s.startswith("long")) == 10**12
    assert sum(p.tokens_requested for s, p in granite_4_1.phase.items() if s.startswith("long")) == 396 * 10**9
    short = compose(["curriculum=granite_4_1_128k"])
    assert "long_512k" not in short.phase
    assert short.model.name == "granite_4_1_3b"
    assert sum(p.tokens_requested for s, p in short.phase.items() if s.startswith("long")) == 396 * 10**9


@pytest.mark.parametrize("name", LARGE)
def test_length_and_rope_base(name: str) -> None:
    recipe = compose([f"curriculum={name}"])
    phases = [recipe.phase[s] for s in recipe.stages if s in recipe.phase]
    bases = [p.rope_base for p in phases]
    assert bases == sorted(bases)
    assert all(p.tokens_per_step == 4 * 2**20 for p in phases)
    for before, after in itertools.pairwise(phases):
        if after.seq_length_tokens > before.seq_length_tokens:
            assert after.rope_base > before.rope_base


@pytest.mark.parametrize("model", GRANITE)
def test_parameter_counts_equal_the_published(model: str) -> None:
    config = compose([f"model={model}"]).model
    assert parameters(config) == config.published_parameters
    assert config.mup_base_hidden_size == 256
    assert config.logits_scaling == config.hidden_size / 256
    assert config.attention_multiplier == 1 / config.head_dim


MIXTURES = {  # the fact sheet's table, percent
    "foundation": {"web": 59, "code": 20, "math": 7, "technical": 10.5, "multilingual": 2, "domain": 1.5},
    "capability": {"web_hq": 12, "code": 30, "math": 35, "technical": 10, "multilingual": 3, "domain": 1, "synthetic": 9},
    "annealing": {
        "web_hq": 16.67,
        "code": 16.67,
        "math": 16.67,
        "technical": 12.5,
        "multilingual": 4.5,
        "synthetic": 8.5,
        "long_cot": 12.5,
        "language_instructions": 7.5,
        "code_instructions": 4.5,
    },
    "final_annealing": {
        "web_hq": 40,
        "code": 20,
        "math": 20,
        "long_cot": 6,
        "language_instructions": 9,
        "code_instructions": 5,
    },
    "long_512k": {"books": 80, "repositories": 20},
}


def test_mixtures_are_the_published_ones_to_two_digits(five_phase: Recipe) -> None:
    used = {p.mixture.name: p.mixture.shares_percent for p in five_phase.phase.values()}
    assert set(used) == set(MIXTURES) == set(known_options("mixture"))
    for name, shares in used.items():
        assert {c: round(s, 2) for c, s in shares.items()} == MIXTURES[name]
        # Exactly, in decimal.
        assert sum(round(s * 10000) for s in shares.values()) == 1000000
    assert five_phase.phase["long_32k"].mixture == five_phase.phase["final_annealing"].mixture


WHOLE_FILE = {
    "curriculum/smoke.yaml",
    "data/smoke.yaml",
    "evaluation/granite_4_1_base.yaml",
    "evaluation/granite_4_1_instruct.yaml",
}
"""Files whose head says once where all their numbers are from."""
NUMBER = re.compile(r"(?<![\w.\"/%-])(-?\d[\d_.e-]*|true|false)(?![\w\"/])")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(TREE).as_posix())
def test_every_number_says_where_it_is_from(path: Path) -> None:
    lines = path.read_text().splitlines()
    if path.relative_to(TREE).as_posix() in WHOLE_FILE:
        head = "\n".join(line for line in lines[:6] if line.startswith("#"))
        assert PROVENANCE.search(head.replace("\n#", ""))
        return
    in_defaults = False
    for number, line in enumerate(lines, 1):
        code = line.partition("#")[0]
        if code.strip() and not code.startswith((" ", "-")):
            in_defaults = code.startswith("defaults:")
        # A key without a value opens a block; its own lines carry the marks.
        if not in_defaults and NUMBER.search(code.partition(":")[2]):
            assert PROVENANCE.search(line), f"{path.name}:{number}: {line}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(TREE).as_posix())
def test_a_file_and_its_name_agree(path: Path) -> None:
    content = yaml.safe_load(path.read_text()) or {}
    if "name" in content:
        assert content["name"] == path.relative_to(TREE / path.relative_to(TREE).parts[0]).with_suffix("").as_posix()
