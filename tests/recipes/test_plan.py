"""What `quarry plan` shows and draws: numbers of the fact sheet, the commands as a user runs them, and the picture's axis."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launchers.cli import main
from recipes.compose import compose
from recipes.flops import flops_per_token, parameters
from recipes.plan import (
    human_length,
    human_lr,
    human_tokens,
    notes,
    plan_phase,
    print_plan,
)
from recipes.plot import CATEGORY_COLORS, TokenAxis, category_color, draw_curriculum, figure
from recipes.schema import Recipe

REPOSITORY = Path(__file__).parents[2]


def quarry(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    code = "import sys; from launchers.cli import main; sys.exit(main())"
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run([sys.executable, "-c", code, "plan", *arguments], capture_output=True, text=True, cwd=cwd, env=env)


@pytest.mark.parametrize(
    ("length", "gflop"), [(4096, 54.3), (8192, 58.3), (16384, 66.4), (32768, 82.5), (131072, 179), (524288, 566)]
)
def test_flops_per_token_of_the_8b_are_the_fact_sheets(five_phase: Recipe, length: int, gflop: float) -> None:
    assert flops_per_token(five_phase.model, length) / 1e9 == pytest.approx(gflop, rel=3e-3)


def test_flops_of_the_four_short_phases_are_the_fact_sheets(granite_4_1: Recipe) -> None:
    total = sum(plan_phase(granite_4_1, s).flops for s in ("foundation", "capability", "annealing", "final_annealing"))
    assert total == pytest.approx(7.9e23, rel=5e-3)


def test_an_untied_lookup_table_multiplies_nothing(five_phase: Recipe, changed) -> None:
    untied = changed(five_phase, **{"model.tied_embeddings": False}).model
    assert parameters(untied) == 8_791_592_960  # the fact sheet's figure for an untied 8B
    assert flops_per_token(untied, 4096) == flops_per_token(five_phase.model, 4096)


@pytest.mark.parametrize(
    ("value", "text"), [(10**13, "10T"), (245760, "246K"), (999_999, "1M"), (46e9, "46B"), (500_002_979_840, "500B"), (7, "7")]
)
def test_human_tokens(value: float, text: str) -> None:
    assert human_tokens(value) == text


def test_human_length_and_rate() -> None:
    assert [human_length(n) for n in (128, 1024, 4096, 524288, 1000)] == ["128", "1K", "4K", "512K", "1000"]
    assert [human_lr(x) for x in (0, 0.02, 9.602e-4)] == ["0", "2.00e-2", "9.60e-4"]


def _printed(recipe: Recipe, width: int) -> str:
    from rich.console import Console

    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    print_plan(recipe, console)
    return console.file.getvalue()


def test_the_default_curriculum_is_one_screen_with_time_and_cost(five_phase: Recipe) -> None:
    text = _printed(five_phase, 120)
    assert max(map(len, text.splitlines())) <= 120
    assert len(text.splitlines()) <= 41
    for stage in five_phase.stages:
        assert stage in text
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    for part in ("10T", "1024x4K", "10K", "power", "DP256", "512", "54.3", " d ", "$"):
        assert part in rows["foundation"]
    for part in ("15.5T", " d ", "$"):
        assert part in rows["total"]
    assert "0→2.00e-2→9.60e-4" in text
    assert "foundation: web 59, code 20, technical 10.5, math 7" in text
    assert "merge_32k = 0.15 annealing + 0.85 long_32k" in text
    assert "15.5T tokens, 9.90e23 FLOPs" in text
    assert "precision: bf16" in text
    assert "muP divides them by 16" in text


def test_on_cpu_there_is_no_speed_to_plan(smoke: Recipe) -> None:
    text = _printed(smoke, 120)
    assert "MFU" not in text
    assert "$" not in text
    assert "GFLOP" in text


def test_the_table_is_readable_on_a_narrow_terminal(granite_4_1: Recipe) -> None:
    text = _printed(granite_4_1, 100)
    assert max(map(len, text.splitlines())) <= 100
    assert "final_annealing" in text
    assert "…" not in text


def test_notes_name_jumps_and_what_is_not_run(granite_4_1: Recipe, changed) -> None:
    text = "\n".join(
        notes(changed(granite_4_1, stages=["foundation", "capability", "annealing", "final_annealing", "long_32k"]))
    )
    assert "long_32k: learning rate jumps: each long-context stage runs from 1e-4 to zero" in text
    assert "not run: long_128k, long_512k, merge_32k, merge_128k, merge_512k, sft" in text


def test_two_phases_that_change_one_mixture_get_a_line_each(five_phase: Recipe, changed) -> None:
    shares = {"books": 60.0, "repositories": 40.0}
    text = _printed(changed(five_phase, **{"phase.long_32k.mixture.shares_percent": shares}), 140)
    assert "final_annealing (in long_32k): books 60, repositories 40" in text
    assert "final_annealing (in long_128k, final_annealing): web_hq 40" in text


def test_plan_answers_in_two_seconds_without_torch_or_matplotlib() -> None:
    code = (
        "import sys; from launchers.cli import main; main(['plan']);"
        "bad = [m for m in ('torch', 'megatron', 'numpy', 'matplotlib', 'nemo_run', 'transformers') if m in sys.modules];"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    times = []
    for _ in range(3):  # the best: what other processes do on the same core costs this one processor time, too
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if times[-1] < 2:
            return
    pytest.fail(f"quarry plan took {min(times):.1f} s of CPU at best")


def test_a_refused_recipe_exits_2_with_every_problem() -> None:
    done = quarry("phase.foundation.steps=3", "phase.capability.mixture.shares_percent.code=31")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "refused, 2 problems" in done.stderr
    assert "phase.capability.mixture.shares_percent = 101 in total" in done.stderr
    assert "Traceback" not in done.stderr


def test_cfg_prints_yaml_even_of_a_recipe_that_the_linter_refuses() -> None:
    done = quarry("--cfg", "curriculum=smoke", "phase.foundation.rope_base=10000.5")
    assert done.returncode == 0
    assert "rope_base: 10000.5" in done.stdout


def test_json_of_the_plan_with_gpu_and_price(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "curriculum=granite_4_1", "--gpu", "h200", "--price-per-gpu-hour", "2", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["gpu"], data["price_per_gpu_hour"]) == ("h200", 2.0)
    assert data["total"]["cost"] == pytest.approx(2 * data["total"]["gpu_hours"])


def test_search_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--search", "--gpus", "256", "--gpu", "h100", "--stage", "long_512k", "--seq-length", "512K"]
    assert main([*arguments, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [(d["seq_length_tokens"], d["gpus"]) for d in data] == [(524288, 256)]
    assert all(d["ranked"] for d in data)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "64"], "--gpus: it says what layouts are searched for; add --search"),
        (["--search", "--stage", "nothing"], "--stage nothing: only phases"),
        (["--price-per-gpu-hour", "-1"], "is no price"),
        (["--search", "--seq-length", "8M"], "is no length"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["plan", *arguments])
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_args_prints_megatrons_arguments() -> None:
    done = quarry("curriculum=smoke", "--args", "annealing")
    assert done.returncode == 0, done.stderr
    assert {"--tensor-model-parallel-size 2", "--sequence-parallel"} <= set(done.stdout.splitlines())


def test_a_team_folder_and_a_picture_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "team" / "mixture").mkdir(parents=True)
    (tmp_path / "team" / "mixture" / "ours.yaml").write_text("name: ours\nshares_percent: {web: 80, code: 20}\n")
    done = quarry(
        "curriculum=smoke", "mixture@phase.foundation.mixture=ours", "--config-dir", "team", "--plot", "plan.png", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "ours" in done.stdout
    assert (tmp_path / "plan.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    done = quarry("--plot", "plan.docx", cwd=tmp_path)
    assert (done.returncode, "end the name in one of .png" in done.stderr) == (2, True)


# ---------------------------------------------------------------- the picture


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_the_axis_is_increasing_complete_and_keeps_every_phase_visible(smoke: Recipe, changed, data: st.DataObject) -> None:
    stages = [s for s in smoke.stages if s in smoke.phase]
    tokens = data.draw(st.lists(st.integers(1, 10**13), min_size=len(stages), max_size=len(stages)))
    recipe = changed(smoke, **{f"phase.{s}.tokens": t for s, t in zip(stages, tokens, strict=True)})
    axis = TokenAxis.of(recipe)
    assert (axis.edges[0], axis.edges[-1]) == (0.0, 1.0)
    widths = [b - a for a, b in zip(axis.edges, axis.edges[1:], strict=False)]
    assert min(widths) > 0.03
    for stage, n in zip(stages, tokens, strict=True):
        assert axis.span(stage) == (axis.x(stage, 0), pytest.approx(axis.x(stage, n)))
        position = data.draw(st.integers(0, n - 1))
        assert axis.x(stage, position) <= axis.x(stage, position + 1) <= axis.span(stage)[1] + 1e-12


def test_the_picture_shows_every_phase_length_and_category(five_phase: Recipe) -> None:
    panels = figure(five_phase).axes
    text = [[t.get_text().replace("\n", " ") for t in ax.texts] for ax in panels]
    for stage in five_phase.stages:
        if stage in five_phase.phase:
            assert five_phase.phase[stage].title in text[0]
    assert {"4K θ 10K", "32K θ 1M", "128K θ 10M", "512K θ 50M", "32K θ 50M"} <= set(text[1])
    assert {t.get_text() for t in panels[2].get_legend().get_texts()} == {c.replace("_", " ") for c in CATEGORY_COLORS}
    drawn = [y for line in panels[0].lines for y in line.get_ydata()]
    assert min(drawn) == 0
    assert max(y for y in drawn if y != 1) == pytest.approx(0.02)


def test_the_same_recipe_gives_the_same_bytes(smoke: Recipe) -> None:
    def drawn(format: str) -> bytes:
        buffer = io.BytesIO()
        draw_curriculum(smoke, buffer, format)
        return buffer.getvalue()

    svg = drawn("svg")
    assert svg == drawn("svg")
    assert b"Foundation" in svg  # text stays text: searchable in the report
    assert drawn("png").startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="give format="):
        draw_curriculum(smoke, io.BytesIO())


def test_a_curriculum_of_one_phase_and_an_own_category_can_be_drawn(smoke: Recipe, changed, tmp_path: Path) -> None:
    recipe = changed(
        smoke,
        stages=["foundation"],
        **{
            "phase.foundation.mixture.shares_percent": {"ours": 60.0, "theirs": 40.0},
            "data.sources.web_readmes.category": "ours",
        },
    )
    draw_curriculum(recipe, tmp_path / "one.svg")
    assert category_color("ours", ["ours", "theirs"]) != category_color("theirs", ["ours", "theirs"])
    assert (tmp_path / "one.svg").stat().st_size > 1000


def test_constant_and_unchanged_lengths_can_be_drawn(tmp_path: Path) -> None:
    recipe = compose(["curriculum=smoke", "stages=[foundation,capability]", "schedule@phase.capability.schedule=constant"])
    draw_curriculum(recipe, tmp_path / "plan.pdf")
    assert (tmp_path / "plan.pdf").read_bytes().startswith(b"%PDF")
