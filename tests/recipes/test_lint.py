"""One test per rule: break a good recipe in one place, and the refusal names the key, the value and a value that would pass."""

from __future__ import annotations

from typing import Any

import pytest

from recipes.compose import compose
from recipes.lint import check, lint
from recipes.schema import Recipe, RecipeError

F = "phase.foundation"
SCHEDULE = {"kind": "power", "power_amplitude": 4.0, "power_exponent": -0.51, "max_lr": 0.02}

# (recipe, changed values, key of the problem, part of its value, part of its rule, part of its remedy)
RULES: dict[str, tuple[str, dict[str, Any], str, str, str, str]] = {
    "no stages": ("five_phase", {"stages": []}, "stages", "[]", "nothing to do", "stages=[foundation,capability"),
    "first stage is no phase": (
        "five_phase",
        {"stages": ["merge_32k"]},
        "stages",
        "merge_32k",
        "no model to start from",
        "a phase first",
    ),
    "export is last": (
        "five_phase",
        {"stages": ["foundation", "export", "capability"]},
        "stages",
        "[foundation, export, capability]",
        "nothing can start from the export",
        "stages=[foundation,capability,export]",
    ),
    "tokens = steps x batch x length": (
        "five_phase",
        {f"{F}.steps": 1000},
        f"{F}.tokens",
        "10000000876544",
        "1000 steps x 1024 samples x 4096 tokens = 4194304000",
        f"{F}.tokens=4194304000",
    ),
    "tokens below one step": (
        "smoke",
        {f"{F}.tokens_requested": 5},
        f"{F}.tokens",
        "5",
        "less than one step of 2048 tokens",
        "at least 2048",
    ),
    "horizon is the phase's": (
        "five_phase",
        {"phase.annealing.schedule.horizon_tokens": 10**12},
        "phase.annealing.schedule.horizon_tokens",
        "1000000000000",
        "another number of tokens than the phase's 2000003530752",
        "null or to 2000003530752",
    ),
    "warm-up longer than the phase": (
        "smoke",
        {f"{F}.schedule.warmup_tokens": 245760},
        f"{F}.schedule.warmup_tokens",
        "245760",
        "not over when the phase is",
        "at most 24576",
    ),
    "schedule lacks a value": (
        "smoke",
        {"phase.annealing.schedule.end_lr": None},
        "phase.annealing.schedule.end_lr",
        "None",
        "exponential schedule needs it",
        "give a number",
    ),
    "schedule has a value that it does not use": (
        "smoke",
        {f"{F}.schedule.start_lr": 0.5},
        f"{F}.schedule.start_lr",
        "0.5",
        "power schedule does not use it",
        f"{F}.schedule.start_lr=null",
    ),
    "rising power law": (
        "smoke",
        {f"{F}.schedule.power_exponent": 0.51},
        f"{F}.schedule.power_exponent",
        "0.51",
        "would not fall",
        "-0.51",
    ),
    "first phase has nothing to continue": (
        "smoke",
        {f"{F}.schedule": {"kind": "constant"}},
        f"{F}.schedule.start_lr",
        "None",
        "first phase continues no other",
        f"{F}.schedule.start_lr=3e-4",
    ),
    "zero learning rate": (
        "smoke",
        {"phase.long_512k.schedule.end_lr": 0.0},
        "phase.final_annealing.schedule.start_lr",
        "None",
        "zero over the whole phase",
        "phase.final_annealing.schedule.jump='REASON'",
    ),
    "unmarked jump": (
        "granite_4_1",
        {"phase.long_32k.schedule.jump": None},
        "phase.long_32k.schedule.start_lr",
        "0.0001",
        "jumps from 0 (end of final_annealing) to 0.0001",
        "phase.long_32k.schedule.jump='REASON'",
    ),
    "unmarked jump by a warm-up": (
        "five_phase",
        {"phase.long_32k.schedule.warmup_tokens": 10**9},
        "phase.long_32k.schedule.start_lr",
        "0 at the start of the warm-up",
        "jumps from 0.0001 (end of annealing) to 0 ",
        "warmup_tokens=0",
    ),
    "unmarked jump by a changed batch": (
        "five_phase",
        {"phase.capability.global_batch_samples": 2048, "phase.capability.steps": 238419},
        "phase.capability.schedule",
        "0.00192",
        "jumps from 0.0009602",
        "keep the tokens per step",
    ),
    "RoPE base falls while the length grows": (
        "five_phase",
        {"phase.long_128k.rope_base": 5e5},
        "phase.long_128k.rope_base",
        "500000",
        "falls from 1e+06 in long_32k while the length grows",
        "phase.long_128k.rope_base=1000000 or higher",
    ),
    "RoPE base falls after long context": (
        "five_phase",
        {"phase.final_annealing.rope_base": 1e4},
        "phase.final_annealing.rope_base",
        "10000",
        "falls from 5e+07 in long_512k: positions",
        "phase.final_annealing.rope_base=50000000",
    ),
    "RoPE base is whole": (
        "smoke",
        {f"{F}.rope_base": 10000.5},
        f"{F}.rope_base",
        "10000.5",
        "whole numbers",
        f"{F}.rope_base=10000",
    ),
    "shares sum to 100": (
        "five_phase",
        {f"{F}.mixture.shares_percent.code": 21},
        f"{F}.mixture.shares_percent",
        "101 in total",
        "mixture foundation must sum to 100",
        f"{F}.mixture.shares_percent.web=58",
    ),
    "published rounding is no excuse": (
        "five_phase",
        {f"phase.annealing.mixture.shares_percent.{c}": 16.67 for c in ("web_hq", "code", "math")},
        "phase.annealing.mixture.shares_percent",
        "100.01 in total",
        "must sum to 100",
        "=16.66",
    ),
    "category without a source": (
        "five_phase",
        {"data.sources.gneissweb.category": "web2"},
        f"{F}.mixture.shares_percent.web",
        "59",
        "no source of data 'granite_4_1' has the category",
        "another category: books, code",
    ),
    "share that rounds to no sample": (
        "smoke",
        {"phase.long_512k.steps": 2, "phase.long_512k.tokens": 4096, "phase.long_512k.tokens_requested": 4096},
        "phase.long_512k.mixture.shares_percent.repositories",
        "20",
        "gets 0.8 of 4 samples",
        "at least 3 steps",
    ),
    "merge weights sum to 1": (
        "five_phase",
        {"merge.merge_32k.inputs.annealing": 0.35},
        "merge.merge_32k.inputs",
        "1.2 in total",
        "must sum to 1",
        "annealing: 0.291667, long_32k: 0.708333",
    ),
    "merge input is an earlier stage": (
        "five_phase",
        {"merge.merge_32k.inputs": {"long_128k": 0.15, "long_32k": 0.85}},
        "merge.merge_32k.inputs.long_128k",
        "0.15",
        "must be an earlier phase or merge",
        "foundation, capability, annealing, long_32k",
    ),
    "merge of one": (
        "five_phase",
        {"merge.merge_32k.inputs": {"long_32k": 1.0}},
        "merge.merge_32k.inputs",
        "1.0",
        "two inputs",
        "add one",
    ),
    "merge takes moments from the newest": (
        "five_phase",
        {"merge.merge_32k.inputs": {"long_32k": 0.85, "annealing": 0.15}},
        "merge.merge_32k.inputs",
        "[long_32k, annealing]",
        "Adam's moments",
        "long_32k last",
    ),
    "tokenizer larger than the model": (
        "smoke",
        {"data.tokenizer.vocab_size": 2049},
        "data.tokenizer.vocab_size",
        "2049",
        "more entries than model tiny has embedding rows",
        "at most 2048",
    ),
    "huggingface tokenizer without a folder": (
        "five_phase",
        {"data.tokenizer.path": None},
        "data.tokenizer.path",
        "None",
        "read from a folder",
        "tokenizer.json",
    ),
    "builtin source without a builder": (
        "smoke",
        {"data.sources.math_worked.builder": None},
        "data.sources.math_worked.builder",
        "None",
        "kind builtin needs it",
        "e.g.",
    ),
    "file source without paths": (
        "five_phase",
        {"data.sources.books.paths": []},
        "data.sources.books.paths",
        "[]",
        "kind jsonl needs it",
        "e.g. [",
    ),
    "heads share key/value heads evenly": (
        "smoke",
        {"model.num_query_groups": 3},
        "model.num_query_groups",
        "3",
        "evenly",
        "1, 2, 4",
    ),
    "even head size": ("smoke", {"model.head_dim": 33}, "model.head_dim", "33", "pairs", "34"),
    "CPU on a cluster": (
        "five_phase",
        {"cluster.gpu": "cpu"},
        "cluster.gpu",
        "cpu",
        "this cluster is slurm",
        "cluster.gpu=h100",
    ),
    "world size by TP x PP x CP": (
        "five_phase",
        {"phase.long_32k.parallel.gpus": 500},
        "phase.long_32k.parallel.gpus",
        "500",
        "tensor 2 x pipeline 1 x context 4 = 8",
        "phase.long_32k.parallel.gpus=496",
    ),
    "whole nodes": (
        "five_phase",
        {f"{F}.parallel.gpus": 12},
        f"{F}.parallel.gpus",
        "12",
        "does not fill nodes of 8",
        f"{F}.parallel.gpus=16",
    ),
    "one machine": (
        "smoke",
        {"cluster.gpus_per_node": 2},
        "phase.long_512k.parallel.gpus",
        "4",
        "one machine with 2",
        "at most 2",
    ),
    "heads by TP": (
        "smoke",
        {"model.num_attention_heads": 9, "model.num_query_groups": 3},
        "phase.annealing.parallel.tensor",
        "2",
        "must divide model.num_attention_heads = 9",
        "one of 1, 3, 9",
    ),
    "groups by TP": (
        "smoke",
        {"model.num_query_groups": 1},
        "phase.annealing.parallel.tensor",
        "2",
        "must divide model.num_query_groups = 1",
        "one of 1",
    ),
    "SwiGLU width by TP": (
        "smoke",
        {"model.ffn_hidden_size": 321},
        "phase.annealing.parallel.tensor",
        "2",
        "must divide model.ffn_hidden_size = 321",
        "one of 1, 3",
    ),
    "vocabulary by TP": (
        "smoke",
        {"model.vocab_size": 2049},
        "phase.annealing.parallel.tensor",
        "2",
        "must divide model.vocab_size = 2049",
        "one of 1, 3",
    ),
    "layers by PP": (
        "smoke",
        {"model.num_layers": 5},
        "phase.long_32k.parallel.pipeline",
        "2",
        "5 layers do not divide",
        "one of 1, 5",
    ),
    "layers by PP x VPP": (
        "smoke",
        {"phase.long_32k.parallel.virtual_pipeline": 3},
        "phase.long_32k.parallel.virtual_pipeline",
        "3",
        "4 layers do not divide into pipeline 2 x virtual 3 = 6 chunks",
        "one of 1, 2",
    ),
    "VPP without PP": (
        "smoke",
        {f"{F}.parallel.virtual_pipeline": 2},
        f"{F}.parallel.virtual_pipeline",
        "2",
        "there is only one",
        f"{F}.parallel.pipeline=2",
    ),
    "VPP of one": (
        "smoke",
        {"phase.long_32k.parallel.virtual_pipeline": 1},
        "phase.long_32k.parallel.virtual_pipeline",
        "1",
        "silently turns it off",
        "null, or 2",
    ),
    "VPP needs micro batches in groups of PP": (
        "smoke",
        {
            "phase.long_32k.parallel.virtual_pipeline": 2,
            "phase.long_32k.global_batch_samples": 7,
            "phase.long_32k.tokens": 35840,
        },
        "phase.long_32k.global_batch_samples",
        "7",
        "gives 7 micro batches per rank",
        "e.g. 8",
    ),
    "VPP and the held-out batch": (
        "smoke",
        {"phase.long_32k.parallel.virtual_pipeline": 2, "data.heldout_batch_samples": 15},
        "data.heldout_batch_samples",
        "15",
        "15 micro batches per rank",
        "e.g. 16",
    ),
    "length by 2 x CP": (
        "smoke",
        {"phase.long_128k.seq_length_tokens": 514, "phase.long_128k.tokens": 41120},
        "phase.long_128k.seq_length_tokens",
        "514",
        "2 x context 2",
        "e.g. 512",
    ),
    "length by TP with sequence parallelism": (
        "smoke",
        {"phase.annealing.seq_length_tokens": 127, "phase.annealing.tokens": 121920},
        "phase.annealing.seq_length_tokens",
        "127",
        "context 1 x tensor 2 (sequence parallelism)",
        "e.g. 128",
    ),
    "held-out length fits every layout": (
        "smoke",
        {"data.heldout_seq_length_tokens": 126},
        "data.heldout_seq_length_tokens",
        "126",
        "2 x context 2",
        "e.g. 128",
    ),
    "global batch by micro batch x DP": (
        "smoke",
        {"phase.capability.parallel.micro_batch_samples": 3},
        "phase.capability.global_batch_samples",
        "16",
        "micro batch 3 x 2 data-parallel ranks = 6",
        "set it to 18",
    ),
    "sequence parallelism without TP": (
        "smoke",
        {f"{F}.parallel.sequence_parallel": True},
        f"{F}.parallel.sequence_parallel",
        "True",
        "silently turns sequence parallelism off",
        f"{F}.parallel.tensor=2",
    ),
    "overlapped gather alone": (
        "smoke",
        {"phase.capability.parallel.overlap_grad_reduce": False},
        "phase.capability.parallel.overlap_param_gather",
        "True",
        "only together",
        "overlap_grad_reduce=true",
    ),
    "recomputed layers without full recompute": (
        "smoke",
        {f"{F}.parallel.recompute_num_layers": 2},
        f"{F}.parallel.recompute_num_layers",
        "2",
        "recompute none does not use it",
        "recompute=full",
    ),
    "FP8 settings without FP8": (
        "five_phase",
        {f"{F}.precision.bf16_layers_at_start": 1},
        f"{F}.precision.bf16_layers_at_start",
        "1",
        "without FP8 it has no effect",
        "precision=bf16",
    ),
    "FP8 on CPU": (
        "smoke",
        {f"{F}.precision.fp8": "tensorwise", f"{F}.precision.dtype": "bf16"},
        f"{F}.precision.fp8",
        "tensorwise",
        "the cluster's cpu does not have",
        "precision=bf16",
    ),
    "MXFP8 on Hopper": (
        "fp8",
        {f"{F}.precision.fp8": "mxfp8"},
        f"{F}.precision.fp8",
        "mxfp8",
        "the cluster's h100 does not have",
        "precision=fp8_blockwise",
    ),
    "blockwise on Blackwell": (
        "fp8",
        {"cluster.gpu": "b200", f"{F}.precision.fp8": "blockwise"},
        f"{F}.precision.fp8",
        "blockwise",
        "the cluster's b200 does not have",
        "precision=mxfp8",
    ),
    "FP8 beside fp32": (
        "fp8",
        {f"{F}.precision.dtype": "fp32"},
        f"{F}.precision.dtype",
        "fp32",
        "bf16",
        f"{F}.precision.dtype=bf16",
    ),
    "history without delayed scaling": (
        "fp8",
        {f"{F}.precision.fp8_amax_history_steps": 16},
        f"{F}.precision.fp8_amax_history_steps",
        "16",
        "only delayed scaling keeps a history",
        "null",
    ),
    "bf16 layers with delayed scaling": (
        "fp8",
        {f"{F}.precision.fp8": "delayed", f"{F}.precision.bf16_layers_at_end": 0},
        f"{F}.precision.bf16_layers_at_start",
        "1",
        "takes no layers out",
        "set it to 0",
    ),
    "more bf16 layers than a stage has": (
        "fp8",
        {f"{F}.precision.bf16_layers_at_end": 41},
        f"{F}.precision.bf16_layers_at_end",
        "41",
        "only 40 layers",
        "at most 40",
    ),
    "FP8 width": (
        "fp8",
        {"model.ffn_hidden_size": 12808},
        "model.ffn_hidden_size",
        "12808",
        "multiples of 16, and the width per rank in foundation is 12808 / tensor 2 = 6404",
        "a width of 12800",
    ),
    "FP8 hidden size": ("fp8", {"model.hidden_size": 4100}, "model.hidden_size", "4100", "multiples of 16", "a width of 4096"),
    "FP8 tokens per rank": (
        "fp8",
        {"phase.long_32k.seq_length_tokens": 32776, "phase.long_32k.tokens": 32776 * 128 * 119210},
        "phase.long_32k.seq_length_tokens",
        "32776",
        "multiple of 16 tokens per rank, and 32776 / 8 = 4097",
        "e.g. 32768",
    ),
}


@pytest.fixture(scope="module")
def fp8() -> Recipe:
    return compose(["precision=fp8_tensorwise"])


@pytest.mark.parametrize("name", RULES)
def test_rule(name: str, changed, request: pytest.FixtureRequest) -> None:
    recipe, values, key, value, rule, remedy = RULES[name]
    good = request.getfixturevalue(recipe)
    assert lint(good) == []
    problems = lint(changed(good, **values))
    assert key in [p.key for p in problems], problems
    said = [p for p in problems if p.key == key and rule in p.rule]
    assert said, problems
    assert any(value in str(p.value) and remedy in p.remedy for p in said), said
    with pytest.raises(RecipeError) as caught:
        check(changed(good, **values))
    assert f"{key} = " in str(caught.value)
    assert remedy in str(caught.value)


def test_check_reports_all_problems_and_passes_a_good_recipe(five_phase: Recipe, changed) -> None:
    check(five_phase)
    bad = changed(five_phase, **{f"{F}.steps": 3, "merge.merge_32k.inputs.annealing": 0.5, "data.tokenizer.vocab_size": 100353})
    with pytest.raises(RecipeError, match="recipe 'five_phase' is refused, 3 problems:") as caught:
        check(bad)
    assert len(str(caught.value).splitlines()) == 4


def test_only_what_stages_names_is_looked_at(smoke: Recipe, changed) -> None:
    broken = {"phase.long_512k.steps": 1, "merge.merge_512k.inputs.long_512k": 0.5}
    assert lint(changed(smoke, **broken)) != []
    assert lint(changed(smoke, stages=["foundation", "capability", "export"], **broken)) == []


def test_what_is_no_rule(smoke: Recipe, changed) -> None:
    assert lint(changed(smoke, **{"model.head_dim": 64})) == []  # hidden_size need not be heads x head_dim
    assert lint(changed(smoke, **{"phase.long_32k.parallel.gpus": 4})) == []  # data parallelism takes the rest
    assert (
        lint(changed(smoke, **{"phase.long_512k.rope_base": 40e3, "phase.final_annealing.rope_base": 40e3})) == []
    )  # equal, not falling


def test_an_older_fault_of_a_schedule_is_reported_once(smoke: Recipe, changed) -> None:
    keys = [p.key for p in lint(changed(smoke, **{"phase.annealing.schedule.end_lr": None}))]
    assert keys == ["phase.annealing.schedule.end_lr"]
