"""Granite between Megatron checkpoints and Hugging Face folders, in either direction, tensor by tensor, without starting Megatron.

    python -m model.convert --from CHECKPOINT_OR_HF --to FOLDER [--dtype fp32|bf16]

`--from` is a stage folder of a run, its checkpoints folder or one iter_* folder (then `--to` becomes a Hugging Face folder), or a
Hugging Face folder of a Granite or a Llama with safetensors (then `--to` gets `checkpoints/iter_0000000` and `model.json`, which Megatron
loads as weights with --finetune). Both outputs appear under their name only when they are complete.

model/ knows no tokenizers (that is data_prep/): `quarry convert` (launchers.convert_command) prepares the tokenizer's files and this
copies them (--tokenizer-files, --tokenizer-record).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import hf_weights
from model.checkpoint import TRACKER, Checkpoint, Writer, latest, sync_folder
from model.errors import ModelError
from model.hf_config import read_hf_config, to_generation_config, to_hf_config
from recipes.schema import Model, describe

MODEL_JSON = "model.json"
FORMAT = "quarry.model/1"
MAX_SHARD_BYTES = 4 << 30
"""Tensors are gathered in memory up to this much before a safetensors file is written."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HF_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_SAVED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}

DtypeName = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Description:
    """model.json: what must be known, beside the tensors, to use a checkpoint."""

    model: Model
    rope_base: float
    max_position_tokens: int
    tokenizer: dict[str, Any] | None
    token_ids: dict[str, int]
    """bos_token_id, eos_token_id, pad_token_id, as far as known."""

    @classmethod
    def find(cls, checkpoint: Path) -> Description:
        """Read model.json from `checkpoint` or the two folders above it; ModelError if there is none or it is malformed."""
        folders = [checkpoint, *checkpoint.resolve().parents[:2]]
        path = next((f / MODEL_JSON for f in folders if (f / MODEL_JSON).is_file()), None)
        if path is None:
            raise ModelError(f"{checkpoint}: no {MODEL_JSON} in it or two folders up; it says what model the tensors are, copy it from the "
                             "stage's folder")  # fmt: skip
        try:
            raw = json.loads(path.read_bytes())
            if raw["format"] != FORMAT:
                raise ModelError(f"{path}: format is {raw['format']!r}, this version reads {FORMAT!r}")
            tokenizer = raw["tokenizer"]
            ids = raw.get("token_ids") or {}
            if not ids and tokenizer and tokenizer.get("eod_id") is not None:
                ids = {"eos_token_id": tokenizer["eod_id"]}
            return cls(
                Model.model_validate(raw["model"]), float(raw["rope_base"]), int(raw["max_position_tokens"]), tokenizer, ids
            )
        except ValidationError as error:
            raise ModelError(f"{path}: model: {describe(error)}") from None
        except KeyError as error:
            raise ModelError(f"{path}: key {error} is missing; write it again with the stage that made it") from None
        except (ValueError, TypeError) as error:
            raise error if isinstance(error, ModelError) else ModelError(f"{path} is malformed: {error}") from None

    def write(self, folder: Path) -> None:
        content = {
            "format": FORMAT,
            "model": self.model.model_dump(mode="json"),
            "rope_base": self.rope_base,
            "max_position_tokens": self.max_position_tokens,
            "tokenizer": self.tokenizer,
            "token_ids": self.token_ids,
        }
        _write_json(folder / MODEL_JSON, content)


def _write_json(path: Path, content: Any) -> None:
    with open(path, "w", encoding="utf-8") as f:
        json.dump(content, f, indent=2)
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())


@contextlib.contextmanager
def _new_folder(target: Path, *, replace: bool) -> Iterator[Path]:
    """A temporary folder beside `target` that gets its name at the end; with `replace`, in the place of an earlier `target`."""
    if target.exists() and not replace:
        raise ModelError(f"{target} exists; remove it or name another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
        sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def plan_shards(shapes: Mapping[str, tuple[int, ...]], element_bytes: int, max_shard_bytes: int) -> list[list[str]]:
    """Names of `shapes`, in order, cut into lists of at most `max_shard_bytes` each (or of one larger tensor)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = element_bytes * torch.Size(shape).numel()
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def export(
    source: Path,
    target: Path,
    *,
    dtype: DtypeName | None = None,
    write_tokenizer: Callable[[Path], None] | None = None,
    token_ids: Mapping[str, int] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    replace: bool = False,
) -> None:
    """Write the Megatron checkpoint at `source`, of any layout, as the Hugging Face folder `target`.

    `source` is an iter_* folder, or one that holds them or `checkpoints/`. `dtype` converts; None keeps the checkpoint's. `write_tokenizer` is
    called with the (temporary) folder and adds the tokenizer's files. `token_ids` overrides those of model.json. `replace` allows `target` to
    exist. Peak memory is about `max_shard_bytes` and one layer.
    Raises ModelError if the checkpoint and its model.json do not fit each other, or if GraniteForCausalLM cannot represent them.
    """
    folder = _checkpoint_folder(source)
    description = Description.find(folder)
    model = description.model
    _check_vocabulary(folder, description.tokenizer, model)
    checkpoint = Checkpoint(folder)
    hf_weights.check_checkpoint(checkpoint, model)
    saved = checkpoint.tensors[hf_weights.EMBEDDING].dtype
    out_dtype = DTYPES[dtype] if dtype else saved
    if out_dtype not in HF_DTYPES:
        raise ModelError(f"{folder}: weights are {saved}; choose --dtype fp32 or bf16")
    with _new_folder(target, replace=replace) as temporary:
        if write_tokenizer is not None:
            write_tokenizer(temporary)
        ids = dict(token_ids) if token_ids is not None else _token_ids(temporary, description.token_ids)
        config = to_hf_config(
            model,
            rope_base=description.rope_base,
            max_position_tokens=description.max_position_tokens,
            dtype=HF_DTYPES[out_dtype],
            token_ids=ids,
        )
        _write_json(temporary / "config.json", config)
        _write_json(temporary / "generation_config.json", to_generation_config(ids))
        _write_safetensors(
            hf_weights.read_hf_tensors(checkpoint, model), hf_weights.hf_shapes(model), out_dtype, temporary, max_shard_bytes
        )


def _token_ids(folder: Path, recorded: Mapping[str, int]) -> dict[str, int]:
    """Special ids of the tokenizer files in `folder`, beside the `recorded` ones, with which they must agree."""
    names, added = folder / "tokenizer_config.json", folder / "tokenizer.json"
    found: dict[str, int] = {}
    if names.is_file() and added.is_file():
        by_content = {token["content"]: token["id"] for token in json.loads(added.read_bytes()).get("added_tokens", [])}
        config = json.loads(names.read_bytes())
        for kind in ("bos", "eos", "pad"):
            token = config.get(f"{kind}_token")
            content = token.get("content") if isinstance(token, dict) else token
            if content in by_content:
                found[f"{kind}_token_id"] = by_content[content]
    differing = [
        f"{k} is {found[k]} in the tokenizer and {recorded[k]} in {MODEL_JSON}"
        for k in found
        if recorded.get(k, found[k]) != found[k]
    ]
    if differing:
        raise ModelError(f"the tokenizer is not the model's: {'; '.join(differing)}; use the one that it was trained with")
    return found | dict(recorded)


def _check_vocabulary(folder: Path, tokenizer: Mapping[str, Any] | None, model: Model) -> None:
    if tokenizer and tokenizer.get("vocab_size", 0) > model.vocab_size:
        raise ModelError(
            f"{folder}: the tokenizer has {tokenizer['vocab_size']} entries, the embedding of '{model.name}' {model.vocab_size} rows; it "
            "belongs to another model"
        )


def _checkpoint_folder(source: Path) -> Path:
    """The newest checkpoint of a stage folder, a checkpoints folder or an iter_* folder."""
    nested = source / "checkpoints"
    return latest(nested if nested.is_dir() else source)


def _write_safetensors(
    tensors: Iterator[tuple[str, torch.Tensor]],
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    folder: Path,
    max_shard_bytes: int,
) -> None:
    """Write `tensors`, which come in the order of `shapes`, under Hugging Face's names for one file or several with an index."""
    shards = plan_shards(shapes, dtype.itemsize, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = {}
        for expected in names:
            name, value = next(tensors)
            assert (name, tuple(value.shape)) == (expected, shapes[expected]), (name, value.shape)
            shard[name] = value.to(dtype)
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(torch.Size(s).numel() for s in shapes.values()) * dtype.itemsize
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


class _HFTensors:
    """The tensors of a Hugging Face folder by name, from one safetensors file or several; opened when first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                self.files: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
            except (ValueError, KeyError) as error:
                raise ModelError(f"{index} is damaged: {error}") from None
            outside = [f for f in self.files.values() if Path(f).name != f]
            if outside:
                raise ModelError(f"{index} points outside of the folder: {outside[0]!r}")
        elif (folder / "model.safetensors").is_file():
            self.files = dict.fromkeys(self._open("model.safetensors").keys(), "model.safetensors")
        else:
            pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
            hint = f"; {pickles[0]} is a pickle, which can run code and is not read: save it as safetensors" if pickles else ""
            raise ModelError(f"{folder}: no model.safetensors or model.safetensors.index.json{hint}")
        self._last: tuple[str, Any] | None = None

    def _open(self, file: str) -> Any:
        try:
            return safe_open(self.folder / file, framework="pt")
        except FileNotFoundError:
            raise ModelError(f"{self.folder / file} is missing; download the model again") from None
        except SafetensorError as error:
            raise ModelError(f"{self.folder / file} is damaged: {error}") from None

    def _file(self, name: str) -> Any:
        file = self.files[name]
        if self._last is None or self._last[0] != file:
            self._last = (file, self._open(file))
        return self._last[1]

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], str]:
        try:
            piece = self._file(name).get_slice(name)
        except SafetensorError:
            raise ModelError(
                f"{self.folder / self.files[name]}: '{name}' is not in it; the index is wrong, download it again"
            ) from None
        return tuple(piece.get_shape()), piece.get_dtype()

    def read(self, name: str) -> torch.Tensor:
        return self._file(name).get_tensor(name)


def import_hf(
    source: Path,
    target: Path,
    *,
    dtype: DtypeName | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    expect: Model | None = None,
    add_files: Callable[[Path], None] | None = None,
) -> None:
    """Write the GraniteForCausalLM in `source` as `target`/checkpoints/iter_0000000 with tracker file and model.json.

    The checkpoint holds weights only; Megatron starts from it with `--load TARGET/checkpoints --finetune`. `dtype` converts; None keeps that of
    the files. `tokenizer` goes into model.json. `expect`: refuse a model that differs from it in anything but its name. `add_files` is
    called with the temporary folder before it gets its name.
    Raises ModelError by name for every setting, tensor or shape that Quarry's Granite does not have.
    """
    described = read_hf_config(source)
    model = described.model
    if expect is not None:
        ours, theirs = expect.model_dump(exclude={"name"}), model.model_dump(exclude={"name"})
        differing = [f"{k} is {theirs[k]!r}, '{expect.name}' has {ours[k]!r}" for k in ours if ours[k] != theirs[k]]
        if differing:
            raise ModelError(f"{source}: {'; '.join(differing)}")
    _check_vocabulary(source, tokenizer, model)
    tensors = _HFTensors(source)
    out_dtype = _check_hf_tensors(tensors, model, DTYPES[dtype] if dtype else None)
    with _new_folder(target, replace=False) as temporary:
        checkpoints = temporary / "checkpoints"
        with Writer(checkpoints / "iter_0000000") as writer:
            _write_megatron(tensors, model, out_dtype, writer)
        (checkpoints / TRACKER).write_text("0")
        Description(
            model,
            described.rope_base,
            described.max_position_tokens,
            dict(tokenizer) if tokenizer is not None else None,
            described.token_ids,
        ).write(temporary)
        if add_files is not None:
            add_files(temporary)


def _check_hf_tensors(tensors: _HFTensors, model: Model, dtype: torch.dtype | None) -> torch.dtype:
    """Raise ModelError for missing, unexpected or misshapen tensors and odd dtypes; returns the dtype to write."""
    shapes = hf_weights.hf_shapes(model)
    problems = [f"'{n}' is missing" for n in shapes if n not in tensors.files]
    extra = [n for n in tensors.files if n not in shapes and not (n == "lm_head.weight" and model.tied_embeddings)]
    problems += [f"'{n}' has no place in a Granite" for n in sorted(extra)]
    found: dict[str, str] = {}
    for name, shape in shapes.items():
        if name not in tensors.files:
            continue
        have, kind = tensors.shape_and_dtype(name)
        found.setdefault(kind, name)
        if have != shape:
            problems.append(f"'{name}' has shape {have}, config.json says {shape}")
    for kind, name in found.items():
        if kind not in _SAVED_DTYPES:
            problems.append(f"'{name}' is {kind}; only F32 and BF16 are read")
    if dtype is None and len(found) > 1 and not problems:
        problems.append(f"dtypes are mixed ({', '.join(f'{n} {k}' for k, n in found.items())}); choose --dtype fp32 or bf16")
    tied = model.tied_embeddings and "lm_head.weight" in tensors.files
    if tied and not problems and not torch.equal(tensors.read("lm_head.weight"), tensors.read("model.embed_tokens.weight")):
        problems.append(
            "tie_word_embeddings is true, but lm_head.weight differs from model.embed_tokens.weight; untie it or remove it"
        )
    if problems:
        raise ModelError(f"{tensors.folder}: {'; '.join(problems[:20])}{' ...' if len(problems) > 20 else ''}")
    return dtype or _SAVED_DTYPES[next(iter(found))]


def _write_megatron(tensors: _HFTensors, model: Model, dtype: torch.dtype, writer: Writer) -> None:
    def read(name: str) -> torch.Tensor:
        return tensors.read(name).to(dtype)

    # Both specs ask for these when they load: Transformer Engine's FP8 state, empty without FP8.
    nothing = _saved([None])
    writer.add_chunk(hf_weights.EMBEDDING, read("model.embed_tokens.weight"))
    shapes = hf_weights.layer_shapes(model)
    for i in range(model.num_layers):
        layer = f"model.layers.{i}."
        q, k, v = (read(f"{layer}self_attn.{n}_proj.weight") for n in "qkv")
        values = {
            hf_weights.ATTENTION_NORM: read(layer + "input_layernorm.weight"),
            hf_weights.QKV: hf_weights.join_qkv(q, k, v, model),
            hf_weights.PROJ: read(layer + "self_attn.o_proj.weight"),
            hf_weights.MLP_NORM: read(layer + "post_attention_layernorm.weight"),
            hf_weights.FC1: torch.cat([read(f"{layer}mlp.{n}_proj.weight") for n in ("gate", "up")]),
            hf_weights.FC2: read(layer + "mlp.down_proj.weight"),
        }
        for name, value in values.items():
            shape = (model.num_layers, *shapes[name])
            writer.add_chunk(hf_weights.LAYERS + name, value[None], shape=shape, offsets=(i, *(0 for _ in shapes[name])))
            if name.endswith(".weight"):
                module = hf_weights.LAYERS + name.removesuffix(".weight")
                writer.add_object(f"{module}._extra_state/shard_{i}_{model.num_layers}", nothing)
    writer.add_chunk(hf_weights.FINAL_NORM, read("model.norm.weight"))
    writer.add_object("decoder.final_layernorm._extra_state/shard_0_1", nothing)
    if not model.tied_embeddings:
        writer.add_chunk(hf_weights.OUTPUT, read("lm_head.weight"))
    # Megatron's part of a checkpoint that is no tensor; without `args` it is not compared with the job's arguments.
    writer.add_object("common_state/shard_0_1", _saved([{"checkpoint_version": 3.0, "iteration": 0}]))


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def is_hf_folder(source: Path) -> bool:
    return (source / "config.json").is_file()


def convert(
    source: Path,
    target: Path,
    dtype: DtypeName | None = None,
    tokenizer_files: Path | None = None,
    tokenizer_record: Mapping[str, Any] | None = None,
) -> str:
    """Convert in the direction that `source` asks for; returns a sentence that says what was written.

    The files in `tokenizer_files` are copied: into the Hugging Face folder, or into `target`/tokenizer. `tokenizer_record` (kind, sha256,
    vocab_size, eod_id) describes them in model.json.
    """
    if is_hf_folder(source):
        record = None if tokenizer_record is None else {**tokenizer_record, "path": str(target.resolve() / "tokenizer")}
        copy = None if tokenizer_files is None else lambda folder: _copy_files(tokenizer_files, folder / "tokenizer")
        import_hf(source, target, dtype=dtype, tokenizer=record, add_files=copy)
        result = (
            f"{target}: checkpoints/iter_0000000 and model.json; Megatron loads it with --load {target}/checkpoints --finetune"
        )
    else:
        copy = None if tokenizer_files is None else lambda folder: _copy_files(tokenizer_files, folder)
        export(source, target, dtype=dtype, write_tokenizer=copy)
        result = f"{target}: GraniteForCausalLM; load it with transformers.AutoModelForCausalLM.from_pretrained"
    return result if tokenizer_files else f"{result} (no tokenizer was given, none is written)"


def _copy_files(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, target / path.name)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m model.convert", description="Convert between Megatron and Hugging Face.")
    parser.add_argument(
        "--from", dest="source", type=Path, required=True, help="stage, checkpoints or iter_* folder, or Hugging Face folder"
    )
    parser.add_argument("--to", dest="target", type=Path, required=True, help="new folder")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: that of the source")
    parser.add_argument("--tokenizer-files", type=Path, help="folder whose files are copied along")
    parser.add_argument("--tokenizer-record", type=json.loads, help="JSON for model.json: kind, sha256, vocab_size, eod_id")
    options = parser.parse_args(argv)
    if not options.source.is_dir():
        print(f"error: {options.source} is no folder; --from takes a checkpoint or a Hugging Face folder", file=sys.stderr)
        return 78
    try:
        print(convert(options.source, options.target, options.dtype, options.tokenizer_files, options.tokenizer_record))
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 78
    return 0


if __name__ == "__main__":
    sys.exit(main())
