"""Stands in for the Python of lm-eval's environment: answers the probe and writes result files in the form that lm-eval 0.4.13 wrote
(lm_eval_results.json, recorded from it with a two-layer Granite; environment and task configurations left out).

What it is to do comes from stand_in.json beside the program: version, tasks that it has, an exit code, changes of the result file.
"""

import copy
import json
import os
import sys
from pathlib import Path

RECORDED = Path(__file__).with_name("lm_eval_results.json")
RECORDED_TASK = "quarry_smoke_choice"


def answer_probe(orders, names):
    print("noise on standard output")
    print("QUARRY " + json.dumps({"version": orders.get("version", "0.4.13"), "python": "3"}))
    for name in names:
        print("QUARRY " + json.dumps({"task": name} | orders["tasks"].get(name, {"known": False})))


def results(task, shots, limit, changes):
    content = copy.deepcopy(json.loads(RECORDED.read_text()))
    for key in ("results", "versions", "n-shot", "n-samples", "task_hashes"):
        content[key] = {task: content[key][RECORDED_TASK]}
    content["group_subtasks"] = {}
    content["n-shot"][task] = shots
    content["config"]["limit"] = limit
    for path, value in changes.items():
        *parents, last = path.split("/")
        place = content
        for key in parents:
            place = place[key]
        if value is None:
            del place[last]
        else:
            place[last] = value
    return content


def option(arguments, name, default=None):
    return arguments[arguments.index(name) + 1] if name in arguments else default


def main(arguments, folder):
    orders = json.loads((folder / "stand_in.json").read_text())
    if arguments[0] != "-m":
        answer_probe(orders, arguments[2:])
        return 0
    with open(folder / "calls.jsonl", "a") as log:
        log.write(json.dumps({"arguments": arguments, "offline": os.environ.get("HF_HUB_OFFLINE")}) + "\n")
    task = option(arguments, "--tasks")
    print(f"Running loglikelihood requests of {task}", file=sys.stderr)
    if code := orders.get("exit", {}).get(task, 0):
        return code
    limit = option(arguments, "--limit")
    shots = int(option(arguments, "--num_fewshot", "0"))
    out = Path(option(arguments, "--output_path")) / "some__model"
    out.mkdir(parents=True)
    content = results(task, shots, None if limit is None else float(limit), orders.get("changes", {}))
    (out / "results_2026-01-01T00-00-00.000000.json").write_text(json.dumps(content))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[2:], Path(sys.argv[1])))
