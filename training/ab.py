"""The gate's stage: the node's part. Trains both arms one after the other, writes the verdict `ab.json`, and hands on what it was handed.

| how it ends | exit code | what follows |
|---|---|---|
| passed | 0 | the hand-off before it goes on to the phase, unchanged |
| the arms differ by more than the tolerance, or a loss was not finite | 17 | the chain stops, nothing behind runs |
| refused: configuration, data, hand-off, or arms that saw different samples | 78 | as every stage |
| an arm was asked to stop and saved | 75 | the same stage again; a finished arm is not run again |
| an arm crashed | its code | the chain stops; recorded as a failure that the same command may mend |
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from data_prep.files import digest_of, replace_symlink, write_json
from data_prep.manifest import DataError, HeldoutManifest, MixtureManifest, heldout_path, mixture_path
from recipes.ab_arms import ARMS, ArmName, arm_of, arm_recipe
from recipes.ab_table import verdict_lines
from recipes.plan import layout_text
from recipes.schema import Ab, Recipe, RecipeError
from training import ab_arm, rank_end, recorder
from training.ab_arm import ArmSettings
from training.ab_compare import DifferentSamples, compare, curves, read_arm, same_samples
from training.exit_codes import FINISHED, REQUEUE, SUSPICIOUS
from training.handoff import Decision, Handoff, Refused, resolve, write_start
from training.versions import versions

FORMAT = "quarry.ab/1"
VERDICT_FILE = "ab.json"
ARMS_FOLDER = "arms"


class ArmFailed(RuntimeError):
    """An arm ended with an exit code of its own."""

    def __init__(self, name: ArmName, code: int, cause: rank_end.RankEnd | None) -> None:
        super().__init__(f"arm {name} ended with exit code {code}: {cause.reason if cause else 'its last lines say why'}")
        self.name = name
        self.code = code


class StopAsked(Exception):
    """A request to stop that came between the arms, while files are verified and no rank runs."""


def _ask(number: int, frame: FrameType | None) -> None:
    raise StopAsked


def _on_request(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def run_ab(recipe: Recipe, stage: str, run_dir: Path) -> int:
    """Both arms and the verdict, on this node; returns the exit code of the table above."""
    from training.stage import refuse

    stage_dir = run_dir / "stages" / stage
    stage_dir.mkdir(parents=True, exist_ok=True)
    try:
        previous = _previous(recipe, stage, run_dir)
        if _passed_before(recipe, stage, stage_dir, previous):
            return FINISHED
        failed = None
        try:
            for name in ARMS:
                if not _run_arm(recipe, stage, run_dir, name):
                    return REQUEUE
        except ArmFailed as error:
            failed = error
        except StopAsked:
            return REQUEUE
        finally:
            _on_request(signal.SIG_DFL)
        verdict = _verdict(recipe, stage, run_dir, previous, failed)
    except (DataError, DifferentSamples, Refused, RecipeError) as error:
        return refuse(error)
    first_node = os.environ.get("NODE_RANK", "0") == "0"
    if first_node:
        write_json(stage_dir / VERDICT_FILE, verdict)
        print("\n".join(verdict_lines(verdict)), flush=True)
    if verdict["verdict"] == "pass":
        if first_node:
            _hand_on(recipe, stage, run_dir, previous)
        return FINISHED
    if failed is not None:
        return failed.code
    if first_node:  # in the words that launchers/last_words.py looks for
        print(f"SuspiciousResult: gate '{stage}' failed: {'; '.join(verdict['reasons'])}", flush=True)
    return SUSPICIOUS


def arm_stage_dir(recipe: Recipe, stage: str, run_dir: Path, name: ArmName) -> Path:
    return run_dir / "stages" / stage / ARMS_FOLDER / name / "stages" / recipe.ab[stage].phase


def _previous(recipe: Recipe, stage: str, run_dir: Path) -> Handoff | None:
    before = recipe.previous(stage)
    return Handoff.read(run_dir / "stages" / before) if before else None


def _gate_digest(recipe: Recipe, stage: str, previous: Handoff | None) -> str:
    """Of what decides the verdict."""
    phases = {name: arm_recipe(recipe, stage, name).phase[recipe.ab[stage].phase].model_dump(mode="json") for name in ARMS}
    return digest_of(
        {
            "gate": recipe.ab[stage].model_dump(mode="json", exclude={"title"}),
            "phases": phases,
            "model": recipe.model.model_dump(mode="json"),
            "optimizer": recipe.optimizer.model_dump(mode="json"),
            "seed": recipe.seed,
            "previous": previous.training_digest if previous else None,
        }
    )


def _passed_before(recipe: Recipe, stage: str, stage_dir: Path, previous: Handoff | None) -> bool:
    if not (stage_dir / "handoff.json").exists():
        return False
    try:
        verdict = json.loads((stage_dir / VERDICT_FILE).read_bytes())
    except FileNotFoundError:
        raise Refused(
            f"{stage_dir} has a hand-off but no {VERDICT_FILE}: restore it, or move the folder away to run the gate again"
        ) from None
    if verdict["digest"] != _gate_digest(recipe, stage, previous):
        raise Refused(
            f"gate '{stage}' has passed, but with other arms, another phase or another predecessor; start a new run with --run NAME, or "
            f"move {stage_dir} away to run it again"
        )
    print(f"gate '{stage}': passed before", *verdict_lines(verdict)[1:], sep="\n", flush=True)
    return True


def _run_arm(recipe: Recipe, stage: str, run_dir: Path, name: ArmName) -> bool:
    """Train one arm to its end; False if it was asked to stop before and has saved. ArmFailed, or what a phase is refused with."""
    phase = recipe.ab[stage].phase
    arm_dir = run_dir / "stages" / stage / ARMS_FOLDER / name
    own = arm_recipe(recipe, stage, name)
    arm_dir.mkdir(parents=True, exist_ok=True)
    stage_dir = arm_stage_dir(recipe, stage, run_dir, name)
    stage_dir.mkdir(parents=True, exist_ok=True)
    if before := own.previous(phase):
        replace_symlink(arm_dir / "stages" / before, os.path.relpath(run_dir / "stages" / before, arm_dir / "stages"))
    own.write(arm_dir / "recipe.json")
    settings = _settings(recipe.ab[stage], name)
    write_json(arm_dir / ab_arm.SETTINGS_FILE, settings.model_dump(mode="json"))
    decision, digest = _resolve(own, phase, arm_dir, settings)
    _show_as_gate(run_dir / "stages" / stage, stage_dir)
    result = ab_arm.read_result(stage_dir)
    if result is not None:
        print(f"arm {name}: has taken its {settings.steps} steps before", flush=True)
        return True
    print(f"arm {name}: {decision.kind} ({decision.reason}); {_what(recipe, stage, name)}", flush=True)
    if decision.kind == "first_start":
        write_start(stage_dir, decision)
        write_json(stage_dir / "arm_digest.json", {"digest": digest})
    from training.stage import run_ranks

    os.environ[recorder.VARIABLE] = "1"
    code = run_ranks(own, phase, arm_dir, decision.load, digest, program="training.ab_arm", rank_main=ab_arm.run_rank)
    _on_request(_ask)  # what trained has handlers of its own, which now have nobody to tell
    if code != FINISHED:
        raise ArmFailed(name, code, rank_end.cause(rank_end.read_all(stage_dir)))
    if ab_arm.read_result(stage_dir) is None:
        return False
    # Nobody goes on from an arm's checkpoints, which it has only if it was stopped on its way.
    if os.environ.get("NODE_RANK", "0") == "0":
        shutil.rmtree(stage_dir / "checkpoints", ignore_errors=True)
    return True


def _settings(gate: Ab, name: ArmName) -> ArmSettings:
    arm = gate.a if name == "a" else gate.b
    return ArmSettings(steps=gate.steps, transformer_impl=arm.transformer_impl, emulated_fp8=arm.emulated_fp8)


def _resolve(own: Recipe, phase: str, arm_dir: Path, settings: ArmSettings) -> tuple[Decision, str]:
    """How the arm begins, and the digest of what decides its result, layout included; Refused where an earlier start had another."""
    data_root = Path(own.data.root)
    mixture = MixtureManifest.read(mixture_path(data_root, phase))
    heldout = HeldoutManifest.read(heldout_path(data_root))
    began = time.monotonic()
    first_node = os.environ.get("NODE_RANK", "0") == "0"
    decision = resolve(own, phase, arm_dir, mixture, heldout, verify_files=first_node)
    print(f"data and hand-off of {arm_dir.name} verified in {time.monotonic() - began:.1f} s", flush=True)
    digest = digest_of(
        {
            "training": decision.training_digest,
            "heldout": heldout.digest,
            "parallel": own.phase[phase].parallel.model_dump(mode="json"),
            "settings": settings.model_dump(mode="json"),
        }
    )
    path = arm_dir / "stages" / phase / "arm_digest.json"
    if path.exists() and (begun := json.loads(path.read_bytes())["digest"]) != digest:
        raise Refused(
            f"{arm_dir} was begun with another recipe, other data or another predecessor (digest {begun[:12]}..., now {digest[:12]}...); "
            "move it away to run the arm again, or start a new run with --run NAME"
        )
    return decision, digest


def _show_as_gate(gate_dir: Path, arm_dir: Path) -> None:
    """The gate shows the steps of the arm that runs as its own: `quarry status` and the watch for hangs look there."""
    for name in ("metrics.jsonl", "heldout.jsonl", "ranks"):
        replace_symlink(gate_dir / name, os.path.relpath(arm_dir / name, gate_dir))


def _what(recipe: Recipe, stage: str, name: ArmName) -> str:
    """'fp8_tensorwise, TP2+SP DP4': an arm in one phrase."""
    arm, phase = arm_of(recipe, stage, name), arm_recipe(recipe, stage, name).phase[recipe.ab[stage].phase]
    words = [phase.precision.name, layout_text(phase)]
    if arm.optimizer is not None:
        words.append("optimizer of its own")
    if arm.transformer_impl is not None:
        words.append(arm.transformer_impl.replace("_", " "))
    if arm.emulated_fp8 is not None:
        error = arm.emulated_fp8.scale_error
        words.append("FP8 emulated on CPU" + (f", scales off by a factor of {error:g}" if error != 1 else ""))
    return ", ".join(words)


def _verdict(recipe: Recipe, stage: str, run_dir: Path, previous: Handoff | None, failed: ArmFailed | None) -> dict[str, Any]:
    """What ab.json holds. DifferentSamples where both arms ended but cannot be compared."""
    gate = recipe.ab[stage]
    whole = failed is None  # a step that was cut may be without the samples of a rank
    runs = {name: read_arm(name, arm_stage_dir(recipe, stage, run_dir, name), with_samples=whole) for name in ARMS}
    if failed is None:
        data: dict[str, Any] | None = same_samples(runs["a"], runs["b"], gate.steps)
        limits = {"tolerance_percent": gate.tolerance_percent, "step_tolerance_percent": gate.step_tolerance_percent}
        found = compare(runs["a"], runs["b"], gate.steps, **limits)
    else:
        data, found = None, {"verdict": "fail", "reasons": [str(failed)], "criteria": [], "statistics": None}
    mixture = MixtureManifest.read(mixture_path(Path(recipe.data.root), gate.phase))
    arms = {}
    for name in ARMS:
        own = arm_recipe(recipe, stage, name)
        arms[name] = {
            **curves(runs[name]),
            "what": _what(recipe, stage, name),
            "emulated": arm_of(recipe, stage, name).emulated_fp8 is not None,
            "recipe_digest": own.digest(),
            "precision": own.phase[gate.phase].precision.model_dump(mode="json"),
            "parallel": own.phase[gate.phase].parallel.model_dump(mode="json"),
            "result": ab_arm.read_result(arm_stage_dir(recipe, stage, run_dir, name)),
        }
    checkpoint = previous and {
        "stage": previous.stage,
        "checkpoint": previous.checkpoint,
        "training_digest": previous.training_digest,
        "sha256": digest_of({k: v.sha256 for k, v in previous.checkpoint_files.items()}),
    }
    return {
        "format": FORMAT,
        "digest": _gate_digest(recipe, stage, previous),
        "stage": stage,
        "phase": gate.phase,
        "steps": gate.steps,
        "tolerance_percent": gate.tolerance_percent,
        "step_tolerance_percent": gate.step_tolerance_percent,
        "start": f"the hand-off of '{previous.stage}'" if previous else f"random weights of seed {recipe.seed}",
        "checkpoint": checkpoint,
        "seed": recipe.seed,
        "data": data and {**data, "mixture": mixture.digest},
        **found,
        # A crash may be mended by the same command; what two whole arms have shown stands.
        "final": failed is None,
        "arms": arms,
        "recipe_digest": recipe.digest(),
        "versions": versions(),
    }


def _hand_on(recipe: Recipe, stage: str, run_dir: Path, previous: Handoff | None) -> None:
    """The hand-off before the gate, as the gate's: the phase behind it starts from the same files with the same history."""
    stage_dir = run_dir / "stages" / stage
    own = {"stage": stage, "kind": "ab", "stage_tokens": 0, "recipe_digest": recipe.digest(), "versions": versions()}
    if previous is not None:
        before = str(recipe.previous(stage))
        folder = run_dir / "stages" / before
        if (folder / "model.json").exists():
            write_json(stage_dir / "model.json", json.loads((folder / "model.json").read_bytes()))
        checkpoint = None if previous.checkpoint is None else os.path.normpath(f"../{before}/{previous.checkpoint}")
        previous.model_copy(update={**own, "checkpoint": checkpoint}).write(stage_dir)
        return
    # In front of the first phase there is nothing to hand on: the phase begins with random weights (Recipe.previous).
    phase = recipe.phase[recipe.ab[stage].phase]
    mixture = MixtureManifest.read(mixture_path(Path(recipe.data.root), recipe.ab[stage].phase))
    Handoff(
        **own,
        step=0,
        total_tokens=0,
        checkpoint=None,
        checkpoint_files={},
        training_digest=_gate_digest(recipe, stage, None),
        data_digest=None,
        ledger={},
        layout=None,
        rope_base=phase.rope_base,
        seq_length_tokens=phase.seq_length_tokens,
        model=recipe.model,
        tokenizer=mixture.tokenizer.model_dump(mode="json"),
        final_loss=None,
        heldout=None,
        heldout_digest=None,
    ).write(stage_dir)
