"""What several of these tests share."""

import os

import pytest
from hypothesis import HealthCheck, settings

from training.rewards import RewardError, sandbox

# A busy machine says nothing about the code: no deadline, and slow drawing is no error.
quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


def need_bubblewrap():
    """Skip where no sandbox can be made; in continuous integration that is a failure."""
    try:
        sandbox.check()
    except RewardError as error:
        reason = f"{error} (bash scripts/sandbox_packages.sh)"
        if os.environ.get("CI", "").lower() not in ("", "0", "false"):
            pytest.fail(reason)
        pytest.skip(reason)
