"""The resolved recipe: every value that a job reads, typed, with its unit in its name.

A recipe is composed once, on the machine that launches it (`recipes.compose`), and written as one JSON file. Jobs read that
file through `Recipe.read` and never see Hydra. All models are frozen and refuse unknown keys, so a mistyped key is an error that
names its path instead of a silent default.

Units: `*_tokens` and `tokens` count tokens, `*_samples` count sequences, `steps` counts optimizer steps, `*_lr` are absolute base
learning rates (before muP's division by the width multiplier), `*_percent` are percent of a phase's tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError, model_validator

from recipes.ab_options import Ab
from recipes.cleaning import Cleaning
from recipes.fields import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Strict
from recipes.job_options import Optimizer, Parallel, Precision
from recipes.logging_options import Logging
from recipes.posttrain import GrpoStage
from recipes.sft_options import Sft

RESOLVED_FORMAT = "quarry.recipe/1"


class RecipeError(ValueError):
    """A recipe that cannot be trained as it stands; the message names key, value, rule and a value that would pass."""


class Model(Strict):
    """A Granite 4.1 dense decoder: RMSNorm, GQA, SwiGLU, RoPE, no biases."""

    name: str
    num_layers: PositiveInt
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    """Width of the SwiGLU's gate and up projections each."""
    num_attention_heads: PositiveInt
    num_query_groups: PositiveInt
    """Key/value heads (GQA)."""
    head_dim: PositiveInt
    vocab_size: PositiveInt
    """Rows of the embedding; the tokenizer's vocabulary may be smaller, never larger."""
    tied_embeddings: bool
    embedding_multiplier: PositiveFloat
    """h_0 = embedding_multiplier * E[token]"""
    residual_multiplier: PositiveFloat
    """h = h + residual_multiplier * branch(norm(h))"""
    attention_multiplier: PositiveFloat
    """Replaces 1/sqrt(head_dim): softmax(attention_multiplier * QK^T)."""
    logits_scaling: PositiveFloat
    """logits = (W_head h) / logits_scaling"""
    norm_epsilon: PositiveFloat
    init_std: PositiveFloat
    """Standard deviation of the initial weights before muP's division by sqrt(width multiplier)."""
    mup_base_hidden_size: PositiveInt | None
    """muP's proxy width; the width multiplier is hidden_size / this. None: 1, no learning-rate or init scaling."""
    released_rope_base: PositiveFloat
    """RoPE theta of the exported config when no phase has set another."""
    released_max_position_tokens: PositiveInt
    published_parameters: PositiveInt | None
    """Exact count that the built model must have; None for a model of our own."""


class Schedule(Strict):
    """Learning rate over one phase, as a function of tokens (formulas: recipes/schedules.py)."""

    kind: Literal["power", "exponential", "linear", "constant"]
    warmup_tokens: NonNegativeInt = 0
    """Linear warm-up from 0, at the start of this phase."""
    horizon_tokens: PositiveInt | None = None
    """Tokens over which an exponential or linear schedule runs; None: the phase's tokens. The linter refuses any other value."""
    start_lr: PositiveFloat | None = None
    """Learning rate that exponential, linear and constant start from; None: where the phase before stopped."""
    end_lr: NonNegativeFloat | None = None
    """Learning rate at the end of exponential and linear; unused by power and constant."""
    power_amplitude: PositiveFloat | None = None
    """a of min(max_lr, batch_samples * a * n^b), n = tokens since the start of the curriculum."""
    power_exponent: float | None = None
    """b, negative."""
    max_lr: PositiveFloat | None = None
    """Cap of the power schedule (eta_max)."""
    jump: str | None = None
    """The reason for a learning rate that does not continue the phase before; a jump without it is refused."""


class Mixture(Strict):
    name: str
    shares_percent: dict[str, NonNegativeFloat]
    """Category -> percent of the phase's tokens."""


class Phase(Strict):
    """One pre-training stage."""

    title: str
    tokens: PositiveInt
    """Tokens trained: steps * global_batch_samples * seq_length_tokens exactly."""
    tokens_requested: PositiveInt | None = None
    """What the recipe asked for, before it was rounded up to whole steps; None: as `tokens`."""
    steps: PositiveInt
    seq_length_tokens: PositiveInt
    rope_base: PositiveFloat
    global_batch_samples: PositiveInt
    mixture: Mixture
    min_document_tokens: NonNegativeInt = 0
    """Of what is left of a source, documents of at least this length come first (long-context phases); shorter ones fill up."""
    require_long_in: list[str] = []
    """Categories of which the phase takes nothing shorter than min_document_tokens; when their long documents are used up, these
    begin another epoch (at most data.max_epochs)."""
    documents_apart: bool = False
    """No token sees, or is predicted from, another document of its sample. False: a sample is one stream."""
    restart_positions: bool = False
    """RoPE counts from 0 in each document (with documents_apart only). RoPE depends on distances alone, so that what changes is the
    rounding of large positions."""
    schedule: Schedule
    parallel: Parallel
    precision: Precision
    optimizer: Optimizer | None = None
    """A phase's own optimizer settings; None: the recipe's."""
    save_interval_steps: PositiveInt
    keep_checkpoints: PositiveInt = 2
    """Checkpoints kept on disk while the phase runs, the newest last; older ones go."""
    async_saves: bool = False
    """A process beside each rank writes checkpoints while the next steps are taken; until one is whole there is another on the disk."""
    log_interval_steps: PositiveInt = 1
    exit_after_minutes: PositiveInt | None = None
    """Save and leave after this many minutes, to be resumed by the next job of the same stage."""

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_samples * self.seq_length_tokens

    @property
    def samples(self) -> int:
        return self.steps * self.global_batch_samples

    @property
    def packed_lengths_vary(self) -> bool:
        """Micro batches differ in shape from what pipeline stages expect, [seq_length_tokens, micro_batch_samples]: with documents apart
        they are one packed sequence, padded for context parallelism by what their documents need."""
        layout = self.parallel
        return self.documents_apart and layout.pipeline > 1 and (layout.context > 1 or layout.micro_batch_samples > 1)


class Merge(Strict):
    """Weighted average of the final checkpoints of earlier stages."""

    title: str
    inputs: dict[str, PositiveFloat]
    """Stage -> weight; the weights sum to 1. Adam's moments are those of the last input (the newest model)."""


class Export(Strict):
    """The last checkpoint as a Hugging Face folder, and a generation sample from it."""

    title: str
    prompts: list[str] = []
    max_new_tokens: PositiveInt = 64
    dtype: Literal["fp32", "bf16"] = "bf16"


class Source(Strict):
    """One tokenized data set of one category."""

    category: str
    weight: PositiveFloat = 1.0
    """Share of its category relative to the category's other sources."""
    kind: Literal["builtin", "files", "indexed"]
    """builtin: made from what this installation has (data_prep/corpus); files: JSON lines (plain, gz, zst) or Parquet with a text
    key; indexed: a .bin/.idx pair."""
    builder: str | None = None
    """Name of the builder (kind builtin)."""
    paths: list[str] = []
    """Files or glob patterns (files), or one prefix without .bin/.idx (indexed)."""
    text_key: str = "text"
    concatenate: Literal["repositories"] | None = None
    """repositories: the files are source files of repositories; each repository becomes one document, its files in dependency order."""
    repository_key: str = "repo_name"
    """Key of a line that names its repository (concatenate)."""
    path_key: str = "path"
    """Key of a line that gives the file's path inside its repository (concatenate)."""
    max_bytes: PositiveInt | None = None
    """Cap on the text taken from this source (builtin)."""


class Tokenizer(Strict):
    kind: Literal["sentencepiece", "huggingface"]
    path: str | None = None
    """Existing .model file or tokenizer folder; None: train one on the mixture of the first phase (sentencepiece: BPE with byte
    fallback; huggingface: byte-level BPE)."""
    vocab_size: PositiveInt
    """Entries of the tokenizer, at most the model's vocab_size."""
    train_max_bytes: PositiveInt | None = None


class Data(Strict):
    name: str
    root: str
    """Folder that holds the tokenizer, the tokenized sources, the held-out sets and the views."""
    sources: dict[str, Source]
    tokenizer: Tokenizer
    cleaning: Cleaning | None = None
    """What is filtered, deduplicated, masked and decontaminated before tokenizing; None: nothing."""
    heldout_percent: PositiveFloat
    """Documents of each source kept out of training, chosen by a hash of their content."""
    heldout_max_tokens: PositiveInt
    """Cap on the held-out tokens per category."""
    heldout_batch_samples: PositiveInt
    """Held-out sequences evaluated per category at each boundary."""
    heldout_seq_length_tokens: PositiveInt
    """Length of a held-out sequence, the same in every stage so that losses compare."""
    max_epochs: PositiveFloat
    """A source may be drawn at most this often over the whole curriculum."""


class Cluster(Strict):
    kind: Literal["local", "docker", "slurm"]
    name: str
    gpu: Literal["cpu", "h100", "h200", "b200", "gb200"]
    """What a rank runs on; cpu presents torch.cuda as CPU (training/cpu_backend.py)."""
    gpus_per_node: PositiveInt
    runs_root: str
    """Folder under which each run has its own."""
    threads_per_rank: PositiveInt = 1
    """OMP_NUM_THREADS of a rank."""
    options: dict[str, Any] = {}
    """What only one kind of cluster has (account, partition, container image ...)."""


class Recipe(Strict):
    """A curriculum for one model, fully resolved."""

    format: Literal["quarry.recipe/1"] = RESOLVED_FORMAT
    name: str
    """Name of the curriculum."""
    seed: NonNegativeInt
    stages: list[str]
    """Stages in order; each names a phase, a merge, an sft, a grpo, a gate (ab) or the export."""
    phase: dict[str, Phase]
    merge: dict[str, Merge] = {}
    sft: dict[str, Sft] = {}
    grpo: dict[str, GrpoStage] = {}
    ab: dict[str, Ab] = {}
    export: dict[str, Export] = {}
    model: Model
    optimizer: Optimizer
    data: Data
    cluster: Cluster
    logging: Logging = Logging()
    extra: dict[str, Any] = {}
    """Free-form values that a team adds (`+extra.owner=me`); Quarry records and ignores them."""

    @model_validator(mode="after")
    def _stages_resolve(self) -> Recipe:
        known = [*self.phase, *self.merge, *self.sft, *self.grpo, *self.ab, *self.export]
        for name in known:
            if known.count(name) > 1:
                raise ValueError(
                    f"stage '{name}' is defined twice, under two of phase, merge, sft, grpo, ab and export; rename one"
                )
        for stage in self.stages:
            if stage not in known:
                raise ValueError(
                    f"stages names '{stage}', which is no phase, merge, sft, grpo, ab or export; known: {', '.join(known)}"
                )
        if len(set(self.stages)) != len(self.stages):
            raise ValueError("stages names a stage twice; give the second run of a phase its own name")
        return self

    def stage_kind(self, stage: str) -> Literal["phase", "merge", "sft", "grpo", "ab", "export"]:
        if stage in self.phase:
            return "phase"
        if stage in self.merge:
            return "merge"
        if stage in self.sft:
            return "sft"
        if stage in self.grpo:
            return "grpo"
        if stage in self.ab:
            return "ab"
        if stage in self.export:
            return "export"
        raise RecipeError(f"no stage '{stage}' in this recipe; stages: {', '.join(self.stages)}")

    def previous(self, stage: str) -> str | None:
        """The stage whose hand-off `stage` starts from; None for the first. A gate hands on what it was handed: in front of the first
        phase nothing."""
        before = self.stages[: self.stages.index(stage)]
        return before[-1] if any(s not in self.ab for s in before) else None

    def tokens_before(self, stage: str) -> int:
        """Tokens that the phases before `stage` train."""
        return sum(self.phase[s].tokens for s in self.stages[: self.stages.index(stage)] if s in self.phase)

    @property
    def total_tokens(self) -> int:
        return sum(self.phase[s].tokens for s in self.stages if s in self.phase)

    def digest(self) -> str:
        """SHA-256 of the canonical JSON of this recipe, in hex."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def write(self, path: Path) -> None:
        """Write the recipe as JSON, atomically (temporary name, fsync, rename)."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with open(temporary, "w", encoding="utf-8") as f:
            # In the recipe's own order, not sorted: the last input of a merge is the newest.
            json.dump(self.model_dump(mode="json"), f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Read a resolved recipe; RecipeError names the file and every wrong key."""
        return read_strict(cls, Path(path), missing=f"no resolved recipe at {path}; `quarry launch` writes it")


def initial_model(recipe: Recipe, stage: str) -> str | None:
    """Folder of the model that `stage` starts from where no stage comes before it; None: it has none."""
    own = recipe.sft.get(stage) or recipe.grpo.get(stage)
    return None if own is None else own.initial


def read_strict[Read: Strict](kind: type[Read], path: Path, *, missing: str) -> Read:
    """The object that a JSON file holds; RecipeError with every wrong key, or `missing` where there is no such file."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise RecipeError(missing) from None
    except ValidationError as error:
        raise RecipeError(f"{path}: {describe(error)}") from None


def describe(error: ValidationError) -> str:
    """All problems of a validation error, one `key: message (value)` each."""
    problems = []
    for e in error.errors():
        key = ".".join(str(part) for part in e["loc"]) or "recipe"
        value = "" if e["type"] in ("missing", "value_error") else f" (got {e['input']!r})"
        hint = "; remove it, or put a value of your own under +extra.NAME" if e["type"] == "extra_forbidden" else ""
        problems.append(f"{key}: {e['msg']}{value}{hint}")
    return "; ".join(problems)
