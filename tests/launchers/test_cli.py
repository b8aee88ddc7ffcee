"""The command line: what a mistyped or interrupted command says."""

from __future__ import annotations

import argparse
import errno
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_prep.errors import DataError
from launchers import cli
from launchers.errors import LaunchError
from recipes.compose import compose
from recipes.schema import RecipeError


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A subcommand `probe` whose `run` can be replaced."""
    seen = SimpleNamespace(args=None, error=None)

    def add_parser(subparsers: argparse._SubParsersAction) -> None:
        parser = subparsers.add_parser("probe")
        parser.add_argument("overrides", nargs="*")
        parser.add_argument("--run", dest="run_name")
        parser.add_argument("--dryrun", action="store_true")

    def run(args: argparse.Namespace) -> int:
        seen.args = args
        if seen.error:
            raise seen.error
        return 5

    monkeypatch.setitem(sys.modules, "probe_command", SimpleNamespace(add_parser=add_parser, run=run))
    monkeypatch.setattr(cli, "COMMANDS", {"probe": ("probe_command", "a probe"), "other": ("no_such_module", "never imported")})
    return seen


@pytest.mark.parametrize(
    "words",
    [
        ["x=1", "~y", "+z=[1,2]", "--run", "r", "--dryrun"],
        ["--run", "r", "x=1", "~y", "--dryrun", "+z=[1,2]"],
        ["x=1", "--run", "r", "~y", "--dryrun", "+z=[1,2]"],
    ],
)
def test_overrides_may_stand_anywhere(command: SimpleNamespace, words: list[str]) -> None:
    assert cli.main(["probe", *words]) == 5
    assert command.args.overrides == ["x=1", "~y", "+z=[1,2]"]
    assert command.args.run_name == "r"
    assert command.args.dryrun


@pytest.mark.parametrize("kind", [RecipeError, DataError, LaunchError])
def test_errors_with_a_remedy_are_one_message(
    command: SimpleNamespace, capsys: pytest.CaptureFixture[str], kind: type[Exception]
) -> None:
    command.error = kind("phase.a.tokens: no; take 5")
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr().err == "quarry: phase.a.tokens: no; take 5\n"


def test_what_the_machine_refuses_is_one_message(command: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    command.error = PermissionError(errno.EACCES, "no", "/there")
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr().err.startswith("quarry: /there: Permission denied; let user ")


@pytest.mark.parametrize("bug", [ValueError("a bug"), FileNotFoundError(errno.ENOENT, "a bug", "/there")])
def test_bugs_keep_their_traceback(command: SimpleNamespace, bug: Exception) -> None:
    command.error = bug
    with pytest.raises(type(bug), match="a bug"):
        cli.main(["probe"])


def test_ctrl_c(command: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    command.error = KeyboardInterrupt()
    assert cli.main(["probe"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["probe", "--foo"], "unrecognized arguments: --foo"),
        (["nope"], "invalid choice: 'nope'"),
        (["probe", "a=1", "--fo", "b"], "--fo"),
    ],
)
def test_usage_errors(command: SimpleNamespace, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as end:
            cli.main([name, "--help"])
        assert end.value.code == 0
        assert f"quarry {name}" in capsys.readouterr().out.split("usage:")[1].split("\n", 1)[1], f"{name}: no example"


def test_installed_command_is_this_one() -> None:
    done = subprocess.run([str(Path(sys.executable).with_name("quarry")), "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()[0]) == (0, "quarry")


def test_closed_pipe_is_no_error(harness, monkeypatch: pytest.MonkeyPatch) -> None:
    harness.run_dir.mkdir(parents=True)
    harness.recipe.write(harness.run_dir / "recipe.json")
    command = f"{sys.executable} -m launchers.cli status {harness.run_dir} | true"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_continue_takes_the_recorded_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "moved" / "elsewhere"
    folder.mkdir(parents=True)
    compose(["curriculum=smoke", "cluster=local", "cluster.threads_per_rank=7"]).write(folder / "recipe.json")
    assert cli.main(["launch", "--continue", str(folder), "--dryrun"]) == 0
    printed = capsys.readouterr().out
    assert "OMP_NUM_THREADS=7" in printed
    assert f"--run-dir {folder} --stage final_annealing" in printed
    assert cli.main(["launch", "--continue", str(folder), "seed=2", "--run", "x"]) == 2
    assert "leave out seed=2 --run" in capsys.readouterr().err
    assert cli.main(["launch", "--continue", str(tmp_path / "nothing")]) == 2
    assert "no run" in capsys.readouterr().err
