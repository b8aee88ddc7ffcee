"""Supervised fine-tuning as a recipe says it: samples, epochs, learning rate, packed length. Part of the schema, see recipes/schema.py.

A *sample* is one conversation; a *sequence* is what samples are packed into, `seq_length_tokens` long. Megatron's batch counts sequences.
"""

from __future__ import annotations

import math
from typing import Literal

from recipes.fields import NonNegativeFloat, PositiveFloat, PositiveInt, Strict
from recipes.job_options import Optimizer, Parallel, Precision


class SftJudge(Strict):
    """How a source is curated while data are prepared: rules first, then an LLM judge (docs/judge.md). What it refuses is not trained on."""

    endpoint: str
    """OpenAI-compatible address, http://host:8000/v1; `local`: a small model served here, which proves the path and judges nothing."""
    model: str | None = None
    """The judge, as the endpoint calls it; None with `local` only."""
    rubric: str = "auto"
    """Name (recipes/rubric) or YAML file; auto: the one that fits each sample."""
    rules: str = "sft"
    """Name (recipes/curation) or YAML file of what precedes the judge."""
    take: list[Literal["accepted", "borderline"]] = ["accepted"]
    """Outcomes that are trained on."""
    concurrent_requests: PositiveInt = 16
    max_answer_tokens: PositiveInt = 1024
    """Longest judgement, thinking included."""
    timeout_seconds: PositiveFloat = 120.0
    """Of one attempt."""
    max_unjudged_percent: NonNegativeFloat = 0.0
    """More samples that no attempt brought a judgement for stop the preparation; the next one asks about these again."""
    min_taken_percent: NonNegativeFloat = 1.0
    """Fewer samples taken of a source than this stop the preparation: the judge is broken, or the source is no good. With 0 even a source of
    which nothing is left goes on without."""
    api_key_env: str | None = None
    """Environment variable that holds the key; None: QUARRY_JUDGE_API_KEY."""


class SftSource(Strict):
    paths: list[str] = []
    """Files or glob patterns of chat samples: JSON lines (plain, gz, zst) or Parquet; format in docs/sft.md."""
    builder: str | None = None
    """In the place of paths: samples made here (data_prep/sft_builtin.py), `max_samples` of them."""
    max_samples: PositiveInt | None = None
    judge: SftJudge | None = None
    """None: the samples are trained on as they are, because `quarry judge` has been run or nothing is to be judged."""


class Sft(Strict):
    """One stage of supervised fine-tuning."""

    title: str
    sources: dict[str, SftSource]
    """Name -> samples. All of them are trained on, `epochs` times; held-out losses are given by source."""
    epochs: PositiveInt
    """Times that every sample is seen, in another order each time."""
    seq_length_tokens: PositiveInt
    global_batch_sequences: PositiveInt
    peak_lr: PositiveFloat
    """Learning rate at the end of the warm-up."""
    mup_scaling: bool = False
    """False: the rate is that of every weight, as published rates of fine-tuning are meant. True: a base rate as in the phases, which
    muP divides by the width multiplier for the matrices inside the layers."""
    end_lr: NonNegativeFloat = 0.0
    """Where the linear decay ends, with the last step."""
    warmup_percent: NonNegativeFloat = 0.0
    """Of the stage's steps: linear, from 0."""
    keep_moments: bool = False
    """True: Adam's moments come with the hand-off, as between phases. False: weights only, because another objective begins; the moments
    start at zero."""
    initial: str | None = None
    """Of the first stage of all: the folder of the model that it starts from, what `quarry convert --from HF --to FOLDER` wrote or a finished
    stage of another run. None: the stage before hands its model on."""
    rope_base: PositiveFloat | None = None
    """None: that of the phase before."""
    pack_multiple_tokens: PositiveInt | None = None
    """Each sample takes up a multiple of this in its sequence; None: what the layout's context parallelism needs (2 * context). Give a
    larger one when the stage may be resumed with more context parallelism."""
    too_long: Literal["refuse", "cut"] = "refuse"
    """A sample longer than a sequence: refused and counted, or cut to the first `seq_length_tokens` and counted."""
    chat_template: str | None = None
    """Jinja file with {% generation %} tags; None: the tokenizer's own."""
    allowed_tokens: list[str] = []
    """Special tokens that an assistant's text may spell, `<think>` say; a sample that spells another is refused."""
    ignored_keys: list[str] = []
    """Further keys of a sample that are read past; any other unknown key refuses it, because it may be a mistyped `tools`."""
    max_refused_percent: NonNegativeFloat = 5.0
    """More refused samples of a source than this mean a wrong file, and stop the preparation."""
    heldout_percent: NonNegativeFloat
    """Samples of each source kept out of training, chosen by a hash of their tokens."""
    heldout_max_samples: PositiveInt
    """Cap on them per source."""
    parallel: Parallel
    precision: Precision
    optimizer: Optimizer | None = None
    """The stage's own optimizer settings; None: the recipe's."""
    save_interval_steps: PositiveInt
    keep_checkpoints: PositiveInt = 2
    log_interval_steps: PositiveInt = 1
    exit_after_minutes: PositiveInt | None = None
    """Save and leave after this many minutes, to be resumed by the next job of the same stage."""

    @property
    def multiple_tokens(self) -> int:
        """What each sample's length is rounded up to: context parallelism gives each rank two of 2 * CP pieces of every sample."""
        if self.pack_multiple_tokens is not None:
            return self.pack_multiple_tokens
        return 2 * self.parallel.context if self.parallel.context > 1 else 1

    def steps(self, sequences: int) -> int:
        """Optimizer steps for `sequences` packed sequences per epoch; the last step is filled up with empty sequences."""
        return math.ceil(self.epochs * sequences / self.global_batch_sequences)
