"""Composition: Hydra's grammar, tokens to steps, a team's own folders, and errors that say what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.compose import _resolve_tokens, compose, composed_yaml, known_options
from recipes.lint import lint
from recipes.schema import Recipe, RecipeError


def refusal(*overrides: str, config_dirs: tuple[Path, ...] = ()) -> str:
    with pytest.raises(RecipeError) as caught:
        compose(overrides, config_dirs)
    return str(caught.value)


def test_defaults(five_phase: Recipe) -> None:
    assert (five_phase.name, five_phase.model.name, five_phase.cluster.kind) == ("five_phase", "granite_4_1_8b", "slurm")
    assert five_phase.phase["long_512k"].parallel.name == "granite_4_1_8b/512k"


def test_work_that_hydra_is_spared_changes_nothing(smoke: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra._internal import defaults_list

    (stock,) = (cell.cell_contents for cell in defaults_list._create_interpolation_map.__closure__)
    assert stock.__module__ == "hydra._internal.defaults_list"
    monkeypatch.setattr(defaults_list, "_create_interpolation_map", stock)
    assert compose(["curriculum=smoke"]) == smoke


def test_overrides_in_hydras_grammar() -> None:
    recipe = compose(
        [
            "model=granite_4_1_3b",
            "precision=fp8_tensorwise",
            "precision@phase.foundation.precision=bf16",
            "phase.foundation.tokens=1e11",
            "phase.capability.global_batch_samples=512",
            "mixture@phase.capability.mixture=annealing",
            "parallel@phase.annealing.parallel=granite_4_1_3b/32k",
            "phase.annealing.parallel.gpus=64",
            "+extra.owner=me",
            "~phase.long_512k",
            "stages=[foundation,capability,annealing,export]",
        ]
    )
    phase = recipe.phase
    assert phase["foundation"].tokens_requested == 10**11
    assert (phase["foundation"].precision.name, phase["capability"].precision.name) == ("bf16", "fp8_tensorwise")
    assert (phase["foundation"].parallel.name, phase["foundation"].parallel.gpus) == ("granite_4_1_3b/4k", 256)
    assert (phase["annealing"].parallel.name, phase["annealing"].parallel.gpus) == ("granite_4_1_3b/32k", 64)
    assert phase["capability"].mixture.name == "annealing"
    assert phase["capability"].mixture.shares_percent.get("domain") is None
    assert recipe.extra == {"owner": "me"}
    assert "long_512k" not in phase


def test_a_cluster_of_the_curriculum_gives_way_to_the_command_line() -> None:
    assert compose(["curriculum=smoke"]).cluster.kind == "local"
    assert compose(["curriculum=smoke", "cluster=slurm"]).cluster.kind == "slurm"


def test_tokens_become_whole_steps(five_phase: Recipe) -> None:
    phase = five_phase.phase["foundation"]
    assert (phase.tokens_requested, phase.steps) == (10**13, 2384186)
    assert phase.tokens == 2384186 * 1024 * 4096
    assert phase.tokens - phase.tokens_per_step < 10**13 <= phase.tokens


def test_steps_alone_give_the_tokens() -> None:
    phase = compose(["curriculum=smoke", "phase.foundation.tokens=null", "phase.foundation.steps=7"]).phase["foundation"]
    assert (phase.steps, phase.tokens, phase.tokens_requested) == (7, 7 * 16 * 128, None)


def test_explicit_steps_that_contradict_the_tokens_are_left_to_the_linter() -> None:
    recipe = compose(["curriculum=smoke", "phase.foundation.steps=7"])
    assert (recipe.phase["foundation"].steps, recipe.phase["foundation"].tokens) == (7, 245760)
    assert [p.key for p in lint(recipe)] == ["phase.foundation.tokens"]


@settings(max_examples=60)
@given(st.integers(1, 10**14), st.integers(1, 4096), st.sampled_from([128, 4096, 524288]), st.booleans())
def test_resolved_tokens_cover_the_request_by_less_than_a_step(tokens: int, batch: int, length: int, as_float: bool) -> None:
    asked = float(tokens) if as_float else tokens  # below 2^53, so exact
    phase = {"tokens": asked, "steps": None, "global_batch_samples": batch, "seq_length_tokens": length}
    assert _resolve_tokens("phase.x", phase) == []
    assert phase["tokens"] == phase["steps"] * batch * length
    assert 0 <= phase["tokens"] - tokens < batch * length
    assert all(isinstance(phase[k], int) for k in ("tokens", "steps", "tokens_requested"))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("phase.foundation.tokens=1.5", "phase.foundation.tokens: must be a whole number (got 1.5); nearest: 2"),
        ("phase.foundation.tokens=0", "phase.foundation.tokens: must be positive (got 0)"),
        ("phase.foundation.tokens=1e400", "phase.foundation.tokens: must be a number (got inf)"),
        ("phase.foundation.tokens=lots", "phase.foundation.tokens: must be a number (got 'lots')"),
        ("phase.foundation.tokens=true", "phase.foundation.tokens: must be a number (got True)"),
        ("phase.foundation.seq_length_tokens=null", "phase.foundation.seq_length_tokens: must be a number (got None)"),
        ("phase.foundation.tokens=null", "phase.foundation.tokens: neither tokens nor steps is given; set one, e.g. phase."),
        ("phase.foundation=3", "phase.foundation: must be a mapping (got 3)"),
        ("model=granite_4_1_9b", "model: no 'granite_4_1_9b' (named in curriculum/five_phase); known: granite_4_1_30b, gra"),
        ("model=granite_4_1_9b", "did you mean granite_4_1_8b?"),
        ("curriculum=five_phases", "did you mean five_phase?"),
        ("parallel@phase.foundation.parallel=granite_4_1_8b/4", "did you mean granite_4_1_8b/4k?"),
        (
            "phase.foundation.token=3",
            "phase.foundation.token: no such key to override; known there: async_saves, documents_apart, exit_af",
        ),
        (
            "data.sources.gneissweb.weight=2",
            "one that the recipe may have and leaves out is added by +data.sources.gneissweb.weight=...",
        ),
        (
            "data.sources={mine:{kind:files}}",
            "data.sources: the value names keys that are not there yet; add them one by one: +data.sources.NAME=...",
        ),
        ("phase.foundation.token=3", "did you mean tokens?"),
        ("phase.foundation.parallel.tensr=2", "did you mean tensor?"),
        ("~phase.fundation", "'phase.fundation' does not exist"),
        ("~phase.long_512k", "stages: names long_512k, which no phase, merge, sft or export defines"),
        (
            "~phase.long_512k",
            "without it: stages=[foundation,capability,annealing,long_32k,merge_32k,long_128k,merge_128k,merge_512k,",
        ),
        ("stages=foundation", "stages: must be a list of stage names (got 'foundation')"),
        ("+x=y", "x: Extra inputs are not permitted (got 'y'); remove it, or put a value of your own under +extra.NAME"),
        ("+phase.foundation.warmup=3", "phase.foundation.warmup: Extra inputs are not permitted"),
        ("x==", "Error parsing override 'x=='"),
        ("phase.foundation.rope_base=-1", "phase.foundation.rope_base: Input should be greater than 0 (got -1)"),
        ("precision.fp8_format=hybrid", "each phase has its own copy of them; set phase.NAME.precision.KEY"),
        ("model=tiny", "no 'tiny/4k'"),
        ("phase.foundation.title=${nope}", "nope"),
        ("+phase@phase.more=foundation", "a phase added on the command line needs parallel@phase.NAME.parallel=LAYOUT"),
    ],
)
def test_an_error_says_what_is_wrong_and_what_would_be_right(override: str, says: str) -> None:
    message = refusal(override)
    assert says in message or (override == "model=tiny" and "no 'tiny/" in message)
    assert "Traceback" not in message
    assert "hydra.cc" not in message


def test_a_mistyped_key_beside_another_error_still_gets_its_siblings() -> None:
    assert "did you mean cluster?" in refusal("cluter=local")


def test_a_value_that_the_curriculum_must_give() -> None:
    overrides = ["parallel@phase.extra.parallel=granite_4_1_8b/32k", "precision@phase.extra.precision=bf16"]
    assert "phase.extra.tokens: has no value" in refusal("+phase@phase.extra=long_32k", *overrides)


def test_cfg_is_yaml_that_hydra_composed() -> None:
    content = yaml.safe_load(composed_yaml(["curriculum=smoke"]))
    assert content["phase"]["long_32k"]["rope_base"] == 20000
    assert "hydra" not in content


def test_hydras_global_state_is_left_alone() -> None:
    from hydra.core.global_hydra import GlobalHydra

    compose(["curriculum=smoke"])
    with pytest.raises(RecipeError):
        compose(["nope=1"])
    assert not GlobalHydra.instance().is_initialized()


def test_a_recipe_survives_its_file_in_its_own_order(five_phase: Recipe, tmp_path: Path) -> None:
    five_phase.write(tmp_path / "recipe.json")
    again = Recipe.read(tmp_path / "recipe.json")
    assert again == five_phase
    # The last input of a merge is the newest model; an alphabetical order would make it the older one.
    assert list(again.merge["merge_128k"].inputs) == ["merge_32k", "long_128k"]


@pytest.fixture
def team(tmp_path: Path) -> Path:
    """A team's own folder: a new mixture, a new phase and a new curriculum, one file each."""
    files = {
        "mixture/legal.yaml": "name: legal\nshares_percent: {domain: 70, web_hq: 30}\n",
        "phase/legal.yaml": "defaults: [annealing, override /mixture@mixture: legal]\ntitle: Legal\n",
        "curriculum/legal.yaml": """# @package _global_
defaults:
  - /phase@phase.legal: legal
  - five_phase
  - _self_
name: legal
stages: [foundation, capability, legal, export]
phase:
  legal: {tokens: 1e9}
""",
    }
    for name, text in files.items():
        (tmp_path / "team" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "team" / name).write_text(text)
    return tmp_path / "team"


def test_a_teams_folder_adds_a_mixture_a_phase_and_a_curriculum(team: Path) -> None:
    recipe = compose(["curriculum=legal", "model=granite_4_1_3b"], [team])
    assert recipe.stages == ["foundation", "capability", "legal", "export"]
    assert recipe.phase["legal"].mixture.shares_percent == {"domain": 70, "web_hq": 30}
    assert recipe.phase["legal"].parallel.name == "granite_4_1_3b/4k"
    assert lint(recipe) == []
    assert "legal" in known_options("curriculum", [team])


def test_a_mixture_alone_is_enough(team: Path) -> None:
    recipe = compose(["mixture@phase.foundation.mixture=legal"], [team])
    assert recipe.phase["foundation"].mixture.name == "legal"


def test_without_the_folder_its_names_are_unknown(team: Path) -> None:
    assert "curriculum: no 'legal'" in refusal("curriculum=legal")
    assert "known: five_phase, granite_4_1, granite_4_1_128k, legal, smoke" in refusal("curriculum=ilegal", config_dirs=(team,))


def test_a_folder_shadows_the_published_file_and_the_first_folder_wins(team: Path, tmp_path: Path) -> None:
    second = tmp_path / "it's a second, [odd] folder"
    for folder, share in ((team, 60), (second, 50)):
        (folder / "mixture").mkdir(parents=True, exist_ok=True)
        (folder / "mixture" / "foundation.yaml").write_text(
            f"name: foundation\nshares_percent: {{web: {share}, code: {100 - share}}}\n"
        )
    (second / "schedule").mkdir()
    (second / "schedule" / "flat.yaml").write_text("defaults: [constant, _self_]\nstart_lr: 1.0e-3\n")
    assert compose([], [second]).phase["foundation"].mixture.shares_percent["web"] == 50
    both = compose(["schedule@phase.capability.schedule=flat"], [team, second])
    assert both.phase["foundation"].mixture.shares_percent["web"] == 60
    assert both.phase["capability"].schedule.start_lr == 1e-3


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "no such folder" in refusal(config_dirs=(tmp_path / "nowhere",))


def test_broken_yaml_in_a_folder_names_the_file(team: Path) -> None:
    (team / "mixture" / "legal.yaml").write_text("name: [legal\n")
    message = refusal("mixture@phase.foundation.mixture=legal", config_dirs=(team,))
    assert "not valid YAML" in message
    assert "legal.yaml" in message
