"""The folder of a run whose stages are fine-tuning and reinforcement learning, as the jobs leave it, without running any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launchers.journal import Journal
from launchers.runs import RunFolder
from recipes.schema import Recipe

PROVES = "protocol, not judgement: tiny-judge is too small"
SFT = {
    "title": "Fine-tuning",
    "sources": {"chat": {"paths": ["chat.jsonl"]}},
    "epochs": 2,
    "seq_length_tokens": 16,
    "global_batch_sequences": 2,
    "peak_lr": 2e-3,
    "warmup_percent": 10,
    "heldout_percent": 1.0,
    "heldout_max_samples": 2,
    "save_interval_steps": 2,
    "parallel": {"name": "single", "gpus": 1},
    "precision": {"name": "fp32", "dtype": "fp32"},
}
GRPO = {
    "title": "Math",
    "steps": 8,
    "prompts_per_step": 2,
    "samples_per_prompt": 4,
    "seq_length_tokens": 16,
    "learning_rate": 1e-3,
    "deviation": "sample",
    "clip_low": 0.2,
    "clip_high": 0.28,
    "kl_coefficient": 0.05,
    "overlong_cache_tokens": 0,
    "overlong_filter": False,
    "dynamic_sampling": False,
    "rollout": {"max_response_tokens": 12},
    "stop": {"max_mean_gap_nats": 0.07, "max_gap_nats": 3.0},
    "save_interval_steps": 2,
    "prompts": ["p.jsonl"],
    "rewards": {"domains": {"*": {"parts": [{"reward": "math"}]}}},
    "parallel": {"name": "single", "gpus": 1},
    "precision": {"name": "fp32", "dtype": "fp32"},
}


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(harness: Any, *, domains: tuple[str, ...] = ("math", "code"), steps: int = 4, word: str = "chat") -> RunFolder:
    """Stages a (a phase), sft, rl, rl_again and hf; `sft` is finished, `rl` has taken `steps` of 8. `word` is in all texts of the run."""
    value = harness.dict(
        stages=["a", "sft", "rl", "rl_again", "hf"],
        sft={"sft": {**SFT, "title": word}},
        grpo={"rl": {**GRPO, "title": word}, "rl_again": {**GRPO, "steps": 4, "prompts_per_step": 4}},
    )
    recipe = Recipe.model_validate({**value, "phase": {"a": value["phase"]["a"]}, "merge": {}})
    run = RunFolder(harness.run_dir)
    run.path.mkdir(parents=True)
    recipe.write(run.recipe)
    journal = Journal(run.journal)
    for stage in ("a", "sft"):
        journal.append("intent", stage=stage, attempt=1)
        journal.append("outcome", stage=stage, attempt=1, exit_code=0, reason="finished", seconds=10.0, first_step_seconds=4.0)
        run.stage(stage).mkdir(parents=True)
        (run.stage(stage) / "handoff.json").write_text(json.dumps({"stage": stage, "total_tokens": 128}))
    lines(
        run.stage("a") / "metrics.jsonl",
        [
            {"step": i, "stage_tokens": 32 * i, "total_tokens": 32 * i, "loss": 5.0, "tokens_per_second": 64.0}
            for i in (1, 2, 3, 4)
        ],
    )
    lines(
        run.stage("sft") / "metrics.jsonl",
        [
            {
                "step": i,
                "stage_tokens": 32 * i,
                "total_tokens": 128 + 32 * i,
                "loss": 3.5 - i / 4,
                "lr": 1e-3,
                "tokens_per_second": 32.0,
            }
            for i in (1, 2, 3, 4, 5)
        ],
    )
    lines(
        run.stage("sft") / "heldout.jsonl",
        [
            {"when": "start", "step": 0, "total_tokens": 128, "losses": {"web": 4.0}, "answers": {word: 5.25}},
            {"when": "end", "step": 5, "total_tokens": 288, "losses": {"web": 4.5}, "answers": {word: 1.75}},
        ],
    )
    folder = Path(recipe.data.root) / "sft" / "sft"
    (folder / "judged" / "chat").mkdir(parents=True)
    training = {"samples": 1234, "sequences": 5, "utilisation_percent": 98.76}
    (folder / "manifest.json").write_text(json.dumps({"training": training}))
    record = {
        "format": "quarry.judged/1",
        "samples": 20,
        "outcomes": {"accepted": 13, "borderline": 2, "rejected": 4, "unjudged": 1},
        "steps": {"judge": {word: 20}},
        "rubrics": {"r": {"contradictions": 3}},
        "judge": {"model": word, "proves": PROVES},
    }
    (folder / "judged" / "chat" / "record.json").write_text(json.dumps(record))
    rows = [grpo_row(i, domains) for i in range(1, steps + 1)]
    lines(run.stage("rl") / "metrics.jsonl", rows)
    lines(run.stage("rl") / "heldout.jsonl", [{"when": "start", "step": 0, "total_tokens": 128, "losses": {"web": 4.5}}])
    lines(
        run.stage("rl") / "rollouts" / "step_0000004.jsonl",
        [
            {
                "step": 4,
                "prompt": [{"role": "user", "content": word}],
                "completion": "8" + word,
                "reward": 0.5,
                "truncated": True,
            }
        ],
    )
    return run


def grpo_row(step: int, domains: tuple[str, ...]) -> dict[str, Any]:
    reward = step / 10
    return {
        "step": step,
        "loss": 0.01,
        "lr": 1e-3,
        "mean_gap_nats": 1e-7 * step,
        "max_gap_nats": 1e-6 * step,
        "entropy_nats": 2.0 - reward,
        "clipped_low_share": 0.0,
        "clipped_high_share": 0.0,
        "divergence_nats": reward,
        "reward": reward,
        "reward_per_domain": {domain: reward + 0.01 * i for i, domain in enumerate(domains)},
        "response_tokens": 5.0,
        "max_response_tokens": 12,
        "truncated_share": 0.25,
        "no_signal_share": 0.5,
        "failed_reward_share": 0.0,
        "stage_tokens": 20 * step,
        "total_tokens": 20 * step,
        "seconds": 2.0,
        "rollout_seconds": 1.5,
        "train_seconds": 0.5,
        "tokens_per_second": 20.0,
    }
