"""A task small enough to be learned from nothing in a minute on two cores: proof that the whole loop learns, on any layout.

    python -m training.rl.demo --layout tp2 --output /tmp/demo

Counting: the prompt is a digit and a marker, the response must be the next two digits (9 goes on with 0) and the end of the text. The
reward is the share of these three places that are right, so that chance is about one in twelve. Model and tokenizer are made here; the rest is
the same code that trains a real model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from recipes.posttrain import Grpo
from recipes.schema import Model, Optimizer, Parallel, Precision
from training import fast_import
from training.files import read_json_lines
from training.rewards import Reward, Score
from training.rewards import Sample as RewardSample
from training.rl.grpo import run_stage
from training.rl.job import Initial, Job
from training.rl.prompts import Sample

DIGITS = "0123456789"
MARK = ">"
END = "<|end_of_text|>"
ANSWER_DIGITS = 2
STEPS = 150
VOCAB_SIZE = 12
"""The end, ten digits and the marker."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {"gpus": 1},
    "tp2": {"gpus": 2, "tensor": 2},
    "tp2_sp": {"gpus": 2, "tensor": 2, "sequence_parallel": True},
    "pp2": {"gpus": 2, "pipeline": 2},
    "dp2": {"gpus": 2, "overlap_grad_reduce": True},
}


def answer(digit: int) -> str:
    return "".join(DIGITS[(digit + k) % 10] for k in range(1, ANSWER_DIGITS + 1))


def _score(completion: str, reference: str) -> float:
    """Share of the right places: each digit, and an end after exactly the last one."""
    right = sum(a == b for a, b in zip(completion, reference, strict=False)) + (len(completion) == ANSWER_DIGITS)
    return right / (ANSWER_DIGITS + 1)


def reward(samples: list[Sample]) -> list[float]:
    return [_score(sample.completion, sample.prompt.reference) for sample in samples]


class Counting(Reward):
    """The same as a reward of a plan (training/rewards), for ranks that no function of this process reaches."""

    def score(self, sample: RewardSample) -> Score:
        return Score(value=_score(sample.completion, str(sample.reference)))


def write_tokenizer(folder: Path) -> None:
    """A character-level tokenizer of the twelve entries."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate([END, *DIGITS, MARK])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))


def make_job(
    folder: Path, layout: str, *, initial: Initial | None = None, micro_batch_samples: int = 120, **settings: Any
) -> Job:
    """The job of the demonstration, with its tokenizer and prompts written below `folder`; `settings` are fields of Grpo."""
    write_tokenizer(folder / "tokenizer")
    lines = [{"prompt": f"{d}{MARK}", "reference": answer(d), "domain": "even" if d % 2 == 0 else "odd"} for d in range(10)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    grpo: dict[str, Any] = {
        "title": "Counting",
        "steps": STEPS,
        "prompts_per_step": 10,
        "samples_per_prompt": 48,
        "seq_length_tokens": 16,
        "rope_base": 10000.0,
        "learning_rate": 2e-3,
        "deviation": "sample",
        "clip_low": 0.2,
        "clip_high": 0.28,
        "kl_coefficient": 0.0,
        "overlong_cache_tokens": 0,
        "overlong_filter": False,
        "dynamic_sampling": False,
        "rollout": {"max_response_tokens": ANSWER_DIGITS + 2, "batch_samples": 480},
        "stop": {"max_mean_gap_nats": 1e-4, "max_gap_nats": 1e-3},
        "save_interval_steps": 1000,
        "record_samples": 4,
    }
    return Job(
        model=Model(
            name="counting",
            num_layers=2,
            hidden_size=64,
            ffn_hidden_size=128,
            num_attention_heads=4,
            num_query_groups=2,
            head_dim=16,
            vocab_size=VOCAB_SIZE,
            tied_embeddings=True,
            embedding_multiplier=12.0,
            residual_multiplier=0.7,
            attention_multiplier=1 / 16,
            logits_scaling=2.0,
            norm_epsilon=1e-5,
            init_std=0.05,
            mup_base_hidden_size=None,
            released_rope_base=1e4,
            released_max_position_tokens=16,
            published_parameters=None,
        ),
        grpo=Grpo.model_validate(grpo | settings),
        parallel=Parallel(name=layout, micro_batch_samples=micro_batch_samples, **LAYOUTS[layout]),
        precision=Precision(name="fp32", dtype="fp32"),
        optimizer=Optimizer(beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.0, clip_grad_norm=1.0),
        seed=7,
        gpu="cpu",
        tokenizer=str(folder / "tokenizer"),
        prompts=[str(folder / "prompts.jsonl")],
        rewards={},
        initial=initial,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.rl.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layout", choices=LAYOUTS, default="single")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for the run; a run of the same layout there is replaced"
    )
    options = parser.parse_args(argv)
    stage_dir = options.output / options.layout
    shutil.rmtree(stage_dir, ignore_errors=True)
    stage_dir.mkdir(parents=True)
    make_job(options.output, options.layout, steps=options.steps).write(stage_dir / "job.json")
    began = time.monotonic()
    code = run_stage(stage_dir, reward)
    rows = read_json_lines(stage_dir / "metrics.jsonl")
    if rows:
        print(
            f"{options.layout}: mean reward {rows[0]['reward']:.3f} -> {rows[-1]['reward']:.3f} in {len(rows)} steps and "
            f"{time.monotonic() - began:.0f} s; largest gap of log-probabilities {max(r['max_gap_nats'] for r in rows):.1e} nats"
        )
    return code


if __name__ == "__main__":
    fast_import.leave(main())
