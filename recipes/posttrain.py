"""Typed settings of post-training by reinforcement learning: what `recipes/posttrain/grpo*.yaml` hold. Part of the schema."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from recipes.fields import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Strict
from recipes.job_options import Optimizer, Parallel, Precision


class VllmServer(Strict):
    """A vLLM server that generates in place of the training processes."""

    url: str
    """Base address, without /v1: http://host:8000"""
    model: str
    """Name under which the server serves the model; its folder, which the server was started from, is `weights_folder`."""
    weights_folder: str
    """Folder, seen by trainer and server, that takes the weights (Hugging Face format) before each round of rollouts."""
    concurrent_requests: PositiveInt = 64
    timeout_seconds: PositiveFloat = 600.0
    attempts: PositiveInt = 5
    """Of one request, where the server is unreachable, overloaded (429) or fails (5xx)."""


class Rollout(Strict):
    """How responses are sampled."""

    engine: Literal["megatron", "vllm"] = "megatron"
    """megatron: in the training processes; vllm: by a server."""
    max_response_tokens: PositiveInt
    """Generation limit, the end-of-text token included."""
    temperature: PositiveFloat = 1.0
    """Of sampling and of the log-probabilities that are trained on alike. No top-k, no top-p: the loss needs the whole distribution."""
    batch_samples: PositiveInt = 64
    """Samples that a rank's engine decodes at once (megatron); more need more memory for keys and values."""
    server: VllmServer | None = None

    @model_validator(mode="after")
    def _server_where_it_is_used(self) -> Rollout:
        if (self.engine == "vllm") != (self.server is not None):
            raise ValueError(
                f"rollout.engine is {self.engine}: rollout.server is for engine vllm, which needs it; set both or none"
            )
        return self


class StopRule(Strict):
    """When training stops by itself, before the step that it distrusts is saved."""

    max_mean_gap_nats: PositiveFloat
    """Of the mean absolute difference between the log-probabilities of rollout and training, per token."""
    max_gap_nats: PositiveFloat | None = None
    """Of its maximum over the tokens of a step; None: no limit (in bf16 single tokens may be far off)."""


class Grpo(Strict):
    """One reinforcement-learning stage: on-policy GRPO with the DAPO loss (arXiv 2402.03300, 2503.14476)."""

    title: str
    steps: PositiveInt
    """Rounds of rollouts and training."""
    prompts_per_step: PositiveInt
    samples_per_prompt: Annotated[int, Field(ge=2)]
    """Size of a group."""
    optimizer_steps_per_rollout: PositiveInt = 1
    """1 is on-policy; more cut the rollout batch into as many mini batches, whose later ones are off-policy."""
    seq_length_tokens: PositiveInt
    """Longest prompt and response together."""
    rope_base: PositiveFloat | None = None
    """None: that of the phase before, in a curriculum."""
    learning_rate: PositiveFloat
    mup_scaling: bool = False
    """False: the rate is that of every weight, as published rates are meant. True: a base rate as in the phases, which muP divides by
    the width multiplier for the matrices inside the layers."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up from 0, then constant."""
    deviation: Literal["sample", "population", "none"]
    """What advantages are divided by (training/rl/losses.py)."""
    advantage_epsilon: NonNegativeFloat = 1.0e-6
    clip_low: PositiveFloat
    clip_high: PositiveFloat
    kl_coefficient: NonNegativeFloat
    """Weight of the k3 divergence from the frozen model that the stage starts with; 0: none is kept."""
    overlong_cache_tokens: NonNegativeInt
    """Soft punishment over the last so many tokens before the generation limit; 0: none."""
    overlong_filter: bool
    """Leave truncated responses out of the loss."""
    dynamic_sampling: bool
    """Roll out again until every group has signal."""
    dynamic_sampling_max_rounds: PositiveInt = 4
    rollout: Rollout
    stop: StopRule
    save_interval_steps: PositiveInt
    keep_checkpoints: PositiveInt = 2
    exit_after_minutes: PositiveInt | None = None
    """Save and leave after this many minutes, to be resumed."""
    record_samples: NonNegativeInt = 0
    """Samples per step written to `rollouts.jsonl`, with text and reward, for people to read."""

    @property
    def samples_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def samples_per_optimizer_step(self) -> int:
        return self.samples_per_step // self.optimizer_steps_per_rollout

    @model_validator(mode="after")
    def _numbers_fit(self) -> Grpo:
        if self.prompts_per_step % self.optimizer_steps_per_rollout:
            raise ValueError(
                f"prompts_per_step is {self.prompts_per_step}, which optimizer_steps_per_rollout {self.optimizer_steps_per_rollout} does "
                "not divide; mini batches are whole groups"
            )
        limit = self.rollout.max_response_tokens
        if limit >= self.seq_length_tokens:
            raise ValueError(
                f"rollout.max_response_tokens is {limit}, seq_length_tokens {self.seq_length_tokens}: no room is left for a prompt; "
                f"lower it below {self.seq_length_tokens}"
            )
        if self.overlong_cache_tokens > limit:
            raise ValueError(
                f"overlong_cache_tokens is {self.overlong_cache_tokens}, over rollout.max_response_tokens {limit}; lower it"
            )
        return self


class GrpoStage(Grpo):
    """One stage of a curriculum: the settings with what they are applied to, and where."""

    initial: str | None = None
    """Of the first stage of all: the folder of the model that it starts from, what `quarry convert --from HF --to FOLDER` wrote or a finished
    stage of another run. None: the stage before hands its model on."""
    prompts: list[str] = []
    """JSON-lines files or glob patterns; format in training/rl/prompts.py."""
    builder: str | None = None
    """In the place of prompts: prompts made here while data are prepared (data_prep/rl_prompts.py), `max_prompts` of them."""
    max_prompts: PositiveInt | None = None
    rewards: dict[str, Any]
    """Reward plan: domain -> rewards (training/rewards/plan.py)."""
    parallel: Parallel
    precision: Precision
    optimizer: Optimizer | None = None
    """The stage's own optimizer settings; None: the recipe's."""

    def settings(self, rope_base: float) -> Grpo:
        """The part that is no more than settings, with the RoPE base that holds."""
        own = {name: getattr(self, name) for name in Grpo.model_fields}
        return Grpo(**(own | {"rope_base": rope_base}))
