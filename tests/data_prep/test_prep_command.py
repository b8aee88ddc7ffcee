"""`quarry prep`: help, the dry run's table, refusals."""

import pytest

from data_prep.preview import preview
from launchers.cli import main
from tests.data_prep import helpers

SMOKE = ["prep", "curriculum=smoke"]


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["prep", "--help"])
    assert "quarry prep curriculum=smoke --dry-run" in capsys.readouterr().out


def test_the_dry_run_estimates_and_writes_nothing(capsys, tmp_path):
    assert main([*SMOKE, f"data.root={tmp_path}/data", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "long_512k" in out
    assert "~ estimated from a sample of the text" in out
    assert not (tmp_path / "data").exists()


def test_the_dry_run_shows_what_prepare_does(prepared):
    from data_prep.manifest import MixtureManifest, mixture_path

    shown = preview(helpers.recipe(prepared))
    assert not shown.estimated
    assert not shown.problems
    for row in shown.rows:
        view = MixtureManifest.read(mixture_path(prepared / "data", row.phase)).sources[row.source]
        assert (row.draw.tokens, row.draw.epochs, row.share_planned_percent) == (
            view.tokens_available,
            view.epochs,
            view.share_percent,
        )
    for name, phase in shown.phases.items():
        assert sum(row.samples_given for row in shown.rows if row.phase == name) == phase.samples
        assert sum(row.share_given_percent for row in shown.rows if row.phase == name) == pytest.approx(100)


def test_refusals_are_one_message_and_exit_code_2(capsys, tmp_path):
    assert main([*SMOKE, f"data.root={tmp_path}", "data.max_epochs=0.01", "--dry-run"]) == 2
    assert "quarry: phase '" in capsys.readouterr().err
    assert main(["prep", "--dry-run"]) == 2
    assert "nothing matches 'data/raw" in capsys.readouterr().err
