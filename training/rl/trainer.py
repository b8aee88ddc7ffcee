"""The loop of reinforcement learning inside a rank: prompts, rollouts, rewards, advantages, optimizer steps, health, checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import megatron.training.training as upstream
import torch
from megatron.core import parallel_state as mpu
from megatron.training import get_args
from megatron.training.global_vars import get_signal_handler

from data_prep.files import atomic_write
from data_prep.tokenizer import Tokenizer
from recipes.posttrain import Grpo
from training.exit_codes import SuspiciousResult
from training.handoff import latest_step
from training.hooks import prune
from training.metrics import MetricsLog
from training.rewards import FailureGuard
from training.rl import losses
from training.rl.batch import MicroBatch, collate, padded_length, tokens_in_loss
from training.rl.engine import Completion, Request, RolloutEngine
from training.rl.health import Health, Tally, reason_to_stop
from training.rl.policy import Policy, ReferenceWeights, computes_loss
from training.rl.prompts import Prompt, PromptOrder, Prompts, Sample
from training.rl.state import SamplerState

RewardFunction = Callable[[list[Sample]], list[float | None]]
"""One finite reward per sample, in order; None where scoring failed. Called on one rank of each replica, with that replica's samples.

RewardsFailed, raised there, stops all ranks.
"""


class RewardsFailed(Exception):
    """Too many scores failed to train on the rest."""


@dataclass(frozen=True)
class Rollouts:
    """One step's samples of all replicas, whole groups in the order of their prompts; the same on every rank."""

    samples: list[Sample]
    rewards: list[float | None]
    """What the reward function says."""
    advantages: list[float]
    has_signal: list[bool]
    """Per group that was rolled out, also of those that dynamic sampling left out."""
    rounds: int


class Trainer:
    """All ranks construct one and call `run`; every decision is taken from numbers that are the same on all of them."""

    def __init__(
        self,
        *,
        settings: Grpo,
        seed: int,
        stage_dir: Path,
        prompts: Prompts,
        tokenizer: Tokenizer,
        policy: Policy,
        engine: RolloutEngine,
        reference: ReferenceWeights | None,
        reward: RewardFunction,
        state: SamplerState,
        guard: FailureGuard | None = None,
    ) -> None:
        """`guard`, which `reward` feeds, on the rank of each replica that asks for rewards: it goes on from `state` and into every next one."""
        self._settings = settings
        self._stage_dir = stage_dir
        self._prompts = prompts
        self._order = PromptOrder(len(prompts.items), seed)
        self._tokenizer = tokenizer
        self._policy = policy
        self._engine = engine
        self._reference = reference
        self._reward = reward
        self._state = state
        self._guard = guard
        if guard is not None:
            guard.restore(state.failures_of(mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()))
        self.metrics = MetricsLog(stage_dir)
        self._writes = torch.distributed.get_rank() == 0
        self._device = torch.cuda.current_device()

    def run(self, begin: Callable[[], None] | None = None) -> bool:
        """Train to the last step; False if it saved and left before (signal or time limit). SuspiciousResult by the stop rule.

        `begin` is called on every rank before the first step, once the log stands where the checkpoint does.
        """
        settings, began = self._settings, time.monotonic()
        if self._writes:
            self.metrics.start(self._state.step)
        if begin is not None:
            begin()
        self.metrics.start_clock()
        while self._state.step < settings.steps:
            self._step()
            last = self._state.step == settings.steps
            leave = not last and self._must_leave(began)
            if last or leave or self._state.step % settings.save_interval_steps == 0:
                self._save()
            if leave:
                return False
        return True

    def _must_leave(self, began: float) -> bool:
        limit = self._settings.exit_after_minutes
        signalled = any(get_signal_handler().signals_received())  # collective: asked on every rank, whatever its clock says
        out_of_time = limit is not None and time.monotonic() - began > 60 * limit
        wish = torch.tensor([int(out_of_time or signalled)], device=self._device)
        torch.distributed.all_reduce(wish, op=torch.distributed.ReduceOp.MAX)
        return bool(wish.item())

    def _step(self) -> None:
        settings, state = self._settings, self._state
        step = state.step + 1
        self._engine.update_weights(state.step * settings.optimizer_steps_per_rollout)
        rollouts = self._roll_out()
        rollout_seconds = self.metrics.lap()
        tally, tokens, grad_norm, skipped, lr = self._train(rollouts, step)
        train_seconds = self.metrics.lap()
        samples = rollouts.samples
        health = Health.of(
            tally,
            rewards=rollouts.rewards,
            domains=[s.prompt.domain for s in samples],
            lengths=[len(s.completion_ids) for s in samples],
            truncated=[s.truncated for s in samples],
            has_signal=rollouts.has_signal,
        )
        loss = tally.sums["loss"] / max(tally.sums["loss_tokens"], 1)
        self._state = SamplerState(
            seed=state.seed,
            step=step,
            prompt_position=state.prompt_position + rollouts.rounds * settings.prompts_per_step,
            consumed_tokens=state.consumed_tokens + tokens,
        )
        if self._writes:
            seconds = rollout_seconds + train_seconds
            self.metrics.append_step(
                step=step,
                loss=loss,
                lr=lr,
                grad_norm=grad_norm,
                skipped=skipped,
                **asdict(health),
                rollout_rounds=rollouts.rounds,
                prompt_position=self._state.prompt_position,
                epoch=self._state.prompt_position / len(self._prompts.items),
                consumed_samples=get_args().consumed_train_samples,
                stage_tokens=self._state.consumed_tokens,
                total_tokens=self._state.consumed_tokens,
                seconds=seconds,
                rollout_seconds=rollout_seconds,
                train_seconds=train_seconds,
                tokens_per_second=sum(len(s.completion_ids) for s in samples) / seconds if seconds else None,
                time=time.time(),
            )
            self._record(samples, rollouts, step)
            print(
                f"step {step}/{settings.steps}  reward {health.reward:.4f}  loss {loss:+.4f}  entropy {health.entropy_nats:.3f}  "
                f"gap {health.mean_gap_nats:.1e} (max {health.max_gap_nats:.1e})  tokens {health.response_tokens:.1f}  "
                f"no signal {health.no_signal_share:.2f}  {seconds:.2f} s",
                flush=True,
            )
        reason = reason_to_stop(health, settings.stop, loss=loss, grad_norm=grad_norm)
        if reason is not None:
            raise SuspiciousResult(
                f"step {step}: {reason} (last checkpoint: step {latest_step(self._stage_dir / 'checkpoints')})"
            )

    # Rollouts and rewards

    def _roll_out(self) -> Rollouts:
        """Rounds of rollouts until there are enough groups; without dynamic sampling there is one."""
        settings = self._settings
        samples: list[Sample] = []
        rewards: list[float | None] = []
        rounds = 0
        while True:
            more_samples, more_rewards = self._round(self._state.prompt_position + rounds * settings.prompts_per_step)
            samples, rewards, rounds = samples + more_samples, rewards + more_rewards, rounds + 1
            scored = torch.tensor([reward is not None for reward in rewards])
            shaped = torch.tensor([reward or 0.0 for reward in rewards], dtype=torch.float64) + losses.soft_overlong_punishment(
                torch.tensor([len(s.completion_ids) for s in samples]),
                limit_tokens=settings.rollout.max_response_tokens,
                cache_tokens=settings.overlong_cache_tokens,
            )
            groups = losses.group_advantages(
                shaped.view(-1, settings.samples_per_prompt),
                deviation=settings.deviation,
                epsilon=settings.advantage_epsilon,
                scored_GN=scored.view(-1, settings.samples_per_prompt),
            )
            keep = list(range(settings.prompts_per_step))
            if settings.dynamic_sampling:
                decision = losses.dynamic_sampling(
                    groups.has_signal_G,
                    wanted_groups=settings.prompts_per_step,
                    rounds=rounds,
                    max_rounds=settings.dynamic_sampling_max_rounds,
                )
                if decision.more:
                    continue
                keep = decision.keep
            kept = [i for g in keep for i in range(g * settings.samples_per_prompt, (g + 1) * settings.samples_per_prompt)]
            return Rollouts(
                samples=[samples[i] for i in kept],
                rewards=[rewards[i] for i in kept],
                advantages=groups.values_GN[keep].flatten().tolist(),
                has_signal=groups.has_signal_G.tolist(),
                rounds=rounds,
            )

    def _round(self, position: int) -> tuple[list[Sample], list[float | None]]:
        """Samples and rewards of `prompts_per_step` prompts from `position` on, each replica its share; the same on all ranks.

        SuspiciousResult, on every rank alike, where rewards cannot be had.
        """
        settings = self._settings
        replicas, replica = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
        share = settings.prompts_per_step // replicas
        requests = [
            Request(self._prompt(p).ids, p, number)
            for p in range(position + replica * share, position + (replica + 1) * share)
            for number in range(settings.samples_per_prompt)
        ]
        completions = self._engine.generate(requests)
        samples = [self._sample(request, done) for request, done in zip(requests, completions, strict=True)]
        rewards = self._score(samples)
        gathered: list[Any] = [None] * replicas
        torch.distributed.all_gather_object(gathered, (completions, rewards), group=mpu.get_data_parallel_group())
        reason = next((theirs for _, theirs in gathered if isinstance(theirs, str)), None)
        if reason is None and all(reward is None for _, theirs in gathered for reward in theirs):
            reason = "the score of every sample failed"
        if reason is not None:
            raise SuspiciousResult(
                f"step {self._state.step + 1}: no rewards to learn from: {reason} (last checkpoint: step "
                f"{latest_step(self._stage_dir / 'checkpoints')})"
            )
        everything: list[Sample] = []
        for other, (theirs, _) in enumerate(gathered):
            first = position + other * share
            addresses = [
                (first + i // settings.samples_per_prompt, i % settings.samples_per_prompt) for i in range(len(theirs))
            ]
            everything += [
                self._sample(Request(self._prompt(p).ids, p, number), done)
                for (p, number), done in zip(addresses, theirs, strict=True)
            ]
        return everything, [reward for _, theirs in gathered for reward in theirs]

    def _prompt(self, position: int) -> Prompt:
        return self._prompts.items[self._order[position]]

    def _sample(self, request: Request, done: Completion) -> Sample:
        ids = done.ids if done.truncated else done.ids[:-1]
        # Rows of the embedding beyond the tokenizer's entries stand for no text.
        text = self._tokenizer.decode([int(i) for i in ids if i < self._tokenizer.vocab_size])
        return Sample(
            self._prompt(request.position), request.position, request.number, done.ids, done.logprobs, done.truncated, text
        )

    def _score(self, samples: list[Sample]) -> list[float | None] | str:
        """Rewards of this replica's samples, asked for on one of its ranks, or why there are none."""
        source = mpu.get_model_parallel_src_rank()
        group = mpu.get_model_parallel_group()
        rewards: list[Any] = [None]
        if torch.distributed.get_rank() == source:
            try:
                rewards[0] = [None if reward is None else float(reward) for reward in self._reward(samples)]
            except RewardsFailed as error:
                rewards[0] = str(error)  # not raised here: the other ranks would wait for this one
            if not isinstance(rewards[0], str) and len(rewards[0]) != len(samples):
                raise ValueError(f"the reward function gave {len(rewards[0])} rewards for {len(samples)} samples")
        if group.size() > 1:
            torch.distributed.broadcast_object_list(rewards, source, group=group)
        return rewards[0]

    # Training

    def _train(self, rollouts: Rollouts, step: int) -> tuple[Tally, int, float | None, bool, float]:
        """The optimizer steps of one rollout batch: (health sums over all ranks, loss tokens, gradient norm, skipped, learning rate).

        With several, the gradient norm and rate are the last one's.
        """
        settings = self._settings
        mini_batches = settings.optimizer_steps_per_rollout
        size = settings.samples_per_optimizer_step
        length = padded_length(rollouts.samples)
        tally, tokens, grad_norm, skipped, lr = Tally(), 0, None, False, 0.0
        prepared: list[tuple[list[MicroBatch], int]] = []
        for start in range(0, len(rollouts.samples), size):
            part = slice(start, start + size)
            count = tokens_in_loss(rollouts.samples[part], filter_overlong=settings.overlong_filter)
            prepared.append((self._micro_batches(rollouts.samples[part], rollouts.advantages[part], length), count))
        everything = [batch for batches, _ in prepared for batch in batches]
        if mini_batches > 1:
            # From the second mini batch on the policy is no longer the one that sampled.
            for batch, old in zip(everything, self._policy.logprobs(everything, length) or (), strict=computes_loss()):
                batch.old = old
                tally.add_gap(batch.rollout, old, batch.response)
        if self._reference is not None:
            with self._reference.in_place():
                reference = self._policy.logprobs(everything, length) or ()
            for batch, values in zip(everything, reference, strict=computes_loss()):
                batch.reference = values
        args = get_args()
        for batches, count in prepared:
            lr = max(group["lr"] for group in self._policy.optimizer.param_groups)
            grad_norm, skip = self._policy.train(batches, length, global_tokens=count, step=step - 1, tally=tally)
            args.consumed_train_samples += size
            skipped |= skip
            tokens += count
        return self._reduced(tally), tokens, grad_norm, skipped, lr

    def _micro_batches(self, samples: Sequence[Sample], advantages: Sequence[float], length: int) -> list[MicroBatch]:
        """This replica's part, dealt out in turn so that groups spread over the replicas, in micro batches."""
        replicas, replica = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
        size = get_args().micro_batch_size
        own, own_advantages = samples[replica::replicas], advantages[replica::replicas]
        return [
            collate(
                own[i : i + size],
                own_advantages[i : i + size],
                length,
                filter_overlong=self._settings.overlong_filter,
                device=self._device,
            )
            for i in range(0, len(own), size)
        ]

    def _reduced(self, tally: Tally) -> Tally:
        """Sums and maxima over all ranks; tensor-parallel ranks hold the same, one of them counts."""
        counts = computes_loss() and mpu.get_tensor_model_parallel_rank() == 0
        sums, maxima = (tally if counts else Tally()).vectors()
        reduced = []
        for values, operation in ((sums, torch.distributed.ReduceOp.SUM), (maxima, torch.distributed.ReduceOp.MAX)):
            tensor = torch.tensor(values, dtype=torch.float64, device=self._device)
            torch.distributed.all_reduce(tensor, op=operation)
            reduced.append(tensor.tolist())
        return Tally.from_vectors(*reduced)

    # What stays

    def _save(self) -> None:
        checkpoints = self._stage_dir / "checkpoints"
        step = self._state.step
        if latest_step(checkpoints) == step:
            return
        # Rank 0 and those that it gathers from are the first of their replicas: they have the guards.
        failures: list[Any] = [None] * mpu.get_data_parallel_world_size()
        own = None if self._guard is None else self._guard.state()
        torch.distributed.all_gather_object(failures, own, group=mpu.get_data_parallel_group())
        if self._writes:
            guarded = [windows for windows in failures if windows is not None]
            self._state.model_copy(update={"failures": guarded}).write(self._stage_dir)
        policy = self._policy
        upstream.save_checkpoint(
            step,
            policy.model,
            policy.optimizer,
            policy.scheduler,
            0,
            {},
            preprocess_common_state_dict_fn=upstream.preprocess_common_state_dict,
        )
        torch.distributed.barrier()
        if self._writes:
            prune(checkpoints, self._settings.keep_checkpoints)
            self._state.prune(self._stage_dir, self._settings.keep_checkpoints)
        self.metrics.lap()  # saving belongs to no step

    def _record(self, samples: Sequence[Sample], rollouts: Rollouts, step: int) -> None:
        count = self._settings.record_samples
        if not count:
            return
        folder = self._stage_dir / "rollouts"
        folder.mkdir(exist_ok=True)
        stride = max(1, len(samples) // count)
        with atomic_write(folder / f"step_{step:07d}.jsonl") as f:
            for i in list(range(0, len(samples), stride))[:count]:
                sample = samples[i]
                line = {
                    "step": step,
                    "position": sample.position,
                    "number": sample.number,
                    "domain": sample.prompt.domain,
                    "prompt": [{"role": role, "content": text} for role, text in sample.prompt.turns],
                    "reference": sample.prompt.reference,
                    "completion": sample.completion,
                    "truncated": sample.truncated,
                    "reward": rollouts.rewards[i],
                    "advantage": rollouts.advantages[i],
                }
                f.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
