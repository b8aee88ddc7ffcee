"""The configuration carries every multiplier or is refused; what muP changes is what the documentation says; counts are the published ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from training import cpu_backend

cpu_backend.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_mup_config_overrides  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402

from model.builder import build, count_parameters  # noqa: E402
from model.config import check, requirements, transformer_config, width_multiplier  # noqa: E402
from model.errors import ModelError  # noqa: E402
from recipes.compose import compose  # noqa: E402
from recipes.schema import Model  # noqa: E402


def tiny(**changes: Any) -> Model:
    values: dict[str, Any] = {
        "name": "tiny", "num_layers": 3, "hidden_size": 128, "ffn_hidden_size": 256, "num_attention_heads": 4, "num_query_groups": 2,
        "head_dim": 32, "vocab_size": 512, "tied_embeddings": True, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
        "attention_multiplier": 1 / 32, "logits_scaling": 4.0, "norm_epsilon": 1e-5, "init_std": 0.1, "mup_base_hidden_size": None,
        "released_rope_base": 1e4, "released_max_position_tokens": 4096, "published_parameters": None}  # fmt: skip
    return Model.model_validate(values | changes)


def no_groups() -> ProcessGroupCollection:
    groups = ProcessGroupCollection()
    groups.tp = groups.pp = groups.cp = groups.embd = groups.dp_cp = None
    return groups


def built(model: Model, **overrides: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformer_config(model, **overrides)
    return build(config, model, rope_base=1e4, max_sequence_length=64, pg_collection=no_groups())


@pytest.mark.parametrize(("name", "count"), [
    ("granite_4_1_3b", 3_402_836_480), ("granite_4_1_8b", 8_380_551_168), ("granite_4_1_30b", 28_865_728_512)])  # fmt: skip
def test_parameter_counts_are_the_published_ones(name: str, count: int) -> None:
    model = compose([f"model={name}"]).model
    assert model.published_parameters == count
    assert count_parameters(model) == count


def test_counting_allocates_nothing() -> None:
    with torch.device("meta"):
        config = transformer_config(tiny(), perform_initialization=False, init_model_with_meta_device=True)
        network = build(config, tiny(), rope_base=1e4, max_sequence_length=64, pg_collection=no_groups())
    assert all(p.is_meta for p in network.parameters())


def test_an_untied_model_has_an_output_matrix_more() -> None:
    model = tiny()
    assert count_parameters(tiny(tied_embeddings=False)) == count_parameters(model) + model.vocab_size * model.hidden_size


def test_the_configuration_carries_every_value() -> None:
    model = tiny(mup_base_hidden_size=64)
    config = transformer_config(model)
    assert {name: getattr(config, name) for name in requirements(model)} == requirements(model)
    assert config.mup_embedding_mult == 12.0
    assert config.mup_output_mult == 0.25
    assert config.softmax_scale == 1 / 32  # not muP's 1 / head_dim by accident: the same here, so another one
    assert transformer_config(tiny(attention_multiplier=0.5)).softmax_scale == 0.5


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "muP off, multipliers ignored": ({"use_mup": False}, "use_mup is False, must be True"),
    "multiplier": ({"mup_embedding_mult": 1.0}, r"mup_embedding_mult is 1\.0, must be 12\.0"),
    "attention": ({"softmax_scale": None}, "softmax_scale is"),
    "width": ({"mup_base_hidden_size": 64}, r"mup_width_mult is 2\.0, must be 1\.0"),
    "biases": ({"add_bias_linear": True}, "add_bias_linear is True"),
    "norm": ({"normalization": "LayerNorm"}, "normalization is 'LayerNorm'"),
    "dropout": ({"hidden_dropout": 0.1}, r"hidden_dropout is 0\.1"),
    "head dim": ({"kv_channels": 64}, "kv_channels is 64, must be 32"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_configuration_that_is_not_the_models_is_refused_by_name(fault: str) -> None:
    overrides, message = FAULTS[fault]
    if overrides == {"softmax_scale": None}:
        with pytest.raises(ModelError, match=message):
            transformer_config(tiny(attention_multiplier=0.5), **overrides)
    else:
        with pytest.raises(ModelError, match=message):
            transformer_config(tiny(), **overrides)


def test_the_builder_checks_the_configuration() -> None:
    config = transformer_config(tiny())
    with pytest.raises(ModelError, match=r"embedding_mult is 12\.0, must be 6\.0"):
        build(config, tiny(embedding_multiplier=6.0), rope_base=1e4, max_sequence_length=64, pg_collection=no_groups())
    config.tensor_model_parallel_size = 3
    with pytest.raises(ModelError, match="vocab_size 512 is not divisible by 3"):
        build(config, tiny(), rope_base=1e4, max_sequence_length=64, pg_collection=no_groups())


def test_a_logits_scaling_of_one_with_a_proxy_width_is_refused_with_the_reason() -> None:
    with pytest.raises(ModelError, match=r"mup_output_mult is 0\.5, must be 1\.0.*set mup_base_hidden_size to null"):
        transformer_config(tiny(logits_scaling=1.0, mup_base_hidden_size=64))
    assert transformer_config(tiny(logits_scaling=1.0)).mup_output_mult == 1.0


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ModelError, match=r"dtype is torch\.float16"):
        transformer_config(tiny(), dtype=torch.float16)


@pytest.mark.parametrize("base", [None, 32])
def test_initial_weights_have_the_documented_deviation(base: int | None) -> None:
    model = tiny(mup_base_hidden_size=base, vocab_size=2048)
    m = width_multiplier(model)
    assert m == (4.0 if base else 1.0)
    weights = dict(built(model).named_parameters())
    expected = {
        "embedding.word_embeddings.weight": model.init_std,
        "decoder.layers.1.self_attention.linear_qkv.weight": model.init_std / math.sqrt(m),
        "decoder.layers.1.mlp.linear_fc1.weight": model.init_std / math.sqrt(m),
        "decoder.layers.1.self_attention.linear_proj.weight": model.init_std / math.sqrt(2 * model.num_layers * m),
        "decoder.layers.1.mlp.linear_fc2.weight": model.init_std / math.sqrt(2 * model.num_layers * m),
    }
    for name, deviation in expected.items():
        assert weights[name].std().item() == pytest.approx(deviation, rel=0.05), name
    assert not [n for n in weights if n.endswith("bias")]


def test_mup_divides_learning_rate_and_epsilon_of_matrices_inside_layers_only() -> None:
    model = tiny(mup_base_hidden_size=32)
    optimizer = OptimizerConfig(optimizer="adam", lr=1.0, min_lr=0.0, adam_eps=1e-8)
    ((key, override),) = get_mup_config_overrides(optimizer, width_multiplier(model)).items()
    assert override == {"max_lr": 0.25, "min_lr": 0.0, "eps": 2.5e-9}
    scaled = {name for name, p in built(model).named_parameters() if key.matches(p, name)}
    assert scaled == {
        f"decoder.layers.{i}.{part}.weight"
        for i in range(model.num_layers)
        for part in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    }
    assert get_mup_config_overrides(optimizer, width_multiplier(tiny())) == {}


@pytest.fixture
def one_rank() -> Iterator[ProcessGroupCollection]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield ProcessGroupCollection.use_mpu_process_groups()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def test_dropping_any_multiplier_from_the_built_model_would_show(one_rank: ProcessGroupCollection) -> None:
    """Each multiplier reaches the forward pass: another value gives other logits."""
    ids = torch.randint(0, 512, (1, 16), generator=torch.Generator().manual_seed(0))

    def logits(**changes: float) -> torch.Tensor:
        torch.manual_seed(0)
        model = tiny(init_std=0.3, **changes)
        network = build(transformer_config(model), model, rope_base=1e4, max_sequence_length=64, pg_collection=one_rank).eval()
        with torch.no_grad():
            return network(ids, torch.arange(16)[None], None)

    reference = logits()
    for change in ({"embedding_multiplier": 6.0}, {"residual_multiplier": 0.3}, {"attention_multiplier": 0.3}):
        assert (logits(**change) - reference).abs().max() > 1e-2, change
    torch.testing.assert_close(logits(logits_scaling=8.0) * 2, reference)


def test_transformer_engine_is_asked_for_by_name() -> None:
    config = transformer_config(tiny(), transformer_engine=False)
    config.transformer_impl = "transformer_engine"
    with pytest.raises(ModelError, match="not installed; install the extra `gpu`"):
        build(config, tiny(), rope_base=1e4, max_sequence_length=64, pg_collection=no_groups())
    config.transformer_impl = "inference_optimized"
    with pytest.raises(ModelError, match="'inference_optimized'; use"):
        build(config, tiny(), rope_base=1e4, max_sequence_length=64, pg_collection=no_groups())


def test_the_transformer_engine_layer_is_megatrons_but_for_the_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine is not installed here: Megatron stands in for its classes, the composition of the spec is real."""
    import dataclasses
    from types import SimpleNamespace

    import megatron.core.models.gpt.gpt_layer_specs as layer_specs
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    import model.spec

    monkeypatch.setattr(layer_specs, "TESpecProvider", TESpecProvider)
    monkeypatch.setattr(model.spec, "HAVE_TE", True)
    config = transformer_config(tiny(), transformer_engine=True, apply_rope_fusion=False, persist_layer_norm=False)
    block = model.spec.block_spec(config, 0.22, pg_collection=SimpleNamespace(pp=None))
    assert block.layer_norm is TENorm
    assert len(block.layer_specs) == 3
    ours, theirs = block.layer_specs[0].submodules, layer_specs.get_gpt_layer_with_transformer_engine_submodules()
    differing = {f.name for f in dataclasses.fields(ours) if repr(getattr(ours, f.name)) != repr(getattr(theirs, f.name))}
    assert differing <= {"self_attn_bda", "mlp_bda", "mlp"}  # mlp is a partial, compared below
    assert ours.mlp.keywords == theirs.mlp.keywords
    x = torch.ones(2)
    assert torch.equal(ours.self_attn_bda(False, False)((x, None), x, 0.0), torch.full((2,), 1.22))
    assert torch.equal(ours.mlp_bda(False, False)((x, None), x, 0.0), torch.full((2,), 1.22))
    config.fused_residual_rmsnorm = True
    with pytest.raises(ModelError, match="fused_residual_rmsnorm is on"):
        model.spec.block_spec(config, 0.22, pg_collection=SimpleNamespace(pp=None))


def test_check_passes_what_transformer_config_made() -> None:
    check(transformer_config(tiny(), tensor=2, sequence_parallel=True, context=2, dtype=torch.bfloat16), tiny())
