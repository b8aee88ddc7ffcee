"""What several of these tests share."""

import os
import shutil

import pytest
from hypothesis import HealthCheck, settings

# A busy machine says nothing about the code: no deadline, and slow drawing is no error.
quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


def need_bubblewrap():
    """Skip where there is no sandbox; in continuous integration that is a failure."""
    if shutil.which("bwrap") is None:
        reason = "bubblewrap is not installed: bash scripts/sandbox_packages.sh (apt-get install bubblewrap)"
        if os.environ.get("CI", "").lower() not in ("", "0", "false"):
            pytest.fail(reason)
        pytest.skip(reason)
