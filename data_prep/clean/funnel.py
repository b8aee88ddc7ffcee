"""The funnel: per source what came in, what each step took and what came out, in documents, bytes and tokens; as JSON and Markdown.

Counts of documents and bytes are those of the cleaning's records. Tokens are counted here, when a tokenizer exists: over the documents
that stay, those that were removed and the lines that were taken out of documents that stay. Tokens in are the sum of the three.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from data_prep.clean.records import CleanRecord, DeduplicatedRecord, StepCount
from data_prep.errors import DataError
from data_prep.files import digest_of, write_bytes, write_json
from data_prep.records import Count, Record
from data_prep.text_files import Text, chunks, lines, read_documents
from recipes.cleaning import Cleaning
from recipes.schema import Recipe

BATCH_BYTES = 1 << 20
"""Encoded in one call: enough for all threads, little memory."""
SIMILARITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
"""At which the report says how likely near-duplicates are found."""


class Encoder(Protocol):
    """What of data_prep.tokenizer.Tokenizer is used here."""

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[Any]: ...

    @property
    def digest(self) -> str: ...


class TokenCounts(Record):
    """Tokens of a source's text by what became of it; end-of-document tokens are not counted."""

    format: Literal["quarry.clean_tokens/1"] = "quarry.clean_tokens/1"
    kept: Count
    removed: dict[str, Count]
    """Step -> tokens of the documents it removed, as they were when it did."""
    cut: dict[str, Count]
    """Step -> tokens of the lines it took out of documents that stay."""

    @property
    def total(self) -> int:
        return self.kept + sum(self.removed.values()) + sum(self.cut.values())


def write_funnel(
    recipe: Recipe,
    root: Path,
    tokenizer: Encoder | None,
    *,
    threads: int = 1,
    kept_tokens: dict[str, int] | None = None,
) -> dict[str, Path]:
    """Write <root>/clean/funnel.json, .md and .png of the last cleaning; returns their paths by suffix.

    `tokenizer` None: without tokens. `kept_tokens`: of sources whose remaining documents someone has already counted (without
    end-of-document tokens); the others are encoded here, with `threads`. Counts are kept, so that a rerun encodes nothing.
    DataError where the sources were not cleaned.
    """
    whole, records = read_records(recipe, root)
    tokens = None
    if tokenizer is not None:
        known = kept_tokens or {}
        tokens = {name: count_tokens(root, record, tokenizer, threads, known.get(name)) for name, record in records.items()}
    report = funnel(recipe, whole, records, tokens, None if tokenizer is None else tokenizer.digest)
    folder = root / "clean"
    paths = {suffix: folder / f"funnel.{suffix}" for suffix in ("json", "md", "png")}
    if all(path.is_file() for path in paths.values()) and json.loads(paths["json"].read_bytes()) == report:
        return paths  # drawing takes a second
    write_json(paths["json"], report)
    write_bytes(paths["md"], markdown(report).encode())
    from data_prep.clean.picture import draw

    write_bytes(paths["png"], draw(report))
    return paths


def read_records(recipe: Recipe, root: Path) -> tuple[DeduplicatedRecord, dict[str, CleanRecord]]:
    """Of the last cleaning, in the recipe's order of the sources."""
    whole = DeduplicatedRecord.read_if_valid(root / "clean" / "record.json")
    records = {}
    for name in recipe.data.sources if whole is not None else ():
        record = CleanRecord.read_if_valid(root / "clean" / name / "record.json") if name in whole.sources else None
        if record is not None and record.inputs == whole.sources[name]:
            records[name] = record
    if whole is None or set(records) != set(whole.sources):
        raise DataError(f"{root / 'clean'}: the sources are not cleaned, or only in part; run `quarry clean` or `quarry prep`")
    return whole, records


# --- tokens ----------------------------------------------------------------------------------------------------------------------


def count_tokens(root: Path, record: CleanRecord, tokenizer: Encoder, threads: int, kept: int | None) -> TokenCounts:
    """Tokens of one source; <root>/clean/<source>/tokens.json remembers them. `kept` is not counted again where it is given."""
    path = root / "clean" / record.source / "tokens.json"
    inputs = digest_of([record.inputs, record.filtered, tokenizer.digest, kept])
    before = TokenCounts.read_if_valid(path)
    if before is not None and before.inputs == inputs:
        return before
    removed, cut = dict.fromkeys(record.steps, 0), dict.fromkeys(record.steps, 0)
    for file in record.files:
        for stored in (file.filtered, file.duplicates):
            for (step, is_cut), count in _tokens_by_step(root / stored, tokenizer, threads).items():
                (cut if is_cut else removed)[step] += count
    if kept is None:
        kept = sum(count for file in record.files for count in _encoded(_texts(root / file.path), tokenizer, threads))
    counts = TokenCounts(
        inputs=inputs,
        kept=kept,
        removed={step: count for step, count in removed.items() if count},
        cut={step: count for step, count in cut.items() if count},
    )
    counts.write(path)
    return counts


def _texts(path: Path) -> Iterator[str]:
    return (found.text for found in read_documents(path, "text") if isinstance(found, Text))


def _tokens_by_step(path: Path, tokenizer: Encoder, threads: int) -> dict[tuple[str, bool], int]:
    """(step, whether it is lines of a document that stays) -> tokens, of one file of removed text."""
    import orjson

    labels: list[tuple[str, bool]] = []

    def texts() -> Iterator[str]:
        for raw in lines(chunks(path)):
            entry = orjson.loads(raw)
            labels.append((entry["step"], entry.get("kept", False)))
            yield entry["text"]

    found: dict[tuple[str, bool], int] = {}
    for number, count in enumerate(_encoded(texts(), tokenizer, threads)):
        found[labels[number]] = found.get(labels[number], 0) + count
    return found


def _encoded(texts: Iterable[str], tokenizer: Encoder, threads: int) -> Iterator[int]:
    """Tokens of each text."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield from map(len, tokenizer.encode_batch(batch, threads))
            batch, size = [], 0
    yield from map(len, tokenizer.encode_batch(batch, threads)) if batch else ()


# --- the report ------------------------------------------------------------------------------------------------------------------


def funnel(
    recipe: Recipe,
    whole: DeduplicatedRecord,
    records: dict[str, CleanRecord],
    tokens: dict[str, TokenCounts] | None,
    tokenizer: str | None,
) -> dict[str, Any]:
    """The report as it goes into funnel.json."""
    cleaning = recipe.data.cleaning
    assert cleaning is not None, "records of a cleaning without its configuration"
    sources = {name: _source(record, tokens[name] if tokens else None, cleaning.steps()) for name, record in records.items()}
    used = [step for step in cleaning.steps() if any(step in s["steps"] for s in sources.values())]
    return {
        "format": "quarry.funnel/1",
        "recipe": recipe.name,
        "cleaning": cleaning.name,
        "tokenizer_sha256": tokenizer,
        "order": list(records),
        "priority": whole.priority,
        "steps": used,
        "near_duplicates": _near_facts(cleaning),
        "benchmarks": whole.benchmarks,
        "sources": sources,
        "total": _total(list(sources.values()), used),
    }


def _near_facts(cleaning: Cleaning) -> dict[str, Any] | None:
    near = cleaning.near_duplicates
    if near is None:
        return None
    return {
        "ngram_words": near.ngram_words,
        "buckets": near.buckets,
        "hashes_per_bucket": near.hashes_per_bucket,
        "threshold": round(near.threshold, 4),
        "detection_probability": {str(s): round(near.detection_probability(s), 4) for s in SIMILARITIES},
        "exempt": near.exempt,
    }


def _source(record: CleanRecord, tokens: TokenCounts | None, order: list[str]) -> dict[str, Any]:
    return {
        "category": record.category,
        "in": {"documents": record.documents_in, "bytes": record.bytes_in, "tokens": tokens.total if tokens else None},
        "steps": {name: _step(name, record.steps[name], tokens) for name in order if name in record.steps},
        "out": {"documents": record.documents, "bytes": record.bytes, "tokens": tokens.kept if tokens else None},
        "quarantined_lines": record.quarantined_lines,
        "empty_documents": record.empty_documents,
    }


def _step(name: str, count: StepCount, tokens: TokenCounts | None) -> dict[str, Any]:
    return {
        "removed": {
            "documents": count.removed_documents,
            "bytes": count.removed_bytes,
            "tokens": tokens.removed.get(name, 0) if tokens else None,
        },
        "changed": {
            "documents": count.changed_documents,
            "shrunk_bytes": count.shrunk_bytes,
            "tokens_cut": tokens.cut.get(name, 0) if tokens else None,
        },
        "reasons": count.reasons,
        "examples": [example.model_dump(mode="json") for example in count.examples],
    }


def _total(sources: list[dict[str, Any]], steps: list[str]) -> dict[str, Any]:
    def summed(parts: list[dict[str, Any]]) -> dict[str, Any]:
        keys = parts[0] if parts else ()
        return {key: None if any(p[key] is None for p in parts) else sum(p[key] for p in parts) for key in keys}

    return {
        "in": summed([s["in"] for s in sources]),
        "steps": {
            step: {
                part: summed([s["steps"][step][part] for s in sources if step in s["steps"]]) for part in ("removed", "changed")
            }
            for step in steps
        },
        "out": summed([s["out"] for s in sources]),
    }


def in_order(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(name, its part) of the sources in the recipe's order, which a JSON object does not keep here, and the sum as 'all'."""
    return [*((name, report["sources"][name]) for name in report["order"]), ("all", report["total"])]


def steps_of(report: dict[str, Any], source: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The steps that a source has, in their order."""
    return [(step, source["steps"][step]) for step in report["steps"] if step in source["steps"]]


def unit_of(report: dict[str, Any]) -> Literal["tokens", "bytes"]:
    """What shares are taken of."""
    return "bytes" if report["tokenizer_sha256"] is None else "tokens"


def taken(step: dict[str, Any], unit: str) -> int:
    """Tokens or bytes that a step took, whole documents and parts; never negative (masking makes texts longer)."""
    part = step["changed"]["shrunk_bytes"] if unit == "bytes" else step["changed"]["tokens_cut"]
    return step["removed"][unit] + max(0, part)


def rows(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows) of the table of documents: in, removed by each step, out, share that stays; the sum last."""
    unit = unit_of(report)
    steps = [step for step in report["steps"] if report["total"]["steps"][step]["removed"]["documents"]]
    headings = ["source", "documents", *steps, "stay", f"{unit} in", f"{unit} out", f"{unit} that stay"]
    found = []
    for name, source in in_order(report):
        before, after = source["in"][unit], source["out"][unit]
        found.append(
            [
                name,
                f"{source['in']['documents']:,}",
                *(_cell(source["steps"].get(step)) for step in steps),
                f"{source['out']['documents']:,}",
                f"{before:,}",
                f"{after:,}",
                f"{100 * after / before:.1f} %" if before else "-",
            ]
        )
    return headings, found


def funnel_rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """`rows` of a funnel.json."""
    return rows(json.loads(path.read_bytes()))


def _cell(step: dict[str, Any] | None) -> str:
    """'' where a source does not have the step."""
    return "" if step is None else f"{step['removed']['documents']:,}"


def markdown(report: dict[str, Any]) -> str:
    """The report for people: the table, what was changed, the facts of deduplication and decontamination, examples."""
    out = [f"# Cleaning of {report['recipe']}: {report['cleaning']}", ""]
    headings, table = rows(report)
    out += ["Documents in, removed by each step, and out. An empty cell: the source does not have that step.", ""]
    out += _table([heading.replace("_", " ") for heading in headings], table)
    out += ["", *_changes(report), *_facts(report), "## Examples", ""]
    for name, source in in_order(report)[:-1]:
        shown = [(step, count) for step, count in steps_of(report, source) if count["examples"]]
        if not shown:
            continue
        out += [f"### {name} ({source['category']})", ""]
        for step, count in shown:
            reasons = ", ".join(
                f"{reason} {number:,}" for reason, number in sorted(count["reasons"].items(), key=lambda r: -r[1])
            )
            out += [f"**{step}**: {reasons}", ""]
            for example in count["examples"]:
                detail = f"; {_code(example['detail'])}" if example["detail"] else ""
                out.append(f"- {_code(example['id'])} ({example['reason']}{detail}): {_code(example['excerpt'])}")
            out.append("")
    return "\n".join(out).rstrip() + "\n"


def _changes(report: dict[str, Any]) -> list[str]:
    found = []
    for name, source in in_order(report)[:-1]:
        for step, count in steps_of(report, source):
            if count["changed"]["documents"]:
                reasons = ", ".join(f"{reason} {number:,}" for reason, number in count["reasons"].items())
                tokens = count["changed"]["tokens_cut"]
                found.append([name, step, f"{count['changed']['documents']:,}", f"{count['changed']['shrunk_bytes']:,}",
                              "-" if tokens is None else f"{tokens:,}", reasons])  # fmt: skip
    if not found:
        return []
    headings = ["source", "step", "documents changed", "bytes fewer", "tokens cut", "why (documents)"]
    return ["## Documents that stay, changed", "", *_table(headings, found, left=(0, 1, 5)), ""]


def _facts(report: dict[str, Any]) -> list[str]:
    out = []
    near = report["near_duplicates"]
    if near is not None:
        chances = ", ".join(f"{float(s):.1f}: {p:.4f}" for s, p in near["detection_probability"].items())
        out += [
            "## Duplicates",
            "",
            f"Of several copies the one of the first of these sources stays: {', '.join(report['priority'])}.",
            "",
            f"Near-duplicates: n-grams of {near['ngram_words']} words, {near['buckets']} buckets of {near['hashes_per_bucket']} hashes, "
            f"threshold {near['threshold']:.2f} (Jaccard). Probability that two documents are found, by their similarity: {chances}.",
            "",
        ]
        out += [f"- {category} is not compared: {reason}" for category, reason in near["exempt"].items()] + [""] * bool(
            near["exempt"]
        )
    if report["benchmarks"]:
        found = []
        for name, counts in report["benchmarks"].items():
            hits = [
                s["steps"].get("decontamination", {"reasons": {}})["reasons"].get(name, 0) for s in report["sources"].values()
            ]
            found.append([name, f"{counts['items']:,}", f"{counts['texts_too_short']:,}", f"{sum(hits):,}"])
        headings = ["benchmark", "items", "texts too short to look for", "documents removed"]
        out += ["## Benchmarks", "", *_table(headings, found), ""]
    return out


def _table(headings: list[str], rows: list[list[str]], left: tuple[int, ...] = (0,)) -> list[str]:
    rule = ["---" if column in left else "---:" for column in range(len(headings))]
    return ["| " + " | ".join(_escaped(cell) for cell in row) + " |" for row in (headings, rule, *rows)]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _code(text: str) -> str:
    """As Markdown code, whatever it holds: nothing of a document becomes markup."""
    fence = "`"
    while fence in text:
        fence += "`"
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"
