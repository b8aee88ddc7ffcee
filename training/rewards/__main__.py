"""Lists rewards and their options; scores a file of samples for debugging.

python -m training.rewards --list
python -m training.rewards --reward math --options '{"answer_in": "boxed"}' --input samples.jsonl
python -m training.rewards --plan rewards.yaml --input samples.jsonl --output scores.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from data_prep.plain_files import atomic_write
from training.rewards.base import RewardError, Sample, Score
from training.rewards.plan import OTHER, RewardPlan
from training.rewards.registry import describe

BATCH_SAMPLES = 512


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.rewards", description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="names of the rewards, with their options")
    parser.add_argument(
        "--check", action="store_true", help="start the rewards, say whether they can work here and fit --input, and stop"
    )
    parser.add_argument("--plan", type=Path, help="reward plan, YAML or JSON (docs/rewards.md)")
    parser.add_argument("--reward", help="one reward for every sample, instead of a plan")
    parser.add_argument("--options", default="{}", help="its options, as JSON")
    parser.add_argument(
        "--input", type=Path, help="samples, one JSON object a line: completion, reference, prompt, domain, metadata"
    )
    parser.add_argument("--output", type=Path, help="scores, one JSON object a line; standard output where absent")
    parser.add_argument("--workers", type=int, help="worker processes; the plan's where absent")
    args = parser.parse_args(argv)
    try:
        if args.list:
            print(describe(), flush=True)
            return 0
        return _score(_plan(args, parser), args)
    except RewardError as error:
        print(f"rewards: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _plan(args: argparse.Namespace, parser: argparse.ArgumentParser) -> RewardPlan:
    if (args.plan is None) == (args.reward is None) or (args.input is None and not args.check):
        parser.error("give --list, or --input (or --check) with one of --plan and --reward")
    if args.plan is not None:
        plan = RewardPlan.read(args.plan)
    else:
        try:
            options = json.loads(args.options)
        except ValueError as error:
            raise RewardError(f"--options: not JSON: {error}") from None
        if not isinstance(options, dict):
            raise RewardError(f"--options: must be a JSON object, found {args.options}")
        plan = RewardPlan.parse({"domains": {OTHER: {"parts": [{"reward": args.reward, "options": options}]}}}, "--reward")
    # Debugging wants every score, also where all of them fail.
    changes: dict[str, object] = {"max_failure_share": 1.0} | ({"workers": args.workers} if args.workers is not None else {})
    return RewardPlan.parse(plan.model_dump() | changes)


def _score(plan: RewardPlan, args: argparse.Namespace) -> int:
    from training.rewards.scoring import Rewards

    with Rewards(plan) as rewards:
        if args.input is not None:
            plan.check_references((sample.domain, sample.reference) for sample in read_samples(args.input))
        if args.check:
            print("every reward of the plan can work here")
            return 0

        def lines() -> Iterator[bytes]:
            batch: list[Sample] = []
            for sample in read_samples(args.input):
                batch.append(sample)
                if len(batch) == BATCH_SAMPLES:
                    yield from map(_line, rewards.score(batch))
                    batch = []
            yield from map(_line, rewards.score(batch))

        if args.output is None:
            for line in lines():
                sys.stdout.buffer.write(line)
            sys.stdout.flush()
        else:
            with atomic_write(args.output) as f:
                f.writelines(lines())
        print(json.dumps(rewards.summary(), indent=1), file=sys.stderr)
    return 0


def _line(score: Score) -> bytes:
    return score.model_dump_json().encode() + b"\n"


def read_samples(path: Path) -> Iterator[Sample]:
    """Samples of a JSON-lines file; RewardError names file, line and key of a bad one."""
    try:
        with open(path, encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    yield Sample.model_validate_json(line)
                except ValidationError as error:
                    problem = error.errors(include_url=False)[0]
                    key = ".".join(str(p) for p in problem["loc"]) or "line"
                    raise RewardError(f"{path}, line {number}: {key}: {problem['msg']}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RewardError(f"{path}: cannot be read: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
