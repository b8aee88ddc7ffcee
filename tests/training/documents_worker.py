"""Real ranks for test_documents, all forked from one process that has imported torch and Megatron once.

    python -m tests.training.documents_worker FOLDER

Numbers of one sample in layouts of 1, 2 and 4 context-parallel ranks go to FOLDER/numbers.<ranks>.pt, runs of the stage command to
FOLDER/runs/<name>. Prints the exit code of each.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from training import fast_import
from training.one_rank import import_megatron_on

os.environ |= {"OMP_NUM_THREADS": "1", "QUARRY_RECORD_SAMPLES": "1"}
import_megatron_on("cpu")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402

from data_prep.progress import Silent  # noqa: E402
from model import builder, config, convert  # noqa: E402
from model.packing import zigzag_positions  # noqa: E402
from recipes.document_packing import multiple_tokens  # noqa: E402
from tests.training import factory, interruption  # noqa: E402
from training import documents, index_cache, stage  # noqa: E402

SAMPLE_TOKENS = 96
LENGTHS = (11, 1, 30, 7, 47)
"""Parts of documents in the sample, and its last label, which belongs to the last."""
CONTEXT_RANKS = (1, 2, 4)
LAYOUTS = {
    "single": {"gpus": 1},
    "tp2_cp2": {"gpus": 4, "tensor": 2, "context": 2, "sequence_parallel": True, "micro_batch_samples": 2},
    "pp2_cp2": {"gpus": 4, "pipeline": 2, "context": 2, "micro_batch_samples": 2},
}
RUNS = {"single": "single", "tp2_cp2": "tp2_cp2", "killed": "tp2_cp2", "pp2_cp2": "pp2_cp2"}
STEPS, SAVED_AT, KILLED_AT = 6, 3, 4


def make_sample(lengths: tuple[int, ...], seed: int) -> torch.Tensor:
    """The tokens of a sample of `lengths`, its last label included; document i is a function of `seed` and i alone."""
    parts = [np.random.default_rng([seed, i]).integers(0, 256, n) for i, n in enumerate(lengths)]
    return torch.from_numpy(np.concatenate(parts))


def batch_of(text: torch.Tensor, lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    positions, mask = documents.positions_and_loss_mask(np.array(lengths))
    sample = {"tokens": text[:-1], "labels": text[1:], "loss_mask": torch.from_numpy(mask)}
    return {key: value[None] for key, value in (sample | {documents.POSITIONS_KEY: torch.from_numpy(positions)}).items()}


def numbers(folder: Path, imported: Path) -> int:
    """Losses and gradients of a sample on this context-parallel rank, put together over all, into FOLDER/numbers.<ranks>.pt."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    ranks = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(context_parallel_size=ranks)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    model = convert.Description.find(imported).model
    net = builder.build(
        config.transformer_config(model, context=ranks),
        model,
        rope_base=1e4,
        max_sequence_length=SAMPLE_TOKENS,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    net.load_state_dict(dist_checkpointing.load({"model": net.sharded_state_dict()}, str(imported))["model"])
    args = SimpleNamespace(
        context_parallel_size=ranks, tensor_model_parallel_size=1, sequence_parallel=False, fp8=None, seq_length=SAMPLE_TOKENS
    )

    def losses(lengths: tuple[int, ...], text: torch.Tensor, restart: bool = True) -> torch.Tensor:
        """[s] nats of every token of the sample, 0 where there is no loss; leaves gradients of their sum."""
        sample = batch_of(text, lengths)
        whole, bounds = documents.pack(sample, multiple_tokens(ranks), documents.grain_tokens(args))
        batch, packed = documents.on_this_rank(whole, bounds, restart_positions=restart)
        net.zero_grad()
        output = net(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=packed)
        output = output * batch["loss_mask"]
        output.sum().backward()
        found = torch.zeros(int(bounds[-1]))
        found[zigzag_positions(bounds.tolist(), ranks, torch.distributed.get_rank())] = output.detach()[0]
        torch.distributed.all_reduce(found)
        # Back to the sample's own order: what the packed sequence has more is padding.
        starts = bounds.tolist()
        parts = [n for n in lengths if n]
        parts[-1] -= 1
        kept = torch.cat([found[start : start + n] for start, n in zip(starts, parts, strict=False)])
        assert int((found != 0).sum()) == int((kept != 0).sum()), "padding has a loss"
        return kept

    text, others = make_sample(LENGTHS, 1), make_sample(LENGTHS, 2)
    ends = np.cumsum(LENGTHS)
    result: dict[str, Any] = {"losses": losses(LENGTHS, text)}
    gradients = {}
    for name, p in net.named_parameters():
        torch.distributed.all_reduce(p.grad)
        gradients[name] = p.grad.clone()
    result |= {"gradients": gradients, "counted on": losses(LENGTHS, text, restart=False)}
    # Document 2 as it is, among other documents of the same lengths, and of others.
    start, end = int(ends[1]), int(ends[2])
    mixed = torch.cat([others[:start], text[start:end], others[end:]])
    result["other neighbours"] = losses(LENGTHS, mixed)[start:end]
    lengths = (5, 20, LENGTHS[2], 41)
    moved = torch.cat([others[:25], text[start:end], others[25:66]])
    result["moved"] = losses(lengths, moved)[25 : 25 + end - start]
    if torch.distributed.get_rank() == 0:
        torch.save(result, folder / f"numbers.{ranks}.pt")
    torch.distributed.destroy_process_group()
    return 0


def make_runs(folder: Path) -> None:
    """Recipes of RUNS: stage `second` of the factory as a first stage, with documents apart."""
    factory.SECOND.update(steps=STEPS, global_batch_samples=4)
    factory.build_caches = lambda root: index_cache.build(root, ["first", "second"], workers=1, progress=Silent())
    factory.make_data(folder / "data")
    for name, layout in RUNS.items():
        run = folder / "runs" / name
        run.mkdir(parents=True)
        recipe = factory.make_recipe(
            folder / "data", LAYOUTS[layout], layout, documents_apart=True, restart_positions=True, save_interval_steps=SAVED_AT
        )
        changes = {"stages": ["second"], "model": recipe.model.model_copy(update={"num_layers": 2})}
        recipe.model_copy(update=changes).write(run / "recipe.json")


def take_over(stage_dir: Path, from_stage_dir: Path) -> None:
    """What a run that died after SAVED_AT would have left: another layout begins with other random weights, and so has to resume."""
    shutil.copytree(from_stage_dir, stage_dir)
    (stage_dir / "handoff.json").unlink()
    shutil.rmtree(stage_dir / "checkpoints" / f"iter_{STEPS:07d}")
    (stage_dir / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(SAVED_AT))


def main(folder: Path) -> None:
    for ranks in CONTEXT_RANKS:
        code = stage.run_forked(ranks, lambda: numbers(folder, folder / "imported" / "checkpoints" / "iter_0000000"))
        print(f"numbers {ranks}: exit code {code}", flush=True)
    make_runs(folder)
    for name in ("single", "tp2_cp2", "killed", "killed", "pp2_cp2"):
        run = folder / "runs" / name
        stage_dir = run / "stages" / "second"
        if name == "killed" and not stage_dir.exists():
            interruption.start(stage_dir / "metrics.jsonl", KILLED_AT)
        if name == "pp2_cp2":
            take_over(stage_dir, folder / "runs" / "single" / "stages" / "second")
        print(f"{name}: exit code {stage.main(['--run-dir', str(run), '--stage', 'second'])}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    fast_import.leave(0)
