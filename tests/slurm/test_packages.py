"""scripts/slurm_packages.sh with a stand-in for apt-get, and what the fixture `slurm` does where there is no Slurm."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[2]
SCRIPT = HOUSE / "scripts" / "slurm_packages.sh"
BINARIES = ("sbatch", "slurmctld", "slurmd", "slurmdbd", "mariadbd", "munged")
TOOLS = ("bash", "sh", "cat", "chmod", "cp", "grep", "mv", "rm")


class Debian:
    """A folder that the script takes for the root of a Debian without Slurm, with the stand-ins that tests say."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tools, self.log = folder, folder / "tools", folder / "log"
        self.policy = folder / "usr/sbin/policy-rc.d"
        for directory in (self.tools, self.policy.parent, folder / "etc"):
            directory.mkdir(parents=True)
        (folder / "etc/debian_version").write_text("12\n")
        for name in TOOLS:
            found = shutil.which(name)
            assert found
            (self.tools / name).symlink_to(found)
        self.tool("id", "echo 0")
        self.tool("sleep", "")
        self.tool("dpkg", f'echo "dpkg $*" >> {self.log}')

    def tool(self, name: str, body: str) -> None:
        path = self.tools / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def apt(self, install: str = "false", update: str = "true") -> None:
        """`install` and `update` are shell; $installs is the number of installations that were tried, this one included."""
        words = f'case "$*" in *" update"*) word=update;; *) word=install;; esac; echo "$word" >> {self.log}'
        self.tool(
            "apt-get",
            f"{words}; cat {self.policy} >> {self.folder}/policies; installs=$(grep -c install {self.log})\n"
            f'if [ "$word" = update ]; then {update}; else {install}; fi',
        )

    def installing(self) -> str:
        """Shell that puts Slurm where the packages put it."""
        return "; ".join(f"cp {self.tools}/id {self.policy.parent}/{name}" for name in BINARIES)

    def environment(self, ci: str = "") -> dict[str, str]:
        return {"PATH": str(self.tools), "SLURM_PACKAGES_ROOT": str(self.folder), "CI": ci}

    def run(self, ci: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.tools / "bash"), str(SCRIPT)],
            env=self.environment(ci),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def did(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def debian(tmp_path: Path) -> Debian:
    return Debian(tmp_path)


def test_fresh_lists_are_not_fetched_again(debian: Debian) -> None:
    debian.apt(install=debian.installing())
    done = debian.run(ci="true")
    assert (done.returncode, debian.did()) == (0, ["install"]), done.stderr
    assert "exit 101" in (debian.folder / "policies").read_text(), "no daemon may start"
    assert not debian.policy.exists()
    assert "installed already" in debian.run().stdout
    assert debian.did() == ["install"]


def test_stale_lists_are_fetched_and_the_installation_tried_again(debian: Debian) -> None:
    debian.apt(install=f'[ "$installs" -ge 2 ] && {{ {debian.installing()}; }}')
    assert debian.run().returncode == 0
    assert debian.did() == ["install", "dpkg --configure -a", "update", "install"]


@pytest.mark.parametrize(("ci", "code"), [("", 0), ("0", 0), ("false", 0), ("true", 1), ("1", 1)])
def test_without_a_network_the_tests_skip_and_ci_fails(ci: str, code: int, debian: Debian) -> None:
    debian.apt(update="false")
    done = debian.run(ci)
    assert done.returncode == code
    assert "could not install slurmctld" in done.stdout + done.stderr
    assert debian.did().count("update") == 2
    assert not debian.policy.exists()


def test_an_installation_that_lacks_something_is_none(debian: Debian) -> None:
    debian.apt(install="true")
    done = debian.run(ci="true")
    assert done.returncode == 1
    assert "but sbatch slurmctld slurmd slurmdbd mariadbd munged cannot be found" in done.stderr


@pytest.mark.parametrize("ci", ["", "true"])
def test_without_root_nothing_is_tried(ci: str, debian: Debian) -> None:
    debian.apt()
    debian.tool("id", "echo 1000")
    done = debian.run(ci)
    assert done.returncode == (1 if ci else 0)
    assert "not root" in done.stdout + done.stderr
    assert debian.did() == []


def test_elsewhere_than_on_debian_nothing_is_tried(debian: Debian) -> None:
    debian.apt()
    (debian.folder / "etc/debian_version").unlink()
    assert "no apt-get here" in debian.run().stdout
    assert debian.did() == []


def test_a_policy_that_was_there_comes_back(debian: Debian) -> None:
    debian.policy.write_text("#!/bin/sh\nexit 0\n")
    debian.apt()
    debian.run()
    assert debian.policy.read_text() == "#!/bin/sh\nexit 0\n"
    assert "exit 0" not in (debian.folder / "policies").read_text()
    assert [path.name for path in debian.policy.parent.iterdir()] == ["policy-rc.d"]


def test_a_policy_of_a_run_that_was_killed_outright_goes(debian: Debian) -> None:
    debian.apt(install="kill -9 $PPID")
    assert debian.run().returncode == -signal.SIGKILL
    assert debian.policy.exists()
    debian.apt()
    debian.run()
    assert not debian.policy.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_policy_goes_when_it_is_interrupted(number: signal.Signals, debian: Debian) -> None:
    debian.policy.write_text("#!/bin/sh\nexit 0\n")
    debian.apt(install=f"echo > {debian.folder}/begun; kill -{number.name[3:]} $PPID; exit 1")
    process = subprocess.Popen([str(debian.tools / "bash"), str(SCRIPT)], env=debian.environment())
    assert process.wait(timeout=30) == 128 + number
    assert debian.policy.read_text() == "#!/bin/sh\nexit 0\n"


@pytest.mark.parametrize(("ci", "outcome"), [("true", "1 error"), ("", "1 skipped")])
def test_under_ci_a_skip_is_a_failure(ci: str, outcome: str, tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "from tests.slurm import cluster\nfrom tests.slurm.conftest import slurm\ncluster.BINARIES = ('no-such-daemon',)\n"
    )
    (tmp_path / "test_it.py").write_text("def test_it(slurm):\n    pass\n")
    environment = {**os.environ, "PYTHONPATH": str(HOUSE), "CI": ci}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-rs",
            "-p",
            "no:cacheprovider",
            "-c",
            os.devnull,
            "--rootdir",
            str(tmp_path),
            str(tmp_path),
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome in done.stdout, done.stdout + done.stderr
    assert (done.returncode == 0) == ("skipped" in outcome)
    assert "lacking no-such-daemon" in done.stdout
