"""The stages that train nothing: the merge of checkpoints and the export to Hugging Face. Both run in one process, without Megatron."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_prep.files import digest_of, write_json
from data_prep.manifest import DataError
from model.errors import ModelError
from recipes.schema import Export, Recipe, RecipeError
from training import fast_import
from training.handoff import TRACKER, Handoff, Refused, checkpoint_record
from training.versions import versions

REFUSALS = (Refused, RecipeError, ModelError, DataError)

# Sampling of the report's generation: a small model's greedy text loops, so it is sampled, with a fixed seed.
SAMPLE = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "seed": 0}


def _finished(recipe: Recipe, stage: str, stage_dir: Path, digest: str) -> bool:
    if not (stage_dir / "handoff.json").exists():
        return False
    own = Handoff.read(stage_dir)
    if own.training_digest != digest:
        raise Refused(
            f"stage '{stage}' is finished, but from other inputs (digest {own.training_digest[:12]}..., now {digest[:12]}...); "
            "start a new run with --run NAME"
        )
    print(f"stage '{stage}': finished (handoff.json is there)", flush=True)
    return True


def _verified(stage: str, run_dir: Path) -> Handoff:
    """The hand-off of `stage`, its files compared with their digests."""
    stage_dir = run_dir / "stages" / stage
    handoff = Handoff.read(stage_dir)
    problems = handoff.verify_files(stage_dir)
    if problems:
        raise Refused(
            f"the checkpoint of stage '{stage}' is damaged:\n"
            + "\n".join(f"  - {p}" for p in problems)
            + "\nrestore it or train the stage again"
        )
    return handoff


def run_merge(recipe: Recipe, stage: str, run_dir: Path) -> int:
    """Average the final checkpoints of the merge's inputs and hand the result off; returns the exit code 0.

    The ledger, the tokens, the RoPE base and the length are those of the last input, the newest model, as are Adam's moments.
    """
    # It computes on CPU tensors, wherever it runs.
    with fast_import.quick_imports(), fast_import.without_unused_torch():
        from model.merge import merge

    stage_dir = run_dir / "stages" / stage
    inputs = {name: _verified(name, run_dir) for name in recipe.merge[stage].inputs}
    weights = recipe.merge[stage].inputs
    digest = digest_of(
        {"merge": recipe.merge[stage].model_dump(mode="json"), "inputs": {n: h.training_digest for n, h in inputs.items()}}
    )
    if _finished(recipe, stage, stage_dir, digest):
        return 0
    for name, handoff in inputs.items():
        if handoff.checkpoint is None:
            raise Refused(f"merge '{stage}': input '{name}' is an export and has no checkpoint; name the stage before it")
    newest_name, newest = list(inputs.items())[-1]
    if newest_name != recipe.previous(stage):
        raise Refused(
            f"merge '{stage}': its last input is '{newest_name}', the stage before it is '{recipe.previous(stage)}'; "
            "put the newest model last, its moments are kept"
        )
    checkpoint = f"checkpoints/iter_{newest.step:07d}"
    paths = {run_dir / "stages" / n / str(h.checkpoint): weights[n] for n, h in inputs.items()}
    print(f"stage '{stage}': " + " + ".join(f"{weights[n]:g} {n}" for n in inputs), flush=True)
    # `replace`: an attempt that was killed before its hand-off may have left the same result.
    merge(paths, stage_dir / checkpoint, replace=True)
    (stage_dir / "checkpoints" / TRACKER).write_text(str(newest.step))
    write_json(stage_dir / "model.json", json.loads((run_dir / "stages" / newest_name / "model.json").read_text()))
    measured = [h.heldout for h in inputs.values() if h.heldout is not None]
    worst = (
        {c: max(m[c] for m in measured if c in m) for c in newest.heldout}
        if newest.heldout and measured
        else newest.heldout_bound
    )
    newest.model_copy(
        update={
            "stage": stage,
            "kind": "merge",
            "stage_tokens": 0,
            **checkpoint_record(stage_dir, newest.step),
            "recipe_digest": recipe.digest(),
            "training_digest": digest,
            "final_loss": None,
            "heldout": None,
            "heldout_bound": worst,
            "versions": versions(),
        }
    ).write(stage_dir)
    return 0


def run_export(recipe: Recipe, stage: str, run_dir: Path) -> int:
    """Write the last checkpoint as a Hugging Face folder `hf/` with a generation sample beside it; returns the exit code 0."""
    from data_prep.tokenizer import load_tokenizer, write_hf_tokenizer
    from model.convert import export

    stage_dir = run_dir / "stages" / stage
    settings = recipe.export[stage]
    previous_stage = recipe.previous(stage)
    if previous_stage is None:
        raise RecipeError(f"export '{stage}' is the first stage: there is nothing to export; put it after a phase")
    previous = _verified(previous_stage, run_dir)
    digest = digest_of({"export": settings.model_dump(mode="json"), "previous": previous.training_digest})
    if _finished(recipe, stage, stage_dir, digest):
        return 0
    source = run_dir / "stages" / previous_stage
    target = stage_dir / "hf"
    description = json.loads((source / "model.json").read_text())
    tokenizer = load_tokenizer(Path(description["tokenizer"]["path"]))
    export(
        source / str(previous.checkpoint),
        target,
        dtype=settings.dtype,
        write_tokenizer=lambda f: write_hf_tokenizer(tokenizer, f),
    )
    samples = generate(target, settings)
    write_json(stage_dir / "sample.json", samples)
    for sample in samples:
        print(f"> {sample['prompt']}\n  {sample['completion']!r}", flush=True)
    previous.model_copy(
        update={
            "stage": stage,
            "kind": "export",
            "step": 0,
            "stage_tokens": 0,
            "checkpoint": None,
            "checkpoint_files": {},
            "recipe_digest": recipe.digest(),
            "training_digest": digest,
            "layout": None,
            "versions": versions(),
        }
    ).write(stage_dir)
    return 0


def generate(folder: Path, settings: Export) -> list[dict[str, Any]]:
    """Completions of the export's prompts by `transformers`, loaded from `folder` as any user would."""
    if not settings.prompts:
        return []
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(SAMPLE["seed"])
    samples = []
    for prompt in settings.prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(
            **ids,
            max_new_tokens=settings.max_new_tokens,
            **{k: v for k, v in SAMPLE.items() if k != "seed"},
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
        completion = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        samples.append({"prompt": prompt, "completion": completion})
    return samples
