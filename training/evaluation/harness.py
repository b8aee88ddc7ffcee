"""Benchmarks by lm-evaluation-harness 0.4.13, which runs in an environment of its own and is never imported here.

One process per benchmark: the few-shot count is an argument of the process, a failure concerns one benchmark, and what is done is done.
Everything is offline: a task whose data set does not lie here is named before anything is measured.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from recipes.schema import describe
from training.evaluation import lm_eval_probe
from training.evaluation.errors import EvaluationError
from training.evaluation.suite import TASK_FILES, Run

VERSION = "0.4.13"
"""Metric names, tasks and their versions belong to it."""
PROBE = Path(lm_eval_probe.__file__)
LINE_SECONDS = 15.0
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
MAKE_ENVIRONMENT = (
    f"python3.12 -m venv lm-eval && lm-eval/bin/pip install 'lm-eval[hf,ifeval,math]=={VERSION}', then --lm-eval lm-eval/bin/python "
    "(docs/evaluation.md)"
)


class _Samples(BaseModel):
    original: int
    effective: int = Field(gt=0)


class _Config(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    limit: float | None
    model_args: dict[str, Any] | str
    model_dtype: str


class Output(BaseModel):
    """The parts of lm-eval's results_*.json that are used; more may be there, none of these may be missing."""

    model_config = ConfigDict(populate_by_name=True)

    results: dict[str, dict[str, Any]]
    versions: dict[str, Any]
    shots: dict[str, int] = Field(alias="n-shot")
    samples: dict[str, _Samples] = Field(alias="n-samples")
    task_hashes: dict[str, str]
    config: _Config
    lm_eval_version: str
    transformers_version: str
    group_subtasks: dict[str, list[str]]
    chat_template_sha: str | None


@dataclass(frozen=True)
class Harness:
    """A Python with lm-eval, and a folder of task files for it."""

    python: Path
    include: Path

    def environment(self) -> dict[str, str]:
        return {**os.environ, **OFFLINE}


def find_python(given: Path | None) -> Path:
    if given is None:
        raise EvaluationError(f"--lm-eval is missing: benchmarks run in an environment of their own; {MAKE_ENVIRONMENT}")
    if not (given.is_file() and os.access(given, os.X_OK)):
        raise EvaluationError(
            f"--lm-eval {given}: no such program; give the Python of lm-eval's environment: {MAKE_ENVIRONMENT}"
        )
    return given.absolute()  # not resolved: a virtual environment's Python is a link, and its place is what makes it that


def write_task_files(target: Path, extra: Path | None) -> None:
    """Our task files and those of `extra` in `target`, with paths of their data files made absolute (lm-eval takes them from its folder).

    Raises EvaluationError for a folder that is not there, a file of one name in both, or data that is missing.
    """
    shutil.copytree(TASK_FILES, target, dirs_exist_ok=True)
    if extra is not None:
        if not extra.is_dir():
            raise EvaluationError(f"--include-path {extra}: no such folder; give one with lm-eval task files (*.yaml)")
        clash = [p.name for p in extra.iterdir() if (target / p.name).exists()]
        if clash:
            raise EvaluationError(f"--include-path {extra}: {clash[0]} is also a file of recipes/evaluation/tasks; rename it")
        shutil.copytree(extra, target, dirs_exist_ok=True)
    for path in sorted(target.rglob("*.yaml")):
        _absolute_data_files(path)


def _absolute_data_files(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if "data_files" not in text:
        return
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise EvaluationError(f"{path.name}: a task file with data_files must be plain YAML (no !function): {error}") from None
    files = (content.get("dataset_kwargs") or {}).get("data_files")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise EvaluationError(
            f"{path.name}: dataset_kwargs.data_files must map splits to one file each, e.g. {{test: mine.jsonl}}"
        )
    for split, name in files.items():
        data = path.parent / name  # an absolute name stays what it is
        if not data.is_file():
            raise EvaluationError(
                f"{path.name}: data file {name} is missing; put it beside the task file or give an absolute path"
            )
        files[split] = str(data.absolute())
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")


def probe(harness: Harness, tasks: Iterable[str], run_code: bool) -> dict[str, list[str]]:
    """Task or group -> names of the tasks in it, of those that can run here.

    Raises EvaluationError naming everything that cannot: another version, an unknown task, a data set that is not there, generated code that
    would be executed without --run-generated-code.
    """
    names = list(dict.fromkeys(tasks))
    command = [str(harness.python), str(PROBE), str(harness.include.absolute()), *names]
    done = subprocess.run(command, env=harness.environment(), capture_output=True, text=True, check=False)
    said = [
        json.loads(line.removeprefix(lm_eval_probe.PREFIX))
        for line in done.stdout.splitlines()
        if line.startswith(lm_eval_probe.PREFIX)
    ]
    if not said or "version" not in said[0]:
        words = (done.stderr or done.stdout).strip()[-1500:]
        raise EvaluationError(f"--lm-eval {harness.python}: lm-eval does not start there; {MAKE_ENVIRONMENT}\n{words}")
    if said[0]["version"] != VERSION:
        raise EvaluationError(
            f"--lm-eval {harness.python}: it has lm-eval {said[0]['version']}, the task list is for {VERSION}; {MAKE_ENVIRONMENT}"
        )
    found = {one["task"]: one for one in said[1:]}
    problems, missing = [], []
    for name in names:
        one = found.get(name)
        if one is None:
            words = (done.stderr or done.stdout).strip()[-500:]
            problems.append(f"{name}: lm-eval ended (exit {done.returncode}) before it was looked at: {words}")
        elif not one["known"]:
            problems.append(f"{name}: lm-eval {VERSION} has no such task; `{harness.python} -m lm_eval ls tasks` lists them")
        elif one.get("error", "").startswith("ModuleNotFoundError"):
            problems.append(f"{name}: a package is missing in lm-eval's environment ({one['error']}); {MAKE_ENVIRONMENT}")
        elif "error" in one:
            missing.append(name)
            problems.append(f"{name}: its data cannot be loaded ({one['error'].splitlines()[0][:300]})")
        elif one["unsafe_code"] and not run_code:
            problems.append(
                f"{name}: it executes what the model writes; in a container without network, add --run-generated-code"
            )
    if problems:
        if missing:
            load = " ".join([str(harness.python), str(PROBE), str(harness.include), *missing])
            problems.append(
                f"data: where there is a network, set HF_HOME to a folder and run `{load}`, copy it here and set HF_HOME; or bring task "
                "files with local data_files (--include-path)"
            )
        raise EvaluationError("\n  ".join(["benchmarks that cannot run (--skip BENCHMARK leaves one out):", *problems]))
    return {name: found[name]["tasks"] for name in names}


def run_benchmark(
    harness: Harness,
    run: Run,
    *,
    model: Path,
    device: str,
    dtype: str,
    batch_size: int,
    chat_template: bool,
    run_code: bool,
    limit: int | None,
    log: Path,
    message: Callable[[str], None],
) -> dict[str, Any]:
    """One benchmark by one lm-eval process; what it measured, parsed. `log` gets all that lm-eval prints.

    Raises EvaluationError with the end of the log if lm-eval fails or says something else than it was asked for.
    """
    if set(",=") & set(str(model.absolute())):
        raise EvaluationError(f"{model.absolute()}: lm-eval cannot take a path with ',' or '='; move the model")
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [str(harness.python), "-m", "lm_eval", "run", "--model", "hf"]
        command += ["--model_args", f"pretrained={model.absolute()},dtype={dtype}", "--tasks", run.task]
        command += ["--include_path", str(harness.include.absolute()), "--device", device, "--batch_size", str(batch_size)]
        command += ["--output_path", folder, "--log_samples"]  # task hashes are only made with --log_samples
        if run.metric:
            command += ["--num_fewshot", str(run.shots)]
        if limit is not None:
            command += ["--limit", str(limit)]
        if chat_template:
            command += ["--apply_chat_template", "--fewshot_as_multiturn", "true"]
        environment = harness.environment()
        if run_code:
            command += ["--confirm_run_unsafe_code"]
            environment["HF_ALLOW_CODE_EVAL"] = "1"
        code = _follow(command, environment, Path(folder), log, message)
        files = sorted(Path(folder).rglob("results_*.json"))
        if code != 0 or len(files) != 1:
            tail = log.read_text(encoding="utf-8", errors="replace")[-1500:].strip()
            raise EvaluationError(f"lm-eval on {run.task}: exit code {code}, {len(files)} result files; see {log}:\n{tail}")
        return parse(files[0], run, limit)


def _follow(command: list[str], environment: dict[str, str], folder: Path, log: Path, message: Callable[[str], None]) -> int:
    """Run `command` with its output in `log`; now and then its last line (lm-eval's progress bar) goes to `message`.

    In `folder`: `python -m` looks for modules in the current one first, which may have an `evaluate` or a `datasets` of its own.
    """
    with open(log, "wb") as sink:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=sink, stderr=subprocess.STDOUT)
        try:
            said = time.monotonic()
            while True:
                try:
                    return process.wait(timeout=0.5)
                except subprocess.TimeoutExpired:
                    if time.monotonic() - said > LINE_SECONDS:
                        said = time.monotonic()
                        if last := _last_line(log):
                            message(f"    {last}")
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()


def _last_line(log: Path) -> str:
    with open(log, "rb") as f:
        f.seek(0, os.SEEK_END)
        f.seek(max(0, f.tell() - 4000))
        words = f.read().decode("utf-8", "replace")
    lines = [line.strip() for line in words.replace("\r", "\n").split("\n") if line.strip()]
    return lines[-1][:160] if lines else ""


def parse(path: Path, run: Run, limit: int | None) -> dict[str, Any]:
    """What lm-eval wrote to `path`, checked against what `run` asked for.

    {"value", "stderr", "metrics", "tasks": {name: {"version", "sha256", "shots", "documents", "of"}}, ...}; `value` as lm-eval gives it (a
    fraction for accuracies). Raises EvaluationError naming the file and key that is missing, not a number, or not what was asked.
    """
    try:
        output = Output.model_validate(json.loads(path.read_bytes()))
    except ValidationError as error:
        raise EvaluationError(f"{path.name} of lm-eval: {describe(error)}; it is not the format of lm-eval {VERSION}") from None
    except ValueError as error:
        raise EvaluationError(f"{path.name} of lm-eval is no JSON ({error}); run the benchmark again") from None
    if output.lm_eval_version != VERSION:
        raise EvaluationError(f"{path.name}: lm_eval_version is {output.lm_eval_version!r}, expected {VERSION}")
    if run.task not in output.results:
        raise EvaluationError(f"{path.name}: results has {sorted(output.results)}, not {run.task!r}")
    if output.config.limit != limit:
        raise EvaluationError(f"{path.name}: config.limit is {output.config.limit}, asked for was {limit}")
    metrics = {k: v for k, v in output.results[run.task].items() if "," in k and "_stderr," not in k}
    value, error = None, None
    if run.metric:
        if run.metric not in metrics:
            raise EvaluationError(
                f"{path.name}: {run.task} has no metric {run.metric!r} but {sorted(metrics)}; correct recipes/evaluation"
            )
        name, _, kind = run.metric.partition(",")
        value, error = metrics[run.metric], output.results[run.task].get(f"{name}_stderr,{kind}")
    elif not metrics:
        raise EvaluationError(
            f"{path.name}: {run.task} has no metric of its own; name a task of {output.group_subtasks.get(run.task)}"
        )
    for name, number in metrics.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise EvaluationError(f"{path.name}: {run.task} {name} is {number!r}, no finite number; see the log")
    tasks = {}
    for name, count in output.samples.items():
        for key, table in (("versions", output.versions), ("task_hashes", output.task_hashes), ("n-shot", output.shots)):
            if name not in table:
                raise EvaluationError(f"{path.name}: {key} has no {name!r}; it is not the format of lm-eval {VERSION}")
        if run.metric and output.shots[name] != run.shots:
            raise EvaluationError(f"{path.name}: {name} ran with {output.shots[name]} examples, asked for were {run.shots}")
        tasks[name] = {
            "version": output.versions[name],
            "sha256": output.task_hashes[name],
            "shots": output.shots[name],
            "documents": count.effective,
            "of": count.original,
        }
    if not tasks:
        raise EvaluationError(f"{path.name}: n-samples is empty, nothing was measured")
    return {
        "task": run.task,
        "metric": run.metric or None,
        "value": value,
        # lm-eval writes "N/A" where it knows none
        "stderr": error if isinstance(error, int | float) else None,
        "metrics": metrics,
        "tasks": tasks,
        "limit": limit,
        "chat_template_sha256": output.chat_template_sha,
        "model_dtype": output.config.model_dtype,
        "lm_eval": output.lm_eval_version,
        "transformers": output.transformers_version,
    }
