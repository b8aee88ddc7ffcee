"""Where a run stands, read from its folder alone: the same for the launcher's display, `quarry status` and `quarry report`."""

from __future__ import annotations

import socket
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from launchers.journal import Journal, attempts, last_outcome, seconds_between, stage_rows
from launchers.jsonl import JsonLines, Row, read_json
from launchers.processes import is_alive
from launchers.runs import RunFolder
from launchers.stage_job import DATA
from launchers.steps import sft_steps
from recipes.flops import flops_per_token
from recipes.gpus import PEAK_BF16_FLOPS
from recipes.schema import Recipe

State = Literal["waiting", "running", "finished", "failed", "interrupted"]

RATE_WINDOW_ROWS = 20
"""Logged steps over which the present speed is taken."""
LENGTHS_PER_SOURCE = 1 << 14
"""Of documents that stay apart: fewer than a plan reads, because a look at a run must not take longer for hundreds of sources."""


@dataclass
class StageProgress:
    """One stage as its files tell it."""

    stage: str
    kind: Literal["phase", "merge", "sft", "grpo", "ab", "export"]
    state: State = "waiting"
    reason: str = ""
    """Why a stage that failed or was interrupted ended."""
    attempts: int = 0
    step: int = 0
    steps: int = 0
    """0 for merges and exports."""
    stage_tokens: int = 0
    total_tokens: int | None = None
    loss: float | None = None
    reward: float | None = None
    """Mean of the last step's samples, of reinforcement learning."""
    tokens_per_second: float | None = None
    """Over all GPUs or ranks, in the last steps that were logged."""
    gpus: int = 0
    """GPUs (on CPU: ranks) that train the stage; 0 for merges and exports."""
    flops_per_token: float | None = None
    """Model FLOPs as `quarry plan` counts them (recipes/plan.py); None where they are not known, as for packed samples, and on CPU."""
    lengths_known: bool = True
    """False: documents stay apart and nothing tells their lengths, so that flops_per_token, of whole samples, is an upper bound."""
    peak_flops: float | None = None
    """Dense bf16 FLOP/s of one GPU; None on CPU."""
    eta_seconds: float | None = None
    """Of a running phase; of one that waits or stopped an estimate, see RunProgress.eta_seconds."""
    wall_seconds: float = 0.0
    """Over all attempts whose end was written down, and the one that runs."""
    startup_seconds: float = 0.0
    """From the start of an attempt to its first logged step: imports, data, checkpoint, the first held-out evaluation."""
    training_seconds: float = 0.0
    """Steps that are in metrics.jsonl."""
    seconds_per_row: float | None = None
    """Of metrics.jsonl, lately; in reinforcement learning that is a step, rollouts included."""
    max_rss_bytes: int | None = None
    handoff: Row | None = None
    metrics: list[Row] = field(default_factory=list)
    heldout: list[Row] = field(default_factory=list)

    @property
    def tokens_per_second_per_gpu(self) -> float | None:
        return self.tokens_per_second / self.gpus if self.tokens_per_second and self.gpus else None

    @property
    def model_flops_utilisation(self) -> float | None:
        """Model FLOPs that the GPUs do a second, over what they could do: from 0 to 1."""
        rate = self.tokens_per_second_per_gpu
        return (
            None
            if rate is None or not self.flops_per_token or not self.peak_flops or not self.lengths_known
            else rate * self.flops_per_token / self.peak_flops
        )

    @property
    def own_heldout(self) -> dict[str, float] | None:
        """Held-out losses that this stage measured at its end, nats per token (an export's hand-off repeats those of its input)."""
        return ((self.handoff or {}).get("heldout") or None) if self.kind == "phase" else None

    @property
    def answers(self) -> tuple[dict[str, float], dict[str, float]] | None:
        """Of fine-tuning: loss on held-out answers by source, nats per token that an assistant wrote, before and after; None until then."""
        found = [
            next((r["answers"] for r in rows if r.get("when") == when and isinstance(r.get("answers"), dict)), None)
            for when, rows in (("start", self.heldout), ("end", reversed(self.heldout)))
        ]
        return (found[0], found[1]) if found[0] is not None and found[1] is not None else None

    @property
    def rewards(self) -> list[Row]:
        """The rows of metrics.jsonl that hold a mean reward."""
        return [row for row in self.metrics if isinstance(row.get("reward"), int | float)]

    @property
    def other_seconds(self) -> float:
        """Held-out evaluation at the end, saving, hand-off, and steps that were lost with a crash."""
        return max(0.0, self.wall_seconds - self.startup_seconds - self.training_seconds)


class RunProgress:
    """Follows one run; `refresh` reads what was written since the last call."""

    def __init__(self, run: RunFolder, recipe: Recipe | None = None) -> None:
        self.run = run
        self.recipe = recipe or Recipe.read(run.recipe)
        self.journal = Journal(run.journal)
        self._metrics = {s: JsonLines(run.stage(s) / "metrics.jsonl") for s in self.recipe.stages}
        self._heldout = {s: JsonLines(run.stage(s) / "heldout.jsonl") for s in self.recipe.stages}
        self._finished: dict[str, Row] = {}
        self._sft_steps: dict[str, int] = {}
        self._attended: dict[str, float] = {}
        self.stages: list[StageProgress] = []
        self.data_failure: str | None = None
        """Why the data could not be prepared, if that is where the run stands."""

    def refresh(self) -> list[StageProgress]:
        self.journal.poll()
        self.stages = [self._stage(stage) for stage in self.recipe.stages]
        self._estimate()
        self.data_failure = _data_failure(stage_rows(self.journal.rows, DATA))
        stopped = DATA if self.data_failure else None
        for progress in self.stages:
            rows = stage_rows(self.journal.rows, progress.stage)
            if stopped is not None and progress.state == "waiting" and rows and rows[-1].get("executor") == "slurm":
                progress.reason = f"not started: Slurm cancelled job {rows[-1].get('job')} when '{stopped}' stopped"
            elif progress.state in ("failed", "interrupted") and any(_stops(row) for row in rows[-2:]):
                stopped = progress.stage
        return self.stages

    @property
    def broken_lines(self) -> int:
        """Lines of the journal and the metrics that a crash cut and that are left out."""
        return self.journal.broken_lines + sum(j.broken_lines for j in (*self._metrics.values(), *self._heldout.values()))

    @property
    def state(self) -> State:
        """Of the whole chain: that of the first stage that is not finished, if it was ever started."""
        open_stages = [s for s in self.stages if s.state != "finished"]
        if not open_stages:
            return "finished"
        if self.data_failure and open_stages[0].state == "waiting":
            return "failed"
        if open_stages[0].state == "waiting" and len(open_stages) < len(self.stages):
            return "interrupted"  # stopped between two stages
        return open_stages[0].state

    @property
    def processor(self) -> Literal["GPU", "rank"]:
        """What `StageProgress.gpus` counts, for headings."""
        return "rank" if self.recipe.cluster.gpu == "cpu" else "GPU"

    @property
    def wall_seconds(self) -> float:
        return sum(s.wall_seconds for s in self.stages)

    @property
    def eta_seconds(self) -> float | None:
        """Estimate for the chain, the sum over its stages; None before the first step."""
        if not any(s.tokens_per_second for s in self.stages):
            return None
        return sum(s.eta_seconds or 0.0 for s in self.stages if s.state != "finished")

    def _estimate(self) -> None:
        """Time left of the stages that are not running: start-up as seen so far, then the speed of the last phase that ran, or of fine-tuning.

        On GPUs the speed is that phase's utilisation: a token of a longer context costs more FLOPs, and more GPUs do more of them.
        """
        ran = next(
            (s for kind in ("phase", "sft") for s in reversed(self.stages) if s.kind == kind and s.tokens_per_second), None
        )
        if not any(s.tokens_per_second for s in self.stages):
            return
        ended = [s for s in self.stages if s.state == "finished" and s.wall_seconds]
        overheads = [s.wall_seconds - s.training_seconds for s in ended]
        overhead = (
            statistics.mean(overheads)
            if overheads
            else next((s.startup_seconds for s in self.stages if s.startup_seconds), 0.0)
        )
        for s in self.stages:
            if s.state in ("running", "finished"):
                continue
            if s.kind == "grpo":
                s.eta_seconds = self._rollout_estimate(s, overhead)
            elif s.kind not in ("phase", "sft"):
                s.eta_seconds = overhead
            elif ran is not None and ran.tokens_per_second and s.steps:
                rate = ran.tokens_per_second
                if s.peak_flops and s.flops_per_token and ran.flops_per_token:
                    rate *= ran.flops_per_token / s.flops_per_token * s.gpus / ran.gpus
                s.eta_seconds = overhead + (self._tokens(s) - s.stage_tokens) / rate

    def _tokens(self, s: StageProgress) -> int:
        """All tokens of a phase, or places of the sequences of fine-tuning, as metrics.jsonl counts them."""
        if s.kind == "phase":
            return self.recipe.phase[s.stage].tokens
        sft = self.recipe.sft[s.stage]
        return s.steps * sft.global_batch_sequences * sft.seq_length_tokens

    def _rollout_estimate(self, s: StageProgress, overhead: float) -> float | None:
        """Of a stage of reinforcement learning that does not run: by its own steps, else those of the last such stage, a sample's place for
        a place. None before any: what a rollout takes follows from no speed of training."""
        like = (
            s if s.seconds_per_row else next((o for o in reversed(self.stages) if o.kind == "grpo" and o.seconds_per_row), None)
        )
        if like is None or not like.seconds_per_row:
            return None
        own, known = self.recipe.grpo[s.stage], self.recipe.grpo[like.stage]
        places = own.samples_per_step * own.seq_length_tokens / (known.samples_per_step * known.seq_length_tokens)
        return overhead + (s.steps - s.step) * like.seconds_per_row * places * like.gpus / s.gpus

    @property
    def not_estimated(self) -> list[str]:
        """Stages that `eta_seconds` leaves out, because nothing tells yet how long they take."""
        return [s.stage for s in self.stages if s.state != "finished" and s.kind in ("sft", "grpo") and s.eta_seconds is None]

    def _stage(self, stage: str) -> StageProgress:
        kind = self.recipe.stage_kind(stage)
        rows = stage_rows(self.journal.rows, stage)
        self._metrics[stage].poll()
        self._heldout[stage].poll()
        progress = StageProgress(
            stage,
            kind,
            attempts=attempts(rows, stage),
            steps=self._steps(stage),
            metrics=self._metrics[stage].rows,
            heldout=self._heldout[stage].rows,
        )
        training = self.recipe.phase.get(stage) or self.recipe.sft.get(stage) or self.recipe.grpo.get(stage)
        if training is not None:
            progress.gpus = training.parallel.gpus
            progress.peak_flops = PEAK_BF16_FLOPS.get(self.recipe.cluster.gpu)
        if kind == "phase" and progress.peak_flops:
            attended = self._attended_tokens(stage)
            length = self.recipe.phase[stage].seq_length_tokens if attended is None else attended
            progress.flops_per_token, progress.lengths_known = flops_per_token(self.recipe.model, length), attended is not None
        self._read_metrics(progress)
        self._read_handoff(progress)
        self._read_journal(progress, rows)
        if progress.state == "running" and progress.tokens_per_second:
            if kind == "phase" or (kind == "sft" and progress.steps):
                progress.eta_seconds = (self._tokens(progress) - progress.stage_tokens) / progress.tokens_per_second
            elif kind == "grpo":
                progress.eta_seconds = (progress.steps - progress.step) * (progress.seconds_per_row or 0.0)
        return progress

    def _attended_tokens(self, stage: str) -> float | None:
        """Tokens that attention spans around a token of a phase; where documents stay apart None until their lengths are known."""
        if stage not in self._attended:
            phase = self.recipe.phase[stage]
            attended: float = phase.seq_length_tokens
            if phase.documents_apart:
                from launchers.document_lengths import phase_lengths
                from recipes.estimates import packing_of

                packing = packing_of(phase, phase_lengths(self.recipe, stage, LENGTHS_PER_SOURCE))
                if packing is None:
                    return None  # not prepared yet, perhaps: asked again with the next look
                attended = packing.attended_tokens
            self._attended[stage] = attended
        return self._attended[stage]

    def _steps(self, stage: str) -> int:
        """Steps of a stage as far as they are known: those of fine-tuning follow from its data."""
        if stage in self.recipe.phase:
            return self.recipe.phase[stage].steps
        if stage in self.recipe.grpo:
            return self.recipe.grpo[stage].steps
        if stage in self.recipe.ab:
            return self.recipe.ab[stage].steps
        if stage not in self.recipe.sft:
            return 0
        if not self._sft_steps.get(stage):
            sft = self.recipe.sft[stage]
            found = sft_steps(Path(self.recipe.data.root), stage, epochs=sft.epochs, batch_sequences=sft.global_batch_sequences)
            self._sft_steps[stage] = found or 0
        return self._sft_steps[stage]

    def _launcher_alive(self) -> bool:
        launch = next((row for row in reversed(self.journal.rows) if row["event"] == "launch"), None)
        return (
            launch is not None
            and launch.get("host") == socket.gethostname()
            and is_alive(launch["pid"], launch["process_started"])
        )

    def _read_metrics(self, progress: StageProgress) -> None:
        tokens_before, spent = 0, []
        for row in progress.metrics:
            rate, stage_tokens = row.get("tokens_per_second"), row.get("stage_tokens", 0)
            seconds = (stage_tokens - tokens_before) / rate if rate else row.get("seconds") or 0.0
            if progress.kind == "grpo":
                # One row a step; stage_tokens counts those in the loss only, not all that were sampled.
                seconds = row.get("seconds") or 0.0
                progress.reward = row.get("reward", progress.reward)
            spent.append((stage_tokens - tokens_before, seconds))
            tokens_before = stage_tokens
            if row.get("loss") is not None:
                progress.loss = row["loss"]
        progress.training_seconds = sum(s for _, s in spent)
        if progress.metrics:
            last = progress.metrics[-1]
            progress.step, progress.stage_tokens, progress.total_tokens = (
                last.get("step", 0),
                tokens_before,
                last.get("total_tokens"),
            )
            recent = spent[-RATE_WINDOW_ROWS:]
            seconds = sum(s for _, s in recent)
            progress.seconds_per_row = seconds / len(recent)
            progress.tokens_per_second = sum(t for t, _ in recent) / seconds if seconds else None

    def _read_handoff(self, progress: StageProgress) -> None:
        value = self._finished.get(progress.stage) or read_json(self.run.stage(progress.stage) / "handoff.json")
        if value is None:
            return
        self._finished[progress.stage] = value
        progress.handoff = value
        progress.state = "finished"
        progress.total_tokens = value.get("total_tokens", progress.total_tokens)

    def _read_journal(self, progress: StageProgress, rows: list[Row]) -> None:
        started = None
        for row in rows:
            if row["event"] == "intent":
                started = None
            elif row["event"] == "started":
                started = row
            elif row["event"] == "decision" and started is not None:
                progress.wall_seconds += seconds_between(started, row)  # its wrapper was killed: the launcher saw the end
                started = None
            elif row["event"] == "outcome":
                progress.wall_seconds += row.get("seconds") or 0.0
                progress.startup_seconds += _startup(row, progress)
                progress.max_rss_bytes = max(progress.max_rss_bytes or 0, row.get("max_rss_bytes") or 0) or None
                started = None
        if progress.state == "finished":
            return
        outcome = last_outcome(rows, progress.stage)
        if started is not None and outcome is None:
            here = started.get("host") == socket.gethostname()
            if not here or is_alive(started["pid"], started["process_started"]):
                progress.state = "running"
                progress.reason = "" if here else f"on {started.get('host')} as far as the journal knows"
                now = Journal.now()
                progress.wall_seconds += max(0.0, seconds_between(started, now))
                return
        if outcome is not None:
            code = outcome.get("exit_code")
            stopped = code == 75 or " after SIG" in outcome.get("reason", "")
            progress.state = "interrupted" if stopped else "failed"
            progress.reason = "ended with 0 but left no hand-off" if code == 0 else outcome.get("reason", "")
        elif rows and rows[-1]["event"] == "submitted" and rows[-1].get("executor") == "slurm":
            progress.reason = f"Slurm job {rows[-1]['job']}"  # waits, as far as the journal knows
        elif progress.attempts and self._launcher_alive() and rows[-1]["event"] in ("intent", "submitted"):
            progress.state = "running"
        elif (end := _stopped_without_outcome(rows)) is not None:
            progress.state, progress.reason = "failed", end
        elif progress.attempts:
            failed = [row for row in rows if row["event"] == "submission_failed"]
            progress.state = "failed" if failed else "interrupted"
            progress.reason = (
                failed[-1].get("reason", "") if failed else "its job ended without a trace (killed, or the machine went down)"
            )


def _stops(row: Row) -> bool:
    return row["event"] == "job_failed" or row.get("decision") == "stop"


def _stopped_without_outcome(rows: list[Row]) -> str | None:
    """Why a stage stopped whose wrapper did not begin, or did not live to write down an outcome; None if nothing tells."""
    begun = max((i for i, row in enumerate(rows) if row["event"] in ("intent", "submitted", "started")), default=-1)
    for row in rows[begun + 1 :]:  # a decision comes before the end of its job
        if row.get("decision") == "stop":
            return str(row.get("reason", ""))
        if row["event"] == "job_failed":
            return (
                f"its Slurm job {row.get('job')} ended with exit code {row.get('exit_code')} before the stage could say why; "
                f"see the files in {row.get('output')}"
            )
    return None


def _data_failure(rows: list[Row]) -> str | None:
    """Why the last attempt at the data ended without it; None while it runs or when it is there."""
    outcome = last_outcome(rows, DATA)
    if outcome is not None:
        return None if outcome.get("exit_code") == 0 else str(outcome.get("reason", ""))
    return _stopped_without_outcome(rows)


def _startup(outcome: Row, progress: StageProgress) -> float:
    first = outcome.get("first_step_seconds")
    if first is None:
        return 0.0
    first_row = progress.metrics[0].get("seconds") or 0.0 if progress.metrics else 0.0
    return max(0.0, first - first_row)
