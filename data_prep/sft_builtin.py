"""Chat samples that every installation can make: questions of reasoning-gym's seeded generators with their answers.

For the smoke curriculum and for trying things out. The problems are not those of the pre-training corpus (data_prep/corpus/reasoning.py):
another seed, and settings small enough that a tiny model learns to answer.
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

SEED = 20_261_127
VERSION = 1
"""Raised whenever the samples change."""
KINDS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("algorithmic.spell_backward", "SpellBackward", {"min_word_len": 3, "max_word_len": 7}),
    ("algorithmic.letter_counting", "LetterCounting", {"min_words": 3, "max_words": 6}),
    ("algorithmic.number_sorting", "NumberSorting", {"min_numbers": 3, "max_numbers": 5, "min_value": 0, "max_value": 99}),
    ("arithmetic.chain_sum", "ChainSum", {"max_terms": 3, "max_digits": 2}),
)
"""(module below reasoning_gym, data set, settings)"""


def reasoning_chat(samples: int, seed: int = SEED) -> Iterator[dict[str, Any]]:
    """`samples` conversations of one turn, the kinds in turn."""
    with _modules([module for module, _, _ in KINDS]) as modules:
        datasets = []
        for module, name, settings in KINDS:
            config = getattr(modules[module], f"{name}Config")(seed=seed, size=samples // len(KINDS) + 1, **settings)
            datasets.append(getattr(modules[module], f"{name}Dataset")(config))
        for number in range(samples):
            entry = datasets[number % len(KINDS)][number // len(KINDS)]
            messages = [{"role": "user", "content": entry["question"]}, {"role": "assistant", "content": str(entry["answer"])}]
            yield {"messages": messages, "id": number, "category": KINDS[number % len(KINDS)][0]}


def more_reasoning_chat(samples: int) -> Iterator[dict[str, Any]]:
    """Others of the same kinds, for a second source beside the first."""
    return reasoning_chat(samples, SEED + 1)


BUILDERS: dict[str, Callable[[int], Iterator[dict[str, Any]]]] = {
    "reasoning_chat": reasoning_chat,
    "more_reasoning_chat": more_reasoning_chat,
}


def build(name: str, samples: int, folder: Path) -> Path:
    """The file with the samples of builder `name`, made if it is not there; its name says what it was made with."""
    if name not in BUILDERS:
        raise DataError(f"no builder of chat samples '{name}'; known: {', '.join(sorted(BUILDERS))}")
    made_with = digest_of(
        {"builder": name, "samples": samples, "version": VERSION, "reasoning-gym": importlib.metadata.version("reasoning-gym")}
    )
    path = folder / f"{name}-{made_with[:16]}.jsonl"
    if not path.exists():
        with atomic_write(path) as f:
            for sample in BUILDERS[name](samples):
                f.write(json.dumps(sample, ensure_ascii=False).encode() + b"\n")
    return path
