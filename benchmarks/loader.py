"""Samples and tokens per second of the loader of a phase with a null model: Megatron's blended data set over views, by length.

Four sources of generated documents (log-normal lengths around 1,000 tokens) in the page cache, an index cache built ahead as `quarry prep`
does, then what a rank does without a model: Megatron's sampler, samples of the mixed views, collation, in this process. A rank needs the
tokens of its model replica, so the hardest case is one replica on a node: every rank reads all that the node trains on. What it is compared
with is such a node at NVIDIA's published speed of Llama 3 8B (H100, FP8, 8K: 14.4K tokens/s/GPU).

CPU seconds are given too: on a machine that others use they say more than the clock.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

LENGTHS = (4_096, 8_192, 32_768, 131_072, 524_288)
NODE_TOKENS_PER_SECOND = 8 * 14_400
"""[published: NVIDIA NeMo, Llama 3 8B on H100 in FP8 at 8K; see docs/benchmarks.md]"""
VOCAB = 100_352
SHARES = {"web": 50.0, "code": 25.0, "math": 15.0, "domain": 10.0}
MEDIAN_DOCUMENT_TOKENS = 600
"""Of the log-normal lengths, whose sigma of 1 makes the mean 1.65 times as long."""
EPILOG = """example:
  python -m benchmarks.loader --lengths 4096 8192 --markdown /tmp/loader.md
"""


def write_views(root: Path, tokens: int) -> dict[str, tuple[int, int]]:
    """Views of random tokens below `root`; returns {source: (documents, tokens)}."""
    from data_prep.indexed import Writer

    rng = np.random.default_rng(1)
    made = {}
    (root / "views").mkdir(parents=True)
    for source, share in SHARES.items():
        wanted, lengths = int(tokens * share / 100), []
        with Writer(root / "views" / source, VOCAB) as writer:
            while wanted > 0:
                length = int(np.clip(rng.lognormal(np.log(MEDIAN_DOCUMENT_TOKENS), 1.0), 16, 200_000))
                writer.add(rng.integers(0, VOCAB, length, dtype=np.int32))
                lengths.append(length)
                wanted -= length
        made[source] = (len(lengths), sum(lengths))
    return made


def manifest(root: Path, made: dict[str, tuple[int, int]], length: int, samples: int):
    from data_prep.files import record_file
    from data_prep.indexed import bin_path, idx_path
    from data_prep.manifest import MixtureManifest, TokenizerRecord, ViewSource

    sources = {}
    for source, (documents, tokens) in made.items():
        prefix = f"views/{source}"
        planned = round(samples * length * SHARES[source] / 100)
        sources[source] = ViewSource(
            prefix=prefix,
            documents=documents,
            max_token_id=VOCAB - 1,
            dtype="int32",
            bin=record_file(bin_path(root / prefix)),
            idx=record_file(idx_path(root / prefix)),
            category=source,
            share_percent=SHARES[source],
            weight=SHARES[source] / 100,
            tokens_available=tokens,
            tokens_planned=planned,
            epochs=planned / tokens,
        )
    tokenizer = TokenizerRecord(kind="huggingface", path="tokenizer", sha256="0" * 64, vocab_size=VOCAB, eod_id=0)
    return MixtureManifest.make(
        phase=f"at_{length}", seed=7, seq_length_tokens=length, samples=samples, tokens=samples * length, recipe={},
        inputs="0" * 64, tokenizer=tokenizer, sources=sources)  # fmt: skip


def measure(root: Path, made: dict[str, tuple[int, int]], length: int, seconds: float, *, documents_apart: bool) -> dict:
    """Tokens per second of the clock and of this process's CPU, and the milliseconds until the first sample."""
    from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
    from torch.utils.data import DataLoader

    from training.blend import blended

    total = sum(tokens for _, tokens in made.values())
    samples = total // length - 8 * len(made)  # each source gives at least its share, rounded up
    plan = manifest(root, made, length, samples)
    cache = root / "cache" / f"{length}"
    if not cache.exists():
        cache.mkdir(parents=True)
        blended(plan, root, cache, build=True)
    began = time.perf_counter()
    dataset = blended(plan, root, cache, build=False, documents_apart=documents_apart)
    sampler = MegatronPretrainingSampler(
        total_samples=len(dataset), consumed_samples=0, micro_batch_size=1, data_parallel_rank=0, data_parallel_size=1
    )
    batches = iter(DataLoader(dataset, batch_sampler=sampler, num_workers=0))
    next(batches)
    first_ms = (time.perf_counter() - began) * 1e3
    count, wall, cpu = 0, time.perf_counter(), time.process_time()
    slowest = 0.0
    while time.perf_counter() - wall < seconds:
        before = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            break
        slowest = max(slowest, time.perf_counter() - before)
        assert batch["tokens"].shape == (1, length)
        count += 1
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "length": length,
        "apart": documents_apart,
        "samples": count,
        "samples_per_second": count / wall,
        "tokens_per_second": count * length / wall,
        "tokens_per_cpu_second": count * length / cpu,
        "times_node": count * length / cpu / NODE_TOKENS_PER_SECOND,
        "first_ms": first_ms,
        "slowest_ms": slowest * 1e3,
    }


def table(rows: Sequence[dict]) -> str:
    lines = [
        "| length | documents | samples | samples/s | tokens/s | tokens per CPU second | times a node's need | opened, first sample |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['length']:,} | {'apart' if r['apart'] else 'one stream'} | {r['samples']:,} | {r['samples_per_second']:,.1f} "
        f"| {r['tokens_per_second'] / 1e6:.2f}M | {r['tokens_per_cpu_second'] / 1e6:.2f}M | {r['times_node']:.0f} "
        f"| {r['first_ms']:.0f} ms |"
        for r in rows
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loader",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), metavar="TOKENS")
    parser.add_argument("--tokens", type=float, default=64e6, help="in all views together (default: 64e6, 256 MB)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement (default: 5)")
    parser.add_argument("--folder", type=Path, help="where the views are made (default: a temporary folder)")
    parser.add_argument("--markdown", type=Path, help="also write the table there")
    options = parser.parse_args(argv)
    longest = max(options.lengths)
    if options.tokens < 40 * longest:
        parser.error(f"--tokens {options.tokens:g}: at least 40 samples of the longest length, {40 * longest:,} tokens")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from training.one_rank import import_megatron_on

    import_megatron_on("cpu")
    with tempfile.TemporaryDirectory(prefix="loader-", dir=options.folder) as folder:
        root = Path(folder)
        made = write_views(root, int(options.tokens))
        rows = []
        for length in options.lengths:
            for apart in (False, True):
                rows.append(measure(root, made, length, options.seconds, documents_apart=apart))
                print(table(rows[-1:]).splitlines()[-1], flush=True)
    text = table(rows)
    print(text)
    worst = min(row["times_node"] for row in rows)
    print(
        f"the slowest reads {worst:.0f} times what a node of eight H100 trains on ({NODE_TOKENS_PER_SECOND:,} tokens/s), on one core"
    )
    if options.markdown:
        options.markdown.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
