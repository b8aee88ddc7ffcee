"""One reinforcement-learning stage on this node: decides first start, resume or refuse, makes the ranks, and says how it ended.

    python -m training.rl.grpo --stage-dir runs/mine/stages/math        # the folder holds job.json

Exit codes: 0 finished (also when it had finished before); 74 no space left; 75 saved and to be resumed; 78 refused, a setting or a file is
wrong; 17 stopped by its own rule (training/rl/health.py), by a number that is not finite or for want of rewards; any other: a crash.

On CPU the ranks are forked after one import of Megatron, on GPUs torchrun makes them, as in training.stage.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.errors import DataError
from data_prep.files import write_json
from data_prep.tokenizer import Tokenizer, load_tokenizer
from recipes.schema import RecipeError
from training import fast_import, one_rank, rank_end, stacks
from training.arguments import Load
from training.exit_codes import FINISHED, SUSPICIOUS, SuspiciousResult
from training.handoff import Refused, latest_step, read_start
from training.metrics import MetricsLog
from training.rewards import FailureGuard, Message, RewardError, RewardPlan, Rewards, TooManyFailures
from training.rewards import Sample as RewardSample
from training.rl.job import Job
from training.rl.prompts import PromptError, Prompts, Sample, read_prompts

if TYPE_CHECKING:
    from training.rl.trainer import RewardFunction

RESULT = "result.json"


@dataclass(frozen=True)
class Boundary:
    """What a chain does before and after the training of a stage. Both are called on every rank with the model's chunks and the stage's
    log, which rank 0 writes."""

    begin: Callable[[list[Any], MetricsLog], None]
    """Before the first step of a first start; raises training.loss_gate.LossGate if this is not the model that was handed off."""
    end: Callable[[list[Any], MetricsLog], None]
    """After the last checkpoint is saved."""


REFUSALS = (RecipeError, DataError, PromptError, RewardError, Refused)


@dataclass(frozen=True)
class Inputs:
    """What a stage reads beside its job, checked."""

    tokenizer: Tokenizer
    prompts: Prompts
    digest: str
    """Of everything that decides the numbers of the stage."""


def read_inputs(job: Job) -> Inputs:
    """Raises one of REFUSALS for whatever cannot be trained on."""
    job.check()
    tokenizer = load_tokenizer(Path(job.tokenizer))
    if tokenizer.vocab_size > job.model.vocab_size:
        raise RecipeError(
            f"tokenizer {job.tokenizer} has {tokenizer.vocab_size} entries, model.vocab_size is {job.model.vocab_size}; use the "
            "tokenizer that the model was trained with"
        )
    plan = RewardPlan.parse(job.rewards, "rewards") if job.rewards else None
    longest = job.grpo.seq_length_tokens - job.grpo.rollout.max_response_tokens
    prompts = read_prompts([Path(p) for p in job.prompts], tokenizer, max_prompt_tokens=longest)
    if plan is not None:
        plan.check_references((prompt.domain, prompt.reference) for prompt in prompts.items)
    return Inputs(tokenizer, prompts, job.digest(prompts.digest, tokenizer.digest))


def decide(job: Job, stage_dir: Path, digest: str) -> Load | None:
    """What the ranks load; raises Refused if a resume would change what is learned."""
    step = latest_step(stage_dir / "checkpoints")
    if step is not None:
        started = read_start(stage_dir)
        if started != digest:
            raise Refused(
                f"{stage_dir} was begun with another job, other prompts or another tokenizer (digest {started[:12]}..., now {digest[:12]}...): "
                "a resume must not change what is learned; restore them, or start in another folder"
            )
        return Load(checkpoints=stage_dir / "checkpoints", step=step, resume=True)
    if job.initial is None:
        return None
    folder = Path(job.initial.checkpoints) / f"iter_{job.initial.step:07d}"
    if not folder.is_dir():
        raise Refused(f"initial checkpoint {folder} does not exist; correct initial.checkpoints or initial.step in job.json")
    return Load(checkpoints=Path(job.initial.checkpoints), step=job.initial.step, resume=False)


def run_stage(stage_dir: Path, reward: RewardFunction | None = None) -> int:
    """Train the job in `stage_dir` with this node's ranks; returns the exit code.

    `reward` replaces the job's reward plan. It is a function of this process, so it only reaches ranks that are forked (on CPU).
    """
    from training import stage

    stage_dir = stage_dir.resolve()
    try:
        job = Job.read(stage_dir / "job.json")
        inputs = read_inputs(job)
        if not job.rewards and reward is None:
            raise RecipeError("job.json: rewards is empty; name a reward for each domain (training/rewards)")
        load = decide(job, stage_dir, inputs.digest)
    except REFUSALS as error:
        return stage.refuse(error)
    if (stage_dir / RESULT).exists():
        print(f"{stage_dir.name}: finished ({RESULT} is there)", flush=True)
        return FINISHED
    if load is None or not load.resume:
        write_json(stage_dir / "start.json", {"training_digest": inputs.digest, "reason": "reinforcement learning"})
    start = "random weights" if load is None else f"step {load.step} of {load.checkpoints}"
    print(f"{stage_dir.name}: {'resume' if load and load.resume else 'first start'} from {start}", flush=True)
    if job.gpu == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        one_rank.import_megatron_on("cpu")
        code = stage.run_forked(job.parallel.gpus, lambda: run_rank(job, stage_dir, load, inputs, reward))
    else:
        if reward is not None:
            raise ValueError("a reward function cannot be handed to ranks that torchrun starts; put a reward plan into the job")
        program = ["-m", "training.rl.grpo", "--stage-dir", str(stage_dir), "--rank", *one_rank.load_arguments(load)]
        code = stage.torchrun(job.parallel.gpus, "parallel.gpus", program, stage_dir=stage_dir, grace_seconds=None)
    return stage.outcome(code, stage_dir / RESULT)


def run_rank(
    job: Job,
    stage_dir: Path,
    load: Load | None,
    inputs: Inputs,
    reward: RewardFunction | None,
    boundary: Boundary | None = None,
) -> int:
    """One rank; the process environment holds RANK, WORLD_SIZE and the rendezvous. Returns an exit code.

    `boundary` is the chain's; None: the stage stands alone, and `result.json` is all that is left beside the checkpoints.
    """
    return one_rank.run(stage_dir, stage_dir, lambda: _run_rank(job, stage_dir, load, inputs, reward, boundary))


def _run_rank(
    job: Job,
    stage_dir: Path,
    load: Load | None,
    inputs: Inputs,
    reward: RewardFunction | None,
    boundary: Boundary | None,
) -> int:
    one_rank.import_megatron_on(job.gpu)
    import torch

    from training.rl.engines import build_engine
    from training.rl.policy import Policy, ReferenceWeights
    from training.rl.state import SamplerState
    from training.rl.trainer import Trainer

    model, optimizer, scheduler = _set_up(job, stage_dir, load, inputs.tokenizer.eod_id)
    resumed = load is not None and load.resume
    state = (
        SamplerState.read(stage_dir, load.step, job.seed)
        if load is not None and resumed
        else SamplerState(seed=job.seed, step=0, prompt_position=0, consumed_tokens=0)
    )
    reference = None
    if job.grpo.kl_coefficient > 0:
        assert job.initial is not None, "checked by Job.check"
        reference = ReferenceWeights(model, Path(job.initial.checkpoints) / f"iter_{job.initial.step:07d}")
    with _reward_function(job, reward) as (reward_function, guard):
        trainer = Trainer(
            settings=job.grpo,
            seed=job.seed,
            stage_dir=stage_dir,
            prompts=inputs.prompts,
            tokenizer=inputs.tokenizer,
            policy=Policy(model, optimizer, scheduler, job.grpo),
            engine=build_engine(job, model, inputs.tokenizer, stage_dir),
            reference=reference,
            reward=reward_function,
            state=state,
            guard=guard,
        )
        begin = (lambda: boundary.begin(model, trainer.metrics)) if boundary is not None and not resumed else None
        try:
            finished = trainer.run(begin)
        except SuspiciousResult as error:  # on every rank alike
            if torch.distributed.get_rank() == 0:
                print(f"stopped: {error}", file=sys.stderr, flush=True)
            raise rank_end.Ended(SUSPICIOUS, str(error)) from error
    if finished and boundary is not None:
        boundary.end(model, trainer.metrics)
    if finished and torch.distributed.get_rank() == 0:
        write_json(
            stage_dir / RESULT, {"format": "quarry.grpo_result/1", "steps": job.grpo.steps, "training_digest": inputs.digest}
        )
    one_rank.leave_group()
    return FINISHED


def _set_up(job: Job, stage_dir: Path, load: Load | None, eod_id: int) -> tuple[list[Any], Any, Any]:
    """Megatron initialised, the model built and loaded: (chunks, optimizer, scheduler)."""
    import megatron.training.training as upstream
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from training.scheduler import TokenScheduler

    grpo = job.grpo
    args = one_rank.parse_arguments("grpo", job.compile(stage_dir, load), eod_id=eod_id, stage_dir=stage_dir)
    one_rank.initialize(args)

    def learning_rate(samples: int) -> float:
        """Of the optimizer step that begins after `samples` samples."""
        step = samples // grpo.samples_per_optimizer_step + 1
        return grpo.learning_rate * min(1.0, step / grpo.warmup_steps if grpo.warmup_steps else 1.0)

    def build_scheduler(optimizer: Any) -> TokenScheduler:
        upstream.update_train_iters(args)
        # Counted in samples: sequences have no fixed length here.
        scheduler = TokenScheduler(optimizer, learning_rate, seq_length_tokens=1, weight_decay=args.weight_decay)
        scheduler.ignore_stored_position = load is None or not load.resume
        scheduler.mup_scaling = grpo.mup_scaling
        scheduler.step(0)  # the rates that it has set already followed muP
        return scheduler

    upstream.get_optimizer_param_scheduler = build_scheduler
    fast_import.results_stay_in_process()
    return upstream.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        model_provider_func=one_rank.model_provider(
            job.model, args, rope_base=grpo.rope_base, max_sequence_length_tokens=grpo.seq_length_tokens
        ),
        checkpointing_context={},
        cfg_container=pretrain_cfg_container_from_args(args),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


@contextlib.contextmanager
def _reward_function(job: Job, reward: RewardFunction | None) -> Iterator[tuple[RewardFunction, FailureGuard | None]]:
    """The caller's function, or the job's reward plan with its guard, started on the one rank of each replica that asks for rewards."""
    import torch
    from megatron.core import parallel_state as mpu

    from training.rl.trainer import RewardsFailed

    if reward is not None or torch.distributed.get_rank() != mpu.get_model_parallel_src_rank():
        yield reward or _asked_elsewhere, None
        return
    with Rewards(RewardPlan.parse(job.rewards, "rewards")) as scorer:

        def score(samples: list[Sample]) -> list[float | None]:
            try:
                scores = scorer.score([_for_reward(sample) for sample in samples])
            except TooManyFailures as error:
                raise RewardsFailed(str(error)) from error
            return [None if s.failed else s.value for s in scores]

        yield score, scorer.guard


def _asked_elsewhere(samples: list[Sample]) -> list[float | None]:
    raise AssertionError("rewards are asked for on the first rank of the replica")


def _for_reward(sample: Sample) -> RewardSample:
    prompt = sample.prompt
    return RewardSample(
        prompt=tuple(Message(role=role, content=text) for role, text in prompt.turns),
        completion=sample.completion,
        reference=prompt.reference,
        domain=prompt.domain,
        metadata=prompt.metadata,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.rl.grpo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage-dir", type=Path, required=True, help="folder of the stage; holds job.json")
    parser.add_argument("--rank", action="store_true", help="be one rank (torchrun starts it)")
    parser.add_argument("--load", help="JSON of a rank: checkpoints, step, resume")
    options = parser.parse_args(argv)
    if not options.rank:
        stacks.on_request()
        return run_stage(options.stage_dir)
    stage_dir = options.stage_dir.resolve()
    job = Job.read(stage_dir / "job.json")
    return run_rank(job, stage_dir, one_rank.parse_load(options.load), read_inputs(job), None)


if __name__ == "__main__":
    # Without the interpreter's teardown: NCCL and loader threads can hang in it long after the work is done.
    fast_import.leave(main())
