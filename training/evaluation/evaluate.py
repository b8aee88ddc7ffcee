"""One evaluation from request to results: each part is kept when it is done, results.json and results.md come last and whole.

A part that was measured before, of the same model with the same options, is not measured again: after a kill, run the same command.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_prep.files import digest_of, write_bytes, write_json
from training.evaluation import harness, heldout, retrieval, table
from training.evaluation.errors import EvaluationError
from training.evaluation.progress import Progress
from training.evaluation.request import PARTS, NeedleOptions, Request
from training.evaluation.source import Source, find
from training.evaluation.suite import Run, Suite, load_suite, single_task, suites
from training.versions import versions

FORMAT = "quarry.evaluation/1"


def evaluate(request: Request, progress: Progress) -> dict[str, Any]:
    """Measure what `request` asks for, write results.json and results.md to its output, and return results.json.

    Everything that can be refused is refused before anything is measured. Raises EvaluationError, ModelError or DataError.
    """
    lists = _lists(request.tasks)
    wanted = _wanted(lists, request.skip)
    _check_output(request)
    if lists:
        python = harness.find_python(request.lm_eval)
    source = find(request.model, request.output)
    previous = request.output / "results.json"
    if previous.is_file() and json.loads(previous.read_bytes())["model"]["sha256"] != source.digest:
        raise EvaluationError(f"--output {request.output}: results.json is of another model; name another folder or remove it")
    if "heldout" in request.tasks:
        root, manifest = heldout.manifest_for(source, request.heldout_data)
    if "needle" in request.tasks:
        retrieval.lengths_for(request.needle, source.max_position_tokens)
    if lists:
        tools = harness.Harness(python, request.output / "lm-eval" / "tasks")
        harness.write_task_files(tools.include, request.include_path)
        _check_chat_template(source, lists)
        progress.message(f"lm-eval {harness.VERSION}: looking for {len(wanted)} tasks and their data, offline")
        harness.probe(tools, [run.task for _, _, run in wanted], request.run_generated_code)

    from training.evaluation import scoring

    device, dtype = scoring.choose(request.device, source.config.get("dtype") or source.config.get("torch_dtype"))
    parts = _Parts(request.output / "parts", {"model": source.digest, "device": device, "dtype": dtype}, progress)
    results: dict[str, Any] = {
        "format": FORMAT,
        "model": source.describe(),
        "device": device,
        "dtype": dtype,
        "versions": versions() | {"transformers": _version("transformers")},
        "heldout": None,
        "needle": None,
        "harness": {},
    }
    loaded: list[Any] = []

    def network() -> Any:
        if not loaded:
            loaded.append(scoring.load(source.hf, device, dtype))
        return loaded[0]

    if "heldout" in request.tasks:
        samples = heldout.samples_for(source, request.heldout_samples)
        key = {
            "heldout": manifest.digest,
            "samples": samples,
            "checkpoint": None if source.checkpoint is None else source.digest,
        }
        results["heldout"] = parts.get(
            "heldout", key, lambda: _heldout(source, root, manifest, samples, device, dtype, network, progress)
        )
    if "needle" in request.tasks:
        results["needle"] = _needle(source, request.needle, parts, network, progress)
    loaded.clear()  # lm-eval loads the model itself: there may be no room for two
    rows = []
    with progress.part("benchmarks", len(wanted)) as done:
        for suite in lists:
            measured = {}
            for _, name, run in (one for one in wanted if one[0] is suite):
                key = {"run": run.model_dump(), "limit": request.limit, "chat_template": suite.chat_template}

                def measure(run: Any = run, suite: Suite = suite, name: str = name) -> dict[str, Any]:
                    return harness.run_benchmark(
                        tools,
                        run,
                        model=source.hf,
                        device=device,
                        dtype=dtype,
                        batch_size=request.batch_size,
                        chat_template=suite.chat_template,
                        run_code=request.run_generated_code,
                        limit=request.limit,
                        log=request.output / "lm-eval" / f"{suite.name}.{name}.log",
                        message=progress.message,
                    )

                measured[name] = parts.get(f"{suite.name}.{name}", key, measure)
                done(1)
            results["harness"][suite.name] = measured
            rows += table.rows(suite, measured, request.skip)
    results["benchmarks"] = table.as_dicts(rows)
    write_bytes(request.output / "results.md", table.markdown(results).encode())
    write_json(previous, results)
    return results


def _lists(tasks: list[str]) -> list[Suite]:
    """The lists of benchmarks that `tasks` names beside the parts; a name that is no list is a task of lm-eval's own."""
    if not tasks:
        raise EvaluationError(f"--tasks is empty; use {', '.join((*PARTS, *suites()))} or a task of lm-eval")
    if len(set(tasks)) != len(tasks):
        raise EvaluationError(f"--tasks {' '.join(tasks)}: one is named twice")
    bad = [name for name in tasks if not name.replace("_", "").replace("-", "").replace("+", "").isalnum()]
    if bad:
        raise EvaluationError(f"--tasks {bad[0]!r} is no name; use {', '.join((*PARTS, *suites()))} or a task of lm-eval")
    return [load_suite(name) if name in suites() else single_task(name) for name in tasks if name not in PARTS]


def _wanted(lists: list[Suite], skip: list[str]) -> list[tuple[Suite, str, Run]]:
    """(list, benchmark, how it is run) of everything that lm-eval is to measure."""
    names = {name for suite in lists for name in suite.run}
    if unknown := [name for name in skip if name not in names]:
        raise EvaluationError(
            f"--skip {unknown[0]}: no benchmark of these tasks; there are {', '.join(sorted(names)) or 'none'}"
        )
    return [(suite, name, run) for suite in lists for name, run in suite.run.items() if name not in skip]


def _check_chat_template(source: Source, lists: list[Suite]) -> None:
    named = [suite.name for suite in lists if suite.chat_template]
    path = source.hf / "tokenizer_config.json"
    inside = path.is_file() and json.loads(path.read_bytes()).get("chat_template")
    if named and not inside and not (source.hf / "chat_template.jinja").is_file():
        raise EvaluationError(
            f"{named[0]}: {source.hf} has no chat template; it is for instruct models, use granite_4_1_base for others"
        )


def _check_output(request: Request) -> None:
    if request.output.exists() and not request.output.is_dir():
        raise EvaluationError(f"--output {request.output} is a file; name a folder")
    if request.output.resolve() == request.model.resolve():
        raise EvaluationError(f"--output {request.output} is the model's own folder; name another one")
    request.output.mkdir(parents=True, exist_ok=True)


class _Parts:
    """Results of parts in files of their own, each with the digest of what it depends on."""

    def __init__(self, folder: Path, common: dict[str, Any], progress: Progress) -> None:
        self._folder, self._common, self._progress = folder, common, progress

    def get(self, name: str, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path, digest = self._folder / f"{name}.json", digest_of({**self._common, **key})
        if path.is_file():
            stored = json.loads(path.read_bytes())
            if stored["key"] == digest:
                self._progress.message(f"{name}: measured before ({path})")
                return stored["result"]
        result = measure()
        write_json(path, {"key": digest, "result": result})
        return result


def _heldout(
    source: Source,
    root: Path,
    manifest: Any,
    samples: int,
    device: str,
    dtype: str,
    network: Callable[[], Any],
    progress: Progress,
) -> dict[str, Any]:
    megatron = None
    if source.checkpoint is not None:
        progress.message("held-out loss by Megatron, from the checkpoint")
        megatron = heldout.from_megatron(source, root, samples, device, dtype)
    length = manifest.seq_length_tokens
    most = sum(min(samples, max(0, held.tokens - 1) // length) for held in manifest.categories.values()) * length
    with progress.part("held-out loss, transformers", most) as done:
        ours = heldout.from_transformers(network(), root, manifest, samples, done)
    return {
        "megatron": megatron,
        "transformers": ours,
        "agreement": None if megatron is None else heldout.compare(megatron, ours, dtype),
        "manifest": manifest.digest,
        "samples": samples,
        "seq_length_tokens": length,
    }


def _needle(
    source: Source, options: NeedleOptions, parts: _Parts, network: Callable[[], Any], progress: Progress
) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from training.evaluation import scoring

    if not (source.hf / "tokenizer.json").is_file() and not (source.hf / "tokenizer_config.json").is_file():
        raise EvaluationError(f"needle: {source.hf} has no tokenizer; add its files, or leave needle out of --tasks")
    tokenizer = AutoTokenizer.from_pretrained(source.hf, trust_remote_code=False, local_files_only=True)
    common = options.model_dump(mode="json", exclude={"lengths_tokens", "depths_percent"})

    def keep(length: int, percent: float, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return parts.get(f"needle.{length}.{percent:g}", {**common, "length": length, "depth": percent}, measure)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    total = retrieval.total_tokens(options, source.max_position_tokens)
    with progress.part("needle", total) as done:
        return retrieval.run(
            options,
            source.max_position_tokens,
            _texts,
            encode,
            lambda prompt, candidates: scoring.score(network(), prompt, candidates),
            done,
            keep,
        )


def _texts() -> Iterator[str]:
    """The language reference, then pages of the standard library's modules: in every installation of the pinned Python."""
    from data_prep.corpus.prose import stdlib_docstrings

    return (document.text for document in stdlib_docstrings())


def _version(name: str) -> str:
    from importlib.metadata import version

    return version(name)
