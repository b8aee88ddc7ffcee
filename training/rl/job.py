"""What one reinforcement-learning stage is told, as one file that its ranks read; and what of it cannot be.

`job.json` lies in the stage's folder; checkpoints, metrics and logs come beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from data_prep.files import digest_of, write_json
from recipes.grpo_stage import phase_of, trainer_rules
from recipes.job_options import Optimizer, Parallel, Precision
from recipes.lint_optimizer import dtype_rules
from recipes.posttrain import Grpo
from recipes.schema import Model, RecipeError, Strict, read_strict
from training import arguments as pretraining
from training.arguments import Load

RESUMABLE_CHANGES = {"save_interval_steps", "keep_checkpoints", "exit_after_minutes", "record_samples", "title"}
"""Settings that alter where and how often things happen, not what is learned."""


class Initial(Strict):
    """The checkpoint that the stage starts from, whose weights are also the reference of the KL term."""

    checkpoints: str
    """Folder that holds iter_*."""
    step: int


class Job(Strict):
    format: Literal["quarry.grpo/1"] = "quarry.grpo/1"
    model: Model
    grpo: Grpo
    parallel: Parallel
    precision: Precision
    optimizer: Optimizer
    seed: int
    gpu: Literal["cpu", "h100", "h200", "b200", "gb200"]
    """What a rank runs on."""
    tokenizer: str
    """Tokenizer folder or SentencePiece model."""
    prompts: list[str]
    """JSON-lines files (training/rl/prompts.py)."""
    rewards: dict[str, Any]
    """A reward plan (training/rewards/plan.py); empty where the caller brings a function of its own."""
    initial: Initial | None
    """None: random weights."""

    @classmethod
    def read(cls, path: Path) -> Job:
        """Raises RecipeError naming the file and every wrong key."""
        return read_strict(cls, path, missing=f"no job at {path}")

    def write(self, path: Path) -> None:
        write_json(path, json.loads(self.model_dump_json()))

    def digest(self, prompts_digest: str, tokenizer_digest: str) -> str:
        """Of everything that decides the numbers of this stage, but for the layout: a resume must find it unchanged."""
        return digest_of(
            {
                "model": self.model.model_dump(mode="json"),
                "grpo": self.grpo.model_dump(mode="json", exclude=RESUMABLE_CHANGES),
                "precision": self.precision.model_dump(mode="json"),
                "optimizer": self.optimizer.model_dump(mode="json"),
                "seed": self.seed,
                "rewards": self.rewards,
                "prompts": prompts_digest,
                "tokenizer": tokenizer_digest,
                "initial": None if self.initial is None else self.initial.model_dump(mode="json"),
            }
        )

    def check(self) -> None:
        """Raise RecipeError with everything that this trainer cannot do, each with a value that would pass."""
        grpo, layout = self.grpo, self.parallel
        problems = []
        if grpo.rope_base is None:
            problems.append("grpo.rope_base is null: outside a curriculum there is no phase before; give the model's")
        if layout.gpus % layout.model_parallel:
            problems.append(f"parallel.gpus is {layout.gpus}, not a multiple of tensor x pipeline = {layout.model_parallel}")
        problems += map(str, trainer_rules(grpo, layout, self.precision, key="grpo", parts=""))
        if grpo.kl_coefficient > 0 and self.initial is None:
            problems.append(
                "grpo.kl_coefficient is positive but there is no initial checkpoint to be the reference; set it to 0"
            )
        problems += map(str, dtype_rules(self.optimizer, self.precision, self.gpu, key="optimizer", precision_key="precision"))
        if problems:
            raise RecipeError("; ".join(problems))

    def compile(self, stage_dir: Path, load: Load | None) -> list[str]:
        """The exact Megatron arguments, with those of pre-training for model, layout, precision and optimizer."""
        grpo = self.grpo
        samples = grpo.steps * grpo.samples_per_step
        phase = phase_of(grpo, self.parallel, self.precision)
        arguments = [
            *pretraining._model(self.model, phase),
            *pretraining._layout(phase),
            *pretraining._precision(phase),
            *pretraining._optimizer(self.optimizer),
            *pretraining._values(train_samples=samples, eval_iters=0, eval_interval=phase.steps + 1, seed=self.seed),
            *pretraining._checkpoints(phase, stage_dir, load),
            *(pretraining._cpu() if self.gpu == "cpu" else pretraining._gpu()),
        ]
        if load is not None and not load.resume:
            # Weights only: Adam's moments belong to another objective.
            arguments.append("--finetune")
        return arguments
