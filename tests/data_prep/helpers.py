"""A small recipe over JSON-lines sources, and comparison of whole data roots."""

import hashlib
import json
import random
from functools import cache

from recipes.compose import compose
from recipes.schema import Recipe

LETTERS = random.Random(0)
WORDS = ["".join(LETTERS.choice("abcdefghijklmnoprstuvw") for _ in range(LETTERS.randint(2, 9))) for _ in range(600)]
SHARES = {"first": {"web": 50.0, "code": 30.0, "math": 20.0}, "second": {"web": 20.0, "code": 80.0}, "third": {"math": 100.0}}
CATEGORY = {"web_a": "web", "web_b": "web", "code_a": "code", "math_a": "math"}


def text(rng, words):
    return " ".join(rng.choice(WORDS) for _ in range(words)) + "\n"


def write_source(path, seed, documents=120, words=(20, 120)):
    rng = random.Random(seed)
    lines = [json.dumps({"text": f"{seed} {text(rng, rng.randint(*words))}"}) for _ in range(documents)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


@cache
def smoke():
    return compose(["curriculum=smoke"]).model_dump(mode="json")


def phase(name, *, steps=10, length=32, batch=4, shares=None, min_document_tokens=0):
    base = smoke()["phase"]["foundation"]
    shares = shares or SHARES[name]
    return {
        **base,
        "tokens": steps * length * batch,
        "tokens_requested": None,
        "steps": steps,
        "seq_length_tokens": length,
        "global_batch_samples": batch,
        "min_document_tokens": min_document_tokens,
        "mixture": {"name": name, "shares_percent": shares},
    }


def recipe(folder, *, phases=None, sources=None, seed=1, **data):
    """Three phases over four sources of files below `folder`/raw; keys of `data` replace those of the recipe's data."""
    sources = sources or {
        name: {"category": category, "kind": "files", "paths": [str(folder / "raw" / f"{name}.jsonl")]}
        for name, category in CATEGORY.items()
    }
    phases = phases or {name: phase(name) for name in SHARES}
    base = smoke()
    return Recipe.model_validate(
        {
            **base,
            "name": "test",
            "seed": seed,
            "stages": list(phases),
            "phase": phases,
            "merge": {},
            "export": {},
            "data": {
                "name": "test",
                "root": str(folder / "data"),
                "sources": sources,
                "tokenizer": {"kind": "sentencepiece", "path": None, "vocab_size": 400, "train_max_bytes": 20_000},
                "heldout_percent": 10.0,
                "heldout_max_tokens": 2000,
                "heldout_batch_samples": 4,
                "heldout_seq_length_tokens": 16,
                "max_epochs": 4.0,
                **data,
            },
        }
    )


def raw(folder):
    for number, name in enumerate(CATEGORY):
        write_source(folder / "raw" / f"{name}.jsonl", number)


def tree(root):
    """Relative path -> digest (or link target) of every file below `root`; the lock's process id is not content."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.name == ".lock" or path.is_dir():
            continue
        name = str(path.relative_to(root))
        found[name] = f"-> {path.readlink()}" if path.is_symlink() else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def times(root):
    return {str(p): p.lstat().st_mtime_ns for p in sorted(root.rglob("*")) if not p.is_dir() and p.name != ".lock"}
