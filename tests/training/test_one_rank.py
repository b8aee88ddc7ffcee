"""What every rank does alike: told where to begin, ended by the gate, held to its last step."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.training.test_stage import run
from training import handoff, one_rank, rank_end
from training.arguments import Load


@given(
    st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), min_size=1), st.integers(0), st.booleans()
)
def test_a_rank_under_torchrun_begins_where_it_is_told(folder, step, resume):
    load = Load(checkpoints=Path(folder), step=step, resume=resume)
    program = one_rank.rank_program("training.sft", Path("/runs/x"), "sft", load, "0" * 64)
    assert one_rank.parse_load(program[program.index("--load") + 1]) == load
    assert "--load" not in one_rank.rank_program("training.sft", Path("/runs/x"), "sft", None, "0" * 64)
    assert one_rank.parse_load(None) is None


def test_a_rank_that_the_gate_stops_is_refused_and_leaves_why(tmp_path):
    body = f"""
        import pathlib
        from training import one_rank
        from training.loss_gate import LossGate
        def train():
            raise LossGate("web 3.1 -> 9.9")
        folder = pathlib.Path({str(tmp_path)!r})
        return one_rank.run(folder, folder, train)
        """
    code, output = run(body, ranks=1)
    assert code == 78
    assert output.count("refused: web 3.1 -> 9.9\n") == 1
    assert [(end.rank, end.exit_code, end.reason) for end in rank_end.read_all(tmp_path)] == [(0, 78, "web 3.1 -> 9.9")]


def test_a_stage_that_has_not_taken_its_last_step_hands_nothing_off(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "iter_0000007"
    checkpoint.mkdir(parents=True)
    (checkpoint / "data").write_bytes(b"weights")
    (tmp_path / "checkpoints" / handoff.TRACKER).write_text("7")
    record = handoff.final_checkpoint(tmp_path, 7)
    assert (record["step"], record["checkpoint"], list(record["checkpoint_files"])) == (7, "checkpoints/iter_0000007", ["data"])
    with pytest.raises(RuntimeError, match="the last checkpoint is of step 7, the stage has 8; no hand-off is written"):
        handoff.final_checkpoint(tmp_path, 8)
