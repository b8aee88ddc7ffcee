"""A run of two small phases on generated token data, for tests that start real ranks."""

import sys
from pathlib import Path

import numpy as np

from data_prep.files import file_sha256, record_file
from data_prep.indexed import Writer, bin_path, idx_path
from data_prep.manifest import (
    HeldoutManifest,
    HeldoutSet,
    MixtureManifest,
    TokenizerRecord,
    ViewSource,
    heldout_path,
    mixture_path,
)
from recipes.schema import Recipe
from tests.training import stage_server

STEPS = 20
VOCAB_SIZE = 256
FIRST = {"steps": 8, "seq_length_tokens": 64, "global_batch_samples": 16, "rope_base": 10000.0}
SECOND = {"steps": STEPS, "seq_length_tokens": 128, "global_batch_samples": 8, "rope_base": 50000.0}
SHARES = {"first": {"web": 70.0, "code": 30.0}, "second": {"web": 25.0, "code": 75.0}}
MODEL = {
    "name": "test",
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "head_dim": 16,
    "vocab_size": VOCAB_SIZE,
    "tied_embeddings": True,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 1 / 16,
    "logits_scaling": 2.0,
    "norm_epsilon": 1e-5,
    "init_std": 0.05,
    # narrower than the model: muP's learning-rate groups are part of what is handed off
    "mup_base_hidden_size": 32,
    "released_rope_base": 1e4,
    "released_max_position_tokens": 128,
    "published_parameters": None,
}
OPTIMIZER = {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1, "clip_grad_norm": 1.0}
CLUSTER = {"kind": "local", "name": "local", "gpu": "cpu", "gpus_per_node": 4, "runs_root": "runs"}


def make_recipe(data_root, layout, layout_name, **second_phase):
    """Two phases: `first` on one rank, `second` on `layout` with another length, batch, RoPE base, mixture and schedule."""

    def phase(name, numbers, parallel, schedule):
        tokens = numbers["steps"] * numbers["seq_length_tokens"] * numbers["global_batch_samples"]
        return {
            "title": name,
            "tokens": tokens,
            **numbers,
            "mixture": {"name": name, "shares_percent": SHARES[name]},
            "schedule": schedule,
            "parallel": {"micro_batch_samples": 4, **parallel},
            "precision": {"name": "fp32", "dtype": "fp32"},
            "save_interval_steps": 7,
        }

    linear = {"kind": "linear", "start_lr": 3e-3, "end_lr": 3e-4}
    return Recipe.model_validate(
        {
            "name": "exact",
            "seed": 7,
            "stages": ["first", "second"],
            "phase": {
                "first": phase("first", FIRST, {"name": "single", "gpus": 1}, {"kind": "constant", "start_lr": 4e-3}),
                "second": {**phase("second", SECOND, {"name": layout_name, **layout}, linear), **second_phase},
            },
            "model": MODEL,
            "optimizer": OPTIMIZER,
            "data": {
                "name": "generated",
                "root": str(data_root),
                "sources": {s: {"category": s, "kind": "indexed", "paths": [s]} for s in ("code", "web")},
                "tokenizer": {"kind": "sentencepiece", "vocab_size": VOCAB_SIZE},
                "heldout_percent": 1.0,
                "heldout_max_tokens": 4096,
                "heldout_batch_samples": 8,
                "heldout_seq_length_tokens": 64,
                "max_epochs": 4.0,
            },
            "cluster": CLUSTER,
        }
    )


def documents(seed, count):
    """Sequences that a model can learn: ramps that wrap, of 40 to 200 tokens."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        length = int(rng.integers(40, 200))
        yield (np.cumsum(rng.integers(0, 3, length)) % 200 + int(rng.integers(0, 50))).astype(np.uint16)


def make_data(root):
    """Views of both phases and held-out sets below `root`, with their manifests."""

    def write(prefix, seed, count):
        (root / prefix).parent.mkdir(parents=True, exist_ok=True)
        with Writer(root / prefix, VOCAB_SIZE) as writer:
            for document in documents(seed, count):
                writer.add(document)
        return {
            "prefix": prefix,
            "documents": count,
            "max_token_id": writer.max_token_id,
            "dtype": "uint16",
            "bin": record_file(bin_path(root / prefix)),
            "idx": record_file(idx_path(root / prefix)),
        }, sum(writer.lengths)

    (root / "tokenizer").mkdir(parents=True)
    (root / "tokenizer" / "tokenizer.model").write_bytes(b"no text is encoded here")
    tokenizer = TokenizerRecord(
        kind="sentencepiece",
        path="tokenizer/tokenizer.model",
        sha256=file_sha256(root / "tokenizer" / "tokenizer.model"),
        vocab_size=VOCAB_SIZE,
        eod_id=VOCAB_SIZE - 1,
    )
    categories = {}
    for seed, category in enumerate(("web", "code")):
        files, tokens = write(f"heldout/{category}", seed, 40)
        categories[category] = HeldoutSet(**files, tokens=tokens)
    HeldoutManifest.make(seq_length_tokens=64, inputs="0" * 64, tokenizer=tokenizer, categories=categories).write(
        heldout_path(root)
    )
    for number, (name, numbers) in enumerate((("first", FIRST), ("second", SECOND))):
        samples = numbers["steps"] * numbers["global_batch_samples"]
        sources = {}
        for seed, category in enumerate(("code", "web")):
            files, tokens = write(f"views/{name}/{category}", 10 + 2 * number + seed, 300)
            share = SHARES[name][category]
            sources[category] = ViewSource(
                **files,
                category=category,
                share_percent=share,
                weight=share / 100,
                tokens_available=tokens,
                tokens_planned=round(samples * numbers["seq_length_tokens"] * share / 100),
                epochs=1.0,
            )
        MixtureManifest.make(
            phase=name,
            seed=7,
            seq_length_tokens=numbers["seq_length_tokens"],
            samples=samples,
            tokens=samples * numbers["seq_length_tokens"],
            recipe={},
            inputs="0" * 64,
            tokenizer=tokenizer,
            sources=sources,
        ).write(mixture_path(root, name))
    build_caches(root)


def build_caches(root):
    """The index caches of both phases, by the command that `quarry prep` starts."""
    make_recipe(root, {"gpus": 1}, "single").write(root / "recipe.json")
    output = root / "index_cache.txt"
    building = stage_server.start(["--recipe", str(root / "recipe.json")], output, program="training.index_cache:main")
    assert building.wait(timeout=300) == 0, output.read_text()
    output.unlink()


def start(run, stage):
    """The stage command in the background; its output is appended to `log.txt` of the run."""
    return stage_server.start(["--run-dir", str(run), "--stage", stage], run / "log.txt")


def start_stage(run, stage):
    """Run the stage command to its end; returns the exit code."""
    return start(run, stage).wait(timeout=300)


def save_before_the_first_step(arguments):
    """For stage_server: start stage `second` of the run in `arguments`, save what was loaded as step 1, and leave."""
    import megatron.training.training as upstream

    from training import stage
    from training.hooks import PhaseHooks

    (run,) = arguments

    def save_at_once(self, forward_step_func, model, optimizer, scheduler, *args, **kwargs):
        upstream.save_checkpoint_and_time(1, model, optimizer, scheduler, 0, {})
        raise SystemExit(0)

    PhaseHooks.train = save_at_once
    code = stage.main(["--run-dir", run, "--stage", "second"])
    return 0 if code == stage.REQUEUE else 1


def start_with_torchrun():
    """Main of a process of its own: stage `second` of the run in argv[1] by torchrun, as on GPUs, though its ranks are on the CPU."""
    from training import stage
    from training.handoff import resolve, write_model_json, write_start

    run = Path(sys.argv[1])
    recipe = Recipe.read(run / "recipe.json")
    root = Path(recipe.data.root)
    mixture = MixtureManifest.read(mixture_path(root, "second"))
    decision = resolve(recipe, "second", run, mixture, HeldoutManifest.read(heldout_path(root)))
    stage_dir = run / "stages" / "second"
    write_start(stage_dir, decision)
    write_model_json(recipe, "second", stage_dir, mixture.tokenizer.model_dump(mode="json"))
    digest = decision.training_digest
    sys.exit(stage.run_torchrun(recipe, "second", run, decision.load, digest, program="training.pretrain"))


def read_checkpoint(stage_dir):
    """Tensors of the newest checkpoint of a stage by key, read without Megatron; RNG states left out."""
    import torch
    import torch.distributed.checkpoint as dcp

    folder = max((stage_dir / "checkpoints").glob("iter_*"))
    reader = dcp.FileSystemReader(folder)
    metadata = reader.read_metadata().state_dict_metadata
    wanted = {
        key: torch.empty(value.size, dtype=value.properties.dtype)
        for key, value in metadata.items()
        if hasattr(value, "size") and "rng" not in key
    }
    dcp.load(wanted, storage_reader=reader, no_dist=True)
    return wanted
