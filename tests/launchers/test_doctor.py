"""`quarry doctor` on machines presented by a few scripts on another PATH."""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from launchers import doctor_command
from launchers.cli import main
from launchers.doctor import (
    Machine,
    examine,
    probe_clock,
    probe_disk,
    probe_docker,
    probe_gpus,
    probe_packages,
    probe_shm,
    probe_slurm,
)

H100 = "NVIDIA H100 80GB HBM3, 81559, 580.95.05, 9.0"
A100 = "NVIDIA A100-SXM4-80GB, 81920, 580.95.05, 8.0"
B200 = "NVIDIA B200, 183359, 580.95.05, 10.0"
HANG_SECONDS = 30
"""How long a hanging command sleeps; a probe that waited for it would fail the test by its duration."""


def script(folder: Path, name: str, body: str) -> None:
    file = folder / name
    file.write_text(f"#!{sys.executable} -S\nimport sys\n{body}\n", encoding="utf-8")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def says(*lines: str) -> str:
    return "\n".join(f"print({line!r})" for line in lines)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "bin"
    path.mkdir()
    return path


def machine(folder: Path, versions: dict[str, str | None] | None = None, **changes: Any) -> Machine:
    """A machine with the scripts of `folder` and the packages of this environment, `versions` put over them."""

    def version_of(package: str) -> str | None:
        if package in (versions or {}):
            return versions[package]
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    environment = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "NCCL_VERSION")}
    return Machine(path=str(folder), version_of=version_of, **{"environment": environment, "uid": 1000, **changes})


def doctor(capsys: pytest.CaptureFixture[str], machine: Machine, *overrides: str) -> tuple[int, dict[str, Any]]:
    args = argparse.Namespace(overrides=list(overrides), config_dir=[], json=True)
    code = doctor_command.run(args, machine)
    return code, json.loads(capsys.readouterr().out)


def line(answer: dict[str, Any], name: str) -> dict[str, str]:
    return next(item for item in answer["lines"] if item["name"] == name)


def verdict(answer: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(item for item in answer["verdicts"] if item["kind"] == kind)


def test_this_machine_can_run_the_smoke_curriculum(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "can run     local CPU (asked)" in shown
    assert f"torch               {metadata.version('torch')}" in shown
    assert list(tmp_path.iterdir()) == []  # it changes nothing


def test_without_anything_slurm_names_each_missing_thing_with_a_remedy(capsys, folder: Path) -> None:
    code, answer = doctor(capsys, machine(folder), "cluster=slurm")
    assert code == doctor_command.EXIT_CANNOT
    for name in ("driver", "gpus", "slurm client", "slurm accounting", "pyxis", "munge", "docker", "transformer-engine"):
        assert line(answer, name)["state"] == "missing", name
        assert line(answer, name)["remedy"], name
    slurm = verdict(answer, "slurm")
    assert slurm["asked"]
    assert slurm["missing"] == ["slurm client", "munge"]  # a login node needs no GPU
    assert verdict(answer, "local CPU")["can_run"]


def test_a_login_node_can_submit(capsys, folder: Path) -> None:
    script(folder, "sbatch", says("slurm 24.05.3"))
    script(folder, "sacct", "")
    script(folder, "srun", says("  --container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH"))
    script(folder, "munge", says("MUNGE:AwQ=:"))
    options = ("cluster=slurm", "cluster.options.container_image=quarry.sqsh")
    code, answer = doctor(capsys, machine(folder), *options)
    assert (code, verdict(answer, "slurm")["missing"]) == (0, [])
    assert line(answer, "slurm client")["found"] == "slurm 24.05.3"
    script(folder, "srun", says("no plugin"))
    code, answer = doctor(capsys, machine(folder), *options)
    assert (code, verdict(answer, "slurm")["missing"]) == (1, ["pyxis"])
    assert doctor(capsys, machine(folder), "cluster=slurm")[0] == 0  # pyxis is only for an image


def test_an_installed_client_without_a_cluster_is_no_client(folder: Path) -> None:
    script(folder, "sbatch", "sys.exit('sbatch: error: a\\nsbatch: fatal: Could not establish a configuration source')")
    client, accounting, *_ = probe_slurm(machine(folder))
    assert client.state == accounting.state == "missing"
    assert client.found == "sbatch exit code 1: sbatch: fatal: Could not establish a configuration source"


def test_slurm_without_accounting_or_munge_is_a_warning(folder: Path) -> None:
    script(folder, "sbatch", says("slurm 24.05.3"))
    script(folder, "sacct", "sys.exit('Slurm accounting storage is disabled')")
    client, accounting, _, munge = probe_slurm(machine(folder))
    assert (client.state, accounting.state, munge.state) == ("ok", "warning", "warning")
    assert "accounting storage is disabled" in accounting.found


def test_eight_h100_run_fp8_but_not_microscaling(capsys, folder: Path) -> None:
    script(folder, "nvidia-smi", says(*[H100] * 8))
    node = machine(folder, {"transformer-engine": "2.17.1", "apex": "0.1"})
    local = ("cluster=local", "cluster.gpu=h100")
    code, answer = doctor(capsys, node, *local)
    assert code == 0
    assert line(answer, "gpus")["found"] == "8 x NVIDIA H100 80GB HBM3 (80 GiB, compute capability 9.0)"
    assert line(answer, "driver") == {"name": "driver", "state": "ok", "found": "580.95.05", "remedy": ""}
    # The smoke model has 64 columns: FP8 fits its rows but the linter has the last word, so only the capability is looked at.
    _, answer = doctor(capsys, node, *local, "precision=fp8_tensorwise")
    assert not [r for r in verdict(answer, "local GPU")["reasons"] if "compute capability" in r]
    code, answer = doctor(capsys, node, *local, "precision=mxfp8")
    assert code == 1
    first = verdict(answer, "local GPU")["reasons"][0]
    assert "needs compute capability 10.0, NVIDIA H100 80GB HBM3 has 9.0; take precision=bf16" in first


@pytest.mark.parametrize(
    ("gpu", "precision", "enough"), [(A100, "bf16", True), (A100, "fp8_tensorwise", False), (B200, "mxfp8", True)]
)
def test_capability_follows_the_precision(capsys, folder: Path, gpu: str, precision: str, enough: bool) -> None:
    script(folder, "nvidia-smi", says(*[gpu] * 8))
    _, answer = doctor(capsys, machine(folder), "cluster=local", "cluster.gpu=b200", f"precision={precision}")
    reasons = [r for r in verdict(answer, "local GPU")["reasons"] if "compute capability" in r]
    assert (reasons == []) is enough


def test_too_few_gpus_for_the_layout(capsys, folder: Path) -> None:
    script(folder, "nvidia-smi", says(H100, H100))
    node = machine(folder, {"transformer-engine": "2.17.1"})
    code, answer = doctor(capsys, node, "cluster=local", "cluster.gpu=h100")
    assert code == 1
    assert "phase.long_512k.parallel.gpus = 4: 2 here" in verdict(answer, "local GPU")["reasons"][0]
    assert doctor(capsys, node, "cluster=local", "cluster.gpu=h100", "stages=[export]")[0] == 1
    one = Machine(path=str(folder), environment={"CUDA_VISIBLE_DEVICES": "1"})
    assert len(probe_gpus(one)[1]) == 1
    none = Machine(path=str(folder), environment={"CUDA_VISIBLE_DEVICES": ""})
    lines, gpus = probe_gpus(none)
    assert (lines[1].state, gpus) == ("missing", [])
    assert "CUDA_VISIBLE_DEVICES" in lines[1].found


def test_an_old_driver_is_a_warning(folder: Path) -> None:
    script(folder, "nvidia-smi", says(H100.replace("580.95.05", "550.54.15")))
    driver, gpus = probe_gpus(machine(folder))[0]
    assert (driver.state, gpus.state) == ("warning", "ok")
    assert "580" in driver.found


@pytest.mark.parametrize(
    "body", ["sys.exit('NVIDIA-SMI has failed')", says("No devices were found"), ""], ids=["fails", "none", "silent"]
)
def test_an_ill_nvidia_smi_gives_no_gpus(folder: Path, body: str) -> None:
    script(folder, "nvidia-smi", body)
    lines, gpus = probe_gpus(machine(folder))
    assert gpus == []
    assert [item.state for item in lines] == ["missing", "missing"]
    assert all(item.remedy for item in lines)


def test_a_hanging_nvidia_smi_is_reported_and_not_waited_for(folder: Path, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    # With a child that holds its output open, as a wrapper script would.
    script(
        folder,
        "nvidia-smi",
        "import subprocess, time\n"
        f"child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep({HANG_SECONDS})'])\n"
        f"open({str(pid_file)!r}, 'w').write(str(child.pid))\ntime.sleep({HANG_SECONDS})",
    )
    began = time.monotonic()
    found = examine(machine(folder, timeout_seconds=2.0))
    assert time.monotonic() - began < HANG_SECONDS / 2
    assert found.line("driver").found == "nvidia-smi hangs (no answer within 2 s)"
    assert found.line("gpus").state == "missing"
    assert "dmesg" in found.line("driver").remedy
    assert _ends(int(pid_file.read_text(encoding="utf-8"))), "the child of nvidia-smi lives on"


def _ends(pid: int) -> bool:
    """Whether the process ends soon; it is no child of ours, so it may stay a zombie until init reaps it."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("version", "state"),
    [
        ("2.11.0", "ok"),
        ("2.11.0+cpu", "ok"),
        ("2.11.0a0+a6c236b9fd.nv26.03.46836102", "ok"),
        ("2.11.0a0+gitabc", "missing"),
        ("2.12.0a0+c0ffee.nv26.4", "missing"),
        ("2.10.0", "missing"),
        (None, "missing"),
    ],
)
def test_version_of_torch(capsys, folder: Path, version: str | None, state: str) -> None:
    node = machine(folder, {"torch": version})
    torch = next(item for item in probe_packages(node) if item.name == "torch")
    assert torch.state == state
    if state == "missing":
        assert "==2.11.0" in torch.found
        assert "make setup" in torch.remedy
        code, answer = doctor(capsys, node)
        assert (code, verdict(answer, "local CPU")["missing"]) == (1, ["torch"])


def test_another_package_missing_is_named(folder: Path) -> None:
    rest = next(item for item in probe_packages(machine(folder, {"hydra-core": None})) if item.name == "other packages")
    assert rest.state == "missing"
    assert rest.found.startswith("hydra-core: not installed")


def test_docker(capsys, folder: Path) -> None:
    script(folder, "nvidia-smi", says(*[H100] * 8))
    script(folder, "docker", "print('28.2.2' if sys.argv[1] == 'version' else '{\"nvidia\": {}, \"runc\": {}}')")
    code, answer = doctor(capsys, machine(folder), "cluster=docker")
    assert line(answer, "docker")["state"] == "ok"
    assert code == 1
    assert "docker build --target gpu" in verdict(answer, "docker")["reasons"][0]
    code, answer = doctor(capsys, machine(folder), "cluster=docker", "cluster.options.container_image=quarry:gpu")
    assert (code, verdict(answer, "docker")["reasons"]) == (0, [])
    assert "no stage runs as root" in probe_docker(machine(folder, uid=0))[0].remedy
    script(folder, "docker", "print('28.2.2' if sys.argv[1] == 'version' else '{\"runc\": {}}')")
    assert line(doctor(capsys, machine(folder))[1], "docker")["state"] == "warning"
    script(folder, "nvidia-smi", "sys.exit(9)")
    image = "cluster.options.container_image=quarry:cpu"
    code, answer = doctor(capsys, machine(folder), "cluster=docker", "cluster.gpu=cpu", image)
    assert (code, verdict(answer, "docker")["missing"]) == (0, [])


def test_folders_and_shared_memory(folder: Path, tmp_path: Path) -> None:
    assert probe_disk("disk runs", tmp_path / "not" / "yet").state in ("ok", "warning")
    file = tmp_path / "file"
    file.touch()
    assert probe_disk("disk runs", file).state == "missing"
    assert "cluster.runs_root" in probe_disk("disk runs", file).remedy
    assert probe_shm(machine(folder, shm=tmp_path / "absent")).state == "warning"


def test_clock(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe_clock(machine(folder), tmp_path).state == "ok"
    script(folder, "timedatectl", says("no"))
    assert probe_clock(machine(folder), tmp_path).found == "not synchronised"
    script(folder, "timedatectl", "sys.exit(1)")
    script(folder, "chronyc", says("Reference ID    : A9FEA97B", "Leap status     : Normal"))
    assert probe_clock(machine(folder), tmp_path).found == "synchronised"
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 60)
    assert "-60." in probe_clock(machine(folder), tmp_path).found


def test_a_model_too_large_for_the_memory(capsys, folder: Path) -> None:
    code, answer = doctor(capsys, machine(folder), "model=granite_4_1_30b")
    assert code == 1
    assert any("take model=tiny" in r or "divide" in r for r in verdict(answer, "local CPU")["reasons"])


def test_overrides_that_do_not_compose_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "cluster=nowhere"]) == 2
    assert "known: docker, local, slurm" in capsys.readouterr().err
