"""Every formula against an implementation of its own: numpy in float64, and TRL where it is installed (its numbers are stored)."""

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.rl import losses

LOW, HIGH = 0.2, 0.28
# What TRL 1.16.0, verl 0.9.1 and SkyRL 0.4.0 all print for `example()`: the loss and the 1-norm of its gradient.
ORACLE = (-0.48958930373191833, 0.5940539240837097)
# What TRL 1.16.0 gives for `with_reference()` and beta 0.05.
ORACLE_WITH_REFERENCE = (0.7315486073493958, 0.8261677622795105)


def example(seed=0, samples=8, length=12):
    torch.manual_seed(seed)
    new = -2 * torch.rand(samples, length)
    old = new + 1.2 * torch.randn(samples, length)
    advantages = torch.randn(samples)
    mask = (torch.arange(length)[None] < torch.tensor([12, 3, 7, 1, 9, 12, 5, 2])[:, None]).float()
    return new, old, advantages, mask


def with_reference():
    new, old, advantages, mask = example(seed=3)
    return new, old, advantages, mask, new + 0.3 * torch.randn_like(new)


def loss_and_gradient(new, old, advantages, mask, tokens):
    new = new.clone().requires_grad_()
    per_token = losses.dapo_token_losses(new, old, advantages, clip_low=LOW, clip_high=HIGH)
    loss = losses.token_share(per_token.loss, mask, tokens)
    loss.backward()
    return loss.item(), new.grad


def numpy_dapo(new, old, advantages, mask, tokens):
    """Loops over tokens, straight from the paper: the sum over i and t, divided once; and the derivative by hand."""
    total, gradient = 0.0, np.zeros(new.shape)
    for i in range(new.shape[0]):
        for t in range(new.shape[1]):
            if not mask[i, t]:
                continue
            a, ratio = float(advantages[i]), float(np.exp(np.float64(new[i, t]) - np.float64(old[i, t])))
            clipped = min(max(ratio, 1 - LOW), 1 + HIGH)
            total += min(ratio * a, clipped * a)
            if ratio * a <= clipped * a:
                gradient[i, t] = -ratio * a / tokens
    return -total / tokens, gradient


def test_loss_equals_the_field_and_numpy():
    new, old, advantages, mask = example()
    loss, gradient = loss_and_gradient(new, old, advantages, mask, mask.sum().item())
    assert loss == pytest.approx(ORACLE[0], abs=1e-7)
    assert gradient.abs().sum().item() == pytest.approx(ORACLE[1], abs=1e-6)
    expected, expected_gradient = numpy_dapo(*(x.numpy() for x in (new, old, advantages, mask)), mask.sum().item())
    assert loss == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(gradient.numpy(), expected_gradient, atol=1e-6)


def trl_loss(new, old, advantages, mask, tokens, *, beta=0.0, reference=None):
    trl = pytest.importorskip("trl", reason="the stored numbers stand in for TRL 1.16.0")
    accelerator = SimpleNamespace(num_processes=1, gather=lambda t: t, reduce=lambda t, reduction=None: t)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (new, torch.zeros_like(new), None),
        loss_type="dapo", importance_sampling_level="token", epsilon_low=LOW, epsilon_high=HIGH, beta=beta,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        args=SimpleNamespace(delta=None, steps_per_generation=1, use_bias_correction_kl=False),
        current_gradient_accumulation_steps=1, model=SimpleNamespace(training=True), accelerator=accelerator,
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    ids = torch.zeros_like(mask).long()
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": mask,
        "advantages": advantages, "old_per_token_logps": old, "num_items_in_batch": torch.tensor(float(tokens)),
        "ref_per_token_logps": reference,
    }  # fmt: skip
    return trl.GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_loss_and_divergence_equal_trl(beta):
    new, old, advantages, mask, reference = with_reference()
    tokens = mask.sum().item()
    theirs = new.clone().requires_grad_()
    expected = trl_loss(theirs, old, advantages, mask, tokens, beta=beta, reference=reference)
    expected.backward()
    ours = new.clone().requires_grad_()
    per_token = losses.dapo_token_losses(ours, old, advantages, clip_low=LOW, clip_high=HIGH).loss
    loss = losses.token_share(per_token + beta * losses.k3_divergence(ours, reference), mask, tokens)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=0)


def test_loss_with_divergence_equals_the_stored_numbers_of_trl():
    new, old, advantages, mask, reference = with_reference()
    new.requires_grad_()
    per_token = losses.dapo_token_losses(new, old, advantages, clip_low=LOW, clip_high=HIGH).loss
    loss = losses.token_share(per_token + 0.05 * losses.k3_divergence(new, reference), mask, mask.sum().item())
    loss.backward()
    assert loss.item() == pytest.approx(ORACLE_WITH_REFERENCE[0], abs=1e-6)
    assert new.grad.abs().sum().item() == pytest.approx(ORACLE_WITH_REFERENCE[1], abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.lists(st.integers(1, 7), min_size=1, max_size=7))
def test_shares_of_micro_batches_add_up_to_the_whole(seed, cuts):
    """However the batch is cut into micro batches and ranks: one division by all tokens, the same loss and gradient."""
    new, old, advantages, mask = example(seed)
    tokens = mask.sum().item()
    whole, whole_gradient = loss_and_gradient(new, old, advantages, mask, tokens)
    parts = torch.tensor_split(torch.arange(8), sorted(set(cuts)))
    pieces = [loss_and_gradient(new[p], old[p], advantages[p], mask[p], tokens) for p in parts if len(p)]
    assert sum(loss for loss, _ in pieces) == pytest.approx(whole, abs=1e-5)
    torch.testing.assert_close(torch.cat([g for _, g in pieces]), whole_gradient)


def test_a_mean_per_micro_batch_would_be_another_number():
    new, old, advantages, mask = example()
    whole, _ = loss_and_gradient(new, old, advantages, mask, mask.sum().item())
    halves = [slice(0, 4), slice(4, 8)]
    means = [loss_and_gradient(new[h], old[h], advantages[h], mask[h], mask[h].sum().item())[0] for h in halves]
    assert abs(sum(means) / 2 - whole) > 0.03


def test_clipping_is_asymmetric_and_counted():
    new = torch.log(torch.tensor([[0.79, 0.81, 1.27, 1.29]])).repeat(2, 1)
    result = losses.dapo_token_losses(new, torch.zeros(2, 4), torch.tensor([1.0, -1.0]), clip_low=LOW, clip_high=HIGH)
    assert result.clipped_high.tolist() == [[False, False, False, True], [False] * 4]
    assert result.clipped_low.tolist() == [[False] * 4, [True, False, False, False]]
    torch.testing.assert_close(result.loss, torch.tensor([[-0.79, -0.81, -1.27, -1.28], [0.80, 0.81, 1.27, 1.29]]))


def test_on_policy_gradient_is_the_policy_gradient():
    """ratio 1: the loss is -mean(A), its gradient -A / tokens on every response token and nothing elsewhere."""
    new, _, advantages, mask = example()
    loss, gradient = loss_and_gradient(new, new.clone(), advantages, mask, mask.sum().item())
    torch.testing.assert_close(gradient, -advantages[:, None] * mask / mask.sum())
    assert loss == pytest.approx(-(advantages[:, None] * mask).sum().item() / mask.sum().item(), abs=1e-6)


def test_padding_never_leaks():
    new, old, advantages, mask = example()
    clean, clean_gradient = loss_and_gradient(new, old, advantages, mask, mask.sum().item())
    old = torch.where(mask.bool(), old, torch.tensor(float("-inf")))
    loss, gradient = loss_and_gradient(new, old, advantages, mask, mask.sum().item())
    assert loss == clean
    torch.testing.assert_close(torch.where(mask.bool(), gradient, 0.0), clean_gradient)


def test_a_step_without_tokens():
    new, old, advantages, mask = example()
    loss, gradient = loss_and_gradient(new, old, advantages, torch.zeros_like(mask), 0)
    assert loss == 0.0
    assert not gradient.any()


def rewards_of(groups, samples):
    value = st.one_of(st.sampled_from([0.0, 1.0, 0.1, -1.0]), st.floats(-10, 10))
    return st.lists(st.lists(value, min_size=samples, max_size=samples), min_size=groups, max_size=groups)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 6).flatmap(lambda n: rewards_of(3, n)), st.sampled_from(["sample", "population", "none"]))
def test_advantages(rewards, deviation):
    array = np.array(rewards, dtype=np.float64)
    result = losses.group_advantages(torch.tensor(array), deviation=deviation, epsilon=1e-6)
    for group, values, signal in zip(array, result.values_GN.numpy(), result.has_signal_G.tolist(), strict=True):
        assert signal == (len(set(group.tolist())) > 1)
        if not signal:
            assert not values.any()
            continue
        scale = {"sample": group.std(ddof=1) + 1e-6, "population": group.std() + 1e-6, "none": 1.0}[deviation]
        np.testing.assert_allclose(values, (group - group.mean()) / scale, rtol=1e-9, atol=1e-9)
        assert abs(values.sum()) < 1e-6
        assert values[group.argmax()] == values.max()


@settings(deadline=None, max_examples=40)
@given(rewards_of(3, 5), st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=3, max_size=3))
def test_a_failed_score_leaves_a_smaller_group(rewards, scored):
    values, mask = torch.tensor(rewards, dtype=torch.float64), torch.tensor(scored)
    result = losses.group_advantages(torch.where(mask, values, 7.0), deviation="sample", epsilon=1e-6, scored_GN=mask)
    for group in range(3):
        own = mask[group]
        assert not result.values_GN[group, ~own].any()
        if own.sum() < 2:
            assert not result.has_signal_G[group]
            assert not result.values_GN[group].any()
        else:
            alone = losses.group_advantages(values[group, own][None], deviation="sample", epsilon=1e-6)
            assert result.has_signal_G[group] == alone.has_signal_G[0]
            torch.testing.assert_close(result.values_GN[group, own], alone.values_GN[0], rtol=0, atol=0)


@settings(deadline=None, max_examples=30)
@given(st.floats(-5, 5), st.floats(0.1, 10))
def test_advantages_do_not_see_shift_and_scale_of_rewards(shift, scale):
    rewards = torch.tensor([[0.0, 1.0, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    plain = losses.group_advantages(rewards, deviation="sample", epsilon=0.0).values_GN
    torch.testing.assert_close(
        losses.group_advantages(scale * rewards + shift, deviation="sample", epsilon=0.0).values_GN, plain
    )


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([[1.0, float("nan")]], "sample 1 of group 0 is nan"),
        ([[1.0, 2.0], [float("inf"), 0.0]], "sample 0 of group 1 is inf"),
        ([[1.0]], "at least two samples"),
    ],
)
def test_bad_rewards_are_refused(rewards, message):
    with pytest.raises(ValueError, match=message):
        losses.group_advantages(torch.tensor(rewards), deviation="sample", epsilon=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-20, 0), min_size=6, max_size=6), st.lists(st.floats(-20, 0), min_size=6, max_size=6))
def test_divergence_is_k3(new, reference):
    value = losses.k3_divergence(torch.tensor([new], dtype=torch.float64), torch.tensor([reference], dtype=torch.float64))
    x = np.array(reference) - np.array(new)
    np.testing.assert_allclose(value.numpy()[0], np.exp(x) - x - 1, rtol=1e-9, atol=1e-12)
    assert (value >= 0).all()


def test_divergence_estimates_the_divergence():
    """Averaged over the exact distribution it is KL(new || reference), and its gradient is that of the KL plus the score term."""
    logits, other = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    new, reference = logits.log_softmax(0), other.log_softmax(0)
    exact = (new.exp() * (new - reference)).sum()
    estimate = (new.exp() * losses.k3_divergence(new[None], reference[None])[0]).sum()
    assert estimate.item() == pytest.approx(exact.item(), rel=1e-9)


def test_soft_overlong_punishment():
    lengths = torch.tensor([1, 12, 13, 15, 16, 17, 40])
    result = losses.soft_overlong_punishment(lengths, limit_tokens=16, cache_tokens=4)
    expected = [0 if n <= 12 else ((16 - 4) - n) / 4 if n <= 16 else -1 for n in lengths.tolist()]
    assert result.tolist() == expected
    assert not losses.soft_overlong_punishment(lengths, limit_tokens=16, cache_tokens=0).any()
    with pytest.raises(ValueError, match="cache_tokens is 17"):
        losses.soft_overlong_punishment(lengths, limit_tokens=16, cache_tokens=17)


def test_overlong_filter_takes_whole_samples():
    mask = torch.ones(3, 4)
    assert losses.overlong_filter(mask, torch.tensor([False, True, False])).sum(1).tolist() == [4, 0, 4]
    assert mask.sum() == 12


@settings(deadline=None, max_examples=60)
@given(st.lists(st.booleans(), min_size=4, max_size=12), st.integers(1, 4), st.integers(1, 3))
def test_dynamic_sampling(flags, wanted, rounds):
    result = losses.dynamic_sampling(torch.tensor(flags), wanted_groups=wanted, rounds=rounds, max_rounds=3)
    assert result.keep == sorted(set(result.keep))
    assert result.more == (sum(flags) < wanted and rounds < 3)
    if sum(flags) >= wanted:
        assert result.keep == [i for i, f in enumerate(flags) if f][:wanted]
    elif not result.more:
        assert len(result.keep) == wanted
        assert {i for i, f in enumerate(flags) if f} <= set(result.keep)
