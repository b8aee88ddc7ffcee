"""A list of benchmarks (recipes/evaluation): what was published of each, how lm-eval runs it, and whether the two compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from data_prep.files import Strict
from recipes.compose import TREE
from recipes.schema import describe
from training.evaluation.errors import EvaluationError

FOLDER = TREE / "evaluation"
TASK_FILES = FOLDER / "tasks"

Size = Literal["3b", "8b", "30b"]
SIZES: tuple[Size, ...] = ("3b", "8b", "30b")


class Benchmark(Strict):
    """A published number, with what is known of how it was measured."""

    title: str
    setting: str
    percent: dict[Size, float]
    """Per model size, on a scale of 0 to 100 (MT-Bench: of 0 to 10)."""

    @model_validator(mode="after")
    def _all_sizes(self) -> Benchmark:
        if missing := [size for size in SIZES if size not in self.percent]:
            raise ValueError(f"percent has no value for {', '.join(missing)}; a row of the published table has all sizes")
        return self


class Run(Strict):
    """How lm-eval measures it."""

    task: str
    """Name of a task or group of lm-eval or of recipes/evaluation/tasks."""
    metric: str
    """Key of lm-eval's results: metric,filter."""
    shots: Annotated[int, Field(ge=0)]
    """Few-shot examples; a result that reports others is refused."""
    comparable: Literal["close", "differs", "none"]
    """close: same benchmark, examples and kind of answer, while prompts and code of the publisher are unknown. differs: see `why`."""
    why: str = ""


class Suite(Strict):
    name: str
    published_by: str = ""
    """Whose the numbers of `benchmarks` are; they are never ours."""
    chat_template: bool = False
    benchmarks: dict[str, Benchmark] = Field(default_factory=dict)
    run: dict[str, Run]
    not_run: dict[str, str] = Field(default_factory=dict)
    """Benchmark -> why lm-eval does not measure it here."""

    @model_validator(mode="after")
    def _complete(self) -> Suite:
        twice = set(self.run) & set(self.not_run)
        lost = [name for name in self.benchmarks if name not in self.run and name not in self.not_run]
        unknown = [name for name in self.not_run if name not in self.benchmarks]
        if twice or lost or unknown:
            raise ValueError(
                f"each benchmark is in run or in not_run: both {sorted(twice)}, neither {lost}, not listed {unknown}"
            )
        silent = [name for name, run in self.run.items() if run.comparable != "close" and not run.why]
        if silent:
            raise ValueError(f"run.{silent[0]}: `why` is missing; say in what it differs")
        return self


def suites() -> list[str]:
    """Names of the lists in recipes/evaluation."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_suite(name: str) -> Suite:
    """The list recipes/evaluation/`name`.yaml; EvaluationError naming file and key for what is wrong in it."""
    return read_suite(FOLDER / f"{name}.yaml")


def read_suite(path: Path) -> Suite:
    try:
        suite = Suite.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path} is no YAML: {error}") from None
    except ValidationError as error:
        raise EvaluationError(f"{path}: {describe(error)}") from None
    if suite.name != path.stem:
        raise EvaluationError(f"{path}: name is {suite.name!r}, must be that of the file, {path.stem!r}")
    return suite


def single_task(task: str) -> Suite:
    """A list of one task of lm-eval's own, of which all metrics are recorded and none compared."""
    run = Run(
        task=task, metric="", shots=0, comparable="none", why="named on the command line; nothing published is known of it"
    )
    return Suite(name=task, run={task: run})
