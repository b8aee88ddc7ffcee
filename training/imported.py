"""The hand-off of a model from elsewhere, so that a stage can begin with it and checks it as it would check the stage before.

    python -m training.imported FOLDER     # FOLDER: what `quarry convert --from HUGGING_FACE_FOLDER --to FOLDER` wrote, and calls this for

Imports no torch. Written last and atomically; it holds the digests of the checkpoint's files, so that nothing is computed of a model that was
altered after the conversion.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_prep.files import digest_of
from recipes.schema import Model, describe
from training.handoff import Handoff, Refused, checkpoint_record, latest_step
from training.versions import versions


def write_handoff(folder: Path) -> Handoff:
    """Write `folder`/handoff.json for the newest checkpoint in it, by its model.json; Refused for what no stage could start from."""
    described = _read(folder / "model.json")
    tokenizer = described.get("tokenizer")
    if not tokenizer:
        raise Refused(f"{folder / 'model.json'} names no tokenizer: convert a Hugging Face folder that holds tokenizer.json")
    step = latest_step(folder / "checkpoints")
    if step is None:
        raise Refused(f"{folder / 'checkpoints'} holds no whole checkpoint; convert the model again")
    record = checkpoint_record(folder, step)
    files = {name: file.model_dump() for name, file in record["checkpoint_files"].items()}
    try:
        handoff = Handoff(
            stage=folder.resolve().name,
            kind="import",
            **record,
            stage_tokens=0,
            total_tokens=0,
            recipe_digest="",
            training_digest=digest_of({"files": files, "model": described["model"], "rope_base": described["rope_base"]}),
            data_digest=None,
            ledger={},
            layout=None,
            rope_base=described["rope_base"],
            seq_length_tokens=described["max_position_tokens"],
            model=Model.model_validate(described["model"]),
            tokenizer=tokenizer,
            final_loss=None,
            heldout=None,
            heldout_digest=None,
            versions=versions(),
        )
    except ValidationError as error:
        raise Refused(f"{folder / 'model.json'}: {describe(error)}; convert the model again") from None
    except KeyError as error:
        raise Refused(f"{folder / 'model.json'}: {error} is missing; convert the model again") from None
    handoff.write(folder)
    return handoff


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise Refused(f"{path} does not exist; name a folder that `quarry convert` wrote of a Hugging Face folder") from None
    except ValueError as error:
        raise Refused(f"{path} is no JSON: {error}; convert the model again") from None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.imported", description="Write the hand-off of a converted model.")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(argv)
    try:
        handoff = write_handoff(options.folder)
    except Refused as error:
        print(f"refused: {error}", file=sys.stderr)
        return 78
    print(
        f"{options.folder}: handoff.json; a stage begins with it by sft.STAGE.initial={options.folder} and "
        f"sft.STAGE.rope_base={handoff.rope_base:g} (or grpo), with data.tokenizer.path={handoff.tokenizer['path']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
