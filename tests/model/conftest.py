"""Random Hugging Face Granites of each family's ratios, and what Megatron makes of them in many layouts, computed once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import stage_server
from training import cpu_backend

cpu_backend.install()

from model import convert  # noqa: E402
from recipes.schema import Model  # noqa: E402

VOCAB = 256
TOKENS = 64
# Ratios of the released models: head dim, attention, residual and logits multipliers, MLP width over hidden width where it fits.
FAMILIES: dict[str, dict[str, Any]] = {
    "3b": {"hidden_size": 256, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2,
           "attention_multiplier": 1 / 64, "residual_multiplier": 0.22, "logits_scaling": 10.0, "tie_word_embeddings": True},
    "8b": {"hidden_size": 512, "intermediate_size": 640, "num_attention_heads": 4, "num_key_value_heads": 1,
           "attention_multiplier": 1 / 128, "residual_multiplier": 0.22, "logits_scaling": 16.0, "tie_word_embeddings": True},
    "30b": {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2,
            "attention_multiplier": 1 / 128, "residual_multiplier": 0.175, "logits_scaling": 16.0, "tie_word_embeddings": True},
    # What the family does not use and the conversion must still get right: an output matrix of its own, heads wider than hidden / heads.
    "untied": {"hidden_size": 192, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
               "attention_multiplier": 0.03, "residual_multiplier": 0.5, "logits_scaling": 4.0, "tie_word_embeddings": False},
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One random model: its Hugging Face folder, its import, its own logits for `Workspace.ids`."""

    hf: Path
    checkpoint: Path
    model: Model
    logits: torch.Tensor
    """[B, S, V] of GraniteForCausalLM with eager attention."""


@dataclass(frozen=True)
class Workspace:
    folder: Path
    ids: torch.Tensor
    """[B, S]"""

    def run(self, jobs: list[dict[str, Any]]) -> None:
        """Run `jobs` (fields of rank_worker.Job) one after the other, in one process tree."""
        (self.folder / "jobs.json").write_text(json.dumps(jobs))
        output = self.folder / "log.txt"
        working = stage_server.start([str(self.folder)], output, program="tests.model.rank_worker:main")
        assert working.wait(timeout=600) == 0, output.read_text()[-6000:]

    def load(self, name: str) -> Any:
        return torch.load(self.folder / f"{name}.pt", weights_only=True)


def make_hf_model(folder: Path, settings: dict[str, Any], *, layers: int = 4, **save: Any) -> torch.nn.Module:
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(
        vocab_size=VOCAB, num_hidden_layers=layers, embedding_multiplier=12.0, rms_norm_eps=1e-5, initializer_range=0.1,
        max_position_embeddings=256, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, bos_token_id=1, eos_token_id=2,
        attn_implementation="eager", **settings)  # fmt: skip
    model = GraniteForCausalLM(config).float().eval()
    for name, p in model.named_parameters():  # initial norms are all ones: any mix-up of them would go unseen
        if name.endswith("norm.weight"):
            p.data.uniform_(0.5, 1.5)
    model.save_pretrained(folder, **save)
    return model


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("model")
    ids = torch.randint(0, VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    torch.save(ids, folder / "ids.pt")
    return Workspace(folder, ids)


@pytest.fixture(scope="session")
def families(workspace: Workspace) -> dict[str, Family]:
    made = {}
    for number, (name, settings) in enumerate(FAMILIES.items()):
        torch.manual_seed(number)
        hf, imported = workspace.folder / f"hf-{name}", workspace.folder / f"imported-{name}"
        network = make_hf_model(hf, settings)
        with torch.no_grad():
            logits = network(workspace.ids).logits
        convert.import_hf(hf, imported)
        checkpoint = imported / "checkpoints" / "iter_0000000"
        made[name] = Family(hf, checkpoint, convert.Description.find(checkpoint).model, logits)
    return made


# Every one starts from the imported checkpoint of its family, saves what it loaded, and exports from there.
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2_sp": {"ranks": 2, "tensor": 2, "sequence_parallel": True},
    "tp2": {"ranks": 2, "tensor": 2},
    "pp2": {"ranks": 2, "pipeline": 2},
    "pp2_vp2": {"ranks": 2, "pipeline": 2, "virtual_pipeline": 2},
    "cp2": {"ranks": 2, "context": 2},
    "cp2_recompute": {"ranks": 2, "context": 2, "recompute": True},
    "tp2_pp2": {"ranks": 4, "tensor": 2, "pipeline": 2},
    "tp2_cp2_sp": {"ranks": 4, "tensor": 2, "context": 2, "sequence_parallel": True},
}
WITH_CACHE = ("one", "tp2")
WITH_GRADIENTS = ("one", "tp2_sp", "cp2", "cp2_recompute", "tp2_cp2_sp")


@pytest.fixture(scope="session")
def ranks(workspace: Workspace, families: dict[str, Family]) -> Workspace:
    """All layouts have run: <family>.<layout>.logits..., .grads..., and checkpoints saved-<family>.<layout>."""
    jobs = []
    for family, made in families.items():
        for layout, fields in LAYOUTS.items():
            if family == "3b" or layout == "one" or (family == "untied" and layout == "pp2"):
                name = f"{family}.{layout}"
                job = {"name": name, "model": made.model.model_dump(mode="json"), "load": str(made.checkpoint), "logits": True}
                job |= {
                    "gradients": layout in WITH_GRADIENTS and family == "3b",
                    "save": str(workspace.folder / f"saved-{name}"),
                }
                if layout in WITH_CACHE:
                    job["decode_from"] = TOKENS - 20
                jobs.append(job | fields)
    workspace.run(jobs)
    return workspace
