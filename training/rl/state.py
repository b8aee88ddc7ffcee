"""Where the sampler stands, saved with every checkpoint and checked when one is resumed.

<stage>/sampler/step_0000007.json      written whole before the checkpoint of step 7 is, so that no checkpoint is without it
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from data_prep.files import write_json
from recipes.schema import Strict, describe
from training.handoff import Refused

FOLDER = "sampler"


class SamplerState(Strict):
    """All that the next rollout depends on, beside the weights: which prompts come next, and with the seed, their random numbers."""

    format: Literal["quarry.sampler/1"] = "quarry.sampler/1"
    seed: int
    step: int
    """Steps taken."""
    prompt_position: int
    """Of the next prompt in the endless order (training.rl.prompts.PromptOrder); more than step x prompts with dynamic sampling."""
    consumed_tokens: int
    """Response tokens that went through the loss so far."""

    @staticmethod
    def path(stage_dir: Path, step: int) -> Path:
        return stage_dir / FOLDER / f"step_{step:07d}.json"

    def write(self, stage_dir: Path) -> None:
        path = self.path(stage_dir, self.step)
        path.parent.mkdir(exist_ok=True)
        write_json(path, json.loads(self.model_dump_json()))

    @classmethod
    def read(cls, stage_dir: Path, step: int, seed: int) -> SamplerState:
        """The state beside the checkpoint of `step`; raises Refused if it is missing, damaged or of another seed."""
        path = cls.path(stage_dir, step)
        try:
            state = cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise Refused(
                f"{path} is missing: it is unknown which prompts come next; restore it, or start the stage anew"
            ) from None
        except ValidationError as error:
            raise Refused(f"{path}: {describe(error)}; restore it, or start the stage anew") from None
        if (state.seed, state.step) != (seed, step):
            raise Refused(
                f"{path} is of seed {state.seed} and step {state.step}, the job has seed {seed} and its checkpoint step {step}; restore it"
            )
        return state

    def prune(self, stage_dir: Path, keep: int) -> None:
        """Remove the states of checkpoints older than the `keep` newest."""
        for path in sorted((stage_dir / FOLDER).glob("step_*.json"))[:-keep]:
            path.unlink()
