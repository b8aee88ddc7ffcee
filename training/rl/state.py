"""Where the sampler stands, saved with every checkpoint and checked when one is resumed.

<stage>/sampler/step_0000007.json      written whole before the checkpoint of step 7 is, so that no checkpoint is without it
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from data_prep.files import write_json
from recipes.schema import Strict, describe
from training.handoff import Refused

FOLDER = "sampler"

Windows = dict[str, list[str | None]]
"""Domain -> its last scores, the oldest first: why one failed, None where it did not (training.rewards.statistics.FailureGuard)."""


class SamplerState(Strict):
    """All that the next rollout depends on, beside the weights: which prompts come next, and with the seed, their random numbers.

    And what has been seen of failing scores, so that a stage which its guard stopped does not begin to count anew.
    """

    format: Literal["quarry.sampler/1"] = "quarry.sampler/1"
    seed: int
    step: int
    """Steps taken."""
    prompt_position: int
    """Of the next prompt in the endless order (training.rl.prompts.PromptOrder); more than step x prompts with dynamic sampling."""
    consumed_tokens: int
    """Response tokens that went through the loss so far."""
    failures: list[Windows] = Field(default_factory=list)
    """Per data-parallel replica, which has a guard of its own; empty where a function of the caller's scores."""

    def failures_of(self, replica: int, replicas: int) -> Windows:
        """What the guard of `replica` begins with, of `replicas` that there are now.

        With as many as were saved each has its own again; else each has the samples of all, in turn, whose share of failures is the whole's.
        """
        if replicas == len(self.failures):
            return self.failures[replica]
        domains = sorted({domain for windows in self.failures for domain in windows})
        return {domain: _in_turn([windows.get(domain, []) for windows in self.failures]) for domain in domains}

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


def _in_turn(windows: Sequence[Sequence[str | None]]) -> list[str | None]:
    """One of each, from the newest backwards, the oldest first."""
    absent = object()
    turns = itertools.zip_longest(*(reversed(window) for window in windows), fillvalue=absent)
    newest_first = [entry for turn in turns for entry in turn if entry is not absent]
    return newest_first[::-1]  # type: ignore[return-value]
