"""One real Slurm per test process; `--dist loadfile` keeps a file's tests in one process."""

import os

import pytest

from tests.slurm.cluster import SlurmCluster, missing


@pytest.fixture(scope="session")
def slurm():
    if lacking := missing():
        reason = f"Slurm is not installed: bash scripts/slurm_packages.sh (apt-get install; lacking {', '.join(lacking)})"
        if os.environ.get("CI", "").lower() not in ("", "0", "false"):
            pytest.fail(reason)
        pytest.skip(reason)
    with SlurmCluster() as cluster:
        yield cluster
