"""Every way in which a job can end, and what follows."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launchers.policy import MAX_STARTS_PER_LAUNCH, Decision, decide


def outcome(exit_code: int | None, **changes: Any) -> Decision:
    values: dict[str, Any] = {
        "reason": "why", "handed_off": False, "step_before": 0, "step_after": 0, "starts": 1, "stop_signal": None, **changes,
    }  # fmt: skip
    return decide(exit_code, **values)


@pytest.mark.parametrize(
    ("exit_code", "changes", "action", "code"),
    [
        (0, {"handed_off": True}, "next", 0),
        (0, {}, "stop", 1),
        (None, {"handed_off": True}, "next", 0),
        (None, {}, "stop", 1),
        (75, {"step_before": 4, "step_after": 5}, "again", 0),
        (75, {"step_before": 4, "step_after": 4}, "stop", 75),
        (75, {"step_after": 5, "starts": MAX_STARTS_PER_LAUNCH}, "stop", 75),
        (75, {"step_after": 5, "stop_signal": 2}, "stop", 130),
        (0, {"handed_off": True, "stop_signal": 15}, "stop", 143),
        (75, {"attached": True}, "again", 0),
        (None, {"attached": True}, "again", 0),
        (None, {"attached": True, "stop_signal": 2}, "stop", 130),
        (None, {"attached": True, "handed_off": True}, "next", 0),
        (1, {"attached": True}, "stop", 1),
        (78, {}, "stop", 78),
        (78, {"handed_off": True}, "stop", 78),
        (73, {}, "stop", 73),
        (16, {}, "stop", 16),
        (1, {"step_after": 9}, "stop", 1),
        (-9, {}, "stop", 137),
        (74, {"step_after": 9}, "stop", 74),
        (17, {}, "stop", 17),
        (79, {}, "again", 0),
        (79, {"step_before": 4, "step_after": 4}, "again", 0),
        (79, {"starts": MAX_STARTS_PER_LAUNCH}, "stop", 79),
        (79, {"stop_signal": 15}, "stop", 143),
        (80, {"step_after": 9}, "stop", 80),
    ],
)
def test_table(exit_code: int | None, changes: dict[str, Any], action: str, code: int) -> None:
    decision = outcome(exit_code, **changes)
    assert (decision.action, decision.exit_code) == (action, code)


@given(
    exit_code=st.none() | st.integers(-64, 255),
    handed_off=st.booleans(),
    before=st.integers(0, 5),
    after=st.integers(0, 5),
    starts=st.integers(1, 200),
    stop_signal=st.sampled_from([None, 1, 2, 15]),
)
def test_never_goes_on_without_a_handoff_and_never_stops_without_a_code_and_remedy(
    exit_code: int | None, handed_off: bool, before: int, after: int, starts: int, stop_signal: int | None
) -> None:
    decision = decide(
        exit_code,
        reason="r",
        handed_off=handed_off,
        step_before=before,
        step_after=after,
        starts=starts,
        stop_signal=stop_signal,
    )
    if decision.action == "next":
        assert handed_off
        assert exit_code in (0, None)
        assert stop_signal is None
    elif decision.action == "again":
        assert exit_code in (75, 79)
        assert after > before or exit_code == 79
        assert starts < MAX_STARTS_PER_LAUNCH
        assert stop_signal is None
    else:
        assert 0 < decision.exit_code < 256
        assert decision.reason
        assert decision.remedy
