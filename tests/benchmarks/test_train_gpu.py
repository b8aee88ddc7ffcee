"""benchmarks/train_gpu.py on a CPU at a tiny size, and its counting."""

import json

import pytest

from benchmarks import train_gpu
from benchmarks.train_gpu_cases import GRANITE, LLAMA, SUITES, Case, plain, suite
from recipes.lint_memory import memory_rules
from recipes.lint_optimizer import optimizer_rules
from training.arguments import compile_phase


def test_tiny_cases_run_and_a_second_start_does_nothing(tmp_path, capsys):
    assert train_gpu.main(["--suite", "tiny", "--only", "quarry|megatron", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["matmul_tflops"]["bf16"] > 0
    assert [case["outcome"] for case in found["cases"]] == ["measured"] * 3
    ours, memory_saved, stock = found["cases"]
    # Recomputation and chunks of the loss change no number but the time; the stock model has no multipliers.
    assert ours["losses"] == pytest.approx(memory_saved["losses"], rel=1e-3)
    assert ours["losses"] != pytest.approx(stock["losses"], rel=1e-3)
    assert ours["parameters"] == stock["parameters"]
    for case in found["cases"]:
        assert case["tokens_per_second"] == pytest.approx(128 / case["step_seconds"][0])
    assert "| quarry | tiny, 2 layers |" in (tmp_path / "results.md").read_text()
    lines = (tmp_path / "results.jsonl").read_text()
    assert train_gpu.main(["--suite", "tiny", "--only", "quarry|megatron", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "results.jsonl").read_text() == lines


def test_no_case_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_gpu.main(["--suite", "tiny", "--only", "nothing", "--output", str(tmp_path)])
    assert "--only nothing: no case of tiny" in capsys.readouterr().err


def test_counting_is_nvidias():
    """14,451 tokens/s/GPU of Llama 3 8B at 8K are the 744 TFLOP/s that Megatron-Bridge 25.11 publishes beside them."""
    llama = next(case for case in suite("whole") if case.model == LLAMA)
    assert llama.shape().published_parameters == 8030261248
    assert 14_451 * llama.flops_per_token() / 1e12 == pytest.approx(744, abs=1)


def row(case, seconds, outcome="measured"):
    return {
        "case": case.as_json(),
        "outcome": outcome,
        "step_seconds": [2 * seconds, seconds, seconds],
        "memory_bytes": {"peak_forward_backward": 130 * 10**9},
    }


def test_bars(tmp_path):
    cases = {(case.model, case.precision): case for case in suite("whole")}
    bf16, fp8 = cases[GRANITE, "bf16"], cases[GRANITE, "fp8_tensorwise"]
    second = bf16.tokens_per_step * bf16.flops_per_token() / 560e12
    lines = [
        {"matmul_tflops": {"bf16": 700.0, "fp8": 1400.0}},
        {"matmul_tflops": {"bf16": 790.0, "fp8": 1300.0}},
        row(bf16, 10 * second),
        row(bf16, second),
        row(fp8, second / 1.2),
        row(cases[LLAMA, "fp8_tensorwise"], 1.0, "out of memory"),
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    peaks, rows = train_gpu.read_results(tmp_path / "results.jsonl")
    assert peaks == {"bf16": 790.0, "fp8": 1400.0}
    assert len(rows) == 3
    verdicts = {line[0]: line[2:] for line in train_gpu.bars(rows)}
    assert verdicts["bf16, share of the bf16 matmul peak"] == (f"{560 / 790:.1%}", "passed")
    assert verdicts["fp8_tensorwise, times bf16"] == ("1.20", "FAILED")
    assert verdicts["fp8_delayed, times bf16"] == ("-", "not measured")
    assert verdicts["Llama 3 8B, fp8_tensorwise, TFLOP/s"] == ("-", "not measured")
    text = train_gpu.markdown(peaks, rows, {"date": "2026-11-27"})
    assert "| quarry | granite_4_1_8b; loss in chunks of 2048; 16-bit state | bf16 | 8,192 | 16 |" in text
    assert "out of memory" in text


def test_whole_models_fit_one_h200_by_the_planners_account(tmp_path):
    for case in suite("whole"):
        recipe = case.recipe("h200")
        phase = recipe.phase["foundation"]
        assert list(optimizer_rules(recipe, "foundation", phase)) == []
        assert list(memory_rules(recipe)) == [], case.name
        arguments = case.arguments(recipe, tmp_path)
        assert "--grad-reduce-in-bf16" in arguments
        assert arguments[arguments.index("--exp-avg-dtype") + 1] == "bf16"


@pytest.mark.parametrize("name", list(SUITES))
def test_suites_are_distinct_cases(name):
    cases = suite(name)
    assert cases
    assert len({case.name for case in cases}) == len(cases)


def test_plain_arguments_say_what_is_trained_and_nothing_else(tmp_path):
    case = Case(program="megatron", model=GRANITE, layers=8, precision="fp8_delayed", seq_length_tokens=4096)
    recipe = case.recipe("h200")
    ours = compile_phase(recipe, "foundation", tmp_path)
    theirs = plain(ours, recipe)
    gone = [word for word in ours if word.startswith("--") and word not in theirs]
    assert "--use-mup" in gone
    assert "--cross-entropy-loss-fusion" in gone
    assert "--fp8-amax-history-len" in gone
    assert theirs[theirs.index("--fp8-format") + 1] == "hybrid"
    for flag in ("--num-layers", "--bf16", "--seq-length", "--swiglu", "--group-query-attention", "--transformer-impl"):
        assert flag in theirs
