"""`quarry tokenizer`: train a tokenizer on files, or see how well tokenizers fit a text."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_prep.fertility import Labelled, Report, Row
    from data_prep.progress import Progress
    from data_prep.text_files import Text
    from data_prep.tokenizer import Tokenizer

TRAIN_MAX_MB = 300.0
"""Of text, by default: 100 s and 1.5 GB for a byte-level vocabulary of 100K on two cores (measured); more text changes few entries.
SentencePiece keeps the text: about 17 MB of memory and 0.4 s per MB."""
REPORT_MAX_MB = 100.0
"""Of text, by default: half a minute per tokenizer; ratios are steady to a percent with much less."""
SMALL_SHARE = 0.02
"""Languages below this share of their category's text are one row of the table; the JSON has them all."""

EPILOG = """examples:
  quarry tokenizer train --input 'raw/*.jsonl.gz' --kind huggingface --vocab-size 100352 --output tokenizers/mine
  quarry tokenizer report --tokenizer tokenizers/mine tokenizers/old --input 'raw/*.jsonl.gz'
  quarry tokenizer report curriculum=smoke                 the recipe's own tokenizer on its sources, by category

`quarry prep` trains the tokenizer of a recipe by itself where data.tokenizer.path is null, on the mixture of the first phase.
"""
TRAIN_EPILOG = """examples:
  quarry tokenizer train --input 'raw/*.jsonl.gz' --kind huggingface --vocab-size 100352 --output tokenizers/mine
  quarry tokenizer train --input raw/a.jsonl 'raw/b/*.parquet' --kind sentencepiece --vocab-size 32768 --max-mb 100 --output tokenizers/small

Writes tokenizer.json with what transformers reads (huggingface), or tokenizer.model and the same for transformers in hf/ (sentencepiece).
Granite's special tokens and chat template are part of it, as far as the size has room: end of text and padding always, roles from 1,024
entries, fill-in-the-middle, tool and other named tokens from 8,192, a block of 96 with reserved ones from 32,768. The same files, options
and library versions give the same tokenizer.
"""
REPORT_EPILOG = """examples:
  quarry tokenizer report --tokenizer tokenizers/a tokenizers/b.model --input 'raw/*.jsonl' --category-key source --language-key language
  quarry tokenizer report --tokenizer tokenizers/a --input 'raw/*.jsonl' --json report.json
  quarry tokenizer report curriculum=smoke

tokens/word: tokens per run of characters between blanks (per character in scripts without blanks). bytes/token: UTF-8 bytes of text per
token; more is better. byte %: tokens that are no whole character. unk %: tokens that stand for what cannot be written.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    from launchers.recipe_arguments import add_recipe_arguments

    raw = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser(
        "tokenizer",
        help="train a tokenizer, or see how well tokenizers fit a text",
        description="Train tokenizers and compare them.",
        epilog=EPILOG,
        formatter_class=raw,
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    train = actions.add_parser(
        "train",
        help="train a tokenizer on text files",
        description="Train a tokenizer.",
        epilog=TRAIN_EPILOG,
        formatter_class=raw,
    )
    _add_input(train, required=True)
    train.add_argument(
        "--kind", choices=("sentencepiece", "huggingface"), required=True, help="BPE with byte fallback, or byte-level BPE"
    )
    train.add_argument(
        "--vocab-size", type=int, required=True, metavar="N", help="entries, special tokens included; met exactly"
    )
    train.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder to write")
    train.add_argument(
        "--max-mb",
        type=float,
        default=TRAIN_MAX_MB,
        metavar="MB",
        help=f"text to train on, from the beginning of every file in proportion to its size (default: {TRAIN_MAX_MB:g})",
    )
    report = actions.add_parser(
        "report",
        help="tokens per word, bytes per token, byte fallback",
        description="Measure how well tokenizers fit a text, per category and language.",
        epilog=REPORT_EPILOG,
        formatter_class=raw,
    )
    report.add_argument(
        "--tokenizer",
        nargs="+",
        action="extend",
        type=Path,
        metavar="PATH",
        help=".model files or folders with tokenizer.json (default with a recipe: the one in its data root)",
    )
    _add_input(report, required=False)
    report.add_argument(
        "--category-key", metavar="KEY", help="key of a line that names its category (default: the name of its file)"
    )
    report.add_argument(
        "--language-key", metavar="KEY", help="key of a line that names its language (default: py3langid finds it)"
    )
    report.add_argument(
        "--max-mb",
        type=float,
        default=REPORT_MAX_MB,
        metavar="MB",
        help=f"text to measure, spread evenly over files or sources (default: {REPORT_MAX_MB:g})",
    )
    report.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    add_recipe_arguments(report, "curriculum=smoke")
    return parser


def _add_input(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--input",
        nargs="+",
        action="extend",
        required=required,
        metavar="GLOB",
        help="JSON lines (plain, .gz, .zst) or Parquet; quote patterns",
    )
    parser.add_argument("--text-key", default="text", metavar="KEY", help="key or column of the text (default: text)")


def run(args: argparse.Namespace) -> int:
    """Returns 0; DataError (exit code 2) for what cannot be read or trained."""
    return _train(args) if args.action == "train" else _report(args)


def _positive(value: float, option: str) -> int:
    """Bytes of a size in MB."""
    from data_prep.errors import DataError

    if not 0 < value < float("inf"):
        raise DataError(f"{option} is {value:g}; give a size above 0")
    return int(value * 1e6)


@dataclass
class LeftOut:
    """Lines that are no documents, in what was read; tokenizing lists them all."""

    lines: int = 0
    first: str = ""

    def tell(self, progress: Progress) -> None:
        if self.lines:
            progress.message(f"left out: {self.lines:,} lines that are no documents, the first: {self.first}")


def _texts(path: Path, text_key: str, left_out: LeftOut, columns: Sequence[str] = ()) -> Iterator[Text]:
    """Documents of a file."""
    from data_prep.text_files import Text, read_documents

    for document in read_documents(path, text_key, columns=columns):
        if isinstance(document, Text):
            yield document
        elif not document.empty:
            left_out.first = left_out.first or f"{document.file}, line {document.line}: {document.reason}"
            left_out.lines += 1


def training_texts(paths: list[Path], text_key: str, max_bytes: int, left_out: LeftOut) -> Iterator[str]:
    """Text from the beginning of each file, in proportion to the sizes of the files, `max_bytes` in all."""
    from data_prep.tokenizer_training import sample

    sizes = [path.stat().st_size for path in paths]
    for path, size in zip(paths, sizes, strict=True):
        yield from sample(
            (document.text for document in _texts(path, text_key, left_out)), max_bytes * size // max(1, sum(sizes))
        )


def _shown(texts: Iterable[str], progress: Progress, max_bytes: int) -> Iterator[str]:
    """The texts, with a bar while they are read."""
    with progress.step("read text", max_bytes) as done:
        for text in texts:
            done(len(text.encode()))
            yield text
    progress.message("counting words and merging pairs ...")


def _train(args: argparse.Namespace) -> int:
    import sys
    import time

    from data_prep.progress import Shown
    from data_prep.text_files import expand
    from data_prep.tokenizer import load_tokenizer, write_hf_tokenizer
    from data_prep.tokenizer_training import train

    paths, max_bytes = expand(args.input, "--input"), _positive(args.max_mb, "--max-mb")
    progress = Shown()
    target = args.output / "tokenizer.model" if args.kind == "sentencepiece" else args.output
    started = time.monotonic()
    left_out = LeftOut()
    texts = _shown(training_texts(paths, args.text_key, max_bytes, left_out), progress, max_bytes)
    train(texts, args.kind, args.vocab_size, target, show_progress=sys.stderr.isatty())
    left_out.tell(progress)
    made = load_tokenizer(target, args.kind)
    if args.kind == "sentencepiece":
        write_hf_tokenizer(made, args.output / "hf")
    progress.message(
        f"{target}: {made.vocab_size:,} entries, {len(made.special_ids)} of them special, documents end with {made.eod_id}, "
        f"sha256 {made.digest[:12]}...; {time.monotonic() - started:.1f} s"
    )
    return 0


def _report(args: argparse.Namespace) -> int:
    from data_prep.errors import DataError
    from data_prep.fertility import measure
    from data_prep.files import write_json
    from data_prep.progress import Shown
    from data_prep.sources import threads

    if bool(args.input) == bool(args.overrides):
        raise DataError("give either --input with files or a recipe such as curriculum=smoke")
    if args.input and not args.tokenizer:
        raise DataError("--tokenizer is missing: name the tokenizers to measure")
    max_bytes = _positive(args.max_mb, "--max-mb")
    progress, left_out = Shown(), LeftOut()
    documents, default = _of_recipe(args, max_bytes) if args.overrides else (_of_files(args, max_bytes, left_out), [])
    tokenizers = _load(args.tokenizer or default)
    with progress.step("encode", None) as done:
        report = measure(documents, tokenizers, threads(), done)
    left_out.tell(progress)
    if not report.rows:
        raise DataError(f"no documents were found under the key '{args.text_key}'; name it with --text-key")
    show(report)
    if args.json:
        write_json(args.json, report.as_json())
    return 0


def _load(paths: list[Path]) -> dict[str, Tokenizer]:
    """Tokenizers by the shortest names that tell them apart: of the folder or file, else the path."""
    from data_prep.tokenizer import load_tokenizer

    found = {path: load_tokenizer(path) for path in dict.fromkeys(paths)}
    short = {
        path: path.resolve().parent.name if path.name in ("tokenizer.model", "tokenizer.json") else path.stem for path in found
    }
    names = list(short.values())
    return {(name if names.count(name) == 1 else str(path)): found[path] for path, name in short.items()}


def _of_files(args: argparse.Namespace, max_bytes: int, left_out: LeftOut) -> Iterator[Labelled]:
    """Documents of the files, each with its own share of the bytes; labels from their keys, the file's name or py3langid."""
    from data_prep.fertility import Labelled, language_of
    from data_prep.text_files import expand

    paths = expand(args.input, "--input")
    columns = [key for key in (args.category_key, args.language_key) if key]
    for path in paths:
        for document in _within(_texts(path, args.text_key, left_out, columns), max_bytes // len(paths)):
            record = document.record or {}
            category = record.get(args.category_key) if args.category_key else path.name.split(".")[0]
            language = record.get(args.language_key) if args.language_key else language_of(document.text)
            yield Labelled(document.text, str(category), str(language))


def _of_recipe(args: argparse.Namespace, max_bytes: int) -> tuple[Iterator[Labelled], list[Path]]:
    """Documents of a recipe's sources by category, and the tokenizer of its data root where there is one."""
    from data_prep.errors import DataError
    from data_prep.fertility import Labelled, language_of
    from data_prep.records import TokenizerFile
    from data_prep.sources import corpus_path, documents
    from data_prep.text_files import Text
    from recipes.compose import compose

    recipe = compose(args.overrides, args.config_dir)
    root = Path(recipe.data.root)
    sources = {name: source for name, source in recipe.data.sources.items() if source.kind != "indexed"}
    missing = [name for name, source in sources.items() if source.kind == "builtin" and not corpus_path(root, name).is_file()]
    record = TokenizerFile.read_if_valid(root / "tokenizer" / "record.json")
    if missing or (record is None and not args.tokenizer):
        what = f"no text of {', '.join(missing)}" if missing else "no tokenizer"
        raise DataError(f"{root} has {what} yet; run `quarry prep {' '.join(args.overrides)}` first")

    def labelled() -> Iterator[Labelled]:
        for name, source in sources.items():
            found = (document for document in documents(root, name, source) if isinstance(document, Text))
            for document in _within(found, max_bytes // len(sources)):
                yield Labelled(document.text, source.category, language_of(document.text))

    return labelled(), [root / record.path] if record else []


def _within(documents: Iterable[Any], max_bytes: int) -> Iterator[Any]:
    """Documents from the beginning, up to `max_bytes` of text; at least one."""
    size = 0
    for document in documents:
        size += len(document.text.encode())
        if size > max_bytes and size > len(document.text.encode()):
            return
        yield document


def show(report: Report) -> None:
    """A table on the terminal: rows by category and language, columns by tokenizer."""
    from rich.console import Console
    from rich.table import Table

    from data_prep.fertility import shares

    console = Console(highlight=False, width=None if Console().is_terminal else 160)
    names = list(report.vocabularies)
    letters = [chr(ord("A") + place) for place in range(len(names))] if len(names) > 1 else [""]
    for letter, name in zip(letters, names, strict=True):
        entries = f"{report.used[name]:,} of {report.vocabularies[name]:,} entries occur in this text"
        console.print(f"{letter + ': ' if letter else ''}{name}, {entries}", soft_wrap=True, markup=False)
    table = Table()
    for heading in ("category", "language"):
        table.add_column(heading, no_wrap=True)
    for heading in ("docs", "MB", *(f"{what}\n{letter}".rstrip() for what, *_ in COLUMNS for letter in letters)):
        table.add_column(heading, justify="right")

    def line(row: Row, category: str, style: str | None = None) -> None:
        numbers = {name: row.figures(name) for name in names}
        cells = [_number(numbers[name][key], digits) for _, key, digits in COLUMNS for name in names]
        table.add_row(category, row.language, f"{row.documents:,}", f"{row.text_bytes / 1e6:.2f}", *cells, style=style)

    last = None
    *totals, everything = report.totals()
    for row in shares(report.rows, SMALL_SHARE):
        if row.category != last and last is not None:
            table.add_section()
        line(row, row.category if row.category != last else "")
        last = row.category
    table.add_section()
    for row in totals:
        line(row, row.category)
    table.add_section()
    line(everything, "all", style="bold")
    console.print(table)


COLUMNS = (
    ("tokens/word", "tokens_per_word", 2),
    ("bytes/token", "bytes_per_token", 2),
    ("byte %", "byte_token_percent", 3),
    ("unk %", "unknown_percent", 3),
)
"""Heading, key of Row.figures, digits."""


def _number(value: float | int | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
