"""Runs of two SFT stages on generated chats, for tests that start real ranks: `warm` from random weights, `sft` from its hand-off.

The tokenizer is bytes and Granite's role tokens, so that nothing has to be trained for it.
"""

import json
from pathlib import Path

import numpy as np

from data_prep.files import file_sha256, record_file
from data_prep.hf_tokenizer import write_config
from data_prep.indexed import Writer, bin_path, idx_path
from data_prep.manifest import HeldoutManifest, HeldoutSet, TokenizerRecord, heldout_path
from data_prep.sft import prepare_sft
from data_prep.special_tokens import END, PAD, ROLES
from recipes.schema import Recipe
from tests.training import factory, interruption

VOCAB_SIZE = 288
"""Rows of the model; the tokenizer has 260 entries."""
LENGTH = 128
MODEL = factory.MODEL | {"vocab_size": VOCAB_SIZE}


def write_tokenizer(folder):
    """A byte-level tokenizer without merges, with the chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = (PAD, END, *ROLES)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_config(folder, {"eos_token": END, "pad_token": PAD}, special)
    return TokenizerRecord(
        kind="huggingface",
        path=folder.name,
        sha256=file_sha256(folder / "tokenizer.json"),
        vocab_size=tokenizer.get_vocab_size(with_added_tokens=True),
        eod_id=tokenizer.token_to_id(END),
    )


def chats(count, seed):
    """Words spelled backwards, of one or two turns: the answer cannot be known from its length alone."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        messages = []
        for _ in range(int(rng.integers(1, 3))):
            word = "".join(rng.choice(list("abcd"), int(rng.integers(2, 8))))
            messages += [{"role": "user", "content": word}, {"role": "assistant", "content": word[::-1]}]
        yield {"messages": messages}


def stage(layout=None, **changes):
    return {
        "title": "test",
        "sources": {"chat": {"paths": ["chat.jsonl"]}},
        "epochs": 2,
        "seq_length_tokens": LENGTH,
        "global_batch_sequences": 8,
        "peak_lr": 3e-3,
        "warmup_percent": 20.0,
        "rope_base": 1e4,
        "pack_multiple_tokens": 4,
        "heldout_percent": 10.0,
        "heldout_max_samples": 16,
        "parallel": {"name": "layout", "gpus": 1, **(layout or {})},
        "precision": {"name": "fp32", "dtype": "fp32"},
        "save_interval_steps": 5,
        **changes,
    }


def make_recipe(root, layout=None, **changes):
    """`warm` on one rank, then `sft` in `layout`."""

    def at_home(values):
        return values | {
            "sources": {name: {"paths": [str(root / p) for p in s["paths"]]} for name, s in values["sources"].items()}
        }

    return Recipe.model_validate(
        {
            "name": "sft-test",
            "seed": 7,
            "stages": ["warm", "sft"],
            "phase": {},
            "sft": {"warm": at_home(stage(epochs=1, peak_lr=1e-2)), "sft": at_home(stage(layout, **changes))},
            "model": MODEL,
            "optimizer": factory.OPTIMIZER,
            "data": {
                "name": "generated",
                "root": str(root / "data"),
                "sources": {},
                "tokenizer": {"kind": "huggingface", "vocab_size": 260},
                "heldout_percent": 1.0,
                "heldout_max_tokens": 4096,
                "heldout_batch_samples": 4,
                "heldout_seq_length_tokens": 64,
                "max_epochs": 4.0,
            },
            "cluster": factory.CLUSTER,
        }
    )


def make_data(root, count=200):
    """Chats, tokenizer, pre-training's held-out set and the packed data of both stages below `root`."""
    data = root / "data"
    data.mkdir(parents=True)
    tokenizer = write_tokenizer(data / "tokenizer")
    (root / "chat.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats(count, seed=1)))
    rng = np.random.default_rng(2)
    (data / "heldout").mkdir()
    with Writer(data / "heldout" / "web", 260) as writer:
        for _ in range(10):
            writer.add(rng.integers(0, 250, 60))
    files = {"bin": record_file(bin_path(data / "heldout" / "web")), "idx": record_file(idx_path(data / "heldout" / "web"))}
    web = HeldoutSet(prefix="heldout/web", documents=10, tokens=600, max_token_id=writer.max_token_id, dtype="uint16", **files)
    HeldoutManifest.make(seq_length_tokens=64, inputs="0" * 64, tokenizer=tokenizer, categories={"web": web}).write(
        heldout_path(data)
    )
    recipe = make_recipe(root)
    for name, sft in recipe.sft.items():
        prepare_sft(sft, name, data, tokenizer)
    return recipe


def hugging_face_model(stage_dir, folder):
    """transformers' Granite in fp32 with the weights that `stage_dir` handed off, exported into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM

    from model.convert import export

    checkpoint = json.loads((stage_dir / "handoff.json").read_text())["checkpoint"]
    export(stage_dir / checkpoint, folder, dtype="fp32", write_tokenizer=lambda f: None)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def losses_alone(model, store, numbers):
    """(sum of the losses, number of loss tokens) of samples, each alone through `model`."""
    import torch

    total, count = 0.0, 0
    for number in numbers:
        tokens, learned = store.sample(int(number))
        ids = torch.tensor(tokens.astype(np.int64))
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        nats = torch.nn.functional.cross_entropy(logits.double(), ids[1:], reduction="none")
        total += float(nats[torch.tensor(learned[1:] == 1)].sum())
        count += int(learned[1:].sum())
    return total, count


def drive(jobs, output):
    """The jobs by the stage command, one after the other in a process of its own; what it prints, each job's exit code too, is appended to
    the file `output`.

    A job is RUN:STAGE, or RUN:STAGE:STEP, where a rank is killed with SIGKILL once that step is logged, or RUN:leaks, which runs
    `packed_and_alone`.
    """
    driving = factory.stage_server.start(jobs, output, program="tests.training.sft_factory:_drive")
    assert driving.wait(timeout=600) == 0, output.read_text()[-4000:]


def _drive(jobs):
    from training import stage as command

    for job in jobs:
        run, name, *step = job.split(":")
        if step:
            interruption.start(Path(run) / "stages" / name / "metrics.jsonl", int(step[0]))
        if name == "leaks":
            code = command.run_forked(1, lambda run=run: packed_and_alone(Path(run)))
        else:
            code = command.main(["--run-dir", run, "--stage", name])
        print(f"{job}: exit code {code}", flush=True)
    return 0


def packed_and_alone(run):
    """Logits and gradients of one packed sequence on one rank under changes that must not matter, into RUN/leaks.pt."""
    import torch
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.process_groups_config import ProcessGroupCollection

    from data_prep.sft_manifest import lay_out
    from model import builder, config
    from recipes.schema import Model

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    model = Model.model_validate(MODEL)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    net = builder.build(
        config.transformer_config(model), model, rope_base=1e4, max_sequence_length=LENGTH, pg_collection=groups
    )
    rng = np.random.default_rng(3)
    samples = [(rng.integers(0, 256, n).astype(np.int32), (np.arange(n) % 5 > 2).astype(np.uint8)) for n in (37, 20, 41)]

    def batch(samples):
        laid = lay_out(samples, LENGTH, 4, pad_id=256)
        bounds = torch.from_numpy(laid.pop("bounds"))
        longest = int((bounds[1:] - bounds[:-1]).max())
        packed = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
        )
        return {k: torch.from_numpy(v).unsqueeze(0) for k, v in laid.items()}, packed, bounds.tolist()

    def logits(samples):
        inputs, packed, bounds = batch(samples)
        with torch.no_grad():
            return net(inputs["tokens"], inputs["position_ids"], None, packed_seq_params=packed)[0], bounds

    def gradients(inputs, packed):
        net.zero_grad()
        losses = net(inputs["tokens"], inputs["position_ids"], None, labels=inputs["labels"], packed_seq_params=packed)
        (losses * inputs["loss_mask"]).sum().backward()
        return {name: p.grad.clone() for name, p in net.named_parameters()}

    others = [(rng.integers(0, 256, len(t)).astype(np.int32), m) for t, m in samples]
    inputs, packed, bounds = batch(samples)
    unlearned = {
        **inputs,
        "labels": torch.where(inputs["loss_mask"] == 0, torch.randint(0, 256, (1, LENGTH)), inputs["labels"]),
    }
    padding = inputs["tokens"].clone()
    padding[:, bounds[len(samples)] :] = 7
    for start, (tokens, _) in zip(bounds, samples, strict=False):
        padding[:, start + len(tokens) : start + -(-len(tokens) // 4) * 4] = 7
    torch.save(
        {
            "bounds": bounds,
            "logits": logits(samples)[0],
            "others": [logits([*others[:i], samples[i], *others[i + 1 :]])[0] for i in range(3)],
            "alone": [logits([sample])[0][: len(sample[0])] for sample in samples],
            "gradients": gradients(inputs, packed),
            "unlearned labels": gradients(unlearned, packed),
            "other padding": gradients({**inputs, "tokens": padding}, packed),
            "nothing learned": gradients({**inputs, "loss_mask": torch.zeros(1, LENGTH)}, packed),
        },
        run / "leaks.pt",
    )
    torch.distributed.destroy_process_group()
    return 0
