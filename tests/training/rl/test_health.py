"""Health numbers against sums by hand, and the rule that stops."""

import math

import pytest
import torch

from recipes.posttrain import StopRule
from training.rl.health import Health, Tally, reason_to_stop

RULE = StopRule(max_mean_gap_nats=0.1, max_gap_nats=1.0)


def health(tally=None, **changes):
    given = {
        "rewards": [1.0, 0.0, 0.5, 0.5],
        "domains": ["a", "b", "a", "b"],
        "lengths": [1, 2, 3, 6],
        "truncated": [False, False, False, True],
        "has_signal": [True, False, False, True, True],
    }
    return Health.of(tally or Tally(), **(given | changes))


def test_numbers_of_samples_and_groups():
    h = health()
    assert h.reward == 0.5
    assert h.reward_per_domain == {"a": 0.75, "b": 0.25}
    assert (h.response_tokens, h.max_response_tokens, h.truncated_share) == (3.0, 6, 0.25)
    assert h.no_signal_share == pytest.approx(2 / 5)


def test_failed_scores_are_in_no_mean():
    h = health(rewards=[1.0, None, 0.5, None])
    assert (h.reward, h.reward_per_domain, h.failed_reward_share) == (0.75, {"a": 0.75}, 0.5)
    assert health().failed_reward_share == 0


def test_numbers_of_tokens_add_up_over_micro_batches_and_ranks():
    torch.manual_seed(0)
    rollout, training, mask = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([[1, 1, 0, 0, 0]] * 3 + [[1] * 5]).float()
    whole = Tally()
    whole.add_gap(rollout, training, mask)
    parts = [Tally(), Tally()]
    for tally, rows in zip(parts, (slice(0, 1), slice(1, 4)), strict=True):
        tally.add_gap(rollout[rows], training[rows], mask[rows])
        tally.add("entropy", torch.ones(4, 5)[rows], mask[rows])
        tally.sums["loss_tokens"] += float(mask[rows].sum())
    sums, maxima = zip(*(t.vectors() for t in parts), strict=True)
    together = Tally.from_vectors([sum(x) for x in zip(*sums, strict=True)], [max(x) for x in zip(*maxima, strict=True)])
    gaps = [abs(float(rollout[i, t] - training[i, t])) for i in range(4) for t in range(5) if mask[i, t]]
    for tally in (whole, together):
        h = health(tally)
        assert h.mean_gap_nats == pytest.approx(sum(gaps) / len(gaps), rel=1e-6)
        assert h.max_gap_nats == pytest.approx(max(gaps), rel=1e-6)
    assert health(together).entropy_nats == 1.0


def test_padding_does_not_count_and_nan_does():
    rollout, training = torch.zeros(1, 3), torch.tensor([[0.0, math.nan, 5.0]])
    tally = Tally()
    tally.add_gap(rollout, training, torch.tensor([[1.0, 0.0, 0.0]]))
    assert health(tally).max_gap_nats == 0.0
    tally.add_gap(rollout, training, torch.tensor([[1.0, 1.0, 0.0]]))
    assert reason_to_stop(health(tally), RULE, loss=0.0, grad_norm=1.0) is not None


def gap(mean, maximum):
    tally = Tally()
    tally.sums |= {"gap": mean * 10, "tokens": 10}
    tally.max_gap = maximum
    return health(tally)


@pytest.mark.parametrize(
    ("h", "loss", "grad_norm", "message"),
    [
        (gap(0.05, 0.9), 0.0, 1.0, None),
        (gap(0.05, 0.9), 0.0, None, None),
        (gap(0.11, 0.9), 0.0, 1.0, "the mean gap of their log-probabilities is 0.11 nats per token, over 0.1 .stop.max_mean_gap_nats"),
        (gap(0.05, 1.1), 0.0, 1.0, "the maximum gap .* is 1.1 nats per token, over 1 .stop.max_gap_nats"),
        (gap(math.nan, 0.0), 0.0, 1.0, "the mean gap"),
        (gap(0.0, 0.0), math.nan, 1.0, "the loss is nan"),
        (gap(0.0, 0.0), 0.0, math.inf, "the gradient norm is inf"),
    ],
)  # fmt: skip
def test_stop_rule(h, loss, grad_norm, message):
    reason = reason_to_stop(h, RULE, loss=loss, grad_norm=grad_norm)
    if message is None:
        assert reason is None
    else:
        import re

        assert re.search(message, reason)


def test_no_limit_on_single_tokens():
    assert reason_to_stop(gap(0.05, 50.0), StopRule(max_mean_gap_nats=0.1), loss=0.0, grad_norm=1.0) is None
