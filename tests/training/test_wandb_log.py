"""Offline files of Weights & Biases, with a stand-in for its package that writes down what it is told (the real one is 62 MB)."""

import json
import os
import subprocess
import sys
import textwrap
import types

import pytest

from recipes.logging_options import Logging
from recipes.schema import RecipeError
from tests.training.factory import make_recipe
from training import stage, wandb_log
from training.metrics import MetricsLog

STAND_IN = """
import json, os, pathlib
environment = {key: value for key, value in os.environ.items() if key.startswith("WANDB_")}
class Settings(dict):
    def __init__(self, **values):
        super().__init__(values)
class Run:
    def __init__(self, values):
        self.told = {"init": values, "environment": environment, "rows": []}
        self.folder = pathlib.Path(values["dir"]) / "wandb" / ("offline-run-20260101_000000-" + values["id"])
        self.folder.mkdir(parents=True)
    def define_metric(self, name, step_metric):
        self.told["axis"] = [name, step_metric]
    def log(self, values, step):
        self.told["rows"].append([step, values])
        if "boom" in values:
            raise ConnectionResetError("Connection lost")
    def finish(self):
        (self.folder / "told.json").write_text(json.dumps(self.told))
def init(**values):
    return Run(values)
def teardown():
    pass
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose stage `second` has logged three steps; the stand-in is what `import wandb` finds in a new process."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(textwrap.dedent(STAND_IN))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "packages"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    folder = tmp_path / "my_run"
    (folder / "stages" / "second").mkdir(parents=True)
    recipe = make_recipe(tmp_path, {"gpus": 1}, "single")
    recipe = recipe.model_copy(update={"logging": Logging(wandb="offline", wandb_project="ours")})
    recipe.write(folder / "recipe.json")
    log = MetricsLog(folder / "stages" / "second")
    log.append_heldout(when="start", step=0, total_tokens=100, losses={"web": 5.0})
    for step in (1, 2, 3):
        log.append_step(step=step, total_tokens=100 + step, loss=1.0 / step, skipped=False, time=1.0)
    return recipe, folder


def told(folder):
    [path] = (folder / "stages" / "second" / "wandb").glob("offline-run-*/told.json")
    return json.loads(path.read_text())


def test_a_stage_is_one_offline_run_with_all_that_was_logged(run, monkeypatch):
    recipe, folder = run
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    wandb_log.after_attempt(recipe, "second", folder)
    first = told(folder)
    assert first["rows"] == [
        [0, {"total_tokens": 100.0, "heldout/web": 5.0}],
        *([step, {"total_tokens": 100.0 + step, "loss": 1.0 / step}] for step in (1, 2, 3)),
    ]
    assert first["axis"] == ["*", "total_tokens"]
    init = first["init"]
    assert (init["mode"], init["project"], init["group"], init["job_type"]) == ("offline", "ours", "my_run", "phase")
    assert init["config"]["recipe"]["seed"] == recipe.seed
    assert "WANDB_MODE" not in first["environment"]
    assert "WANDB_API_KEY" not in first["environment"]
    assert first["environment"]["WANDB_ERROR_REPORTING"] == "false"

    # Another attempt: the whole again, under the same id; and nothing where there is nothing new.
    MetricsLog(folder / "stages" / "second").append_step(step=4, total_tokens=104, loss=0.25)
    wandb_log.after_attempt(recipe, "second", folder)
    second = told(folder)
    assert second["init"]["id"] == init["id"]
    assert [step for step, _ in second["rows"]] == [0, 1, 2, 3, 4]
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("written again"))
    wandb_log.after_attempt(recipe, "second", folder)
    wandb_log.after_attempt(recipe, "first", folder)  # has no metrics


def test_a_failure_of_wandb_is_said_and_leaves_nothing_half(run, capfd):
    recipe, folder = run
    MetricsLog(folder / "stages" / "second").append_step(step=4, boom=1.0)
    wandb_log.after_attempt(recipe, "second", folder)
    assert "were not written (exit code 1)" in capfd.readouterr().err
    assert [path.name for path in (folder / "stages" / "second" / "wandb").iterdir()] == ["run_id.txt"]


def test_written_when_a_stage_ends_but_not_while_it_must_leave(run, monkeypatch):
    """A preempted stage has no time for it."""
    _, folder = run
    monkeypatch.delenv("NODE_RANK", raising=False)
    written = []
    monkeypatch.setattr(wandb_log, "after_attempt", lambda recipe, name, run_dir: written.append((name, run_dir)))
    for code, expected in ((75, []), (0, [("second", folder)]), (17, [("second", folder)] * 2)):
        monkeypatch.setattr(stage, "_run_kind", lambda *_, code=code: code)
        assert stage.run_stage(folder, "second") == code
        assert written == expected


def test_without_the_option_nothing_is_written(run):
    recipe, folder = run
    wandb_log.after_attempt(recipe.model_copy(update={"logging": Logging()}), "second", folder)
    assert not (folder / "stages" / "second" / "wandb").exists()


def test_a_missing_package_is_refused_with_the_remedy(run, monkeypatch, capsys):
    recipe, folder = run
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else types.SimpleNamespace())
    with pytest.raises(
        RecipeError, match=r"logging\.wandb is offline, but .* has no package wandb; install .* or set logging\.wandb=null"
    ):
        wandb_log.check(recipe)
    assert stage.run_stage(folder, "second") == 78
    assert capsys.readouterr().err.startswith("refused: logging.wandb is offline")
    assert wandb_log.main(["--run-dir", str(folder), "--stage", "second"]) == 78
    assert wandb_log.main(["--run-dir", str(folder), "--stage", "third"]) == 78


def test_by_hand_for_a_run_that_did_not_ask_for_it(run):
    recipe, folder = run
    recipe.model_copy(update={"logging": Logging()}).write(folder / "recipe.json")
    command = [sys.executable, "-m", "training.wandb_log", "--run-dir", str(folder), "--stage", "second"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(told(folder)["rows"]) == 4
