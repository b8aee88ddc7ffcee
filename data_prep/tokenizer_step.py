"""The tokenizer of a data root: trained on the mixture of the first phase, or taken over from a path."""

from __future__ import annotations

import hashlib
from pathlib import Path

from data_prep import plan, tokenizer, tokenizer_training
from data_prep.errors import DataError
from data_prep.files import digest_of, write_bytes
from data_prep.manifest import TokenizerRecord
from data_prep.progress import Progress
from data_prep.records import TokenizerFile
from data_prep.sources import Content
from data_prep.text_files import Text
from recipes.schema import Recipe


def make_tokenizer(
    recipe: Recipe, root: Path, contents: dict[str, Content], progress: Progress
) -> tuple[tokenizer.Tokenizer, TokenizerRecord]:
    """Train the tokenizer or take over the given one, into tokenizer/; returns it and what manifests record of it."""
    spec = recipe.data.tokenizer
    folder = root / "tokenizer"
    target = folder / "tokenizer.model" if spec.kind == "sentencepiece" else folder
    record = TokenizerFile.read_if_valid(folder / "record.json")
    if spec.path is None:
        budgets = _training_budgets(recipe)
        inputs = digest_of(
            {
                "version": tokenizer_training.TRAINING_VERSION,
                "kind": spec.kind,
                "vocab_size": spec.vocab_size,
                "sample": {name: [size, contents[name].identity] for name, size in budgets.items()},
            }
        )
    else:
        given = tokenizer.load_tokenizer(Path(spec.path), spec.kind)
        budgets = None
        inputs = digest_of({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in given.files()})
    if not _tokenizer_current(record, inputs, target):
        taken = None
        with progress.step("tokenizer", None) as done:
            (folder / "record.json").unlink(missing_ok=True)
            if budgets is None:
                for file in given.files():
                    write_bytes(target if spec.kind == "sentencepiece" else folder / file.name, file.read_bytes())
            else:
                texts, taken = _training_sample(contents, budgets)
                tokenizer_training.train(texts, spec.kind, spec.vocab_size, target)
                done(sum(taken.values()))
        loaded = tokenizer.load_tokenizer(target, spec.kind)
        record = TokenizerFile(
            inputs=inputs,
            kind=spec.kind,
            path=str(target.relative_to(root)),
            sha256=loaded.digest,
            vocab_size=loaded.vocab_size,
            eod_id=loaded.eod_id,
            special_ids=loaded.special_ids,
            trained_on=taken,
        )
        record.write(folder / "record.json")
    loaded = tokenizer.load_tokenizer(target, spec.kind)
    if loaded.vocab_size > spec.vocab_size:
        raise DataError(
            f"{spec.path}: {loaded.vocab_size} entries, data.tokenizer.vocab_size is {spec.vocab_size}; set it to {loaded.vocab_size} "
            "(and model.vocab_size to at least that)"
        )
    return loaded, TokenizerRecord(path=str(target.relative_to(root)), **tokenizer.describe(loaded))


def _tokenizer_current(record: TokenizerFile | None, inputs: str, target: Path) -> bool:
    if record is None or record.inputs != inputs:
        return False
    file = target / "tokenizer.json" if record.kind == "huggingface" else target
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == record.sha256


def _training_budgets(recipe: Recipe) -> dict[str, int]:
    """Source of the first phase -> bytes of its text to train the tokenizer on, in the shares of the phase's mixture."""
    spec = recipe.data.tokenizer
    if spec.train_max_bytes is None:
        raise DataError(
            "data.tokenizer.train_max_bytes is null; say how much text a tokenizer is trained on, for example 4000000"
        )
    first = next((name for name in recipe.stages if name in recipe.phase), None)
    if first is None:
        raise DataError("the recipe has no phase, so there is no data to train a tokenizer on; set data.tokenizer.path")
    shares = plan.weights(recipe.data, first, recipe.phase[first])
    for name in shares:
        if recipe.data.sources[name].kind == "indexed":
            raise DataError(
                f"data.sources.{name} is already tokenized, a tokenizer cannot be trained on it; "
                "set data.tokenizer.path to the tokenizer that it was made with"
            )
    return {name: int(weight * spec.train_max_bytes) for name, weight in shares.items()}


def _training_sample(contents: dict[str, Content], budgets: dict[str, int]) -> tuple[list[str], dict[str, int]]:
    """Text up to the budget of each source, and the bytes taken of each."""
    texts: list[str] = []
    taken: dict[str, int] = {}
    for name, budget in budgets.items():
        part = list(
            tokenizer_training.sample(
                (document.text for document in contents[name].documents() if isinstance(document, Text)), budget
            )
        )
        taken[name] = sum(len(text.encode()) for text in part)
        texts += part
    return texts, taken
