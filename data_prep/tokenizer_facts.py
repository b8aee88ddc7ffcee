"""What `quarry tokenize` has to know of a tokenizer, as Megatron's preprocess_data.py would load it, without loading it.

That tool reads a folder through transformers' AutoTokenizer, which for some classes builds another tokenizer than tokenizer.json
describes. Where the files show that it does not, they are taken as they are; otherwise transformers is asked once, in a process of
its own, and what it made is kept on disk.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.encoder_choice import cache_folder, tokenizer_sha256
from data_prep.errors import DataError
from data_prep.plain_files import atomic_write

FACTS_VERSION = 1
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes of transformers that take tokenizer.json as it is."""
SPECIAL_KEYS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
CHANGING_KEYS = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "split_special_tokens",
    "auto_map",
    "from_slow",
    "tokenizer_file",
)
"""Keys of tokenizer_config.json that make transformers change what tokenizer.json says when they are set."""
ASK_TRANSFORMERS = """
import json, sys
from transformers import AutoTokenizer
t = AutoTokenizer.from_pretrained(sys.argv[1], local_files_only=True)
s = {}
if t.sep_token is None and t.eos_token: s["sep_token"] = t.eos_token
elif t.eos_token is None and t.sep_token: s["eos_token"] = t.sep_token
if t.bos_token is None and t.cls_token: s["bos_token"] = t.cls_token
if t.cls_token is None and t.bos_token: s["cls_token"] = t.bos_token
t.add_special_tokens(s)
eod = None if t.eos_token is None else t.convert_tokens_to_ids(t.eos_token)
open(sys.argv[2], "w", encoding="utf-8").write(json.dumps([len(t), eod, t.backend_tokenizer.to_str()]))
"""
"""The special tokens that Megatron's HuggingFaceTokenizer fills in (megatron/core/tokenizers/text/libraries/huggingface_tokenizer.py)."""


@dataclass(frozen=True)
class TokenizerFacts:
    """Such a tokenizer as tokenize_files asks for."""

    kind: str
    path: Path
    """The .model, or the tokenizer.json that encodes."""
    vocab_size: int
    eod_id: int | None


def facts(path: Path) -> TokenizerFacts:
    """Facts of a SentencePiece .model, a folder with tokenizer.json, or that file; DataError when it is none of these."""
    if path.is_dir() or path.name == "tokenizer.json":
        return _huggingface(path if path.is_dir() else path.parent)
    if not path.is_file():
        raise DataError(f"{path}: no such tokenizer; name a folder with tokenizer.json or a SentencePiece .model file")
    from data_prep.tokenizer import SentencePieceTokenizer

    loaded = SentencePieceTokenizer(path)
    return TokenizerFacts("sentencepiece", path, loaded.vocab_size, loaded.eod_id)


def _huggingface(folder: Path) -> TokenizerFacts:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise DataError(f"{file}: no such file; name a folder with a tokenizer.json, or a SentencePiece .model file")
    key = _key(folder)
    known = cache_folder() / f"{key}.facts.json"
    try:
        found = TokenizerFacts(**json.loads(known.read_bytes()))
        if found.path == "" or Path(found.path).is_file():
            return TokenizerFacts(found.kind, Path(found.path or file), found.vocab_size, found.eod_id)
    except (FileNotFoundError, ValueError, TypeError):
        pass  # not known yet, or written by another version
    found = _from_files(folder) or _from_transformers(folder, cache_folder() / f"{key}.tokenizer.json")
    with atomic_write(known) as f:
        f.write(json.dumps(asdict(found) | {"path": "" if found.path == file else str(found.path)}).encode())
    return found


def _key(folder: Path) -> str:
    digest = hashlib.sha256(f"{FACTS_VERSION}".encode())
    for file in sorted(folder.glob("*")):
        # Weights may lie beside a tokenizer; its own files are text.
        if file.suffix in (".json", ".jinja", ".model", ".txt", ".tiktoken") and file.is_file():
            digest.update(f"{file.name}\0".encode() + tokenizer_sha256(file).encode())
    return digest.hexdigest()[:32]


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error}); repair it") from None
    if not isinstance(value, dict):
        raise DataError(f"{file}: a JSON {type(value).__name__}, not an object; repair it")
    return value


def _from_files(folder: Path) -> TokenizerFacts | None:
    """Facts by tokenizer.json alone, or None where transformers may make something else of it."""
    content, config = _read(folder / "tokenizer.json"), _read(folder / "tokenizer_config.json")
    added = {token["content"]: token for token in content.get("added_tokens") or []}
    model = content.get("model", {}).get("vocab")
    if (
        config.get("tokenizer_class") not in PLAIN_CLASSES
        or "model_type" in _read(folder / "config.json")
        or not isinstance(model, dict)
    ):
        return None
    if any(config.get(key) for key in CHANGING_KEYS):
        return None
    if any(not added.get(name, {}).get("special") for name in _named(config | _read(folder / "special_tokens_map.json"))):
        return None
    for number, token in (config.get("added_tokens_decoder") or {}).items():
        if added.get(token["content"]) != {"id": int(number)} | token:
            return None
    end = _content(config.get("eos_token"))
    if end is None:
        return None
    vocab_size = len(model) + sum(name not in model for name in added)
    return TokenizerFacts("huggingface", folder / "tokenizer.json", vocab_size, added[end]["id"])


def _named(config: dict[str, Any]) -> Iterator[str]:
    """Special tokens that a tokenizer_config.json names."""
    for key in SPECIAL_KEYS:
        if (name := _content(config.get(key))) is not None:
            yield name
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(key) or []
        for token in more.values() if isinstance(more, dict) else more:
            if (name := _content(token)) is not None:
                yield name


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _from_transformers(folder: Path, target: Path) -> TokenizerFacts:
    """Facts and tokenizer.json of what AutoTokenizer makes of the folder."""
    answer = target.with_suffix(".answer")
    target.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", ASK_TRANSFORMERS, str(folder.resolve()), str(answer)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(
            f"{folder}: transformers cannot load the tokenizer ({reason}); set tokenizer_class to PreTrainedTokenizerFast in its "
            "tokenizer_config.json if tokenizer.json is all that counts"
        )
    vocab_size, eod_id, content = json.loads(answer.read_bytes())
    answer.unlink()
    with atomic_write(target) as f:
        f.write(content.encode())
    return TokenizerFacts("huggingface", target, vocab_size, eod_id)
