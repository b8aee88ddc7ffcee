from types import SimpleNamespace

import pytest

from training import cpu_backend

cpu_backend.install()

from training.scheduler import TokenScheduler  # noqa: E402

LENGTH = 100


def make(groups=None):
    optimizer = SimpleNamespace(param_groups=groups or [{"max_lr": 1.0, "lr": 0.0}])
    return optimizer, TokenScheduler(optimizer, lambda tokens: 1.0 + tokens, seq_length_tokens=LENGTH, weight_decay=0.1)


def test_the_position_is_in_tokens_of_this_stage():
    optimizer, scheduler = make()
    assert optimizer.param_groups[0]["lr"] == 1.0
    scheduler.step(increment=8)
    assert scheduler.stage_tokens == 800
    assert optimizer.param_groups[0]["lr"] == 801.0
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_mup_groups_keep_their_ratio_and_their_weight_decay():
    optimizer, scheduler = make([{"max_lr": 1.0}, {"max_lr": 1 / 16, "wd_mult": 0.0}, {}])
    scheduler.step(increment=15)
    assert [g["lr"] for g in optimizer.param_groups] == [1501.0, 1501.0 / 16, 1501.0]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0, 0.1]


@pytest.mark.parametrize(("first_start", "tokens"), [(True, 0), (False, 4000)])
def test_a_resume_takes_the_stored_position_and_a_first_start_does_not(first_start, tokens):
    _, before = make()
    before.step(increment=40)
    optimizer, scheduler = make()
    scheduler.ignore_stored_position = first_start
    scheduler.load_state_dict(before.state_dict())
    assert scheduler.stage_tokens == tokens
    assert optimizer.param_groups[0]["lr"] == 1.0 + tokens
