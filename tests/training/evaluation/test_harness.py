"""lm-eval behind a stand-in that writes files in the form recorded from lm-eval 0.4.13: what it says is taken strictly or refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.training.evaluation.conftest import StandIn
from training.evaluation import harness
from training.evaluation.errors import EvaluationError
from training.evaluation.suite import Run, load_suite

RECORDED = Path(__file__).with_name("lm_eval_results.json")
RUN = Run(task="quarry_smoke_choice", metric="acc,none", shots=2, comparable="none", why="test")


def edited(tmp_path: Path, path: str, value: Any) -> Path:
    """The recorded results with one value replaced (None: removed)."""
    content = json.loads(RECORDED.read_text())
    *parents, last = path.split("/")
    place = content
    for key in parents:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    target = tmp_path / "results_x.json"
    target.write_text(json.dumps(content))
    return target


def test_the_recorded_results_are_read() -> None:
    found = harness.parse(RECORDED, RUN, None)
    assert found["value"] == pytest.approx(11 / 24)
    assert found["stderr"] == pytest.approx(0.10389457)
    assert found["tasks"] == {
        "quarry_smoke_choice": {
            "version": 1.0,
            "sha256": "97e9f7c4cc508da77d4762c8bbc25f05803a7082db22fe57d4327df7c61e04ce",
            "shots": 2,
            "documents": 24,
            "of": 24,
        }
    }
    assert found["lm_eval"] == "0.4.13"
    assert set(found["metrics"]) == {"acc,none", "acc_norm,none"}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("results/quarry_smoke_choice/acc,none", float("nan"), "no finite number"),
        ("results/quarry_smoke_choice/acc,none", "0.9", "no finite number"),
        ("results/quarry_smoke_choice/acc,none", None, "has no metric 'acc,none' but"),
        ("results/quarry_smoke_choice", None, "not 'quarry_smoke_choice'"),
        ("lm_eval_version", "0.4.12", "lm_eval_version is '0.4.12'"),
        ("n-shot/quarry_smoke_choice", 5, "ran with 5 examples, asked for were 2"),
        ("n-samples/quarry_smoke_choice/effective", 0, "n-samples"),
        ("n-samples", {}, "nothing was measured"),
        ("task_hashes", None, "task_hashes"),
        ("task_hashes", {}, "task_hashes has no 'quarry_smoke_choice'"),
        ("versions", {}, "versions has no 'quarry_smoke_choice'"),
        ("config/limit", 10.0, "config.limit is 10.0, asked for was None"),
        ("config/model_dtype", None, "model_dtype"),
    ],
)
def test_what_is_not_as_asked_is_refused(tmp_path: Path, path: str, value: Any, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        harness.parse(edited(tmp_path, path, value), RUN, None)


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results_cut.json"
    path.write_bytes(RECORDED.read_bytes()[:700])
    with pytest.raises(EvaluationError, match="no JSON"):
        harness.parse(path, RUN, None)


def tools(stand_in: StandIn, tmp_path: Path, extra: Path | None = None) -> harness.Harness:
    include = tmp_path / "include"
    harness.write_task_files(include, extra)
    return harness.Harness(harness.find_python(stand_in.python), include)


def test_the_probe_names_everything_that_cannot_run(stand_in: StandIn, tmp_path: Path) -> None:
    used = tools(stand_in, tmp_path)
    fine = {"known": True, "tasks": ["a_x", "a_y"], "unsafe_code": False}
    lost = {"known": True, "error": "ConnectionError: Couldn't reach 'cais/mmlu' on the Hub"}
    code = {"known": True, "tasks": ["humaneval"], "unsafe_code": True}
    stand_in.orders(tasks={"a": fine, "mmlu": lost, "humaneval": code})
    assert harness.probe(used, ["a"], run_code=False) == {"a": ["a_x", "a_y"]}
    assert harness.probe(used, ["humaneval", "humaneval"], run_code=True) == {"humaneval": ["humaneval"]}
    with pytest.raises(EvaluationError) as caught:
        harness.probe(used, ["a", "mmlu", "humaneval", "nothing"], run_code=False)
    for words in (
        "mmlu: its data cannot be loaded",
        "cais/mmlu",
        "HF_HOME",
        "--skip BENCHMARK",
        "--run-generated-code",
        "nothing: lm-eval 0.4.13 has no such",
    ):
        assert words in str(caught.value)
    assert "\n  a:" not in str(caught.value)
    stand_in.orders(tasks={"ifeval": {"known": True, "error": "ModuleNotFoundError: No module named 'langdetect'"}})
    with pytest.raises(
        EvaluationError, match=r"a package is missing in lm-eval's environment .*langdetect.*lm-eval\[hf,ifeval,math\]"
    ):
        harness.probe(used, ["ifeval"], run_code=False)
    stand_in.orders(tasks={}, version="0.4.9")
    with pytest.raises(EvaluationError, match=r"has lm-eval 0\.4\.9, the task list is for 0\.4\.13.*pip install"):
        harness.probe(used, ["a"], run_code=False)


def test_the_probe_does_not_hide_packages_behind_our_modules(tmp_path: Path) -> None:
    """Its folder has an evaluate.py; lm-eval's tasks import a package of that name."""
    package = tmp_path / "lm_eval"
    (package / "tasks").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "tasks" / "__init__.py").write_text(
        "import evaluate\nclass TaskManager:\n    task_index = ()\n    def __init__(self, include_path): print('QUARRY', evaluate.ME)\n"
    )
    (tmp_path / "evaluate.py").write_text("ME = '\"theirs\"'\n")
    (tmp_path / "lm_eval-0.4.13.dist-info").mkdir()
    (tmp_path / "lm_eval-0.4.13.dist-info" / "METADATA").write_text("Name: lm_eval\nVersion: 0.4.13\n")
    command = [sys.executable, str(harness.PROBE), str(tmp_path), "a"]
    done = subprocess.run(command, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 'QUARRY "theirs"' in done.stdout
    assert done.stdout.startswith('QUARRY {"version": "0.4.13"')


def test_programs_that_are_not_lm_eval_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="--lm-eval is missing.*pip install"):
        harness.find_python(None)
    with pytest.raises(EvaluationError, match="no such program"):
        harness.find_python(tmp_path / "python")
    with pytest.raises(EvaluationError, match="lm-eval does not start there"):
        harness.probe(harness.Harness(Path("/bin/true"), tmp_path), ["a"], run_code=False)


def run(used: harness.Harness, tmp_path: Path, model: Path | None = None, **options: Any) -> dict[str, Any]:
    given = {"device": "cpu", "dtype": "float32", "batch_size": 4, "chat_template": False, "run_code": False, "limit": None}
    log = tmp_path / "log.txt"
    return harness.run_benchmark(used, RUN, model=model or tmp_path, log=log, message=print, **(given | options))


def test_a_benchmark_runs_offline_with_what_was_asked(stand_in: StandIn, tmp_path: Path) -> None:
    used = tools(stand_in, tmp_path)
    found = run(used, tmp_path, limit=5)
    assert (found["value"], found["limit"]) == (pytest.approx(11 / 24), 5)
    (call,) = stand_in.calls()
    words = " ".join(call["arguments"])
    assert call["offline"] == "1"
    for part in (
        f"pretrained={tmp_path},dtype=float32",
        "--num_fewshot 2",
        f"--include_path {used.include}",
        "--log_samples",
        "--limit 5",
    ):
        assert part in words
    assert "unsafe" not in words
    assert "chat_template" not in words
    run(used, tmp_path, chat_template=True, run_code=True)
    assert {"--apply_chat_template", "--confirm_run_unsafe_code"} <= set(stand_in.calls()[1]["arguments"])
    assert "loglikelihood requests" in (tmp_path / "log.txt").read_text()


def test_a_failed_benchmark_shows_the_end_of_its_log(stand_in: StandIn, tmp_path: Path) -> None:
    used = tools(stand_in, tmp_path)
    stand_in.orders(tasks={}, exit={"quarry_smoke_choice": 3})
    with pytest.raises(EvaluationError, match=r"(?s)exit code 3, 0 result files; see .*log.txt.*loglikelihood"):
        run(used, tmp_path)
    with pytest.raises(EvaluationError, match="cannot take a path with"):
        run(used, tmp_path, model=tmp_path / "a,b")


def test_task_files_find_their_data(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "x.yaml").write_text("task: x\ndataset_path: json\ndataset_kwargs: {data_files: {test: x.jsonl}}\n")
    with pytest.raises(EvaluationError, match=r"x.yaml: data file x.jsonl is missing"):
        harness.write_task_files(tmp_path / "a", mine)
    (mine / "x.jsonl").write_text("{}\n")
    harness.write_task_files(tmp_path / "b", mine)
    for name, data in (("x.yaml", "x.jsonl"), ("smoke_choice.yaml", "smoke_choice.jsonl")):
        files = yaml.safe_load((tmp_path / "b" / name).read_text())["dataset_kwargs"]["data_files"]
        assert files == {"test": str(tmp_path / "b" / data)}
    (mine / "smoke_choice.yaml").write_text("task: x\n")
    with pytest.raises(EvaluationError, match=r"smoke_choice.yaml is also a file of recipes/evaluation/tasks"):
        harness.write_task_files(tmp_path / "c", mine)
    with pytest.raises(EvaluationError, match="no such folder"):
        harness.write_task_files(tmp_path / "d", tmp_path / "nothing")


def test_our_questions_have_their_answers_in_all_places() -> None:
    path = harness.TASK_FILES / "smoke_choice.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(row["gold"] for row in rows) == sorted(n % 4 for n in range(24))
    assert all(len(set(row["choices"])) == 4 for row in rows)
    assert load_suite("smoke").run["smoke_choice"].task == yaml.safe_load(path.with_suffix(".yaml").read_text())["task"]
