"""What a stage leaves for the next one, and the check that the next one makes of it.

A stage writes `handoff.json` last and atomically. Whether a job starts its stage for the first time, resumes it or refuses is decided
on the node at job start, from what lies on disk then (`resolve`): a scheduler's dependency proves nothing about files.

On a first start, weights and Adam's moments come from the hand-off, and the data cursor, the schedule, the sequence length, the RoPE
base and the layout are this stage's. On a resume nothing is reset.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from data_prep.files import digest_of, write_json
from data_prep.index_caches import verify_cache
from data_prep.manifest import DataError, HeldoutManifest, MixtureManifest, TokenizerRecord
from recipes.schema import Model, Recipe, Strict, describe
from training.arguments import Load
from training.files import compare_folder, digest_folder

if TYPE_CHECKING:
    from data_prep.sft_manifest import SftManifest

FORMAT = "quarry.handoff/1"
TRACKER = "latest_checkpointed_iteration.txt"

# What may change when a stage is resumed: it alters where and how often things happen, not what is learned.
RESUMABLE_CHANGES = (
    "parallel",
    "save_interval_steps",
    "keep_checkpoints",
    "async_saves",
    "log_interval_steps",
    "exit_after_minutes",
    "title",
)


class Refused(ValueError):
    """The stage must not start; the message lists what differs and how to mend it."""


class FileRecord(Strict):
    bytes: int
    sha256: str


class Drawn(Strict):
    samples: int
    tokens: int


class Handoff(Strict):
    format: Literal["quarry.handoff/1"] = FORMAT
    stage: str
    kind: Literal["phase", "merge", "sft", "grpo", "ab", "export", "import"]
    step: int
    """Steps of this stage (for a merge: of its last input)."""
    stage_tokens: int
    total_tokens: int
    """Tokens since the start of the curriculum, of the phases: what the schedules of pre-training count."""
    checkpoint: str | None
    """Folder of the checkpoint, relative to the stage's folder; None for an export."""
    checkpoint_files: dict[str, FileRecord]
    recipe_digest: str
    training_digest: str
    """Digest of what decides the result of this stage: model, phase, optimizer, seed, data and the hand-off before."""
    data_digest: str | None
    ledger: dict[str, dict[str, Drawn]]
    """Phase -> source -> what was drawn, over the whole curriculum so far."""
    layout: dict[str, Any] | None
    rope_base: float
    seq_length_tokens: int
    model: Model
    tokenizer: dict[str, Any]
    final_loss: float | None
    """Training loss of the last step, nats per token."""
    heldout: dict[str, float] | None
    """Category -> held-out loss at the end, nats per token, at the recipe's held-out length."""
    heldout_bound: dict[str, float] | None = None
    """After a merge, in place of `heldout`: per category the worst loss of its inputs."""
    heldout_digest: str | None
    """Digest of the held-out sets that `heldout` was measured on."""
    heldout_answers: dict[str, float] | None = None
    """After fine-tuning: source -> loss on held-out answers, nats per token that an assistant wrote."""
    versions: dict[str, str]

    @classmethod
    def read(cls, stage_dir: Path) -> Handoff:
        """Raises Refused if there is no hand-off or it is malformed."""
        path = stage_dir / "handoff.json"
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            done = latest_step(stage_dir / "checkpoints")
            raise Refused(
                f"stage '{stage_dir.name}' is unfinished: {path} does not exist"
                + (f" (its last checkpoint is of step {done})" if done is not None else " (it has no checkpoint either)")
                + "; run the same `quarry launch` again to finish it"
            ) from None
        except ValidationError as error:
            raise Refused(f"{path} is no hand-off of this version: {describe(error)}") from None

    def write(self, stage_dir: Path) -> None:
        write_json(stage_dir / "handoff.json", self.model_dump(mode="json"))

    def verify_files(self, stage_dir: Path) -> list[str]:
        """What is missing or altered of the checkpoint."""
        if self.checkpoint is None:
            return []
        return compare_folder(stage_dir / self.checkpoint, {k: v.model_dump() for k, v in self.checkpoint_files.items()})


def latest_step(checkpoints: Path) -> int | None:
    """Step of the last whole checkpoint below `checkpoints` (Megatron writes the tracker after the files); None without one."""
    tracker = checkpoints / TRACKER
    if not tracker.exists():
        return None
    text = tracker.read_text().strip()
    if not text.isdigit():
        raise Refused(f"{tracker} holds '{text}', not a step: the file is damaged; write the last whole iter_* number into it")
    return int(text)


def checkpoint_record(stage_dir: Path, step: int) -> dict[str, Any]:
    """The fields of a hand-off that say which checkpoint is handed off: that of `step`, with the digests of its files."""
    checkpoint = f"checkpoints/iter_{step:07d}"
    files = {name: FileRecord.model_validate(record) for name, record in digest_folder(stage_dir / checkpoint).items()}
    return {"step": step, "checkpoint": checkpoint, "checkpoint_files": files}


def final_checkpoint(stage_dir: Path, steps: int) -> dict[str, Any]:
    """`checkpoint_record` of a stage that has taken all its `steps`."""
    step = latest_step(stage_dir / "checkpoints")
    if step != steps:
        raise RuntimeError(f"{stage_dir}: the last checkpoint is of step {step}, the stage has {steps}; no hand-off is written")
    return checkpoint_record(stage_dir, step)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """How a phase begins."""

    kind: Literal["first_start", "resume", "finished"]
    load: Load | None
    """None on the very first stage's first start, and when finished."""
    previous: Handoff | None
    training_digest: str
    reason: str


def training_digest(recipe: Recipe, stage: str, data_digest: str | None, previous: Handoff | None) -> str:
    phase = recipe.phase[stage].model_dump(mode="json", exclude=set(RESUMABLE_CHANGES))
    return digest_of(
        {
            "model": recipe.model.model_dump(mode="json"),
            "phase": phase,
            "optimizer": recipe.optimizer.model_dump(mode="json"),
            "seed": recipe.seed,
            "data": data_digest,
            "previous": previous.training_digest if previous else None,
        }
    )


def resolve(
    recipe: Recipe,
    stage: str,
    run_dir: Path,
    mixture: MixtureManifest,
    heldout: HeldoutManifest,
    *,
    verify_files: bool = True,
) -> Decision:
    """First start, resume or finished, for the phase `stage`; raises Refused with everything that is wrong.

    `mixture` and `heldout` are the manifests that the stage will read; their files and those of the hand-off are verified here against
    their digests, unless `verify_files` is False because another node of the same job does it.
    """
    problems = _check_data(recipe, stage, mixture, heldout, verify_files)
    return decide(recipe, stage, run_dir, mixture.digest, mixture.tokenizer.sha256, problems, verify_files=verify_files)


def decide(
    recipe: Recipe,
    stage: str,
    run_dir: Path,
    data_digest: str,
    tokenizer_sha256: str,
    problems: list[str],
    *,
    initial: str | None = None,
    verify_files: bool = True,
) -> Decision:
    """`resolve` for a stage whose data have been looked at: `problems` is what was found, and joins what is found here.

    `initial` is the folder that a first stage starts from (recipes.schema.initial_model).
    """
    stage_dir = run_dir / "stages" / stage
    problems = list(problems)
    previous_dir = predecessor(recipe, stage, run_dir, initial)
    previous = read_predecessor(recipe, stage, previous_dir) if previous_dir else None
    digest = training_digest(recipe, stage, data_digest, previous)

    if (stage_dir / "handoff.json").exists():
        own = Handoff.read(stage_dir)
        if own.training_digest != digest:
            raise Refused(
                f"stage '{stage}' is finished, but was trained with another recipe, other data or another predecessor "
                f"(training digest {own.training_digest[:12]}..., now {digest[:12]}...); start a new run with --run NAME"
            )
        return Decision(kind="finished", load=None, previous=previous, training_digest=digest, reason="handoff.json is there")

    step = latest_step(stage_dir / "checkpoints")
    if step is not None:
        started = read_start(stage_dir)
        if started != digest:
            problems.append(
                f"stage '{stage}' was begun with another recipe, other data or another predecessor (training digest {started[:12]}..., "
                f"now {digest[:12]}...): a resume must not change what is learned; restore them, or start a new run with --run NAME"
            )
        _raise(stage, problems)
        load = Load(checkpoints=stage_dir / "checkpoints", step=step, resume=True)
        return Decision(
            kind="resume", load=load, previous=previous, training_digest=digest, reason=f"own checkpoint of step {step}"
        )

    if previous is None or previous_dir is None:
        _raise(stage, problems)
        return Decision(kind="first_start", load=None, previous=None, training_digest=digest, reason="first stage")
    problems += _check_previous(recipe, stage, previous, tokenizer_sha256)
    damaged = previous.verify_files(previous_dir) if verify_files else []
    remedy = "convert the model again" if previous.kind == "import" else "train it again"
    problems += [f"{p}; restore the checkpoint of {_words(previous, 'stage ')} or {remedy}" for p in damaged]
    _raise(stage, problems)
    assert previous.checkpoint is not None
    checkpoint = previous_dir / previous.checkpoint
    load = Load(checkpoints=checkpoint.parent, step=int(checkpoint.name.removeprefix("iter_")), resume=False)
    return Decision(
        kind="first_start", load=load, previous=previous, training_digest=digest, reason=f"hand-off of {_words(previous)}"
    )


def predecessor(recipe: Recipe, stage: str, run_dir: Path, initial: str | None = None) -> Path | None:
    """Folder of the hand-off that `stage` starts from: that of the stage before it, or of a first stage `initial`; None: random weights."""
    before = recipe.previous(stage)
    if before is not None:
        return run_dir / "stages" / before
    return None if initial is None else Path(initial)


def read_predecessor(recipe: Recipe, stage: str, folder: Path) -> Handoff:
    """The hand-off in `folder` (`predecessor`); raises Refused if there is none."""
    if recipe.previous(stage) is None and not (folder / "handoff.json").exists():
        raise Refused(
            f"{stage}.initial is {folder}, which holds no handoff.json: it must be a finished stage of a run, or what "
            "`quarry convert --from HUGGING_FACE_FOLDER --to FOLDER` wrote (with the tokenizer's files beside the model)"
        )
    return Handoff.read(folder)


def _words(previous: Handoff, stage: str = "") -> str:
    return f"the imported model '{previous.stage}'" if previous.kind == "import" else f"{stage}'{previous.stage}'"


def _raise(stage: str, problems: list[str]) -> None:
    if problems:
        raise Refused(f"stage '{stage}' refuses to start:\n" + "\n".join(f"  - {p}" for p in problems))


def read_start(stage_dir: Path) -> str:
    """The training digest that `write_start` recorded; Refused where there is none to be read."""
    path = stage_dir / "start.json"
    try:
        return json.loads(path.read_bytes())["training_digest"]
    except (FileNotFoundError, json.JSONDecodeError, KeyError) as error:
        raise Refused(
            f"{stage_dir} has checkpoints but no readable start.json ({error!r}): it is unknown what they were trained with; "
            f"move {stage_dir} away and start the stage again"
        ) from None


def write_start(stage_dir: Path, decision: Decision) -> None:
    """Record what a first start begins with; a resume is checked against it."""
    write_json(stage_dir / "start.json", {"training_digest": decision.training_digest, "reason": decision.reason})


def write_model_json(recipe: Recipe, stage: str, stage_dir: Path, tokenizer: dict[str, Any]) -> None:
    """What is needed to read the stage's checkpoints without the recipe (see model/convert.py)."""
    phase = recipe.phase[stage]
    path = Path(recipe.data.root) / tokenizer["path"]
    so_far = recipe.stages[: recipe.stages.index(stage) + 1]
    write_json(
        stage_dir / "model.json",
        {
            "format": "quarry.model/1",
            "model": recipe.model.model_dump(mode="json"),
            "rope_base": phase.rope_base,
            # What the model has been trained on up to here: an annealing at a shorter length does not take long context back.
            "max_position_tokens": max(recipe.phase[s].seq_length_tokens for s in so_far if s in recipe.phase),
            "tokenizer": {**tokenizer, "path": str(path.resolve())},
        },
    )


def _check_data(
    recipe: Recipe, stage: str, mixture: MixtureManifest, heldout: HeldoutManifest, verify_files: bool
) -> list[str]:
    phase = recipe.phase[stage]
    fields = (
        ("phase", stage, mixture.phase),
        ("seq_length_tokens", phase.seq_length_tokens, mixture.seq_length_tokens),
        ("samples", phase.samples, mixture.samples),
        ("seed", recipe.seed, mixture.seed),
    )
    problems = data_problems(
        recipe, stage, fields, mixture.tokenizer, (mixture, heldout) if verify_files else (), remedy="run `quarry prep` again"
    )
    try:
        verify_cache(Path(recipe.data.root), mixture, read_files=verify_files)
    except DataError as error:
        problems.append(str(error))
    return problems


def data_problems(
    recipe: Recipe,
    stage: str,
    fields: Iterable[tuple[str, Any, Any]],
    tokenizer: TokenizerRecord,
    manifests: Iterable[MixtureManifest | HeldoutManifest | SftManifest],
    *,
    remedy: str,
) -> list[str]:
    """What is wrong with data that a stage has been given, one sentence each.

    `fields`: (key, what the recipe says, what the data were prepared with). The files of `manifests` are read and compared with their digests.
    """
    problems = [
        f"the data of stage '{stage}' were prepared with {key} {found}, the recipe says {expected}; {remedy}"
        for key, expected, found in fields
        if expected != found
    ]
    if tokenizer.vocab_size > recipe.model.vocab_size:
        problems.append(
            f"the data's tokenizer has {tokenizer.vocab_size} entries, the model's vocab_size is {recipe.model.vocab_size}; "
            "use a model with at least as many rows"
        )
    for manifest in manifests:
        try:
            manifest.verify(Path(recipe.data.root))
        except DataError as error:
            problems.append(str(error))
    return problems


def _check_previous(recipe: Recipe, stage: str, previous: Handoff, tokenizer_sha256: str) -> list[str]:
    """Everything in the hand-off `previous` that does not fit `stage`."""
    problems = []
    ours = recipe.model.model_dump()
    for key, theirs in previous.model.model_dump().items():
        if key in ("name", "published_parameters", "released_rope_base", "released_max_position_tokens", "init_std"):
            continue  # do not enter the computation of a trained model
        if key == "mup_base_hidden_size" and previous.kind == "import":
            continue  # GraniteConfig has none; it decides learning rates only, and those are this recipe's
        if theirs != ours[key]:
            problems.append(
                f"architecture differs: model.{key} is {theirs} in the hand-off of '{previous.stage}', {ours[key]} in the recipe; "
                "a phase can only continue the same model"
            )
    if previous.tokenizer["sha256"] != tokenizer_sha256:
        problems.append(
            f"tokenizer differs: '{previous.stage}' was trained with {previous.tokenizer['sha256'][:12]}..., the data of '{stage}' were "
            f"tokenized with {tokenizer_sha256[:12]}...; tokenize them again with the run's tokenizer"
        )
    phase = recipe.phase[stage]
    if phase.rope_base < previous.rope_base:
        problems.append(
            f"RoPE base falls from {previous.rope_base:g} ('{previous.stage}') to {phase.rope_base:g} ('{stage}'): a longer context "
            f"would be unlearned; set phase.{stage}.rope_base to at least {previous.rope_base:g}"
        )
    expected_tokens = recipe.tokens_before(stage)
    if (
        recipe.previous(stage) is not None and previous.total_tokens != expected_tokens
    ):  # a model of elsewhere has trained what it has
        problems.append(
            f"the hand-off of '{previous.stage}' holds {previous.total_tokens} tokens, the recipe trains {expected_tokens} before '{stage}'; "
            "the stages before were trained with another recipe"
        )
    if previous.stage in recipe.phase and previous.seq_length_tokens != recipe.phase[previous.stage].seq_length_tokens:
        problems.append(
            f"'{previous.stage}' was trained at {previous.seq_length_tokens} tokens, the recipe says "
            f"{recipe.phase[previous.stage].seq_length_tokens}"
        )
    if previous.final_loss is not None and not math.isfinite(previous.final_loss):
        problems.append(
            f"the final loss of '{previous.stage}' is {previous.final_loss}; train that stage again from an earlier checkpoint"
        )
    if previous.checkpoint is None:
        problems.append(f"stage '{previous.stage}' is an export and leaves no checkpoint; put it after all phases")
    if previous.kind == "import":
        problems += _check_import(recipe, stage, previous)
    return problems


def _check_import(recipe: Recipe, stage: str, previous: Handoff) -> list[str]:
    """What a model of elsewhere cannot give."""
    problems = []
    if recipe.phase[stage].rope_base != previous.rope_base:
        # Between stages of ours it may rise, because training goes on at a longer context.
        problems.append(
            f"{stage}.rope_base is {recipe.phase[stage].rope_base:g}, {_words(previous)} was trained with {previous.rope_base:g}; "
            "set it to that"
        )
    return problems
