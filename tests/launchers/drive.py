"""A launcher in a process of its own, so that a test can kill it: `python drive.py RUNS_ROOT`."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from conftest import FAKE_DATA, FAKE_STAGE, make_recipe

from launchers.chain import Launch

if __name__ == "__main__":
    recipe = make_recipe(Path(sys.argv[1]))
    os.environ["FAKE_DIGEST"] = recipe.digest()
    sys.exit(Launch(recipe=recipe, stage_command=FAKE_STAGE, data_command=FAKE_DATA).start())
