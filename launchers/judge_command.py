"""`quarry judge`: samples that rules and an LLM judge let through, and for every other one why not."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_prep.judge.agreement import Agreement
    from data_prep.judge.config import Rubric
    from data_prep.judge.curate import Request
    from data_prep.judge.records import JudgedRecord

LOCAL = "local"
EXIT_UNJUDGED = 1
KEY_VARIABLE = "QUARRY_JUDGE_API_KEY"
"""Not that of a known service: a key must not go to whatever endpoint is named."""

EPILOG = """examples:
  quarry judge --input 'sft/*.jsonl.zst' --endpoint http://vllm-1:8000/v1 --model gpt-oss-120b --rubric auto --output judged
  quarry judge ... --estimate --price-input 0.15 --price-output 0.6       only say what it would take
  quarry judge ... --rubric tool_calling --requests-per-minute 600 --tokens-per-minute 2e6
  quarry judge ... --rubric my_rubric.yaml --labels labels.jsonl          how far the judge agrees with people
  quarry judge --input s.jsonl --endpoint local --rubric smoke --output judged   a small model served here: proves the path, not data

A sample is a line with `messages` (system, user, assistant, tool, tool_calls) and optionally `tools` and `documents`. Writes
accepted.jsonl, borderline.jsonl, rejected.jsonl and unjudged.jsonl (each sample is in exactly one of them), audit.jsonl (what happened to
each, and why) and record.json (counts, scores, agreement), and keeps what was judged in cache.sqlite: run it again after anything, no
judged sample is asked about twice. The key is read from the environment (QUARRY_JUDGE_API_KEY, or --api-key-env) and never written.
docs/judge.md describes rules, rubrics and files. Exit code 0: done; 1: written, but more samples are unjudged than --max-unjudged-percent;
2: refused, with the reason and a remedy.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "judge",
        help="let rules and an LLM judge decide which samples are trained on",
        description="Curate samples for fine-tuning: deterministic rules, then an LLM judge behind an OpenAI-compatible endpoint.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="GLOB",
        help="JSON-lines files (plain, .gz, .zst) or glob patterns; read sorted by path",
    )
    parser.add_argument(
        "--endpoint",
        required=True,
        metavar="URL",
        help="OpenAI-compatible, e.g. http://host:8000/v1; `local` serves a small model here",
    )
    parser.add_argument("--model", metavar="NAME", help="the judge, as the endpoint calls it")
    parser.add_argument(
        "--rubric",
        required=True,
        metavar="RUBRIC",
        help="name (recipes/rubric) or YAML file; `auto` takes the one that fits each sample",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where everything is written")
    parser.add_argument(
        "--rules",
        default="sft",
        metavar="RULES",
        help="name (recipes/curation) or YAML file of what precedes the judge (default: sft)",
    )
    parser.add_argument(
        "--labels", type=Path, metavar="FILE", help='JSON lines of {"id", "verdict"} by people, to compare with'
    )
    parser.add_argument("--estimate", action="store_true", help="only say what it would take; nothing is asked")
    pace = parser.add_argument_group("pace")
    pace.add_argument("--concurrency", type=int, metavar="N", help="requests at a time (default: 16)")
    pace.add_argument("--requests-per-minute", type=float, metavar="N", help="default: no limit")
    pace.add_argument(
        "--tokens-per-minute", type=float, metavar="N", help="of prompts and answers together (default: no limit)"
    )
    pace.add_argument("--attempts", type=int, metavar="N", help="at one sample in one run (default: 6)")
    pace.add_argument("--timeout-seconds", type=float, metavar="S", help="of one attempt (default: 120)")
    pace.add_argument(
        "--patience-seconds",
        type=float,
        metavar="S",
        help="give the judge up when nothing but failures (100 and more) came for so long (default: 120)",
    )
    answer = parser.add_argument_group("answer")
    answer.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0")
    answer.add_argument(
        "--max-tokens", type=int, default=1024, metavar="N", help="longest answer, thinking included (default: 1024)"
    )
    answer.add_argument("--seed", type=int, default=0, metavar="N", help="sent with each request; negative: none (default: 0)")
    money = parser.add_argument_group("estimate")
    money.add_argument("--price-input", type=float, metavar="PRICE", help="per million tokens of prompts")
    money.add_argument("--price-output", type=float, metavar="PRICE", help="per million tokens of answers")
    money.add_argument("--max-cost", type=float, metavar="COST", help="refuse to start above this estimate")
    money.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="count prompts with this .model file or tokenizer folder (default: by characters)",
    )
    parser.add_argument(
        "--cache", type=Path, metavar="FILE", help="what was judged before (default: cache.sqlite in the output)"
    )
    parser.add_argument(
        "--api-key-env", default=KEY_VARIABLE, metavar="VARIABLE", help=f"that holds the key (default: {KEY_VARIABLE})"
    )
    parser.add_argument(
        "--max-unjudged-percent",
        type=float,
        default=0.0,
        metavar="PERCENT",
        help="more unjudged samples are exit code 1 (default: 0)",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Returns 0, or EXIT_UNJUDGED; DataError (exit code 2) when input, rubric or endpoint are refused."""
    from data_prep.errors import DataError
    from data_prep.judge.curate import curate
    from data_prep.judge.local_server import local_server
    from data_prep.judge.records import JudgedRecord
    from data_prep.progress import Shown

    if not 0 <= args.max_unjudged_percent <= 100:
        raise DataError(f"--max-unjudged-percent is {args.max_unjudged_percent}; use 0 to 100")
    progress = Shown()
    local = args.endpoint == LOCAL
    with ExitStack() as stack:
        if local and not args.estimate:
            # Checked before the server takes its seconds to start.
            _request(args, "http://127.0.0.1/v1").check()
            slots = args.concurrency or 2
            url = stack.enter_context(local_server(slots))
        else:
            url = "http://127.0.0.1/v1" if local else args.endpoint
        request = _request(args, url)
        if request.endpoint.key is not None and url.startswith("http://") and not local:
            progress.message("the key goes over plain http; that is only for networks of your own")
        record = curate(request, progress, only_estimate=args.estimate)
    if not isinstance(record, JudgedRecord):
        return 0
    _show(record, args.output)
    return EXIT_UNJUDGED if 100 * record.outcomes["unjudged"] > args.max_unjudged_percent * record.samples else 0


def _request(args: argparse.Namespace, url: str) -> Request:
    """What the command line asks for; DataError for what is wrong in it."""
    from data_prep.errors import DataError
    from data_prep.judge import local_server
    from data_prep.judge.agreement import read_labels
    from data_prep.judge.asking import Limits
    from data_prep.judge.client import Sampling, endpoint
    from data_prep.judge.config import load_curation
    from data_prep.judge.curate import UNKNOWN_WORTH, Request
    from data_prep.judge.estimate import Prices
    from data_prep.text_files import expand, is_parquet

    local = args.endpoint == LOCAL
    if args.model is None and not local:
        raise DataError("--model: is missing; `curl ENDPOINT/models` lists what the server has")
    if args.max_tokens < 1 or not 0 <= args.temperature <= 2:
        raise DataError(f"--max-tokens {args.max_tokens}, --temperature {args.temperature}: use at least 1, and 0 to 2")
    inputs = expand(args.input, "--input")
    if parquet := [path for path in inputs if is_parquet(path)]:
        raise DataError(f"--input {parquet[0]}: Parquet is not read here; write the samples as JSON lines")
    given = {
        name: value
        for name in ("requests_per_minute", "tokens_per_minute", "attempts", "timeout_seconds", "patience_seconds")
        if (value := getattr(args, name)) is not None
    }
    rubrics = _rubrics(args.rubric)
    return Request(
        inputs=inputs,
        folder=args.output,
        endpoint=endpoint(url, args.model or local_server.MODEL, args.api_key_env),
        rubrics=rubrics,
        rubric="auto" if args.rubric == "auto" else next(iter(rubrics)),
        curation=load_curation(args.rules),
        sampling=Sampling(args.temperature, args.max_tokens, args.seed if args.seed >= 0 else None),
        limits=Limits(concurrency=args.concurrency if args.concurrency is not None else 2 if local else 16, **given),
        prices=Prices(args.price_input, args.price_output),
        tokens=_tokens(args.tokenizer),
        labels=read_labels(args.labels) if args.labels is not None else {},
        cache=args.cache,
        max_cost=args.max_cost,
        proves=local_server.PROVES if local else UNKNOWN_WORTH,
    )


def _rubrics(name: str) -> dict[str, Rubric]:
    from data_prep.judge.config import load_rubric
    from data_prep.judge.planning import AUTO_RUBRICS

    loaded = [load_rubric(n) for n in (AUTO_RUBRICS.values() if name == "auto" else [name])]
    return {rubric.name: rubric for rubric in loaded}


def _tokens(path: Path | None) -> Any:
    from data_prep.judge.planning import Tokens

    if path is None:
        return Tokens()
    from data_prep.tokenizer import load_tokenizer

    return Tokens(load_tokenizer(path).encode)


def _show(record: JudgedRecord, folder: Path) -> None:
    """The counts as a table, then what to look at."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 140, highlight=False)
    table = Table(title=f"{record.samples:,} samples", title_justify="left")
    for heading, justify in (("outcome", "left"), ("samples", "right"), ("share", "right")):
        table.add_column(heading, justify=justify)
    for outcome, count in record.outcomes.items():
        table.add_row(outcome, f"{count:,}", f"{100 * count / record.samples:.1f} %" if record.samples else "")
    console.print(table)
    table = Table(title="decided by", title_justify="left")
    for heading, justify in (("step", "left"), ("reason", "left"), ("samples", "right")):
        table.add_column(heading, justify=justify)
    for step, reasons in record.steps.items():
        for reason, count in reasons.items():
            table.add_row(step, reason, f"{count:,}")
    console.print(table)
    if record.calibration is not None:
        _show_agreement(record.calibration, console)
    for warning in record.warnings:
        print(f"note      {warning}")
    print(f"judge     {record.judge.model}; {record.judge.proves}")
    print(f"samples   {folder}/accepted.jsonl\naudit     {folder}/audit.jsonl\nrecord    {folder}/record.json")


def _show_agreement(found: Agreement, console: Any) -> None:
    from rich.table import Table

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    title = f"agreement with {found.samples:,} labels: {number(found.agreement)}, Cohen's kappa {number(found.kappa)}"
    table = Table(title=f"{title} (linear weights {number(found.weighted_kappa)})", title_justify="left")
    table.add_column("label")
    for heading in (*found.confusion, "recall", "precision"):
        table.add_column(heading, justify="right")
    for label, row in found.confusion.items():
        per = found.verdicts[label]
        table.add_row(label, *(f"{count:,}" for count in row.values()), number(per.recall), number(per.precision))
    console.print(table)
    left = {
        "unjudged": found.labelled_unjudged,
        "refused by rules": found.labelled_refused_by_rules,
        "not in the input": found.labelled_not_in_input,
    }
    if any(left.values()):
        print("labels of other samples: " + ", ".join(f"{count:,} {name}" for name, count in left.items() if count))
