"""First start, resume or refuse: decided from the files on disk, one test per wrong hand-off."""

import json
from types import SimpleNamespace

import pytest

from data_prep.manifest import DataError
from tests.training.factory import FIRST, SECOND, make_recipe
from training import handoff
from training.files import digest_folder
from training.handoff import Decision, FileRecord, Handoff, Refused, latest_step, resolve, training_digest, write_start
from training.imported import main as imported_command
from training.imported import write_handoff

LAYOUT = {"gpus": 1}


def manifest(stage="second", **changes):
    """Stands in for the mixture manifest of `stage`; data_prep tests the real one."""
    numbers = {"first": FIRST, "second": SECOND}[stage]
    values = {
        "phase": stage,
        "seq_length_tokens": numbers["seq_length_tokens"],
        "samples": numbers["steps"] * numbers["global_batch_samples"],
        "seed": 7,
        "digest": f"data of {stage}",
        "tokenizer": SimpleNamespace(sha256="t" * 64, vocab_size=256),
        "verify": lambda root: None,
    }
    return SimpleNamespace(**{**values, **changes})


def altered(root):
    raise DataError("views/second/code.bin was altered: SHA-256 abc, recorded def; run `quarry prep` again")


@pytest.fixture(autouse=True)
def cache_is_there(monkeypatch):
    """tests/training/test_index_cache.py has the real ones."""
    monkeypatch.setattr("training.handoff.verify_cache", lambda root, mixture, read_files: None)


@pytest.fixture
def recipe(tmp_path):
    return make_recipe(tmp_path / "data", LAYOUT, "single")


@pytest.fixture
def run(tmp_path, recipe):
    """A run whose first stage is finished."""
    stage_dir = tmp_path / "run" / "stages" / "first"
    checkpoint = stage_dir / "checkpoints" / "iter_0000008"
    checkpoint.mkdir(parents=True)
    for name in ("__0_0.distcp", ".metadata", "metadata.json"):
        (checkpoint / name).write_bytes(name.encode() * 100)
    (stage_dir / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("8")
    Handoff(
        stage="first",
        kind="phase",
        step=8,
        stage_tokens=recipe.phase["first"].tokens,
        total_tokens=recipe.phase["first"].tokens,
        checkpoint="checkpoints/iter_0000008",
        checkpoint_files={k: FileRecord.model_validate(v) for k, v in digest_folder(checkpoint).items()},
        recipe_digest=recipe.digest(),
        training_digest=training_digest(recipe, "first", "data of first", None),
        data_digest="data of first",
        ledger={},
        layout={},
        rope_base=FIRST["rope_base"],
        seq_length_tokens=FIRST["seq_length_tokens"],
        model=recipe.model,
        tokenizer={"sha256": "t" * 64},
        final_loss=3.0,
        heldout=None,
        heldout_digest=None,
        versions={},
    ).write(stage_dir)
    return tmp_path / "run"


def decide(recipe, run, stage="second", **changes):
    return resolve(recipe, stage, run, manifest(stage, **changes), manifest(stage))


def edit(run, **changes):
    path = run / "stages" / "first" / "handoff.json"
    values = json.loads(path.read_text())
    for dotted, value in changes.items():
        target = values
        *parents, last = dotted.split("__")
        for key in parents:
            target = target[key]
        target[last] = value
    path.write_text(json.dumps(values))


def test_first_start_takes_the_handoff(recipe, run):
    decision = decide(recipe, run)
    assert decision.kind == "first_start"
    assert decision.load.step == 8
    assert not decision.load.resume
    assert decision.load.checkpoints == run / "stages" / "first" / "checkpoints"


def test_the_first_stage_starts_from_nothing(recipe, tmp_path):
    decision = decide(recipe, tmp_path / "new", "first")
    assert (decision.kind, decision.load) == ("first_start", None)


def begin(recipe, run, step=7):
    """The second stage, interrupted after a checkpoint at `step`."""
    decision = decide(recipe, run)
    stage_dir = run / "stages" / "second"
    write_start(stage_dir, decision)
    (stage_dir / "checkpoints" / f"iter_{step:07d}").mkdir(parents=True)
    (stage_dir / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(step))


def test_a_second_start_resumes_and_does_not_rewind(recipe, run):
    begin(recipe, run)
    decision = decide(recipe, run)
    assert decision.kind == "resume"
    assert decision.load.resume
    assert (decision.load.checkpoints, decision.load.step) == (run / "stages" / "second" / "checkpoints", 7)


def test_a_killed_first_save_is_a_first_start(recipe, run):
    """Files without the tracker: Megatron was killed while it wrote them."""
    begin(recipe, run)
    (run / "stages" / "second" / "checkpoints" / "latest_checkpointed_iteration.txt").unlink()
    assert decide(recipe, run).kind == "first_start"


def test_a_resume_may_change_the_layout_and_nothing_that_is_learned(recipe, run, tmp_path):
    begin(recipe, run)
    assert decide(make_recipe(tmp_path / "data", {"gpus": 2, "tensor": 2}, "tp2"), run).kind == "resume"
    with pytest.raises(Refused, match="begun with another recipe"):
        decide(make_recipe(tmp_path / "data", LAYOUT, "single", rope_base=60000.0), run)
    with pytest.raises(Refused, match="begun with another recipe, other data"):
        decide(recipe, run, digest="other data")


def test_finished(recipe, run):
    decision = decide(recipe, run, "first")
    assert decision == Decision(
        kind="finished", load=None, previous=None, training_digest=decision.training_digest, reason="handoff.json is there"
    )
    with pytest.raises(Refused, match="finished, but was trained with another recipe"):
        decide(recipe, run, "first", digest="other data")


def test_refuses_an_unfinished_stage(recipe, run):
    (run / "stages" / "first" / "handoff.json").unlink()
    with pytest.raises(
        Refused, match=r"'first' is unfinished: .*handoff.json does not exist \(its last checkpoint is of step 8\)"
    ):
        decide(recipe, run)


@pytest.mark.parametrize(("key", "value"), [("hidden_size", 128), ("residual_multiplier", 0.22), ("tied_embeddings", False)])
def test_refuses_another_architecture(recipe, run, key, value):
    edit(run, **{f"model__{key}": value})
    with pytest.raises(Refused, match=f"architecture differs: model.{key} is {value}"):
        decide(recipe, run)


def test_refuses_another_vocabulary(recipe, run):
    edit(run, model__vocab_size=512)
    with pytest.raises(Refused, match=r"model.vocab_size is 512 in the hand-off of 'first', 256"):
        decide(recipe, run)
    with pytest.raises(Refused, match="the data's tokenizer has 300 entries"):
        decide(recipe, run, tokenizer=SimpleNamespace(sha256="t" * 64, vocab_size=300))


def test_refuses_another_tokenizer(recipe, run):
    edit(run, tokenizer__sha256="u" * 64)
    with pytest.raises(Refused, match="tokenizer differs.*tokenize them again"):
        decide(recipe, run)


def test_refuses_a_rope_base_that_falls(recipe, run):
    edit(run, rope_base=1e6)
    with pytest.raises(Refused, match=r"RoPE base falls from 1e\+06.*set phase.second.rope_base to at least 1e\+06"):
        decide(recipe, run)


def test_refuses_a_missing_checkpoint_file(recipe, run):
    (run / "stages/first/checkpoints/iter_0000008/.metadata").unlink()
    with pytest.raises(Refused, match=r"\.metadata is missing; restore the checkpoint of stage 'first'"):
        decide(recipe, run)


def test_refuses_an_altered_checkpoint_file(recipe, run):
    path = run / "stages/first/checkpoints/iter_0000008/__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    with pytest.raises(Refused, match="__0_0.distcp was altered"):
        decide(recipe, run)


def test_refuses_altered_data(recipe, run):
    with pytest.raises(Refused, match="code.bin was altered"):
        decide(recipe, run, verify=altered)


@pytest.mark.parametrize(("key", "value"), [("phase", "first"), ("seq_length_tokens", 64), ("samples", 1), ("seed", 8)])
def test_refuses_data_of_another_phase(recipe, run, key, value):
    with pytest.raises(Refused, match=f"were prepared with {key} {value}.*run `quarry prep` again"):
        decide(recipe, run, **{key: value})


def test_refuses_to_start_without_the_index_cache(recipe, run, monkeypatch):
    from data_prep.index_caches import verify_cache

    monkeypatch.setattr("training.handoff.verify_cache", verify_cache)
    with pytest.raises(Refused, match="phase 'second' has no index cache .*quarry prep"):
        decide(recipe, run)


def test_refuses_tokens_that_the_recipe_does_not_train(recipe, run):
    edit(run, total_tokens=1)
    with pytest.raises(Refused, match="the hand-off of 'first' holds 1 tokens"):
        decide(recipe, run)


def test_refuses_a_loss_that_is_not_finite(recipe, run):
    path = run / "stages" / "first" / "handoff.json"
    path.write_text(path.read_text().replace('"final_loss": 3.0', '"final_loss": NaN'))
    with pytest.raises(Refused, match="final loss of 'first' is nan"):
        decide(recipe, run)


def test_refuses_a_malformed_handoff(recipe, run):
    edit(run, kind="nonsense")
    with pytest.raises(Refused, match="no hand-off of this version: kind"):
        decide(recipe, run)


def test_every_difference_is_named_at_once(recipe, run):
    edit(run, rope_base=1e6, tokenizer__sha256="u" * 64, model__hidden_size=128)
    with pytest.raises(Refused) as refusal:
        decide(recipe, run)
    assert str(refusal.value).count("\n  - ") == 3


def test_a_damaged_tracker_is_not_guessed_at(tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release?")
    with pytest.raises(Refused, match="holds 'release\\?', not a step"):
        latest_step(tmp_path)


@pytest.fixture
def imported(tmp_path, recipe):
    """What `quarry convert` leaves of a Hugging Face folder."""
    folder = tmp_path / "granite"
    checkpoint = folder / "checkpoints" / "iter_0000000"
    checkpoint.mkdir(parents=True)
    (checkpoint / "__0_0.distcp").write_bytes(b"weights")
    (folder / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("0")
    described = {
        "model": recipe.model.model_dump(mode="json"),
        "rope_base": FIRST["rope_base"],
        "max_position_tokens": 64,
        "tokenizer": {"kind": "huggingface", "path": str(folder / "tokenizer"), "sha256": "t" * 64, "vocab_size": 256},
    }
    (folder / "model.json").write_text(json.dumps(described))
    return folder


def begin_with(recipe, run, folder, tokenizer="t" * 64):
    return handoff.decide(recipe, "first", run, "data", tokenizer, [], initial=str(folder))


def test_a_first_stage_begins_with_an_imported_model(recipe, run, imported, capsys):
    assert imported_command([str(imported)]) == 0
    assert "initial=" in capsys.readouterr().out
    (run / "stages" / "first" / "handoff.json").unlink()
    (run / "stages" / "first" / "checkpoints").rename(run / "away")
    decision = begin_with(recipe, run, imported)
    assert (decision.kind, decision.reason) == ("first_start", "hand-off of the imported model 'granite'")
    assert (decision.load.checkpoints, decision.load.step, decision.load.resume) == (imported / "checkpoints", 0, False)
    # Another model is another training, though everything else is the same.
    (imported / "checkpoints" / "iter_0000000" / "__0_0.distcp").write_bytes(b"others!")
    with pytest.raises(Refused, match="was altered"):
        begin_with(recipe, run, imported)
    write_handoff(imported)
    assert begin_with(recipe, run, imported).training_digest != decision.training_digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"num_layers": 99}}, "architecture differs: model.num_layers is 99"),
        ({"tokenizer": {"sha256": "u" * 64}}, "tokenizer differs"),
        ({"rope_base": 5000.0}, "was trained with 5000; set it to that"),
    ],
)
def test_an_imported_model_that_does_not_fit_is_refused(recipe, tmp_path, imported, change, message):
    described = json.loads((imported / "model.json").read_text())
    for key, value in change.items():
        described[key] = described[key] | value if isinstance(value, dict) else value
    (imported / "model.json").write_text(json.dumps(described))
    write_handoff(imported)
    with pytest.raises(Refused, match=message):
        begin_with(recipe, tmp_path / "run", imported)


def test_a_first_stage_begins_with_a_stage_of_another_run(recipe, run, tmp_path):
    """Whatever that has trained: the count of this curriculum begins anew."""
    edit(run, total_tokens=12345)
    decision = begin_with(recipe, tmp_path / "another", run / "stages" / "first")
    assert decision.reason == "hand-off of 'first'"


def test_a_folder_without_a_hand_off_is_no_initial_model(recipe, tmp_path, imported):
    with pytest.raises(Refused, match=r"first.initial is .*granite, which holds no handoff.json.*quarry convert"):
        begin_with(recipe, tmp_path / "run", imported)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ('{"tokenizer": null}', "names no tokenizer"),
        ('{"tokenizer": {"sha256": "t"}}', "'model' is missing"),
        (None, "does not exist"),
    ],
)
def test_what_is_no_converted_model_gets_no_hand_off(imported, content, message, capsys):
    (imported / "model.json").unlink()
    if content is not None:
        (imported / "model.json").write_text(content)
    assert imported_command([str(imported)]) == 78
    assert message in capsys.readouterr().err
    assert not (imported / "handoff.json").exists()
