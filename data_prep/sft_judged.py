"""The samples of a source that rules and a judge let through, for the preparation of an SFT stage: what `quarry judge` does, by recipe.

<data root>/sft/<stage>/judged/<source>/        what docs/judge.md lists: accepted.jsonl, audit.jsonl, record.json, cache.sqlite ...
<data root>/sft/<stage>/judged/<source>/made_from.json    digest of everything that decides the outcome, and of record.json; written last
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from data_prep.errors import DataError
from data_prep.files import digest_of, write_json
from data_prep.judge.asking import Limits
from data_prep.judge.client import Sampling, endpoint
from data_prep.judge.config import Curation, Rubric, load_curation, load_rubric
from data_prep.judge.curate import UNKNOWN_WORTH, Request, curate
from data_prep.judge.local_server import MODEL, PROVES, local_server
from data_prep.judge.planning import AUTO_RUBRICS
from data_prep.judge.records import JudgedRecord
from data_prep.plain_files import file_sha256
from data_prep.progress import Progress
from data_prep.text_files import is_parquet
from recipes.sft_options import SftJudge

LOCAL = "local"
AUTO = "auto"
KEY_VARIABLE = "QUARRY_JUDGE_API_KEY"
LOCAL_REQUESTS = 2
"""In flight with the local judge: its slots share few cores, and each has a context of its own in memory."""


def judged_paths(paths: list[Path], judge: SftJudge, folder: Path, key: str, progress: Progress) -> list[Path]:
    """Files of the samples that are to be trained on; asks the judge where inputs, rules, rubric or judge are not those of the last time.

    `key` names the source in errors. DataError for whatever is refused, and where more than judge.max_unjudged_percent of the samples have
    no judgement: nothing is trained on a part without being told to.
    """
    if parquet := [path for path in paths if is_parquet(path)]:
        raise DataError(f"{key}.paths: {parquet[0]} is Parquet, which the judge does not read; write the samples as JSON lines")
    rubrics = {
        rubric.name: rubric for rubric in map(load_rubric, AUTO_RUBRICS.values() if judge.rubric == AUTO else [judge.rubric])
    }
    rules = load_curation(judge.rules)
    made_from = digest_of(_identity(paths, judge, rubrics, rules))
    taken = [folder / f"{outcome}.jsonl" for outcome in judge.take]
    if _is_current(folder, made_from, taken):
        progress.message(f"{key}: judged before, nothing to do")
        return taken
    (folder / "made_from.json").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        local = judge.endpoint == LOCAL
        requests = min(judge.concurrent_requests, LOCAL_REQUESTS) if local else judge.concurrent_requests
        url = stack.enter_context(local_server(requests)) if local else judge.endpoint
        record = curate(
            Request(
                inputs=paths,
                folder=folder,
                endpoint=endpoint(url, judge.model or MODEL, judge.api_key_env or KEY_VARIABLE),
                rubrics=rubrics,
                rubric=AUTO if judge.rubric == AUTO else next(iter(rubrics)),
                curation=rules,
                sampling=Sampling(max_tokens=judge.max_answer_tokens),
                limits=Limits(concurrency=requests, timeout_seconds=judge.timeout_seconds),
                proves=PROVES if local else UNKNOWN_WORTH,
            ),
            progress,
        )
    assert isinstance(record, JudgedRecord)
    counts = ", ".join(f"{name} {count}" for name, count in record.outcomes.items())
    progress.message(f"{key}: {record.samples} samples: {counts}; {record.judge.proves}")
    unjudged = record.outcomes["unjudged"]
    if 100 * unjudged > judge.max_unjudged_percent * record.samples:
        reasons = ", ".join(f"{kind} {count}" for kind, count in sorted(record.work.failed_attempts.items()))
        raise DataError(
            f"{key}.judge: {unjudged} of {record.samples} samples have no judgement, more than max_unjudged_percent = "
            f"{judge.max_unjudged_percent:g} (failed attempts: {reasons or 'none in this run'}); see {folder / 'audit.jsonl'}. "
            "The same command asks about these again"
        )
    left = sum(record.outcomes[outcome] for outcome in judge.take)
    if 100 * left < judge.min_taken_percent * record.samples or not record.samples:
        raise DataError(
            f"{key}.judge: {left} of {record.samples} samples are {' or '.join(judge.take)}, fewer than min_taken_percent = "
            f"{judge.min_taken_percent:g}; {folder / 'audit.jsonl'} says of each why"
        )
    write_json(folder / "made_from.json", {"made_from": made_from, "record": file_sha256(folder / "record.json")})
    return taken


def _identity(paths: list[Path], judge: SftJudge, rubrics: dict[str, Rubric], rules: Curation) -> dict[str, Any]:
    """Everything that the outcome depends on; pace and patience are not of it."""
    return {
        "inputs": [file_sha256(path) for path in paths],
        "rubrics": [rubric.model_dump(mode="json") for rubric in rubrics.values()],
        "rules": rules.model_dump(mode="json"),
        "endpoint_is_local": judge.endpoint == LOCAL,
        "model": judge.model,
        "max_answer_tokens": judge.max_answer_tokens,
    }


def _is_current(folder: Path, made_from: str, taken: list[Path]) -> bool:
    """Made from the same, and what is read of it is as it was written."""
    try:
        seal = json.loads((folder / "made_from.json").read_bytes())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    record = JudgedRecord.read_if_valid(folder / "record.json")
    if record is None or seal != {"made_from": made_from, "record": file_sha256(folder / "record.json")}:
        return False
    return all(path.exists() and file_sha256(path) == record.files[path.name].sha256 for path in taken)
