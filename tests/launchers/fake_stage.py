"""A stage command that honours the contract of training.stage (files, exit codes, signals) without training: milliseconds a step.

It reads its faults from RUN_DIR/faults.json:
{STAGE: {"exit": 75|78|1, "at_step": 3, "times": 1, "hang": true, "no_handoff": true, "save_seconds": 2}}
and counts its starts in STAGE_DIR/starts.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

SAVE_EVERY_STEPS = 2


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--stage", required=True)
    args = parser.parse_args()
    recipe = json.loads((args.run_dir / "recipe.json").read_text())
    stage_dir = args.run_dir / "stages" / args.stage
    faults_path = args.run_dir / "faults.json"
    fault = json.loads(faults_path.read_text()).get(args.stage, {}) if faults_path.exists() else {}
    with open(stage_dir / "starts", "a") as f:
        f.write(f"{os.getpid()}\n")
    starts = len((stage_dir / "starts").read_text().splitlines())
    if starts > fault.get("times", 10**9):
        fault = {}
    stop = []
    signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
    if (stage_dir / "handoff.json").exists():
        return 0
    print(f"stage {args.stage} start {starts}", flush=True)
    if fault.get("exit") is not None and not fault.get("at_step"):
        print(f"<b>refusing</b> [bold]with[/bold] {fault['exit']}", flush=True)
        return fault["exit"]
    phase = recipe["phase"].get(args.stage)
    before = sum(
        recipe["phase"][s]["tokens"] for s in recipe["stages"][: recipe["stages"].index(args.stage)] if s in recipe["phase"]
    )
    step, loss = 0, None
    if phase:
        step, loss = train(args, recipe, stage_dir, phase, before, fault, stop)
        if step < 0:
            return -step
    if args.stage in recipe["export"]:
        write_json(
            stage_dir / "sample.json",
            [{"prompt": p, "completion": " ..."} for p in recipe["export"][args.stage]["prompts"]],
        )
    if fault.get("no_handoff"):
        return 0
    tokens = phase["tokens"] if phase else 0
    kind = "phase" if phase else "merge" if args.stage in recipe["merge"] else "export"
    handoff = {
        "format": "quarry.handoff/1", "stage": args.stage, "kind": kind, "step": step, "stage_tokens": tokens,
        "total_tokens": before + tokens, "checkpoint": None if kind == "export" else f"checkpoints/iter_{step:07}",
        "checkpoint_files": {}, "recipe_digest": os.environ["FAKE_DIGEST"], "data_digest": "d", "ledger": {}, "layout": {"tensor": 1},
        "rope_base": 1e4, "seq_length_tokens": 16, "model": recipe["model"], "tokenizer": {}, "final_loss": loss,
        "heldout": None if kind == "merge" else {"web": 6.0 - before / 1e4, "code": 5.0 - before / 1e4}, "versions": {"torch": "0"},
    }  # fmt: skip
    if phase:
        tokens_phase = {"web_a": {"samples": step, "tokens": tokens // 2}, "code_a": {"samples": step, "tokens": tokens // 2}}
        handoff["ledger"] = {args.stage: tokens_phase}
    write_json(stage_dir / "handoff.json", handoff)
    return 0


def train(args, recipe, stage_dir: Path, phase: dict, before: int, fault: dict, stop: list) -> tuple[int, float | None]:
    """Returns the last step and loss, or minus the exit code."""
    checkpoints = stage_dir / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    tracker = checkpoints / "latest_checkpointed_iteration.txt"
    step = int(tracker.read_text()) if tracker.exists() else 0
    metrics = stage_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    rewritten = metrics.with_suffix(".tmp")
    rewritten.write_text("".join(json.dumps(r) + "\n" for r in rows if r["step"] <= step))
    os.replace(rewritten, metrics)
    per_step = phase["global_batch_samples"] * phase["seq_length_tokens"]
    loss = None
    delay = float(os.environ.get("FAKE_STEP_SECONDS", "0.002"))

    def save() -> None:
        tracker.write_text(str(step))

    with open(stage_dir / "heldout.jsonl", "a") as f:
        f.write(json.dumps({"when": "start", "step": 0, "total_tokens": before, "losses": {"web": 6.1, "code": 5.1}}) + "\n")
    while step < phase["steps"]:
        if stop:
            time.sleep(fault.get("save_seconds", 0))
            save()
            return -75, None
        if fault.get("hang") and step == fault.get("at_step"):
            time.sleep(600)
        time.sleep(delay)
        step += 1
        total = before + step * per_step
        loss = 6.0 - total / 1e4
        row = {
            "step": step, "consumed_samples": step * phase["global_batch_samples"], "stage_tokens": step * per_step, "total_tokens": total,
            "loss": loss, "lr": 1e-3, "grad_norm": 1.0, "seconds": delay, "tokens_per_second": per_step / delay, "skipped": False,
        }  # fmt: skip
        with open(metrics, "a") as f:
            f.write(json.dumps(row) + "\n")
        if fault.get("exit") is not None and step == fault.get("at_step"):
            if fault["exit"] == 75 and not fault.get("no_save"):
                save()
            if fault["exit"] == -9:
                os.kill(os.getpid(), signal.SIGKILL)
            return -fault["exit"], None
        if step % SAVE_EVERY_STEPS == 0:
            save()
    save()
    return step, loss


if __name__ == "__main__":
    sys.exit(main())
