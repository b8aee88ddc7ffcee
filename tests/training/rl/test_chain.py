"""The stage in a chain: fine-tuning, reinforcement learning in another layout, export; each by the command that launchers start."""

import json
import shutil
from collections import Counter

import pytest

from recipes.schema import Recipe
from tests.training import sft_factory
from tests.training.factory import read_checkpoint
from tests.training.sft_factory import LENGTH, MODEL, VOCAB_SIZE, losses_alone, make_data, make_recipe
from training import arguments
from training.files import read_json_lines

pytestmark = pytest.mark.multirank

GRPO = {
    "title": "Reinforcement",
    "steps": 3,
    "prompts_per_step": 4,
    "samples_per_prompt": 4,
    "seq_length_tokens": 64,
    "rope_base": 1e4,
    "learning_rate": 1e-3,
    "deviation": "sample",
    "clip_low": 0.2,
    "clip_high": 0.28,
    "kl_coefficient": 0.05,
    "overlong_cache_tokens": 4,
    "overlong_filter": False,
    "dynamic_sampling": False,
    "rollout": {"max_response_tokens": 12},
    "stop": {"max_mean_gap_nats": 1e-4},
    "rewards": {"domains": {"*": {"parts": [{"reward": "format", "options": {"pattern": "[abcd]*"}}]}}, "workers": 1},
    "parallel": {"name": "tp2_sp", "gpus": 2, "tensor": 2, "sequence_parallel": True, "micro_batch_samples": 4},
    "precision": {"name": "fp32", "dtype": "fp32"},
    "save_interval_steps": 2,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished chain of three stages."""
    root = tmp_path_factory.mktemp("chain")
    make_data(root, count=60)
    prompts = [
        {"messages": [{"role": "user", "content": word}], "domain": "words"} for word in ("abc", "dcba", "aabb", "cdcdc", "b")
    ]
    (root / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    raw = make_recipe(root).model_dump(mode="json")
    del raw["sft"]["sft"]
    raw |= {
        "stages": ["warm", "reinforce", "export"],
        "grpo": {"reinforce": GRPO | {"prompts": [str(root / "prompts.jsonl")]}},
        "export": {"export": {"title": "Export", "dtype": "fp32"}},
    }
    folder = root / "run"
    folder.mkdir()
    Recipe.model_validate(raw).write(folder / "recipe.json")
    others = first_stages(root, raw, folder / "stages" / "warm")
    drive(root, f"{folder}:warm", f"{folder}:reinforce", *others)
    # Everything is trained and saved, only the hand-off is missing.
    copy = root / "killed"
    shutil.copytree(folder, copy)
    (copy / "stages" / "reinforce" / "handoff.json").unlink()
    drive(root, f"{copy}:reinforce", f"{folder}:export")
    return folder


def first_stages(root, raw, finished):
    """Chains of one stage, RUN:STAGE: fine-tuning of a Hugging Face model, and reinforcement of what the stage in `finished` hands off."""
    import torch
    from transformers import GraniteConfig, GraniteForCausalLM

    from model.convert import convert
    from training.imported import write_handoff

    torch.manual_seed(3)
    names = {
        "ffn_hidden_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_query_groups": "num_key_value_heads",
    }
    names |= {"tied_embeddings": "tie_word_embeddings", "norm_epsilon": "rms_norm_eps", "init_std": "initializer_range"}
    config = GraniteConfig(
        **{
            names.get(key, key): value
            for key, value in MODEL.items()
            if not key.startswith(("name", "mup", "released", "published"))
        },
        max_position_embeddings=LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    GraniteForCausalLM(config).save_pretrained(root / "hf")
    heldout = json.loads((root / "data" / "heldout" / "manifest.json").read_text())
    convert(root / "hf", root / "imported", tokenizer_record=heldout["tokenizer"])
    write_handoff(root / "imported")
    sft = make_recipe(root, {"gpus": 2, "pipeline": 2}, initial=str(root / "imported"), epochs=1).model_dump(mode="json")[
        "sft"
    ]["sft"]
    chains = {
        "tune": {"stages": ["sft"], "grpo": {}, "export": {}, "sft": {"sft": sft}},
        "reinforce": {
            "stages": ["again"],
            "export": {},
            "sft": {},
            "grpo": {
                "again": raw["grpo"]["reinforce"] | {"initial": str(finished), "steps": 1, "parallel": {"name": "1", "gpus": 1}}
            },
        },
    }
    for name, chain in chains.items():
        (root / name).mkdir()
        Recipe.model_validate(raw | chain).write(root / name / "recipe.json")
    return [f"{root / 'tune'}:sft", f"{root / 'reinforce'}:again"]


def drive(root, *jobs):
    """The stage command for each RUN:STAGE, in one process."""
    sft_factory.drive(list(jobs), root / "log.txt")
    text = (root / "log.txt").read_text()
    assert all(f"{job}: exit code 0" in text for job in jobs), text[-4000:]


def handoff(run, stage):
    return json.loads((run / "stages" / stage / "handoff.json").read_text())


def test_the_hand_off_goes_through_the_stage(run):
    before, after, last = (handoff(run, stage) for stage in ("warm", "reinforce", "export"))
    assert (after["kind"], after["step"], after["checkpoint"]) == ("grpo", 3, "checkpoints/iter_0000003")
    assert after["layout"]["name"] == "tp2_sp"
    assert after["total_tokens"] == before["total_tokens"]
    rows = read_json_lines(run / "stages" / "reinforce" / "metrics.jsonl")
    assert after["ledger"]["reinforce"]["rollouts"] == {"samples": 48, "tokens": rows[-1]["stage_tokens"]}
    assert after["ledger"]["warm"] == before["ledger"]["warm"]
    assert after["heldout"].keys() == before["heldout"].keys()
    # three small steps move the held-out losses, and not far
    start, end = read_json_lines(run / "stages" / "reinforce" / "heldout.jsonl")
    assert (start["when"], end["when"]) == ("start", "end")
    assert start["losses"] == pytest.approx(before["heldout"], abs=1e-5)
    assert end["losses"] == after["heldout"]
    for category, loss in after["heldout"].items():
        assert 0 < abs(loss - before["heldout"][category]) < 0.5
    assert last["kind"] == "export"


@pytest.mark.parametrize(("stage", "loaded"), [("warm", 0), ("reinforce", 7)])
def test_the_plan_prints_the_arguments_of_the_job(run, stage, loaded, capsys):
    """All but where the weights come from: --load and --ckpt-step with their values, and three flags."""
    assert arguments.main(["--recipe", str(run / "recipe.json"), "--stage", stage]) == 0
    printed, given = capsys.readouterr().out.split(), (run / "stages" / stage / "args.txt").read_text().split()
    assert Counter(printed) <= Counter(given)
    assert len(given) - len(printed) == loaded


def test_it_starts_from_the_stage_before(run):
    """The first step's policy is the reference, which is read from the hand-off: were either another model, they would differ."""
    rows = read_json_lines(run / "stages" / "reinforce" / "metrics.jsonl")
    assert rows[0]["divergence_nats"] < 1e-12
    assert rows[-1]["divergence_nats"] > 0
    assert all(row["max_gap_nats"] < 1e-5 for row in rows)
    assert rows[0]["reward_per_domain"].keys() == {"words"}


def test_what_is_exported_is_what_was_reinforced(run):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run / "stages" / "export" / "hf", dtype=torch.float32)
    saved = read_checkpoint(run / "stages" / "reinforce")
    embedding = saved["embedding.word_embeddings.weight"]
    assert embedding.shape[0] == VOCAB_SIZE
    torch.testing.assert_close(model.get_input_embeddings().weight.detach(), embedding, rtol=0, atol=0)
    assert not embedding.equal(read_checkpoint(run / "stages" / "warm")["embedding.word_embeddings.weight"])


def test_a_chain_begins_with_a_hugging_face_model(run):
    """What fine-tuning measures before its first step is the loss of that very model by transformers, each sample alone."""
    import torch
    from transformers import AutoModelForCausalLM

    from data_prep.sft_manifest import PackedSequences, SampleStore, SftManifest, manifest_path

    root = run.parent
    start, end = read_json_lines(root / "tune" / "stages" / "sft" / "heldout.jsonl")
    manifest = SftManifest.read(manifest_path(root / "data", "sft"))
    store = SampleStore(manifest, root / "data")
    model = AutoModelForCausalLM.from_pretrained(root / "hf", dtype=torch.float32).eval()
    numbers = PackedSequences(manifest, root / "data", manifest.heldout["chat"], store).samples
    total, count = losses_alone(model, store, numbers)
    assert start["answers"]["chat"] == pytest.approx(total / count, abs=1e-5)
    assert end["answers"]["chat"] < start["answers"]["chat"] - 0.1
    assert handoff(root / "tune", "sft")["total_tokens"] == 0


def test_a_chain_begins_with_a_stage_of_another_run(run):
    """Its first policy is the model that was handed off; held-out losses go through the gate as between stages."""
    stages = run.parent / "reinforce" / "stages"
    start, _ = read_json_lines(stages / "again" / "heldout.jsonl")
    assert start["losses"] == pytest.approx(handoff(run, "warm")["heldout"], abs=1e-5)
    ours, theirs = (
        read_json_lines(stages / "again" / "metrics.jsonl")[0],
        read_json_lines(run / "stages/reinforce/metrics.jsonl")[0],
    )
    assert ours["reward"] == theirs["reward"]
    assert handoff(run.parent / "reinforce", "again")["total_tokens"] == 0


def test_killed_before_the_hand_off(run):
    """The same command writes it and trains nothing."""
    copy = run.parent / "killed"
    metrics = "stages/reinforce/metrics.jsonl"
    assert (copy / metrics).read_text() == (run / metrics).read_text()
    ours, theirs = handoff(copy, "reinforce"), handoff(run, "reinforce")
    for key in ("heldout", "final_loss", "ledger", "training_digest", "checkpoint_files"):
        assert ours[key] == theirs[key], key
