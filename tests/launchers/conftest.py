"""A tiny recipe built without Hydra, and a launch of it whose stages are tests/launchers/fake_stage.py."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launchers.chain import Launch
from recipes.schema import Recipe

FAKE_STAGE = (sys.executable, str(Path(__file__).with_name("fake_stage.py")))
FAKE_DATA = (sys.executable, "-c", "import sys; print('data from', sys.argv[2])")


def recipe_dict(runs_root: Path, **changes: Any) -> dict[str, Any]:
    """A curriculum a, b, merged, c, hf: three phases of 4 steps, a merge and an export."""
    parallel = {"name": "single", "gpus": 1}
    phase = {
        "title": "Phase",
        "tokens": 128,
        "steps": 4,
        "seq_length_tokens": 16,
        "rope_base": 1e4,
        "global_batch_samples": 2,
        "mixture": {"name": "mix", "shares_percent": {"web": 50.0, "code": 50.0}},
        "schedule": {"kind": "constant", "start_lr": 1e-3},
        "parallel": parallel,
        "precision": {"name": "fp32", "dtype": "fp32"},
        "save_interval_steps": 2,
    }
    source = {"kind": "builtin", "builder": "x"}
    value = {
        "name": "smoke",
        "seed": 1,
        "stages": ["a", "b", "merged", "c", "hf"],
        "phase": {"a": phase, "b": phase, "c": phase},
        "merge": {"merged": {"title": "Merge", "inputs": {"a": 0.5, "b": 0.5}}},
        "export": {"hf": {"title": "Export", "prompts": ["def f(x):", "<script>alert('prompt')</script>"]}},
        "model": {
            "name": "tiny_model",
            "num_layers": 2,
            "hidden_size": 8,
            "ffn_hidden_size": 16,
            "num_attention_heads": 2,
            "num_query_groups": 1,
            "head_dim": 4,
            "vocab_size": 64,
            "tied_embeddings": True,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.25,
            "logits_scaling": 10.0,
            "norm_epsilon": 1e-5,
            "init_std": 0.1,
            "mup_base_hidden_size": None,
            "released_rope_base": 1e4,
            "released_max_position_tokens": 16,
            "published_parameters": None,
        },
        "optimizer": {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1, "clip_grad_norm": 1.0},
        "data": {
            "name": "smoke",
            "root": str(runs_root / "data"),
            "sources": {"web_a": {"category": "web", **source}, "code_a": {"category": "code", **source}},
            "tokenizer": {"kind": "sentencepiece", "vocab_size": 64},
            "heldout_percent": 1.0,
            "heldout_max_tokens": 100,
            "heldout_batch_samples": 2,
            "heldout_seq_length_tokens": 16,
            "max_epochs": 4.0,
        },
        "cluster": {"kind": "local", "name": "local", "gpu": "cpu", "gpus_per_node": 4, "runs_root": str(runs_root)},
    }
    value.update(changes)
    return value


def make_recipe(runs_root: Path, **changes: Any) -> Recipe:
    return Recipe.model_validate(recipe_dict(runs_root, **changes))


class Harness:
    """Launches the fake chain under one folder and looks at what it left."""

    fake_stage = FAKE_STAGE

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.recipe = make_recipe(root)
        self.run_dir = root / "smoke-tiny-model"
        self._monkeypatch = monkeypatch
        self.output = ""

    def dict(self, **changes: Any) -> dict[str, Any]:
        """The recipe as a dictionary, with other values for some top-level keys."""
        return recipe_dict(self.root, **changes)

    def faults(self, **faults: dict[str, Any]) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        (self.run_dir / "faults.json").write_text(json.dumps(faults))

    def launch(self, recipe: Recipe | None = None, **options: Any) -> int:
        """Run the chain; what it printed is in `output`. `recipe` defaults to the harness's."""
        recipe = recipe or self.recipe
        self._monkeypatch.setenv("FAKE_DIGEST", recipe.digest())
        stream = io.StringIO()
        options = {"stage_command": FAKE_STAGE, "data_command": FAKE_DATA, **options}
        try:
            return Launch(
                recipe=recipe, console=Console(file=stream, width=160, highlight=False, markup=False), **options
            ).start()
        finally:
            self.output = stream.getvalue()

    def journal(self, **match: Any) -> list[dict[str, Any]]:
        """Rows of the journal with these values."""
        lines = (self.run_dir / "journal.jsonl").read_text().splitlines()
        rows = []
        for line in lines:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return [row for row in rows if all(row.get(k) == v for k, v in match.items())]

    def starts(self, stage: str) -> int:
        path = self.run_dir / "stages" / stage / "starts"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def steps(self, stage: str) -> list[int]:
        path = self.run_dir / "stages" / stage / "metrics.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Harness:
    return Harness(tmp_path / "runs", monkeypatch)
