"""A small corpus with copies, cleaned by `quarry clean` as jobs of the bench's Slurm and in this process, for comparison."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tests.slurm.bench import HERE, ON_N1, SLURM, Bench

STAGES = ("filter", "exact", "near", "removals", "apply")
COPIES = {"first": {"exact": 1, "near": 1}, "second": {"exact": 2, "near": 1}}
"""What goes of each source of recipes/data/copies.yaml, as `write_copies` plants it: of the second also what the first has."""


def write_copies(folder: Path) -> None:
    """Four documents a source that stay, and copies of them."""
    rng = random.Random(7)
    words = ["".join(rng.choices("abcdefghijklmnop", k=6)) for _ in range(2000)]
    texts = {name: [" ".join(rng.choices(words, k=200)) for _ in range(4)] for name in COPIES}
    planted = {
        name: [*own, own[0], own[1].replace(own[1].split()[5], "changed"), *(texts["first"][2:3] if name == "second" else [])]
        for name, own in texts.items()
    }
    folder.mkdir()
    for name, documents in planted.items():
        lines = [json.dumps({"id": f"{name}/{number}", "text": text}) + "\n" for number, text in enumerate(documents)]
        (folder / f"{name}.jsonl").write_text("".join(lines))


class CleaningJobs:
    """Submitted when it is made."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.folder = bench, bench.home / "copies of text"
        write_copies(self.folder)
        code, self.output = self.quarry("--slurm")
        assert code == 0, self.output
        found = [line.split() for line in self.output.splitlines()]
        self.jobs = {words[0]: words[2] for words in found if words[1:2] == ["job"]}

    def quarry(self, *more: str) -> tuple[int, str]:
        """Exit code and output of `quarry clean`."""
        recipe = ("--config-dir", str(HERE / "recipes"), "curriculum=drill", "data=copies", *SLURM, ON_N1)
        return self.bench.quarry("clean", *recipe, *more)

    def wait(self, timeout_s: float) -> None:
        """Until none of the jobs waits or runs; the accounting may tell of it later."""

        def ended() -> bool:
            return not set(self.jobs.values()) & set(self.bench.slurm.run("squeue", "-h", "-o", "%F").split())

        self.bench.slurm.until(ended, timeout_s, f"{self.jobs} to end")

    def finished_tasks(self) -> dict[str, int]:
        """Stage -> tasks that wrote down that they are done."""
        return {stage: len(list(self.folder.glob(f"data/clean/.work/*/{stage}/completions/*"))) for stage in STAGES}

    def explain(self) -> str:
        logs = sorted(self.folder.glob("data/clean/.work/*/*/slurm_logs/*.out"))
        return "\n".join([self.output, *(f"== {log.name}\n{log.read_text(errors='replace')[-800:]}" for log in logs)])

    def removed(self, root: str) -> dict[str, dict[str, int]]:
        """Source -> kind of duplicates -> documents removed, by the report."""
        report = json.loads((self.folder / root / "clean" / "funnel.json").read_text())
        return {
            name: {kind: source["steps"][f"{kind}_duplicates"]["removed"]["documents"] for kind in ("exact", "near")}
            for name, source in report["sources"].items()
        }
