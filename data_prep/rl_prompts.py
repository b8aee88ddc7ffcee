"""Prompts of reinforcement-learning stages while data are prepared: files are looked for, and built-in ones are made.

Built-in prompts are questions of reasoning-gym's seeded generators with their answers (format: training/rl/prompts.py), for the smoke
curriculum and for trying things out.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_prep.corpus.reasoning import _modules
from data_prep.errors import DataError
from data_prep.files import atomic_write, digest_of
from data_prep.text_files import expand
from recipes.posttrain import GrpoStage

SEED = 20_261_129
"""Another than that of data_prep/sft_builtin.py: what is rolled out has not been memorised."""
DIGITS = frozenset("0123456789")
VERSION = 2
"""Raised whenever the prompts change."""


def small_sums(count: int) -> Iterator[dict[str, Any]]:
    """Sums and differences of two digits whose answer is a digit too, each question once: few answers, so that a tiny model meets some."""
    with _modules(["arithmetic.chain_sum"]) as modules:
        module = modules["arithmetic.chain_sum"]
        config = module.ChainSumConfig(seed=SEED, size=100 * count, min_terms=2, max_terms=2, min_digits=1, max_digits=1)
        seen: set[str] = set()
        for entry in module.ChainSumDataset(config):
            if len(seen) == count:
                return
            if entry["question"] not in seen and str(entry["answer"]) in DIGITS:
                seen.add(entry["question"])
                yield {
                    "messages": [{"role": "user", "content": entry["question"]}],
                    "reference": str(entry["answer"]),
                    "domain": "math",
                }
    if len(seen) < count:
        raise DataError(f"small_sums: there are {len(seen)} different questions, {count} were asked for; lower max_prompts")


BUILDERS: dict[str, Callable[[int], Iterator[dict[str, Any]]]] = {"small_sums": small_sums}


def prompt_paths(grpo: GrpoStage, stage: str, data_root: Path) -> list[Path]:
    """The stage's files of prompts, sorted; DataError for a pattern that matches none, or built-in prompts that are not made yet."""
    if grpo.builder is None:
        return expand(grpo.prompts, f"grpo.{stage}.prompts")
    path = _built(grpo, stage, data_root)
    if not path.exists():
        raise DataError(f"grpo.{stage}.builder: {path} is not there; `quarry prep` makes it")
    return [path]


def prepare_prompts(grpo: GrpoStage, stage: str, data_root: Path) -> list[Path]:
    """The same, with built-in prompts made where they are not there."""
    if grpo.builder is not None:
        path = _built(grpo, stage, data_root)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as f:
                for prompt in BUILDERS[grpo.builder](grpo.max_prompts or 0):
                    f.write(json.dumps(prompt, ensure_ascii=False).encode() + b"\n")
    return prompt_paths(grpo, stage, data_root)


def _built(grpo: GrpoStage, stage: str, data_root: Path) -> Path:
    """Its name says what the file was made with."""
    if grpo.builder not in BUILDERS:
        raise DataError(f"grpo.{stage}.builder: no builder of prompts '{grpo.builder}'; known: {', '.join(sorted(BUILDERS))}")
    made_with = digest_of(
        {
            "builder": grpo.builder,
            "prompts": grpo.max_prompts,
            "version": VERSION,
            "reasoning-gym": importlib.metadata.version("reasoning-gym"),
        }
    )
    return data_root / "grpo" / stage / f"{grpo.builder}-{made_with[:16]}.jsonl"
