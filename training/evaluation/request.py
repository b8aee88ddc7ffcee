"""What one evaluation is asked for, as one object that a command line and a stage of a chain fill in the same way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from data_prep.files import Strict
from recipes.schema import describe
from training.evaluation.errors import EvaluationError

PARTS = ("heldout", "needle")
"""Words of --tasks that are no benchmark."""

Length = Annotated[int, Field(gt=0)]


class NeedleOptions(Strict):
    lengths_tokens: list[Length] = Field(default_factory=list)
    """Prompt and answer together, in tokens; empty: half and all of what the model was trained on."""
    depths_percent: list[Annotated[float, Field(ge=0, le=100)]] = Field(default_factory=lambda: [0, 25, 50, 75, 100])
    samples: Annotated[int, Field(gt=0)] = 8
    """Per length and depth."""
    choices: Annotated[int, Field(ge=2)] = 8
    """The answer and its distractors; chance is 1 / choices."""
    keys: Annotated[int, Field(ge=1, le=32)] = 4
    """Sentences of the needle's kind in one text: the one asked for, and others whose values are distractors that were really seen."""
    seed: Annotated[int, Field(ge=0)] = 0

    @field_validator("lengths_tokens", "depths_percent")
    @classmethod
    def _distinct(cls, value: list[float]) -> list[float]:
        if len(set(value)) != len(value):
            raise ValueError(f"{value} names one value twice; name each once")
        return value

    @model_validator(mode="after")
    def _keys_are_candidates(self) -> NeedleOptions:
        if self.keys > self.choices:
            raise ValueError(
                f"keys is {self.keys}, more than the {self.choices} choices, which hold the codes of the text; lower it"
            )
        return self


class Request(Strict):
    model: Path
    """Hugging Face folder, export stage, stage folder, checkpoints folder or iter_* folder."""
    output: Path
    tasks: list[str] = Field(default_factory=lambda: list(PARTS))
    """heldout, needle, names of recipes/evaluation, names of lm-eval's own tasks."""
    heldout_data: Path | None = None
    """Data root with heldout/manifest.json; None: that of the run that the checkpoint lies in."""
    heldout_samples: Annotated[int, Field(gt=0)] | None = None
    """Sequences per category; None: as many as the run's recipe has, else 64."""
    needle: NeedleOptions = NeedleOptions()
    lm_eval: Path | None = None
    """Python of the environment that lm-eval 0.4.13 is installed in."""
    include_path: Path | None = None
    """Folder of lm-eval task files beside ours."""
    skip: list[str] = Field(default_factory=list)
    """Benchmarks of the lists that are left out, such as those whose data are not here."""
    run_generated_code: bool = False
    """Benchmarks that execute what the model writes are refused without it."""
    limit: Annotated[int, Field(gt=0)] | None = None
    """Documents per benchmark task, for trying; results are marked."""
    batch_size: Annotated[int, Field(gt=0)] = 4
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @classmethod
    def make(cls, **values: object) -> Request:
        """EvaluationError naming every value that is wrong."""
        return cls.read(json.dumps(values, default=str))

    @classmethod
    def read(cls, text: str) -> Request:
        """The same from JSON."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise EvaluationError(describe(error)) from None
