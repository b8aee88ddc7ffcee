"""nemo-run is imported without torch and leptonai, works, and neither is missed by what is imported later."""

import subprocess
import sys

PROGRAM = """
import sys
from launchers.nemo_import import import_nemo_run
nemo_run = import_nemo_run()
assert import_nemo_run() is nemo_run
heavy = {"torch", "leptonai", "fastapi"} & set(sys.modules)
assert not heavy, heavy
assert not [finder for finder in sys.meta_path if type(finder).__name__ == "_StandIn"]
assert nemo_run.LocalExecutor() and nemo_run.Script(path="launchers.wrapper", m=True, entrypoint=sys.executable)
import importlib.util
assert importlib.util.find_spec("leptonai").origin.endswith("leptonai/__init__.py")
assert importlib.util.find_spec("torch").origin.endswith("torch/__init__.py")
"""


def test_only_what_is_used_is_imported():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
