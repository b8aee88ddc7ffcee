"""Megatron's parameter scheduler with the learning rate of the recipe, as a function of tokens.

Megatron's own schedules know no power law and no curriculum, and take their position from the checkpoint. This one takes it from the
samples of *this* stage and asks recipes.schedules for the absolute rate; muP's groups keep their ratio to the nominal rate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from training.arguments import NOMINAL_LR


class TokenScheduler(OptimizerParamScheduler):
    """`num_steps` counts the samples of this stage, as Megatron increments it.

    `learning_rate(stage_tokens)` -> absolute base learning rate of the step that begins after `stage_tokens` tokens of this stage.
    """

    def __init__(
        self, optimizer: Any, learning_rate: Callable[[int], float], *, seq_length_tokens: int, weight_decay: float
    ) -> None:
        self.learning_rate = learning_rate
        self.seq_length_tokens = seq_length_tokens
        self.ignore_stored_position = False
        self.mup_scaling = True
        super().__init__(
            optimizer,
            init_lr=0.0,
            max_lr=NOMINAL_LR,
            min_lr=0.0,
            lr_warmup_steps=0,
            lr_decay_steps=1,
            lr_decay_style="constant",
            start_wd=weight_decay,
            end_wd=weight_decay,
            wd_incr_steps=1,
            wd_incr_style="constant",
        )

    @property
    def stage_tokens(self) -> int:
        return self.num_steps * self.seq_length_tokens

    def get_lr(self, param_group: dict) -> float:
        """Absolute rate now; a group whose max_lr is a fraction of the nominal rate (muP: 1 / width multiplier) gets that fraction,
        unless `mup_scaling` is off."""
        rate = self.learning_rate(self.stage_tokens)
        return rate * (param_group.get("max_lr", NOMINAL_LR) / NOMINAL_LR) if self.mup_scaling else rate

    def state_dict(self) -> dict:
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state_dict: dict) -> None:
        """On a resume, take the stored position; on a first start, the stored one is another stage's."""
        self.num_steps = 0 if self.ignore_stored_position else int(state_dict["num_steps"])
        self.step(0)
