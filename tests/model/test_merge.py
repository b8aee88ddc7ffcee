"""The merge equals the average of the tensors, keeps everything else of the newest input, and Megatron resumes from it in any layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from model.checkpoint import Checkpoint, Writer
from model.errors import ModelError
from model.merge import merge
from tests.model.conftest import Family, Workspace

MAIN = "optimizer.state.param."


def read_with_torch(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by torch's own reader, independent of model.checkpoint."""
    reader = dcp.FileSystemReader(folder)
    index = reader.read_metadata().state_dict_metadata
    state = {k: torch.zeros(v.size, dtype=v.properties.dtype) for k, v in index.items() if isinstance(v, TensorStorageMetadata)}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def objects(folder: Path) -> dict[str, bytes]:
    checkpoint = Checkpoint(folder)
    return {k: checkpoint.read_bytes(p) for k, p in checkpoint.objects.items()}


@pytest.fixture(scope="module")
def trained(workspace: Workspace, families: dict[str, Family]) -> Path:
    """Checkpoints with the distributed optimizer's state, of two stages in different layouts, in fp32 and bf16, and their merges."""
    root = workspace.folder / "merge"
    common: dict[str, Any] = {"model": families["3b"].model.model_dump(mode="json")}
    jobs = []
    for kind, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
        first, second = str(root / kind / "first"), str(root / kind / "second")
        jobs += [
            {"name": f"{kind}.first", "ranks": 2, "dtype": dtype, "load": str(families["3b"].checkpoint), "train_steps": 2, "save": first},
            {"name": f"{kind}.second", "ranks": 2, "tensor": 2, "sequence_parallel": True, "dtype": dtype, "load": first,
             "load_optimizer": True, "train_steps": 2, "seed": 5, "save": second},
        ]  # fmt: skip
    jobs.append({"name": "bound", "train_steps": 1, "sharding": "dp_reshardable", "save": str(root / "bound")})
    workspace.run([common | job for job in jobs])
    for kind in ("fp32", "bf16"):
        merge({root / kind / "first": 0.25, root / kind / "second": 0.75}, root / kind / "merged")
    # Megatron loads the merged checkpoint with its optimizer in other layouts, saves it again, and one trains on.
    resumed = [
        {"name": f"{kind}.resumed", "dtype": dtype, "load": str(root / kind / "merged"), "load_optimizer": True,
         "save": str(root / kind / "resumed"), **layout}
        for kind, dtype, layout in (("fp32", "float32", {"ranks": 2, "pipeline": 2}), ("bf16", "bfloat16", {"ranks": 2, "tensor": 2}))
    ]  # fmt: skip
    resumed.append(resumed[0] | {"name": "fp32.went_on", "save": str(root / "fp32" / "went_on"), "train_steps": 1})
    workspace.run([common | job for job in resumed])
    return root


@pytest.mark.multirank
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_merge_is_the_average_of_the_weights_and_the_newest_of_the_rest(trained: Path, kind: str) -> None:
    first, second, merged = (read_with_torch(trained / kind / n) for n in ("first", "second", "merged"))
    assert merged.keys() == second.keys()
    main = [k for k in merged if k.startswith(MAIN)]
    assert len(main) == 8
    for key in main:
        expected = (first[key].double() * 0.25 + second[key].double() * 0.75).float()
        assert torch.equal(merged[key], expected), key
        assert not torch.equal(merged[key], second[key])
        weight = key.removeprefix(MAIN)
        assert torch.equal(merged[weight], expected.to(merged[weight].dtype)), weight
    moments = [k for k in merged if k.startswith("optimizer.state.exp_avg")]
    assert len(moments) == 16
    for key in moments:
        assert torch.equal(merged[key], second[key])
        assert not torch.equal(merged[key], first[key])
    assert objects(trained / kind / "merged") == objects(trained / kind / "second")


@pytest.mark.multirank
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_megatron_resumes_from_a_merge_in_another_layout(trained: Path, kind: str) -> None:
    merged, resumed = (read_with_torch(trained / kind / n) for n in ("merged", "resumed"))
    assert all(torch.equal(merged[k], resumed[k]) for k in merged)
    assert resumed.keys() == merged.keys()


@pytest.mark.multirank
def test_megatron_trains_on_from_a_merge(trained: Path) -> None:
    merged, went_on = (read_with_torch(trained / "fp32" / n) for n in ("merged", "went_on"))
    assert all(not torch.equal(merged[k], went_on[k]) for k in merged if k.startswith("optimizer.state."))


@pytest.mark.multirank
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_merging_a_checkpoint_with_itself_returns_the_same_bits(trained: Path, tmp_path: Path, kind: str) -> None:
    source = trained / kind / "second"
    (tmp_path / "copy").symlink_to(source)
    merge({tmp_path / "copy": 0.3, source: 0.7}, tmp_path / "merged")
    before, after = read_with_torch(source), read_with_torch(tmp_path / "merged")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)


@pytest.mark.multirank
def test_a_state_bound_to_its_layout_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"bound to the layout.*--dist-ckpt-optim-fully-reshardable"):
        merge({trained / "bound": 1.0}, tmp_path / "merged")


def test_weights_only_checkpoints_are_merged(families: dict[str, Family], tmp_path: Path) -> None:
    a = families["3b"].checkpoint
    b = scaled(a, tmp_path / "b", 3.0)
    merge({a: 0.5, b: 0.5}, tmp_path / "merged")
    first, merged = read_with_torch(a), read_with_torch(tmp_path / "merged")
    assert all(torch.equal(merged[k], first[k] * 2) for k in first)


def scaled(source: Path, target: Path, factor: float, **replaced: torch.Tensor | None) -> Path:
    """A copy of a weights-only checkpoint times `factor`, with tensors replaced, or left out where None."""
    checkpoint = Checkpoint(source)
    with Writer(target) as writer:
        for key in checkpoint.tensors:
            value = replaced.get(key, checkpoint.read(key) * factor)
            if value is not None:
                writer.add_chunk(key, value)
    return target


NORM = "decoder.final_layernorm.weight"
DIFFERENCES: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "missing tensor": ({NORM: None}, r"'decoder\.final_layernorm\.weight' is only in .*imported"),
    "tensor beyond": ({"output_layer.weight": torch.ones(2)}, r"'output_layer\.weight' is only in .*other"),
    "shape": ({NORM: torch.ones(128)}, r"'decoder\.final_layernorm\.weight' is torch\.float32 \(128,\) in .* and torch\.float32 \(256,\)"),
    "dtype": ({NORM: torch.ones(256, dtype=torch.bfloat16)}, r"torch\.bfloat16 \(256,\)"),
    "main parameters in one only": ({MAIN + NORM: torch.ones(256)}, rf"'{MAIN}{NORM}' is only in"),
}  # fmt: skip


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_different_models_are_refused_by_name(families: dict[str, Family], tmp_path: Path, difference: str) -> None:
    replaced, message = DIFFERENCES[difference]
    checkpoint = Checkpoint(families["3b"].checkpoint)
    other = tmp_path / "other"
    with Writer(other) as writer:
        for key in checkpoint.tensors.keys() | replaced.keys():
            value = replaced[key] if key in replaced else checkpoint.read(key)
            if value is not None:
                writer.add_chunk(key, value)
    with pytest.raises(ModelError, match=message):
        merge({other: 0.5, families["3b"].checkpoint: 0.5}, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_another_family_is_refused(families: dict[str, Family], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="one architecture and precision"):
        merge({families["8b"].checkpoint: 0.5, families["3b"].checkpoint: 0.5}, tmp_path / "merged")


def test_a_diverged_input_is_refused(families: dict[str, Family], tmp_path: Path) -> None:
    bad = torch.ones(256)
    bad[7] = float("nan")
    other = scaled(families["3b"].checkpoint, tmp_path / "other", 1.0, **{NORM: bad})
    with pytest.raises(ModelError, match=r"the average of 'decoder\.final_layernorm\.weight' is not finite"):
        merge({other: 0.5, families["3b"].checkpoint: 0.5}, tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other"]


@pytest.mark.parametrize(("weights", "message"), [
    ((0.5, 0.6), r"sum to 1\.1, must be 1; divide each by 1\.1"), ((0.4, 0.4), r"sum to 0\.8"), ((-0.5, 1.5), "must be positive"),
    ((0.0, 1.0), "must be positive"), ((float("nan"), 1.0), "must be positive")])  # fmt: skip
def test_weights_that_are_no_average_are_refused(tmp_path: Path, weights: tuple[float, float], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        merge(dict(zip((tmp_path / "a", tmp_path / "b"), weights, strict=True)), tmp_path / "merged")
    with pytest.raises(ModelError, match="no inputs"):
        merge({}, tmp_path / "merged")


def test_thirds_are_an_average(families: dict[str, Family], tmp_path: Path) -> None:
    a = families["3b"].checkpoint
    (tmp_path / "b").symlink_to(a)
    (tmp_path / "c").symlink_to(a)
    merge({tmp_path / "b": 0.333333333, tmp_path / "c": 0.333333333, a: 0.333333334}, tmp_path / "merged")
    before, after = read_with_torch(a), read_with_torch(tmp_path / "merged")
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_file_beside_the_tensors_comes_from_the_newest(families: dict[str, Family], tmp_path: Path) -> None:
    a, b = scaled(families["3b"].checkpoint, tmp_path / "a", 1.0), scaled(families["3b"].checkpoint, tmp_path / "b", 2.0)
    (a / "common.pt").write_bytes(b"old")
    (b / "common.pt").write_bytes(b"new")
    merge({a: 0.5, b: 0.5}, tmp_path / "merged")
    assert (tmp_path / "merged" / "common.pt").read_bytes() == b"new"
    assert "common.pt" in json.loads((tmp_path / "merged" / "integrity.json").read_text())["files"]


def test_an_existing_output_is_kept_unless_it_may_be_replaced(families: dict[str, Family], tmp_path: Path) -> None:
    a = families["3b"].checkpoint
    merge({a: 1.0}, tmp_path / "merged")
    with pytest.raises(ModelError, match="exists"):
        merge({a: 1.0}, tmp_path / "merged")
    merge({a: 1.0}, tmp_path / "merged", replace=True)
    assert Checkpoint(tmp_path / "merged").tensors
