"""Run by lm-eval's own Python, not by ours: says which version it is, and which tasks can be loaded with the data that lies here.

python lm_eval_probe.py INCLUDE_PATH TASK ...     -> lines "QUARRY {json}" on standard output
"""

import importlib.metadata
import json
import os
import sys

PREFIX = "QUARRY "


def say(**values):
    print(PREFIX + json.dumps(values), flush=True)


def main(include, names):
    say(version=importlib.metadata.version("lm_eval"), python=sys.version.split()[0])
    # Python puts this file's folder first, where `evaluate` is ours and not the package that lm-eval's tasks import.
    here = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.realpath(path) != here]
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include)
    for name in names:
        if name not in manager.task_index:
            say(task=name, known=False)
            continue
        try:
            loaded = manager.load([name])["tasks"]
        except Exception as error:
            # Whatever it is, the caller names it and refuses: a task whose data cannot be loaded is not run.
            say(task=name, known=True, error=f"{type(error).__name__}: {error}"[:2000])
            continue
        unsafe = any(getattr(task.config, "unsafe_code", False) for task in loaded.values())
        say(task=name, known=True, tasks=sorted(loaded), unsafe_code=bool(unsafe))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
