"""Hugging Face import and export: same logits, same bits, from every layout; what cannot be represented is refused by name."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from model import convert, hf_weights
from model.checkpoint import Checkpoint
from model.convert import Description, export, import_hf
from model.errors import ModelError
from tests.model.conftest import FAMILIES, LAYOUTS, VOCAB, Family, Workspace, make_hf_model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def hf_logits(folder: Path, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    network, info = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True, **kwargs
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        return network.float().eval()(ids).logits


@pytest.fixture
def hf(families: dict[str, Family], tmp_path: Path) -> Path:
    """A copy of a Hugging Face folder, to be spoilt."""
    return Path(shutil.copytree(families["3b"].hf, tmp_path / "hf"))


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys; a value of None removes the key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if k not in changes or changes[k] is not None}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    content = tensors(folder)
    change(content)
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_import_then_export_gives_the_same_bits_and_logits(
    families: dict[str, Family], workspace: Workspace, tmp_path: Path, family: str
) -> None:
    made = families[family]
    export(made.checkpoint, tmp_path / "hf")
    assert same_bits(tensors(tmp_path / "hf"), tensors(made.hf))
    assert torch.equal(hf_logits(tmp_path / "hf", workspace.ids), made.logits)


@pytest.mark.multirank
@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "cp2_recompute"])
def test_export_of_every_layout_loads_with_the_same_logits(
    ranks: Workspace, families: dict[str, Family], tmp_path: Path, layout: str
) -> None:
    saved = ranks.folder / f"saved-3b.{layout}"
    shutil.copy(families["3b"].checkpoint.parents[1] / "model.json", saved)
    export(saved, tmp_path / "hf")
    assert same_bits(tensors(tmp_path / "hf"), tensors(families["3b"].hf))
    assert torch.equal(hf_logits(tmp_path / "hf", ranks.ids), families["3b"].logits)
    # Every key of an import, which are those that Transformer Engine's spec asks for on a GPU: a load there fails on one that is missing.
    assert Checkpoint(families["3b"].checkpoint).objects.keys() <= Checkpoint(saved).objects.keys()


@pytest.mark.multirank
def test_export_of_an_untied_pipeline(ranks: Workspace, families: dict[str, Family], tmp_path: Path) -> None:
    saved = ranks.folder / "saved-untied.pp2"
    shutil.copy(families["untied"].checkpoint.parents[1] / "model.json", saved)
    export(saved, tmp_path / "hf")
    assert "lm_head.weight" in tensors(tmp_path / "hf")
    assert same_bits(tensors(tmp_path / "hf"), tensors(families["untied"].hf))


def test_exported_config_is_read_by_transformers_with_every_value(families: dict[str, Family], tmp_path: Path) -> None:
    from transformers import AutoConfig

    for made in families.values():
        out = tmp_path / made.model.name
        export(made.checkpoint, out)
        ours, theirs = AutoConfig.from_pretrained(out), AutoConfig.from_pretrained(made.hf)
        for key, value in theirs.to_dict().items():
            if key not in ("transformers_version", "_name_or_path", "pad_token_id", "initializer_range"):
                assert ours.to_dict()[key] == value, key
        assert ours.initializer_range == made.model.init_std == 0.1
        assert ours.rope_parameters["rope_theta"] == 10000.0
        assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2


def test_sharded_export_has_an_index_and_is_imported_again(
    families: dict[str, Family], workspace: Workspace, tmp_path: Path
) -> None:
    made = families["3b"]
    export(made.checkpoint, tmp_path / "hf", max_shard_bytes=1 << 20)
    files = sorted(p.name for p in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "hf" / f).stat().st_size < (1 << 20) + 4096 for f in files)
    assert torch.equal(hf_logits(tmp_path / "hf", workspace.ids), made.logits)
    import_hf(tmp_path / "hf", tmp_path / "back")
    export(tmp_path / "back", tmp_path / "again")
    assert same_bits(tensors(tmp_path / "again"), tensors(made.hf))
    assert Description.find(tmp_path / "back" / "checkpoints").model == made.model


def test_dtypes_are_converted_by_rounding(families: dict[str, Family], tmp_path: Path) -> None:
    made = families["3b"]
    export(made.checkpoint, tmp_path / "bf16", dtype="bf16")
    expected = {k: v.bfloat16() for k, v in tensors(made.hf).items()}
    assert same_bits(tensors(tmp_path / "bf16"), expected)
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"
    import_hf(tmp_path / "bf16", tmp_path / "kept")
    export(tmp_path / "kept", tmp_path / "kept-hf")
    assert same_bits(tensors(tmp_path / "kept-hf"), expected)
    import_hf(made.hf, tmp_path / "rounded", dtype="bf16")
    export(tmp_path / "rounded", tmp_path / "rounded-hf", dtype="fp32")
    assert same_bits(tensors(tmp_path / "rounded-hf"), {k: v.float() for k, v in expected.items()})


def test_a_config_as_transformers_4_wrote_it_is_read(hf: Path, tmp_path: Path) -> None:
    edit_json(hf / "config.json", rope_parameters=None, rope_theta=5000000.0)
    import_hf(hf, tmp_path / "out")
    assert Description.find(tmp_path / "out" / "checkpoints").rope_base == 5000000.0


CONFIG_FAULTS = {
    "other architecture": ({"architectures": ["LlamaForCausalLM"]}, r"LlamaForCausalLM.*only GraniteForCausalLM"),
    "other model type": ({"model_type": "granitemoe"}, "granitemoe"),
    "multiplier left out": ({"embedding_multiplier": None}, "embedding_multiplier is missing"),
    "multiplier of zero": ({"residual_multiplier": 0.0}, r"residual_multiplier is 0\.0"),
    "multiplier as text": ({"attention_multiplier": "0.1"}, "attention_multiplier is '0.1'"),
    "logits scaling negative": ({"logits_scaling": -16}, "logits_scaling is -16"),
    "RoPE scaling": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_type is 'yarn'"),
    "RoPE scaling of transformers 4": ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5"),
    "fractional theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.5}}, r"rope_theta is 10000\.5"),
    "two thetas": ({"rope_theta": 5e5}, r"rope_theta is 500000\.0 and rope_parameters\.rope_theta is 10000\.0"),
    "attention biases": ({"attention_bias": True}, "attention_bias is True"),
    "MLP biases": ({"mlp_bias": True}, "mlp_bias is True"),
    "other activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "quantised": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is"),
    "heads and groups": ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    "heads and width": ({"num_attention_heads": 6, "num_key_value_heads": 3}, "hidden_size 256 is not a multiple of num_attention_heads 6"),
    "odd head dim": ({"head_dim": 63}, "head_dim is 63"),
    "other head dim than the tensors": ({"head_dim": 32}, r"q_proj\.weight' has shape \(256, 256\), config\.json says \(128, 256\)"),
    "other vocabulary than the tensors": ({"vocab_size": 300}, r"embed_tokens\.weight' has shape \(256, 256\), config\.json says \(300, 256\)"),
    "other layer count": ({"num_hidden_layers": 5}, r"'model\.layers\.4\.input_layernorm\.weight' is missing"),
    "untied without an output matrix": ({"tie_word_embeddings": False}, r"'lm_head\.weight' is missing"),
    "width left out": ({"hidden_size": None}, "hidden_size is missing"),
}  # fmt: skip


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_a_config_that_cannot_be_represented_is_refused_by_name(hf: Path, tmp_path: Path, fault: str) -> None:
    changes, message = CONFIG_FAULTS[fault]
    edit_json(hf / "config.json", **changes)
    with pytest.raises(ModelError, match=message):
        import_hf(hf, tmp_path / "out")
    assert not [p for p in tmp_path.iterdir() if p != hf]  # nothing half-written


TENSOR_FAULTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (lambda t: t.pop("model.norm.weight"), r"'model\.norm\.weight' is missing"),
    "unexpected": (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(2)}), r"q_proj\.bias' has no place in a Granite"),
    "shape": (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"'model\.norm\.weight' has shape \(3,\)"),
    "dtype": (lambda t: t.update({"model.norm.weight": torch.ones(256, dtype=torch.float16)}), r"'model\.norm\.weight' is F16"),
    "mixed dtypes": (lambda t: t.update({"model.norm.weight": torch.ones(256, dtype=torch.bfloat16)}), "dtypes are mixed"),
    "another output matrix": (lambda t: t.update({"lm_head.weight": torch.ones(VOCAB, 256)}), r"lm_head\.weight differs"),
}  # fmt: skip


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_tensors_that_do_not_fit_are_refused_by_name(hf: Path, tmp_path: Path, fault: str) -> None:
    change, message = TENSOR_FAULTS[fault]
    edit_tensors(hf, change)
    with pytest.raises(ModelError, match=message):
        import_hf(hf, tmp_path / "out")


def test_a_tied_model_may_repeat_its_embedding_as_output_matrix(hf: Path, tmp_path: Path, families: dict[str, Family]) -> None:
    edit_tensors(hf, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    import_hf(hf, tmp_path / "out")
    export(tmp_path / "out", tmp_path / "back")
    assert same_bits(tensors(tmp_path / "back"), tensors(families["3b"].hf))


def test_pickled_weights_are_refused(hf: Path, tmp_path: Path) -> None:
    (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle"):
        import_hf(hf, tmp_path / "out")


def test_an_index_that_points_outside_or_nowhere_is_refused(hf: Path, tmp_path: Path) -> None:
    index = hf / "model.safetensors.index.json"
    names = tensors(hf)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "../hf/model.safetensors")}))
    with pytest.raises(ModelError, match="points outside"):
        import_hf(hf, tmp_path / "out")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}))
    with pytest.raises(ModelError, match=r"model-00001-of-00002\.safetensors is missing"):
        import_hf(hf, tmp_path / "out")


def test_damaged_safetensors_are_refused(hf: Path, tmp_path: Path) -> None:
    path = hf / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelError, match="is damaged"):
        import_hf(hf, tmp_path / "out")


def test_a_model_that_is_not_the_expected_one_is_refused(families: dict[str, Family], tmp_path: Path) -> None:
    wanted = families["3b"].model.model_copy(update={"residual_multiplier": 0.175, "name": "recipe"})
    with pytest.raises(ModelError, match=r"residual_multiplier is 0\.22, 'recipe' has 0\.175"):
        import_hf(families["3b"].hf, tmp_path / "out", expect=wanted)


MODEL_JSON_FAULTS = {
    "width": ({"hidden_size": 128}, r"'embedding\.word_embeddings\.weight' has shape \(256, 256\), model 'hf-3b' has \(256, 128\)"),
    "vocabulary": ({"vocab_size": 384}, r"padded is not converted"),
    "layers": ({"num_layers": 3}, r"linear_qkv\.weight' has shape \(4, 512, 256\)"),
    "groups": ({"num_query_groups": 4}, r"linear_qkv\.weight' has shape"),
    "output matrix": ({"tied_embeddings": False}, r"'output_layer\.weight' is missing"),
}  # fmt: skip


@pytest.mark.parametrize("fault", MODEL_JSON_FAULTS)
def test_a_checkpoint_of_another_model_is_not_exported(families: dict[str, Family], tmp_path: Path, fault: str) -> None:
    changes, message = MODEL_JSON_FAULTS[fault]
    root = Path(shutil.copytree(families["3b"].checkpoint.parents[1], tmp_path / "stage"))
    content = json.loads((root / "model.json").read_text())
    content["model"] |= changes
    (root / "model.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=message):
        export(root, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_checkpoint_with_more_than_a_granite_is_not_exported(families: dict[str, Family], tmp_path: Path) -> None:
    tied = families["untied"].model.model_copy(update={"tied_embeddings": True})
    root = Path(shutil.copytree(families["untied"].checkpoint.parents[1], tmp_path / "stage"))
    content = json.loads((root / "model.json").read_text()) | {"model": tied.model_dump(mode="json")}
    (root / "model.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"'output_layer\.weight' has no place in a Granite"):
        export(root, tmp_path / "hf")


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(families: dict[str, Family], tmp_path: Path) -> None:
    root = Path(shutil.copytree(families["3b"].checkpoint.parents[1], tmp_path / "stage"))
    edit_json(root / "model.json", tokenizer={"kind": "sentencepiece", "path": "x", "sha256": "0", "vocab_size": VOCAB + 1})
    with pytest.raises(ModelError, match="the tokenizer has 257 entries"):
        export(root, tmp_path / "hf")


def test_a_token_id_outside_of_the_vocabulary_is_refused(families: dict[str, Family], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="eos_token_id is 256, the vocabulary has 256"):
        export(families["3b"].checkpoint, tmp_path / "hf", token_ids={"eos_token_id": VOCAB})


def test_special_ids_come_from_the_tokenizer_and_must_agree(families: dict[str, Family], tmp_path: Path) -> None:
    def write_tokenizer(folder: Path, end: int = 2) -> None:
        names = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<pad>", "unk_token": None}
        tokens = [{"id": i, "content": c} for i, c in ((1, "<s>"), (end, "</s>"), (3, "<pad>"))]
        (folder / "tokenizer_config.json").write_text(json.dumps(names))
        (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))

    export(families["3b"].checkpoint, tmp_path / "hf", write_tokenizer=write_tokenizer)
    for file in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / "hf" / file).read_text())
        assert [content[f"{k}_token_id"] for k in ("bos", "eos", "pad")] == [1, 2, 3]
    with pytest.raises(ModelError, match=r"eos_token_id is 9 in the tokenizer and 2 in model\.json"):
        export(families["3b"].checkpoint, tmp_path / "other", write_tokenizer=lambda f: write_tokenizer(f, end=9))
    assert not (tmp_path / "other").exists()


def test_model_json_is_searched_and_explained(families: dict[str, Family], tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(families["3b"].checkpoint, tmp_path / "a" / "checkpoints" / "iter_0000000"))
    with pytest.raises(ModelError, match=r"no model\.json in it or two folders up"):
        export(checkpoint, tmp_path / "hf")
    shutil.copy(families["3b"].checkpoint.parents[1] / "model.json", tmp_path / "a")
    assert Description.find(checkpoint).model == families["3b"].model
    edit_json(tmp_path / "a" / "model.json", format="quarry.model/9")
    with pytest.raises(ModelError, match=r"quarry\.model/9"):
        Description.find(checkpoint)
    edit_json(tmp_path / "a" / "model.json", format="quarry.model/1", rope_base=None)
    with pytest.raises(ModelError, match="'rope_base' is missing"):
        Description.find(checkpoint)


def test_an_existing_output_is_kept_unless_it_may_be_replaced(families: dict[str, Family], tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine").touch()
    with pytest.raises(ModelError, match="exists; remove it or name another"):
        export(families["3b"].checkpoint, tmp_path / "hf")
    assert (tmp_path / "hf" / "mine").exists()
    export(families["3b"].checkpoint, tmp_path / "hf", replace=True)
    assert not (tmp_path / "hf" / "mine").exists()
    assert (tmp_path / "hf" / "model.safetensors").exists()


def test_a_failure_in_the_middle_leaves_nothing(families: dict[str, Family], tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        export(families["3b"].checkpoint, tmp_path / "hf", write_tokenizer=fail)
    assert not list(tmp_path.iterdir())


def test_the_command_converts_there_and_back_and_refuses_with_a_reason(families: dict[str, Family], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "model.convert", "--from"]
    there = subprocess.run(
        [*command, families["3b"].hf, "--to", tmp_path / "stage"], capture_output=True, text=True, check=False
    )
    assert there.returncode == 0, there.stderr
    assert "checkpoints/iter_0000000" in there.stdout
    assert convert.main(["--from", str(tmp_path / "stage"), "--to", str(tmp_path / "hf")]) == 0
    assert same_bits(tensors(tmp_path / "hf"), tensors(families["3b"].hf))


def test_the_command_refuses_with_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert.main(["--from", str(tmp_path / "nothing"), "--to", str(tmp_path / "hf")]) == 78
    assert "is no folder" in capsys.readouterr().err
    assert convert.main(["--from", str(tmp_path), "--to", str(tmp_path / "hf")]) == 78
    assert "no checkpoint here" in capsys.readouterr().err


def quarry_convert(*arguments: object) -> int:
    import argparse

    from launchers import convert_command

    parser = argparse.ArgumentParser()
    convert_command.add_parser(parser.add_subparsers())
    return convert_command.run(parser.parse_args(["convert", *map(str, arguments)]))


def test_quarry_convert_takes_the_tokenizer_along_both_ways(families: dict[str, Family], tmp_path: Path) -> None:
    import tokenizers

    from data_prep.errors import DataError

    hf = Path(shutil.copytree(families["3b"].hf, tmp_path / "hf"))
    vocabulary = {"<|end_of_text|>": 0, "a": 1, "b": 2, "[UNK]": 3}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")).save(str(hf / "tokenizer.json"))
    assert quarry_convert("--from", hf, "--to", tmp_path / "stage", "--dtype", "bf16") == 0
    record = json.loads((tmp_path / "stage" / "model.json").read_text())["tokenizer"]
    assert record["kind"] == "huggingface"
    assert record["vocab_size"] == 4
    assert Path(record["path"]) == tmp_path / "stage" / "tokenizer"
    assert quarry_convert("--from", tmp_path / "stage" / "checkpoints", "--to", tmp_path / "back") == 0
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()
    assert next(iter(tensors(tmp_path / "back").values())).dtype == torch.bfloat16
    adopted = tmp_path / "stage" / "tokenizer" / "tokenizer.json"
    adopted.write_text(adopted.read_text().replace('"b"', '"c"'))
    with pytest.raises(DataError, match="not the tokenizer that the model was trained with"):
        quarry_convert("--from", tmp_path / "stage", "--to", tmp_path / "again")


def test_quarry_convert_refuses_with_the_exit_code_of_the_work(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert quarry_convert("--from", tmp_path, "--to", tmp_path / "out") == 78
    assert "no checkpoint here" in capfd.readouterr().err


@settings(max_examples=30, deadline=None)
@given(groups=st.integers(1, 4), per_group=st.integers(1, 4), half_head=st.integers(1, 4), hidden=st.integers(1, 5))
def test_qkv_splits_into_what_it_was_joined_from(groups: int, per_group: int, half_head: int, hidden: int) -> None:
    from recipes.schema import Model

    head = 2 * half_head
    model = Model.model_construct(num_attention_heads=groups * per_group, num_query_groups=groups, head_dim=head)
    q = torch.randn(groups * per_group * head, hidden)
    k, v = torch.randn(2, groups * head, hidden)
    joined = hf_weights.join_qkv(q, k, v, model)
    # Independently: the rows of group g are its queries, its key, its value.
    rows = [
        torch.cat([q.view(groups, -1, hidden)[g], k.view(groups, -1, hidden)[g], v.view(groups, -1, hidden)[g]])
        for g in range(groups)
    ]
    assert torch.equal(joined, torch.cat(rows))
    assert all(torch.equal(a, b) for a, b in zip(hf_weights.split_qkv(joined, model), (q, k, v), strict=True))


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=30), limit=st.integers(1, 100))
def test_shards_keep_order_and_limit(sizes: list[int], limit: int) -> None:
    shapes = {str(i): (s,) for i, s in enumerate(sizes)}
    shards = convert.plan_shards(shapes, 1, limit)
    assert [n for s in shards for n in s] == list(shapes)
    filled = [sum(shapes[n][0] for n in s) for s in shards]
    assert all(f <= limit or len(s) == 1 for f, s in zip(filled, shards, strict=True))
    assert all(filled[i] + shapes[shards[i + 1][0]][0] > limit for i in range(len(shards) - 1))


def test_a_checkpoint_with_the_local_specs_own_names_and_single_layers_is_read(
    families: dict[str, Family], tmp_path: Path
) -> None:
    """Norms under their own names and layers one by one, as other versions and switches of Megatron save them."""
    from model.checkpoint import Checkpoint, Writer

    made = families["3b"]
    source = Checkpoint(made.checkpoint)
    rename = {hf_weights.ATTENTION_NORM: "input_layernorm.weight", hf_weights.MLP_NORM: "pre_mlp_layernorm.weight"}
    with Writer(tmp_path / "stage" / "checkpoints" / "iter_0000003") as writer:
        for key in source.tensors:
            value = source.read(key)
            if not key.startswith(hf_weights.LAYERS):
                writer.add_chunk(key, value)
                continue
            name = key.removeprefix(hf_weights.LAYERS)
            for i, layer in enumerate(value):
                writer.add_chunk(f"{hf_weights.LAYERS}{i}.{rename.get(name, name)}", layer)
    (tmp_path / "stage" / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("3")
    shutil.copy(made.checkpoint.parents[1] / "model.json", tmp_path / "stage")
    export(tmp_path / "stage", tmp_path / "hf")
    assert same_bits(tensors(tmp_path / "hf"), tensors(made.hf))


def test_a_checkpoint_index_that_names_other_classes_is_not_unpickled(families: dict[str, Family], tmp_path: Path) -> None:
    root = Path(shutil.copytree(families["3b"].checkpoint.parents[1], tmp_path / "stage"))
    trap = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (trap,))

    (root / "checkpoints" / "iter_0000000" / ".metadata").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ModelError, match="has no place in a checkpoint's index"):
        export(root, tmp_path / "hf")
    assert not trap.exists()


def test_a_model_made_with_other_layer_count(tmp_path: Path) -> None:
    """Nothing in the conversion assumes the fixture's four layers."""
    make_hf_model(tmp_path / "hf", FAMILIES["8b"], layers=3)
    import_hf(tmp_path / "hf", tmp_path / "stage")
    export(tmp_path / "stage", tmp_path / "back")
    assert same_bits(tensors(tmp_path / "back"), tensors(tmp_path / "hf"))


@pytest.mark.multirank
def test_megatrons_own_loader_takes_an_imported_model(
    families: dict[str, Family], workspace: Workspace, tmp_path: Path
) -> None:
    """With its checks on: the sums of the files, and every key that the model asks for."""
    made = families["3b"]
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.model.megatron_load",
        made.checkpoint.parent,
        workspace.folder / "ids.pt",
    ]
    done = subprocess.run(
        [*command, tmp_path / "logits.pt"], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (torch.load(tmp_path / "logits.pt", weights_only=True) - made.logits).abs().max() < 1e-5
