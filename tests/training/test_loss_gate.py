"""What a held-out loss may be after a boundary: the same within the precision, or not far above the worst input of a merge."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.handoff import Handoff
from training.loss_gate import GATE_NATS, MERGE_GATE_NATS, LossGate, check_gate

categories = st.dictionaries(st.sampled_from(("code", "math", "web", "web_hq")), st.floats(0.5, 12), min_size=1)


def previous(**losses):
    return Handoff.model_construct(**{"stage": "before", "heldout": None, "heldout_bound": None} | losses)


@given(categories, st.sampled_from(sorted(GATE_NATS)), st.floats(-0.99, 0.99))
def test_the_same_loss_within_the_precision_passes(losses, dtype, share):
    check_gate(previous(heldout=losses), {c: x + share * GATE_NATS[dtype] for c, x in losses.items()}, dtype)


@given(categories, st.sampled_from(sorted(GATE_NATS)), st.sampled_from((-1, 1)), st.data())
def test_one_category_that_moved_either_way_is_named(losses, dtype, sign, data):
    moved = data.draw(st.sampled_from(sorted(losses)))
    found = losses | {moved: losses[moved] + sign * 1.01 * GATE_NATS[dtype]}
    with pytest.raises(LossGate, match="not the one that 'before' handed off") as refusal:
        check_gate(previous(heldout=losses), found, dtype)
    assert f": {moved} {losses[moved]:.4f} -> {found[moved]:.4f}; " in str(refusal.value)


def test_the_category_that_moved_most_comes_first_and_nan_does_not_pass():
    before = {"code": 2.0, "web": 3.0}
    with pytest.raises(LossGate, match=r": web 3\.0000 -> 1\.0000, code 2\.0000 -> 3\.0000; "):
        check_gate(previous(heldout=before), {"code": 3.0, "web": 1.0}, "fp32")
    with pytest.raises(LossGate, match="code 2.0000 -> nan"):
        check_gate(previous(heldout=before), {"code": float("nan"), "web": 3.0}, "bf16")


@given(categories, st.floats(-12, 0.99), st.sampled_from(sorted(GATE_NATS)))
def test_a_merge_may_gain_anything_and_lose_little(worst, share, dtype):
    check_gate(previous(heldout_bound=worst), {c: x + share * MERGE_GATE_NATS for c, x in worst.items()}, dtype)
    with pytest.raises(LossGate, match="after the merge 'before' is over 0.5 nats above the worst of its inputs"):
        check_gate(previous(heldout_bound=worst), {c: x + 1.01 * MERGE_GATE_NATS for c, x in worst.items()}, dtype)


def test_without_a_measured_loss_nothing_is_compared():
    check_gate(previous(), {"web": 99.0}, "fp32")
