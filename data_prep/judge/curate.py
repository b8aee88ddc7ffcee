"""The whole of `quarry judge`: rules, estimate, judge, outputs; resumable after anything, each judged sample asked about once."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.errors import DataError
from data_prep.judge import prompt
from data_prep.judge.agreement import agreement
from data_prep.judge.asking import Asking, Limits, Question
from data_prep.judge.cache import Cache
from data_prep.judge.client import Client, Endpoint, Failed, Reply, Sampling
from data_prep.judge.config import Curation, Rubric, Verdict
from data_prep.judge.estimate import Estimate, Prices, duration, estimate, judge_group
from data_prep.judge.planning import JUDGE, Plan, Planner, Row, Rubrics, Tokens, again
from data_prep.judge.records import OUTCOMES, JudgedRecord, JudgeRecord, Work
from data_prep.judge.writing import Tally, warnings_of, write_outputs
from data_prep.plain_files import digest_of, exclusive_lock, file_sha256
from data_prep.progress import Done, Progress

NAMES = (*(f"{name}.jsonl" for name in (*OUTCOMES, "audit")), "record.json")
"""Files that a run replaces."""
TOLD_AFTER_FAILURES = 20
"""Without a judgement before: a wrong option of the server is seen at once and not in the record."""
UNKNOWN_WORTH = "what the named model's verdicts are worth is not known from this run; compare them with people's (--labels)"


@dataclass(frozen=True)
class Request:
    """Everything that a run is made from."""

    inputs: list[Path]
    folder: Path
    endpoint: Endpoint
    rubrics: dict[str, Rubric]
    """By name; several with `auto`."""
    rubric: str
    """A name of `rubrics`, or `auto`."""
    curation: Curation
    sampling: Sampling = field(default_factory=Sampling)
    limits: Limits = field(default_factory=Limits)
    prices: Prices = field(default_factory=Prices)
    tokens: Tokens = field(default_factory=Tokens)
    labels: dict[str, Verdict] = field(default_factory=dict)
    cache: Path | None = None
    """None: cache.sqlite in the folder."""
    max_cost: float | None = None
    proves: str = UNKNOWN_WORTH

    def check(self) -> None:
        """DataError for what cannot work."""
        self.limits.check()
        self.prices.check()
        assert all(name == rubric.name for name, rubric in self.rubrics.items())
        if self.max_cost is not None and self.prices.input is None:
            raise DataError("--max-cost: needs --price-input and --price-output")
        outputs = {(self.folder / name).resolve() for name in NAMES}
        if used := [path for path in self.inputs if path.resolve() in outputs]:
            raise DataError(f"--input {used[0]}: would be overwritten by the output; give another --output")


def curate(request: Request, progress: Progress, *, only_estimate: bool = False) -> JudgedRecord | Estimate:
    """Judge the samples and write the folder, record.json last; with `only_estimate` nothing is asked and nothing but the cache touched.

    Raises DataError for what is refused. A sample that no attempt brought a judgement for is `unjudged`; asking again is running again.
    """
    request.check()
    folder = request.folder
    with exclusive_lock(
        folder / ".lock", lambda holder: progress.message(f"waiting for process {holder}, which judges into {folder}")
    ):
        for name in NAMES:  # of a killed run, and not whatever else may lie in the folder
            for leftover in folder.glob(f".{name}.*.tmp"):
                leftover.unlink()
        with Cache(request.cache or folder / "cache.sqlite") as cache, Plan(folder / ".plan.sqlite") as plan:
            rubrics = Rubrics(request.rubrics, request.rubric)
            planner = Planner(request.curation, rubrics, request.endpoint.model, request.sampling, request.tokens)
            planner.run(request.inputs, plan, progress)
            _check_ids(request, plan)
            expected = estimate(plan, cache, request.rubrics, request.endpoint.model, request.limits, request.prices)
            progress.message(expected.sentence())
            if only_estimate:
                return expected
            if request.max_cost is not None and expected.cost is not None and expected.cost > request.max_cost:
                raise DataError(
                    f"the estimated cost {expected.cost:,.2f} is above --max-cost {request.max_cost:,.2f}; raise it or judge less"
                )
            work = _Work(request, cache, expected, progress)
            with progress.step("judge", expected.prompt_bytes) as done:
                work.done = done
                if expected.requests:
                    asyncio.run(_ask(request, plan, cache, work))
            return _finish(request, plan, cache, work, progress)


def _check_ids(request: Request, plan: Plan) -> None:
    if request.labels and (twice := plan.repeated_id()) is not None:
        raise DataError(
            f"--labels: two samples have the id {twice}, so a label for it means neither; give each sample an id of its own"
        )


class _Work:
    """Told about every attempt; stores before anything else."""

    def __init__(self, request: Request, cache: Cache, expected: Estimate, progress: Progress):
        self.request, self._cache, self._expected, self._progress = request, cache, expected, progress
        self.done: Done = lambda size_bytes, documents=0, tokens=0: None
        self.asked = self.judgements = self.prompt_tokens = self.answer_tokens = 0
        self.failures: Counter[str] = Counter()
        self.started, self.seconds = time.monotonic(), 0.0
        self.given_up: str | None = None
        self._estimated_tokens = 0
        self._measured_from = max(8, 2 * request.limits.concurrency)

    def judged(self, question: Question, reply: Reply, attempts: int) -> None:
        self._cache.store(question.key, judge_group(self.request.endpoint.model, question.rubric), reply, attempts)
        self.asked += 1
        self.judgements += 1
        self.prompt_tokens += reply.prompt_tokens or 0
        self.answer_tokens += reply.answer_tokens or 0
        self.done(question.size_bytes, 1, (reply.prompt_tokens or 0) + (reply.answer_tokens or 0))
        if self.judgements == self._measured_from:
            self._say_measured()

    def failed(self, question: Question, failure: Failed) -> None:
        self._cache.failed(question.key, failure.kind, failure.detail)
        self.failures[failure.kind] += 1
        if not self.judgements and self.failures.total() == TOLD_AFTER_FAILURES:
            self._progress.message(f"nothing judged yet: {TOLD_AFTER_FAILURES} attempts failed, the last with {failure}")
        # An answer that is no judgement is paid for, too.
        self.prompt_tokens += failure.prompt_tokens or 0
        self.answer_tokens += failure.answer_tokens or 0

    def unjudged(self, question: Question) -> None:
        self.asked += 1
        self.done(question.size_bytes, 1)

    def _say_measured(self) -> None:
        """The estimate again, from what the first answers took."""
        share_left = 1 - self.judgements / max(1, self._expected.requests)
        seconds = time.monotonic() - self.started
        left = (self._expected.requests - self.judgements) * seconds / self.judgements
        scale = self._expected.requests / self.judgements
        cost = self.request.prices.cost(self.prompt_tokens * scale, self.answer_tokens * scale)
        costs = f", cost {cost:,.2f} in all" if cost is not None and self.prompt_tokens else ""
        self._progress.message(
            f"measured over {self.judgements} answers: {self.judgements / seconds:.2f} samples/s, about {duration(left)} left "
            f"({100 * share_left:.0f} % of the samples){costs}"
        )


def _questions(request: Request, plan: Plan, cache: Cache) -> Iterator[Question | None]:
    """What is not judged yet, in the order of the input, equal samples once; None for every other line."""
    seen: set[str] = set()

    def wanted(row: Row) -> bool:
        return row.step == JUDGE and row.key not in seen and not cache.holds(row.key)

    for found in again(request.inputs, plan, request.curation, wanted):
        if found is None:
            yield None
            continue
        row, _, _, sample = found
        assert row.key is not None
        assert row.rubric is not None
        assert sample is not None
        if not request.curation.exact_duplicates:  # else no two samples that come here are equal
            seen.add(row.key)
        rubric = request.rubrics[row.rubric]
        tokens = row.prompt_tokens + request.sampling.max_tokens
        yield Question(row.key, prompt.messages(sample, rubric), rubric, tokens, row.prompt_bytes)


async def _ask(request: Request, plan: Plan, cache: Cache, work: _Work) -> None:
    limits = request.limits
    work.started = time.monotonic()
    async with Client(request.endpoint, request.sampling, timeout_seconds=limits.timeout_seconds) as client:
        asking = Asking(client, limits, work)
        await asking.run(_questions(request, plan, cache))
    work.seconds, work.given_up = time.monotonic() - work.started, asking.given_up


def _finish(request: Request, plan: Plan, cache: Cache, work: _Work, progress: Progress) -> JudgedRecord:
    folder, record_path = request.folder, request.folder / "record.json"
    record_path.unlink(missing_ok=True)  # it vouches for files that are about to be replaced
    tally, files = write_outputs(
        folder, request.inputs, plan, cache, request.curation, request.rubrics, request.labels, work.given_up, progress
    )
    record = _record(request, tally, work, files)
    record.write(record_path)
    return record


def _record(request: Request, tally: Tally, work: _Work, files: dict) -> JudgedRecord:
    files_in = {str(path): file_sha256(path) for path in request.inputs}
    used = {name: request.rubrics[name] for name in sorted(tally.rubrics)}
    seen = tally.labels_seen
    calibration = None
    if request.labels:
        calibration = agreement(
            tally.labelled,
            labelled_unjudged=seen["unjudged"],
            labelled_refused_by_rules=seen["refused by rules"],
            labelled_not_in_input=len(request.labels) - seen.total(),
        )
    return JudgedRecord(
        inputs=digest_of(
            {
                "files": list(files_in.values()),
                "rules": request.curation.sha256,
                "rubrics": {name: rubric.sha256 for name, rubric in request.rubrics.items()},
                "rubric": request.rubric,
                "model": request.endpoint.model,
                "sampling": request.sampling.plain(),
            }
        ),
        files_in=files_in,
        samples=tally.samples,
        outcomes={outcome: tally.outcomes[outcome] for outcome in OUTCOMES},
        steps={step: dict(sorted(reasons.items())) for step, reasons in tally.steps.items()},
        repairs=dict(sorted(tally.repairs.items())),
        rules=request.curation.model_dump(mode="json"),
        rubrics={name: tally.rubrics[name].record(rubric) for name, rubric in used.items()},
        judge=JudgeRecord(
            endpoint=request.endpoint.url,
            model=request.endpoint.model,
            answered_as=dict(sorted(tally.answered_as.items())),
            sampling=request.sampling.plain(),
            proves=request.proves,
        ),
        work=Work(
            asked=work.asked,
            judged=work.judgements,
            failed_attempts=dict(sorted(work.failures.items())),
            prompt_tokens=work.prompt_tokens,
            answer_tokens=work.answer_tokens,
            cost=request.prices.cost(work.prompt_tokens, work.answer_tokens),
            seconds=round(work.seconds, 3),
            given_up=work.given_up,
        ),
        calibration=calibration,
        warnings=warnings_of(tally, work.given_up),
        files=files,
    )
