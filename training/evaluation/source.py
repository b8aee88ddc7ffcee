"""The model that is evaluated: found, exported where it is a Megatron checkpoint, and named by a digest of its files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.errors import DataError
from data_prep.files import digest_of, file_sha256, write_json
from model import convert
from model.checkpoint import INTEGRITY, METADATA, latest
from model.errors import ModelError
from recipes.schema import Recipe
from training.evaluation.errors import EvaluationError
from training.files import digest_folder

RECORD = "export.json"
HF = "hf"


@dataclass(frozen=True)
class Source:
    given: Path
    kind: Literal["huggingface", "megatron"]
    hf: Path
    """Folder that transformers loads."""
    checkpoint: Path | None
    """iter_* folder of a Megatron checkpoint."""
    recipe: Recipe | None
    """Of the run that the checkpoint lies in."""
    tokenizer_sha256: str | None
    """Of the tokenizer that the checkpoint was trained with."""
    digest: str
    """SHA-256 over the names and SHA-256 of the files of `hf`."""
    max_position_tokens: int
    config: dict[str, Any]
    """config.json of `hf`."""

    def describe(self) -> dict[str, Any]:
        """What the results record."""
        return {
            "given": str(self.given.resolve()),
            "kind": self.kind,
            "name": (self.config.get("quarry") or {}).get("name"),
            "architecture": (self.config.get("architectures") or [None])[0],
            "sha256": self.digest,
            "max_position_tokens": self.max_position_tokens,
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint.resolve()),
            "saved_dtype": self.config.get("dtype") or self.config.get("torch_dtype"),
        }


def find(given: Path, output: Path) -> Source:
    """The model at `given`; a Megatron checkpoint is exported to `output`/hf, unless that is there from the same checkpoint.

    Raises EvaluationError or ModelError where there is no model, or one whose files cannot be trusted.
    """
    if not given.is_dir():
        raise EvaluationError(f"MODEL {given}: no such folder; give a Hugging Face folder, a stage of a run or a checkpoint")
    if convert.is_hf_folder(given):
        return _described(given, "huggingface", given)
    if convert.is_hf_folder(given / HF):  # an export stage
        return _described(given, "huggingface", given / HF)
    nested = given / "checkpoints"
    checkpoint = latest(nested if nested.is_dir() else given)
    description = convert.Description.find(checkpoint)
    target = output / HF
    identity = _checkpoint_identity(checkpoint, description)
    record = output / RECORD
    if not (target.is_dir() and record.is_file() and json.loads(record.read_bytes()) == identity):
        record.unlink(missing_ok=True)
        convert.export(checkpoint, target, write_tokenizer=_tokenizer_writer(description), replace=True)
        write_json(record, identity)
    return _described(given, "megatron", target, checkpoint, description)


def _checkpoint_identity(checkpoint: Path, description: convert.Description) -> dict[str, Any]:
    """What an export depends on. integrity.json has the sums of all files; without it the index names at least their sizes and places."""
    sums = checkpoint / INTEGRITY
    return {
        "checkpoint": str(checkpoint.resolve()),
        "sha256": file_sha256(sums if sums.is_file() else checkpoint / METADATA),
        "rope_base": description.rope_base,
        "max_position_tokens": description.max_position_tokens,
        "tokenizer": (description.tokenizer or {}).get("sha256"),
    }


def _tokenizer_writer(description: convert.Description) -> Any:
    from data_prep.tokenizer import load_tokenizer, write_hf_tokenizer

    record = description.tokenizer
    if record is None:
        return None
    path = Path(record["path"])
    if not path.exists():
        raise EvaluationError(
            f"{path}: the model's tokenizer (model.json) is not there; restore it or correct the path in model.json"
        )
    tokenizer = load_tokenizer(path, record.get("kind"))
    if tokenizer.digest != record["sha256"]:
        raise DataError(
            f"{path}: its SHA-256 is {tokenizer.digest}, model.json says {record['sha256']}; it is not the tokenizer that the model was "
            "trained with, restore that one"
        )
    return lambda folder: write_hf_tokenizer(tokenizer, folder)


def _described(
    given: Path,
    kind: Literal["huggingface", "megatron"],
    hf: Path,
    checkpoint: Path | None = None,
    description: convert.Description | None = None,
) -> Source:
    path = hf / "config.json"
    try:
        config = json.loads(path.read_bytes())
        limit = config["max_position_embeddings"]
    except ValueError as error:
        raise ModelError(f"{path} is no JSON: {error}; download or export the model again") from None
    except KeyError as error:
        raise ModelError(f"{path}: key {error} is missing; it says how long the model's context is, write it out") from None
    if not isinstance(limit, int) or limit <= 0:
        raise ModelError(f"{path}: max_position_embeddings is {limit!r}, must be a positive whole number of tokens")
    files = digest_folder(hf)
    if not any(name.endswith(".safetensors") for name in files):
        raise ModelError(f"{hf}: no *.safetensors; pickles can run code and are not read: save the model as safetensors")
    digest = digest_of({name: record["sha256"] for name, record in files.items()})
    recipe = None if checkpoint is None else _recipe(checkpoint)
    tokenizer = None if description is None or description.tokenizer is None else description.tokenizer["sha256"]
    return Source(given, kind, hf, checkpoint, recipe, tokenizer, digest, limit, config)


def _recipe(checkpoint: Path) -> Recipe | None:
    """recipe.json of runs/NAME, if `checkpoint` is runs/NAME/stages/STAGE/checkpoints/iter_*."""
    parents = checkpoint.resolve().parents
    path = parents[3] / "recipe.json" if len(parents) > 3 else None
    return Recipe.read(path) if path is not None and path.is_file() else None
