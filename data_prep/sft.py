"""Chat samples -> the packed data set of an SFT stage.

    python -m data_prep.sft --recipe runs/smoke/recipe.json --stage sft

Three steps, each cheap to do again: every input file is rendered to tokens and masks (on all cores; a file that is done is kept), some
samples of each source are held out by the hash of their tokens, and the rest is packed into sequences. Nothing is read twice, and
no step holds more than a few numbers per sample. What was refused is counted by reason and lies beside the tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from data_prep.errors import DataError
from data_prep.files import atomic_write, digest_of, exclusive_lock, record_file, remove_leftovers
from data_prep.manifest import TokenizerRecord
from data_prep.progress import Progress, Shown, Silent
from data_prep.sft_builtin import build
from data_prep.sft_files import render_file
from data_prep.sft_manifest import Packs, SampleFile, SampleStore, SftManifest, manifest_path, packs_prefix
from data_prep.sft_packing import Packing, pack
from data_prep.sft_render import Renderer
from data_prep.text_files import expand
from data_prep.tokenizer import Tokenizer, load_tokenizer, write_hf_tokenizer
from recipes.schema import Recipe, RecipeError
from recipes.sft_options import Sft

HASH_SPACE = 2.0**64
SHOWN_REASONS = 5
BYTES_PER_WORKER = 16_000_000
"""Of files to render: a worker process imports transformers first, which takes as long as rendering some of these."""


def prepare_sft(
    sft: Sft, stage: str, data_root: Path, tokenizer: TokenizerRecord, *, workers: int = 1, progress: Progress | None = None
) -> SftManifest:
    """Make, or complete, the data set of `stage` below `data_root`, and return its manifest; DataError says what is wrong."""
    progress = progress or Silent()
    say = progress.message
    folder = data_root / "sft" / stage
    with exclusive_lock(folder / ".lock", lambda holder: say(f"waiting for process {holder}, which prepares the same data")):
        remove_leftovers(folder)
        loaded = load_tokenizer(data_root / tokenizer.path, tokenizer.kind)
        hf_folder = _hf_folder(loaded, folder)
        template = Path(sft.chat_template) if sft.chat_template is not None else None
        sources = _render(sft, data_root, stage, hf_folder, template, workers, progress)
        renderer = _renderer(hf_folder, template)
        inputs = digest_of(
            {
                "files": [file.inputs for files in sources.values() for file in files],
                "sources": {name: len(files) for name, files in sources.items()},
                "sft": sft.model_dump(
                    mode="json", include={"seq_length_tokens", "too_long", "heldout_percent", "heldout_max_samples"}
                ),
                "multiple": sft.multiple_tokens,
                "tokenizer": tokenizer.model_dump(mode="json"),
            }
        )
        path = manifest_path(data_root, stage)
        if path.exists():
            old = SftManifest.read(path)
            if old.inputs == inputs and [file.files for file in old.files] == [f.files for fs in sources.values() for f in fs]:
                old.verify(data_root)
                say(f"sft data '{stage}': nothing to do")
                return old
            path.unlink()  # what follows replaces files that it vouches for
        return _pack(sft, stage, data_root, tokenizer, renderer.pad_id, sources, inputs, say)


def _hf_folder(tokenizer: Tokenizer, folder: Path) -> Path:
    """What transformers loads: a Hugging Face tokenizer's own folder, or a SentencePiece model written as one."""
    if tokenizer.kind == "huggingface":
        return tokenizer.path
    write_hf_tokenizer(tokenizer, folder / "tokenizer")
    return folder / "tokenizer"


def _render(
    sft: Sft, data_root: Path, stage: str, hf_folder: Path, template: Path | None, workers: int, progress: Progress
) -> dict[str, list[SampleFile]]:
    """Records of every input file by source; refuses a source of which too much was refused."""
    say, jobs = progress.message, []
    _renderers.clear()  # what an earlier call left may be of files that have changed
    for name, source in sorted(sft.sources.items()):  # the manifest's order, which numbers the samples
        if not name.replace("_", "").replace("-", "").isalnum():
            raise DataError(f"sft.{stage}.sources: '{name}' becomes a folder's name; use letters, digits, - and _")
        if source.builder is not None:
            paths = [build(source.builder, source.max_samples or 0, data_root / "sft" / stage / "built")]
        else:
            paths = expand(source.paths, f"sft.{stage}.sources.{name}.paths")
        if source.judge is not None:
            from data_prep.sft_judged import judged_paths  # an HTTP client and more that samples taken as they are do without

            folder = data_root / "sft" / stage / "judged" / name
            paths = judged_paths(paths, source.judge, folder, f"sft.{stage}.sources.{name}", progress)
            if not any(path.stat().st_size for path in paths):
                say(f"sft data '{stage}', {name}: the judge left nothing of it")
                continue
        for number, path in enumerate(paths):
            prefix = f"sft/{stage}/samples/{name}/{number:05d}"
            jobs.append(
                (name, (path, data_root, prefix, hf_folder, template, tuple(sft.allowed_tokens), tuple(sft.ignored_keys)))
            )
    workers = min(workers, len(jobs), 1 + sum(arguments[0].stat().st_size for _, arguments in jobs) // BYTES_PER_WORKER)
    if workers > 1:
        # spawn: the tokenizer's threads do not survive a fork
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            records = list(pool.map(_render_one, (arguments for _, arguments in jobs)))
    else:
        records = [_render_one(arguments) for _, arguments in jobs]
    sources: dict[str, list[SampleFile]] = {}
    for (name, _), record in zip(jobs, records, strict=True):
        sources.setdefault(name, []).append(record)
    for name, files in sources.items():
        read, samples = sum(f.read for f in files), sum(f.samples for f in files)
        reasons = sum((Counter(f.refused) for f in files), Counter())
        worst = ", ".join(f"{kind} {count}" for kind, count in reasons.most_common(SHOWN_REASONS))
        say(f"sft data '{stage}', {name}: {samples} of {read} samples" + (f"; refused: {worst}" if worst else ""))
        refused = sum(reasons.values())
        if not samples or 100 * refused > sft.max_refused_percent * read:
            raise DataError(
                f"sft.{stage}.sources.{name}: {refused} of {read} samples are refused ({worst or 'the files are empty'}), more than "
                f"max_refused_percent = {sft.max_refused_percent:g}; each with its reason in {data_root / files[0].prefix}.refused.jsonl; "
                "mend the samples, or raise max_refused_percent"
            )
    return sources


_renderers: dict[tuple[Path, Path | None], Renderer] = {}
"""Of this process, the last one: loading a tokenizer takes a second."""


def _renderer(hf_folder: Path, template: Path | None) -> Renderer:
    if (hf_folder, template) not in _renderers:
        _renderers.clear()
        _renderers[hf_folder, template] = Renderer(hf_folder, template)
    return _renderers[hf_folder, template]


def _render_one(arguments: tuple[Path, Path, str, Path, Path | None, tuple[str, ...], tuple[str, ...]]) -> SampleFile:
    path, data_root, prefix, hf_folder, template, allowed, ignored = arguments
    return render_file(path, data_root, prefix, _renderer(hf_folder, template), allowed, ignored)


def _pack(
    sft: Sft,
    stage: str,
    data_root: Path,
    tokenizer: TokenizerRecord,
    pad_id: int,
    sources: dict[str, list[SampleFile]],
    inputs: str,
    say: Callable[[str], None],
) -> SftManifest:
    """Hold out, pack, and write the manifest last."""
    draft = SftManifest.model_construct(
        stage=stage, sources=sources, seq_length_tokens=sft.seq_length_tokens, multiple_tokens=sft.multiple_tokens
    )
    store = SampleStore(draft, data_root)
    lengths, table = store.lengths, store.table()
    usable = lengths <= sft.seq_length_tokens
    if sft.too_long == "cut":
        usable |= table["first_loss"] < sft.seq_length_tokens  # something learned is left
    source_of = np.repeat(np.arange(len(sources)), [sum(f.samples for f in files) for files in sources.values()])
    too_long = {name: int((lengths[source_of == number] > sft.seq_length_tokens).sum()) for number, name in enumerate(sources)}
    held = np.zeros(len(lengths), dtype=bool)
    heldout: dict[str, Packs] = {}
    for number, name in enumerate(sources):
        mine = np.flatnonzero((source_of == number) & usable)
        chosen = mine[_held_out(table["hash"][mine], sft.heldout_percent, sft.heldout_max_samples)]
        held[chosen] = True
        if len(chosen):
            heldout[name] = _write_packs(f"heldout.{name}", chosen, sft, stage, data_root, store, table)
    copies = ~held & np.isin(table["hash"], table["hash"][held])  # of held-out samples of another source
    trained = np.flatnonzero(usable & ~held & ~copies)
    if not len(trained):
        raise DataError(
            f"sft.{stage}: no sample is left to train on ({len(lengths)} rendered, {sum(too_long.values())} longer than "
            f"{sft.seq_length_tokens} tokens, {int(held.sum())} held out); give more samples or a longer seq_length_tokens"
        )
    if sft.heldout_percent and not heldout:
        raise DataError(
            f"sft.{stage}.heldout_percent = {sft.heldout_percent:g} holds out none of {len(lengths)} samples; raise it, or set it to 0"
        )
    training = _write_packs("train", trained, sft, stage, data_root, store, table)
    manifest = SftManifest.make(
        stage=stage,
        seq_length_tokens=sft.seq_length_tokens,
        multiple_tokens=sft.multiple_tokens,
        too_long=sft.too_long,
        tokenizer=tokenizer,
        pad_id=pad_id,
        sources=sources,
        too_long_samples=too_long,
        heldout_copies=int((usable & copies).sum()),
        training=training,
        heldout=heldout,
        inputs=inputs,
    )
    manifest.write(manifest_path(data_root, stage))
    verb = "cut" if sft.too_long == "cut" else "left out"
    say(
        f"sft data '{stage}': {training.samples} samples in {training.sequences} sequences of {sft.seq_length_tokens} tokens, "
        f"{training.utilisation_percent:.2f}% used, {training.learned_tokens} tokens learned per epoch; "
        f"{int(held.sum())} samples held out, {manifest.heldout_copies} copies of them left out, {sum(too_long.values())} too long ({verb})"
    )
    return manifest


def _held_out(hashes: np.ndarray, percent: float, most: int) -> np.ndarray:
    """Which samples (bool [N]) are held out: the smallest hashes, so that equal samples are on the same side."""
    below = hashes.astype(np.float64) < percent / 100 * HASH_SPACE
    if below.sum() > most:
        cut = np.sort(hashes[below])[most]
        below &= hashes < cut
    return below


def _write_packs(
    name: str, numbers: np.ndarray, sft: Sft, stage: str, data_root: Path, store: SampleStore, table: np.ndarray
) -> Packs:
    length = sft.seq_length_tokens
    whole = store.lengths[numbers]
    taken = np.minimum(whole, length)
    packing = pack(taken, length, sft.multiple_tokens)
    learned = int(table["learned"][numbers][whole <= length].sum())
    learned += sum(int(store.sample(int(n))[1][1:].sum()) for n in numbers[whole > length])
    packing = Packing(packing.bounds, numbers[packing.samples])
    files = {}
    for suffix, array in ((".bounds.npy", packing.bounds), (".samples.npy", packing.samples)):
        path = packs_prefix(data_root, stage, name, suffix)
        with atomic_write(path) as f:
            np.save(f, array, allow_pickle=False)
        files[suffix] = record_file(path)
    tokens = int(taken.sum(dtype=np.int64))
    return Packs(
        name=name,
        sequences=len(packing),
        samples=len(numbers),
        tokens=tokens,
        learned_tokens=learned,
        utilisation_percent=round(100 * tokens / (len(packing) * length), 4),
        cut_samples=int((whole > length).sum()),
        files=files,
    )


def tokenizer_of(data_root: Path) -> TokenizerRecord:
    """The tokenizer that `quarry prep` made or found for the phases' data."""
    from data_prep.manifest import HeldoutManifest, heldout_path

    return HeldoutManifest.read(heldout_path(data_root)).tokenizer


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.sft", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, required=True, help="resolved recipe (recipe.json)")
    parser.add_argument("--stage", required=True)
    parser.add_argument("--workers", type=int, default=1, help="processes that render files (default 1)")
    options = parser.parse_args(argv)
    try:
        recipe = Recipe.read(options.recipe)
        if recipe.stage_kind(options.stage) != "sft":
            raise RecipeError(f"stage '{options.stage}' is a {recipe.stage_kind(options.stage)}, not an sft")
        root = Path(recipe.data.root)
        prepare_sft(
            recipe.sft[options.stage], options.stage, root, tokenizer_of(root), workers=options.workers, progress=Shown()
        )
    except (RecipeError, DataError) as error:
        print(f"refused: {error}", file=sys.stderr)
        return 78
    return 0


if __name__ == "__main__":
    sys.exit(main())
