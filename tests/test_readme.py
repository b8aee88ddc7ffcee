"""The README's commands run as they stand, and what it names is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_commands_run(number, tmp_path):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-e", "-u", "-c", BLOCKS[number]],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_there_are_blocks_to_run():
    assert len(BLOCKS) == 3
    assert "quarry verify" in BLOCKS[1]
    assert "--config-dir" in BLOCKS[2]


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_tree_is_as_drawn():
    tree = README.split("## The tree")[1].split("```")[1]
    drawn = re.findall(r"^(\w+)/ ", tree, re.MULTILINE)
    assert set(drawn) >= {"recipes", "data_prep", "model", "training", "launchers", "tests"}
    for folder in drawn:
        assert (ROOT / folder).is_dir(), folder


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
